"""Metrics against closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from distill3d.evaluation.metrics import frechet_distance, psnr, radial_power, saturation, sharpness


def test_psnr_of_a_constant_difference():
    a = torch.full((2, 3, 8, 8), 0.5)
    assert psnr(a + 0.1, a) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("frequency", [3, 8, 13])
def test_a_sine_has_its_power_at_its_frequency(frequency):
    wave = torch.sin(2 * math.pi * frequency * torch.arange(64) / 64).expand(1, 3, 64, 64) * 0.5 + 0.5
    power = radial_power(wave) * torch.arange(32)
    assert int(power.argmax()) in (frequency - 1, frequency, frequency + 1)
    assert power[frequency - 2 : frequency + 3].sum() / power.sum() > 0.95


def test_sharpness_is_one_for_itself_falls_under_blur_and_rises_with_contrast():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert sharpness(images, images) == pytest.approx(1)
    assert sharpness(F.avg_pool2d(images, 3, 1, 1), images) < 0.5
    assert sharpness(images * 0.5, images) == pytest.approx(0.25, rel=1e-4)


def test_the_spectrum_wants_square_pictures():
    with pytest.raises(ValueError, match="square"):
        radial_power(torch.rand(1, 3, 8, 9))


def test_saturation_is_zero_for_greys_one_for_pure_colours_and_falls_as_they_fade():
    grey = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    assert saturation(grey) == 0
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert saturation(red) == 1
    assert saturation(0.25 * red + 0.75 * 0.5) == pytest.approx(0.25)  # mixed with grey: the red's share
    assert saturation(0.01 * red) == pytest.approx(0.01)  # almost black, and no colour to speak of


def test_frechet_distance_is_the_formula_with_scipys_matrix_root_and_zero_for_itself():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(60, 4, generator=g, dtype=torch.float64) @ torch.randn(4, 4, generator=g, dtype=torch.float64)
    b = torch.randn(50, 4, generator=g, dtype=torch.float64) + torch.tensor([1.0, 0, 0, 2.0])
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca + cb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 4, rel=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(a[:1], b)
