"""Backgrounds: shapes, ranges, seeds."""

import pytest
import torch

from distill3d.cameras import turntable
from distill3d.scenes.background import ConstantBackground, RandomGrey


def views(n):
    return turntable(n, 15, 2.8, 40)


def test_a_constant_is_the_same_for_every_view():
    torch.testing.assert_close(ConstantBackground((0.1, 0.2, 0.3))(views(2), 4), torch.tensor([[0.1, 0.2, 0.3]] * 2))
    assert torch.equal(ConstantBackground(0.5)(views(3), 4), torch.full((3, 3), 0.5))


def test_random_greys_are_neutral_in_range_and_repeat_with_their_seed():
    grey = RandomGrey(0.4, 0.9)
    drawn = grey(views(500), 4, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, grey(views(500), 4, torch.Generator().manual_seed(0)))
    assert bool((drawn == drawn[:, :1]).all())
    assert 0.4 <= drawn.min() < 0.42 and 0.88 < drawn.max() <= 0.9
    torch.testing.assert_close(grey(views(1), 4), torch.full((1, 3), 0.65))


@pytest.mark.parametrize(
    "make", [lambda: ConstantBackground(1.5), lambda: ConstantBackground((0, 1)), lambda: RandomGrey(0.8, 0.2)]
)
def test_mistakes_are_value_errors(make):
    with pytest.raises(ValueError, match="got"):
        make()
