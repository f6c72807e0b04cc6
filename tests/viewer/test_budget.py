"""The viewer takes its share of the time and no more, on a clock that the test moves."""

import random

import pytest

from distill3d.viewer.budget import Budget


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("expected", [0.001, 0.02, 0.3, 3.0])
@pytest.mark.parametrize("wrong", [1.0, 2.5], ids=["as expected", "longer than expected"])
def test_never_more_than_the_share_and_what_was_saved(expected, wrong):
    """Whatever the steps take; and a viewer that always has something to do gets nearly all of its share."""
    clock, chance, spent = Clock(), random.Random(0), 0.0
    budget = Budget(share=0.1, most=0.5, clock=clock)
    while clock.now < 300:
        clock.now += chance.uniform(0.01, 2.0)  # a step
        while budget.allows(expected):
            with budget.spend():
                clock.now += wrong * expected
                spent += wrong * expected
        assert spent <= 0.1 * (clock.now - 100) + 0.5 + wrong * expected
    assert spent >= 0.9 * 0.1 * 200


def test_idle_time_is_not_saved_up():
    clock = Clock()
    budget = Budget(share=0.1, most=0.5, clock=clock)
    clock.now += 3600
    assert budget.allowance() == 0.5
    with budget.spend():
        clock.now += 0.5
    assert budget.allowance() == pytest.approx(0.05)


def test_a_job_that_fails_counts_too():
    clock = Clock()
    budget = Budget(share=0.1, most=0.5, clock=clock)
    clock.now += 100
    with pytest.raises(OSError), budget.spend():
        clock.now += 2
        raise OSError
    assert budget.allowance() == pytest.approx(0.5 - 2 + 0.2)
