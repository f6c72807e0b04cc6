"""Numbers about pictures alone, against closed forms and scipy."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from distill3d.evaluation.images import (
    edge_concentration,
    luma,
    psnr,
    radial_power,
    saturation,
    sharpness,
    spectrum_gap,
)
from distill3d.toybox.world import View, build, draw


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def toys() -> torch.Tensor:
    """True renders [6, 3, 64, 64]: flat colors and crisp edges."""
    pictures = [draw(build(kind, "red", seed=1), View(a, 15)) for kind in ("car", "robot", "house") for a in (20, 200)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.from_numpy(scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def mottled(images: torch.Tensor, amount: float) -> torch.Tensor:
    """Patches of two pixels, on the object and beside it."""
    patches = F.interpolate(noise(len(images), 3, 32, 32) - 0.5, scale_factor=2, mode="bilinear")
    return images + amount * patches


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
    images = noise(4, 3, 64, 64)
    assert sharpness(images, images) == pytest.approx(1)
    assert sharpness(F.avg_pool2d(images, 3, 1, 1), images) < 0.5
    assert sharpness(images * 0.5, images) == pytest.approx(0.25, rel=1e-4)


def test_the_spectrum_wants_square_pictures():
    with pytest.raises(ValueError, match="square"):
        radial_power(torch.rand(1, 3, 8, 9))


def test_sharpness_falls_with_every_blur_and_rises_to_the_references(toys):
    values = [sharpness(blurred(toys, sigma), toys) for sigma in (3.0, 2.0, 1.0, 0.5, 0.0)]
    assert values == sorted(values) and values[0] < 0.01 and values[-1] == 1


def test_noise_fools_sharpness_but_not_its_companions(toys):
    soft = blurred(toys, 1.0)
    bad = mottled(soft, 0.7)
    assert sharpness(bad, toys) > 3 * sharpness(soft, toys)  # as if it had become sharper
    assert edge_concentration(bad, toys) < 0.6 * edge_concentration(soft, toys)
    flood = toys + 0.3 * (noise(*toys.shape) - 0.5)
    assert sharpness(flood, toys) > 1 and spectrum_gap(flood, toys) > 0.3 and edge_concentration(flood, toys) < 0.7


def test_the_spectrum_gap_is_the_log_ratio_and_zero_for_itself():
    images = 0.2 + 0.6 * noise(4, 3, 64, 64)
    assert spectrum_gap(images, images) == 0
    for k in (0.5, 0.8):  # the power goes with the square
        assert spectrum_gap(0.5 + k * (images - 0.5), images) == pytest.approx(-2 * math.log(k), rel=1e-3)
    assert spectrum_gap(images * 0.5, images) == pytest.approx(spectrum_gap(images, images * 0.5))
    gray = torch.full_like(images, 0.5)
    # Beside nothing, power counts relative to that of noise of variance 1e-6 through the window (mean square 3/8).
    floor = 1e-6 * 64**2 * (3 / 8) ** 2
    faint = 0.5 + 1e-2 * (images - 0.5)
    expected = (1 + radial_power(faint)[1:] / floor).log().mean()
    assert spectrum_gap(faint, gray) == pytest.approx(float(expected), rel=1e-3) and 0.1 < expected < 3
    assert math.isfinite(spectrum_gap(gray, images)) and spectrum_gap(gray, gray) == 0
    with pytest.raises(ValueError, match="one size"):
        spectrum_gap(images, images[..., :32, :32])


def test_the_spectrum_gap_grows_with_blur_and_with_noise(toys):
    blur = [spectrum_gap(blurred(toys, sigma), toys) for sigma in (0.0, 0.5, 1.0, 2.0)]
    grain = [spectrum_gap(toys + amount * (noise(*toys.shape) - 0.5), toys) for amount in (0.0, 0.1, 0.3, 0.9)]
    assert blur == sorted(blur) and grain == sorted(grain) and blur[0] == grain[0] == 0


def test_edge_concentration_is_that_of_numpys_gradient_and_does_not_depend_on_contrast(toys):
    def by_numpy(images):
        values = []
        for gray in luma(images).double().numpy():
            g = np.hypot(*np.gradient(gray))[1:-1, 1:-1]
            values.append((g**2).mean() / g.mean() ** 2)
        return np.mean(values)

    other = noise(3, 3, 64, 64)
    assert edge_concentration(toys, other) == pytest.approx(by_numpy(toys) / by_numpy(other), rel=1e-4)
    assert edge_concentration(toys, toys) == 1
    assert edge_concentration(0.5 + 0.3 * (toys - 0.5), toys) == pytest.approx(1, rel=1e-4)
    assert edge_concentration(torch.full_like(toys, 0.5), toys) == 0


def test_a_straight_edge_is_as_concentrated_as_its_share_of_the_picture():
    """g is c on two of the 62 inner columns, 0 elsewhere: E[g^2] / E[g]^2 = 31; a ramp from end to end has 1."""
    edge = (torch.arange(64) >= 32).float().expand(1, 3, 64, 64)
    ramp = (torch.arange(64) / 63).expand(1, 3, 64, 64)
    assert edge_concentration(edge, ramp) == pytest.approx(31, rel=1e-4)


def test_edges_soften_under_blur_and_mottle(toys):
    blur = [edge_concentration(blurred(toys, sigma), toys) for sigma in (2.0, 1.0, 0.5, 0.0)]
    grain = [edge_concentration(mottled(toys, amount), toys) for amount in (0.4, 0.2, 0.1, 0.0)]
    assert blur == sorted(blur) and grain == sorted(grain)


def test_saturation_is_zero_for_grays_one_for_pure_colors_and_falls_as_they_fade():
    gray = noise(2, 1, 4, 4).expand(-1, 3, -1, -1)
    assert saturation(gray) == 0
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert saturation(red) == 1
    assert saturation(0.25 * red + 0.75 * 0.5) == pytest.approx(0.25)  # mixed with gray: the red's share
    assert saturation(0.01 * red) == pytest.approx(0.01)  # almost black, and no color to speak of
