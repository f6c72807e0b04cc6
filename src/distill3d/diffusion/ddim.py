"""DDIM: one step function for both directions; sampling and inversion are loops over it.

    notation            meaning                                     code
    x_t                 sample at time t                            x
    eps(x_t, t)         noise that the model predicts there         eps
    lambda              log(alpha^2 / sigma^2)                      level
    rho = sigma/alpha   the variable in which the ODE reads         -
                        d(x/alpha) / d rho = eps(x, t)

The deterministic step is Euler's method for that equation, in whichever direction s lies from t. The
solvers of second order differ only in the eps they hand to the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distill3d.diffusion.random import Generators, normal
from distill3d.diffusion.schedule import coefficients, expand, log_snr
from distill3d.types import Schedule

# eps(x [N, ...], t [N], rows [N]) -> [N, ...]: rows are the places of the N samples in the whole batch,
# for models whose condition differs from sample to sample.
Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Solver = Literal["euler", "ab2", "heun"]


def ddim_step(
    x: Tensor,
    eps: Tensor,
    schedule: Schedule,
    t: Tensor,
    s: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step from time t [B] to time s [B], up or down, x and eps [B, ...].

    x_s = alpha_s x0 + sqrt(sigma_s^2 - f^2) eps + f noise
    f   = eta sigma_s sqrt(1 - exp(-|lambda_t - lambda_s|))

    Downwards this is DDIM (Song et al. 2020, eq. 12 and 16). The same f serves upwards, where eta = 1 gives
    the forward process itself; the variance is preserved for every eta in [0, 1] and either direction.
    Raises ValueError if eta is not in [0, 1], or positive without noise.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1] (0: deterministic, 1: fully random), got {eta}")
    alpha_t, sigma_t = coefficients(schedule, t, x)
    alpha_s, sigma_s = coefficients(schedule, s, x)
    x0 = (x - sigma_t * eps) / alpha_t
    if eta == 0.0:
        return alpha_s * x0 + sigma_s * eps
    if noise is None:
        raise ValueError(f"eta = {eta} needs noise: pass noise shaped like x, or a generator to the loop")
    gap = (log_snr(schedule, t.to(x)) - log_snr(schedule, s.to(x))).abs()
    fresh = eta * expand((-torch.expm1(-gap)).sqrt(), x)  # as a share of sigma_s
    return alpha_s * x0 + sigma_s * ((1 - fresh**2).sqrt() * eps + fresh * noise)


def sample(
    eps: Model,
    x: Tensor,
    schedule: Schedule,
    times: Tensor,
    solver: Solver = "euler",
    eta: float = 0.0,
    generator: Generators | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Walks x [B, ...] down the times [K+1] or [K+1, B]; returns the sample at the last of them.

    noise [K, B, ...] (or else draws from the generator) is what eta > 0 adds. Equal neighbors in a column
    of times are no hop for that sample, which is then not shown to the model. Raises ValueError if a time
    rises, for an unknown solver, and for eta > 0 with a solver other than euler.
    """
    _check_direction(times, -1, "sample", "fall")
    return _walk(eps, x, schedule, times, solver, eta, generator, noise)


def invert(
    eps: Model,
    x: Tensor,
    schedule: Schedule,
    times: Tensor,
    solver: Solver = "euler",
    eta: float = 0.0,
    generator: Generators | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Walks x [B, ...] up the times: DDIM inversion. Arguments and errors as in `sample`."""
    _check_direction(times, 1, "invert", "rise")
    return _walk(eps, x, schedule, times, solver, eta, generator, noise)


def descending(steps: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
    """Times [steps + 1], evenly spaced from start down to stop, float64; ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def ascending(t: Tensor, steps: int) -> Tensor:
    """Inversion times [K+1, B] for targets t [B]: 0, 1/steps, 2/steps, ... < t, then t itself.

    All hops but the last are 1/steps of the whole range long, so a low target takes fewer of them; columns
    that end early repeat their last time. Raises ValueError if steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    rungs = torch.arange(steps + 1, device=t.device, dtype=t.dtype)[:, None] / steps
    # A target that is itself a rung must not be visited twice for want of a rounding error.
    times = torch.where(rungs < t - 1e-6, rungs, t)
    hops = int((times[1:] != times[:-1]).any(dim=1).sum())
    return times[: hops + 1]


def _check_direction(times: Tensor, sign: int, name: str, verb: str) -> None:
    if len(times) < 1 or bool((sign * times.diff(dim=0) < 0).any()):
        raise ValueError(f"{name} needs times that {verb}, got {times.tolist()}")


def _walk(eps, x, schedule, times, solver, eta, generator, noise) -> Tensor:
    if solver not in ("euler", "ab2", "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose euler, ab2 or heun")
    if eta > 0 and solver != "euler":
        raise ValueError(f"solver {solver!r} is for the deterministic walk: use eta = 0 or solver 'euler'")
    if eta > 0 and noise is None and generator is None:
        raise ValueError(f"eta = {eta} needs randomness: pass a generator, or noise [hops, B, ...]")
    times = (times[:, None].expand(-1, len(x)) if times.ndim == 1 else times).to(x)
    slope = _Slope(x) if solver == "ab2" else None
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        rows = (t != s).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        t, s, here = t[rows], s[rows], x[rows]
        e = eps(here, t, rows)
        if slope is not None:
            e = slope.extrapolate(e, log_snr(schedule, t), log_snr(schedule, s), rows)
        elif solver == "heun":
            ahead = ddim_step(here, e, schedule, t, s)
            e = (e + eps(ahead, s, rows)) / 2
        fresh = None
        if eta > 0:
            fresh = normal(here, generator, rows) if noise is None else noise[k][rows]
        x = x.index_copy(0, rows, ddim_step(here, e, schedule, t, s, eta, fresh))
    return x


class _Slope:
    """The memory of Adams-Bashforth 2: eps at the middle of the next hop, extrapolated in the log-SNR.

    The log-SNR, not rho, because its hops shrink where those of rho explode: the extrapolation stays short.
    """

    def __init__(self, x: Tensor):
        self.eps = torch.zeros_like(x)
        self.per_level = x.new_zeros(len(x))  # 1 / length of the last hop; 0 before the first: Euler

    def extrapolate(self, eps: Tensor, level: Tensor, ahead: Tensor, rows: Tensor) -> Tensor:
        hop = ahead - level
        share = expand(hop * self.per_level[rows] / 2, eps)
        out = eps + share * (eps - self.eps[rows])
        # Times beyond the ends of a schedule share one level: such a hop tells nothing of the slope.
        self.eps[rows], self.per_level[rows] = eps, torch.where(hop == 0, 0, 1 / hop)
        return out
