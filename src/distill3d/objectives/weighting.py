"""How much each time counts: functions (schedule, t [B]) -> w [B]; and the step size of a sampler."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.devices import on_host
from distill3d.objectives.objective import Weight, check_number
from distill3d.types import Schedule


def noise_variance(schedule: Schedule, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """sigma^2, i.e. 1 - abar: the weight of DreamFusion (Poole et al. 2022)."""
    return schedule.sigma(t) ** 2


def x0_matching(schedule: Schedule, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """sigma / alpha: with the injected noise as reference the gradient is then x - x0_hat."""
    return schedule.sigma(t) / schedule.alpha(t)


def velocity_matching(schedule: Schedule, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 / alpha where alpha = 1 - sigma: turns a difference of noises into one of velocities.

    With v = eps - x0 and x0 = (x_t - sigma eps) / alpha, two velocities at one x_t differ by
    (alpha + sigma) / alpha times their noises. Raises ValueError unless alpha + sigma = 1.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if not torch.allclose(alpha + sigma, torch.ones_like(alpha)):
        raise ValueError("rfds needs a flow-matching prior (x_t = (1 - sigma) x + sigma eps): use sds for this one")
    return 1 / alpha


def constant(value: float = 1.0) -> Weight:
    """The same weight at every time; ValueError unless it is a finite number."""
    check_number("weight", value)
    return lambda schedule, t: t.new_full(t.shape, value)


def scaled(value: float, weight: Weight) -> Weight:
    """A multiple of another weight; ValueError unless value is a finite number."""
    check_number("weight", value)
    return lambda schedule, t: value * weight(schedule, t)


def ddim_step_size(schedule: Schedule, t: Float[Tensor, " b"], following: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 - rho' / rho with rho = sigma / alpha at t and rho' at the following time: for `Objective.step_size`.

    With constant noise, `x0_matching` and this fraction, x <- x - g is a DDIM step (see `methods.cfd`). Raises
    ValueError where the following time is above t.
    """
    if bool((on_host(following) > on_host(t)).any()):
        raise ValueError(f"times must fall from step to step, got {t.tolist()} and then {following.tolist()}")
    return 1 - x0_matching(schedule, following) / x0_matching(schedule, t)
