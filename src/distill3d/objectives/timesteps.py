"""At which time the network is used: functions (step, total, batch, generator) -> t [B], float64 in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill3d.diffusion import random as draw
from distill3d.diffusion.random import Generators
from distill3d.objectives.objective import Timesteps, check_fraction


def uniform(low: float = 0.02, high: float = 0.98) -> Timesteps:
    """t ~ U[low, high], one draw per sample; ValueError unless 0 <= low <= high <= 1."""
    _check(low, high)
    if low > high:
        raise ValueError(f"low must not exceed high, got {low} and {high}: swap them")

    def timesteps(step: int, total: int, batch: int, generator: Generators) -> Tensor:
        return low + (high - low) * draw.uniform(batch, generator)

    return timesteps


def linear(start: float = 0.98, stop: float = 0.25) -> Timesteps:
    """From start at the first step to stop at the last, linearly; ValueError outside [0, 1]."""
    _check(start, stop)

    def timesteps(step: int, total: int, batch: int, generator: Generators) -> Tensor:
        done = min(step / max(total - 1, 1), 1.0)
        return torch.full((batch,), start + (stop - start) * done, dtype=torch.float64)

    return timesteps


def square_root(start: float = 0.98, stop: float = 0.3) -> Timesteps:
    """From start at the first step to stop at the last, as sqrt(step); ValueError outside [0, 1].

    The schedule of HiFA (Zhu et al. 2023): fast at first, then slower.
    """
    _check(start, stop)

    def timesteps(step: int, total: int, batch: int, generator: Generators) -> Tensor:
        done = min(step / max(total - 1, 1), 1.0)
        return torch.full((batch,), start + (stop - start) * done**0.5, dtype=torch.float64)

    return timesteps


def narrowing(low: float, high: float, settled: float, after: float = 0.0, over: float = 0.0) -> Timesteps:
    """t ~ U[low, top], top falling linearly from high to settled.

    The fall begins after the fraction `after` of the run and takes the fraction `over`, one step at least. Raises
    ValueError unless 0 <= low <= settled, high <= 1 and both fractions lie in [0, 1].
    """
    _check(low, high, settled)
    check_fraction("after", after)
    check_fraction("over", over)
    if low > min(high, settled):
        raise ValueError(f"low must not exceed high and settled, got {low}, {high} and {settled}")

    def timesteps(step: int, total: int, batch: int, generator: Generators) -> Tensor:
        begin, length = steps_of(after, total), max(steps_of(over, total), 1)
        top = high + (settled - high) * min(max(step - begin, 0) / length, 1.0)
        return low + (top - low) * draw.uniform(batch, generator)

    return timesteps


def moving(first: tuple[float, float], last: tuple[float, float], over: float = 1.0) -> Timesteps:
    """t ~ U[first] at first, U[last] after the fraction `over` of the run; both ends move linearly.

    The schedule of MVDream (Shi et al. 2023), of ASD and of SCTD. Raises ValueError unless both are (low, high) with
    0 <= low <= high <= 1, and for `over` outside [0, 1].
    """
    _check(*first, *last)
    check_fraction("over", over)
    if first[0] > first[1] or last[0] > last[1]:
        raise ValueError(f"low must not exceed high, got {first} and {last}: swap them")

    def timesteps(step: int, total: int, batch: int, generator: Generators) -> Tensor:
        done = min(step / max(steps_of(over, total), 1), 1.0)
        bottom, top = (a + (b - a) * done for a, b in zip(first, last, strict=True))
        return bottom + (top - bottom) * draw.uniform(batch, generator)

    return timesteps


def steps_of(fraction: float, total: int) -> int:
    """The whole steps in a fraction of a run; 0.3 of 10 steps is 3 in spite of rounding."""
    return int(fraction * total + 1e-6)


def scaled(timesteps: Timesteps, factor: float) -> Timesteps:
    """The same times, each multiplied by `factor`, so that none lies above it; ValueError outside [0, 1]."""
    _check(factor)
    return lambda step, total, batch, generator: factor * timesteps(step, total, batch, generator)


def listed(times: Sequence[float] | Tensor) -> Timesteps:
    """times [T] (one per step) or [T, B] (one per step and sample); after the last one it stays there."""
    table = torch.as_tensor(times, dtype=torch.float64)
    _check(*table.flatten().tolist())

    def timesteps(step: int, total: int, batch: int, generator: Generators) -> Tensor:
        return table[min(step, len(table) - 1)].expand(batch)

    return timesteps


def _check(*times: float) -> None:
    if not times or not all(0.0 <= t <= 1.0 for t in times):
        raise ValueError(f"times must lie in [0, 1] (1 is pure noise), got {list(times)}")
