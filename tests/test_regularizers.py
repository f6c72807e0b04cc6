"""Regularisers against values computed by hand."""

import math

import pytest
import torch

from distill3d.regularizers import WeightSchedule, opaque, orientation, sparsity, z_variance
from distill3d.types import Rendering


def rendering(opacity, variance=None, away=None):
    def image(values):
        return torch.tensor(values).view(1, 1, 1, -1).requires_grad_()

    o = image(opacity)
    facing = None if away is None else image(away)
    return Rendering(o.expand(1, 3, 1, -1), o, o, image(variance or opacity), None, facing)


def test_hand_values():
    assert sparsity(rendering([0.0, 1.0])).item() == pytest.approx((0.1 + math.sqrt(1.01)) / 2)
    assert opaque(rendering([0.5])).item() == pytest.approx(math.log(2))
    clamped = -0.001 * math.log(0.001) - 0.999 * math.log(0.999)
    assert opaque(rendering([0.0, 1.0])).item() == pytest.approx(clamped, rel=1e-3)
    assert z_variance(rendering([0.9, 0.4, 0.6], [2.0, 50.0, 4.0])).item() == pytest.approx(3)
    assert orientation(rendering([0.9, 0.0, 0.6], away=[0.2, 0.0, 0.4])).item() == pytest.approx(0.3)


def test_z_variance_of_nothing_is_zero_with_a_zero_gradient():
    picture = rendering([0.1, 0.2], [3.0, math.nan])
    value = z_variance(picture)
    value.backward()
    assert value.item() == 0 and torch.equal(picture.depth_variance.grad, torch.zeros(1, 1, 1, 2))


def test_gradients_are_finite_at_the_extremes():
    picture = rendering([0.0, 1.0, 0.5])
    (sparsity(picture) + opaque(picture)).backward()
    assert bool(picture.opacity.grad.isfinite().all())


def test_orientation_asks_for_normals():
    with pytest.raises(ValueError, match="normals"):
        orientation(rendering([0.5]))


def test_a_weight_goes_from_start_to_end():
    weight = WeightSchedule(1.0, 3.0, 10, 20)
    assert [weight(s) for s in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]
    assert WeightSchedule(0.1, 0.1)(0) == 0.1
    assert [WeightSchedule(0.0, 1.0, 5, 5)(s) for s in (4, 5)] == [0, 1]
    with pytest.raises(ValueError, match="end_step"):
        WeightSchedule(0, 1, 5, 4)
