"""Backgrounds: shapes, ranges, seeds."""

import math

import numpy as np
import pytest
import torch

from distill3d.cameras import turntable
from distill3d.scenes.background import ConstantBackground, LearnedBackground, RandomGray, harmonics


def views(n):
    return turntable(n, 15, 2.8, 40)


def test_a_constant_is_the_same_for_every_view():
    torch.testing.assert_close(ConstantBackground((0.1, 0.2, 0.3))(views(2), 4), torch.tensor([[0.1, 0.2, 0.3]] * 2))
    assert torch.equal(ConstantBackground(0.5)(views(3), 4), torch.full((3, 3), 0.5))


def test_random_grays_are_neutral_in_range_and_repeat_with_their_seed():
    gray = RandomGray(0.4, 0.9)
    drawn = gray(views(500), 4, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, gray(views(500), 4, torch.Generator().manual_seed(0)))
    assert bool((drawn == drawn[:, :1]).all())
    assert 0.4 <= drawn.min() < 0.42 and 0.88 < drawn.max() <= 0.9
    torch.testing.assert_close(gray(views(1), 4), torch.full((1, 3), 0.65))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantBackground(1.5),
        lambda: ConstantBackground((0, 1)),
        lambda: RandomGray(0.8, 0.2),
        lambda: LearnedBackground(layers=0),
    ],
)
def test_mistakes_are_value_errors(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_harmonics_are_orthonormal():
    """By quadrature that is exact for polynomials of degree 6: even in azimuth, Gauss-Legendre in z."""
    z, weight = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(8))
    azimuth = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    side = (1 - z**2).sqrt()[:, None]
    directions = torch.stack((side * azimuth.cos(), side * azimuth.sin(), z[:, None].expand(-1, 16)), -1)
    values = harmonics(directions)
    product = torch.einsum("z,zai,zaj->ij", weight * (2 * math.pi / 16), values, values)
    torch.testing.assert_close(product, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_learned_background_is_a_function_of_direction():
    background = LearnedBackground().build()
    images = background(views(3), 8)
    assert images.shape == (3, 3, 8, 8) and images.min() > 0 and images.max() < 1
    torch.testing.assert_close(background(views(3)[1:2], 8), images[1:2])
    # The same direction seen in two images: the middle of one of 1 pixel and of 3 pixels.
    torch.testing.assert_close(background(views(2), 1)[..., 0, 0], background(views(2), 3)[..., 1, 1])
    assert [tuple(w.shape) for w in background.weights] == [(16, 16), (16, 16), (3, 16)]
    assert background.parameter_groups()[0]["scale"] == 0.1
    assert torch.equal(LearnedBackground().build()(views(3), 8), images)


def test_a_learned_background_learns():
    background, target = LearnedBackground(seed=3).build(), torch.rand(4, 3, 1, 1, generator=torch.Generator())
    optimizer = torch.optim.Adam(background.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (background(views(4), 6) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
