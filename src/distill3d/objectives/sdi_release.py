"""SDI number for number as its author released it (threestudio, commit 28d9d80d): `sdi(released=True)`.

For comparison with published numbers; the default of `sdi` follows the paper. The release differs in seven points,
which are all in this file:

    1. the sample inverted to t + d enters the network, and is denoised, as if it were at t
    2. the first step of the inversion evaluates the network at a negative timestep, with the lowest noise level
    3. eta adds noise without shrinking the deterministic part: the variance grows
    4. the inversion takes one view at a time
    5. without Perp-Neg the guidance is e_c + s (e_c - e_u), with it e_u + s (...)
    6. Perp-Neg evaluates its negatives on samples in the order of the batch, not on those of their own views
    7. t anneals in whole timesteps, towards a step count beyond which it keeps falling

t and d are whole timesteps of a table of 1000 levels.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from distill3d.diffusion import random as draw
from distill3d.diffusion.ddim import Levels, step_between
from distill3d.diffusion.guidance import cfg, perp_neg
from distill3d.diffusion.random import Generators
from distill3d.diffusion.schedule import Table, coefficients, to_eps
from distill3d.objectives import prediction as predictions
from distill3d.objectives import reference, weighting
from distill3d.objectives import timesteps as times
from distill3d.objectives.objective import Noise, Objective, Prediction, Query, Timesteps
from distill3d.types import Condition

LEVELS = 1000
LOWEST = 1  # the first timestep above the data in the grid of Stable Diffusion's scheduler


def sdi_as_released(
    scale: float = 7.5,
    inversion_scale: float = -7.5,
    inversion_steps: int = 10,
    eta: float = 0.3,
    start: float = 0.98,
    stop: float = 0.25,
) -> Objective:
    """g = x - x0_hat with x0_hat = (x_{t+d} - sigma_t eps_s(x_{t+d}, t)) / alpha_t; arguments as in methods.sdi."""
    return Objective(
        noise=inversion(inversion_steps, inversion_scale, eta),
        timesteps=annealed(start, stop),
        prediction=guided(scale),
        reference=reference.injected_noise,
        weight=weighting.x0_matching,
        pull=1.0,
    )


def annealed(start: float = 0.98, stop: float = 0.25) -> Timesteps:
    """int(1000 (stop + (start - stop)(1 - step/total))) / 1000, falling on when step exceeds total."""
    times.linear(start, stop)  # raises ValueError outside [0, 1]

    def timesteps(step: int, total: int, batch: int, generator: Generators) -> Tensor:
        left = 1 - step / max(total, 1)
        # In this order of operations: another one rounds to other whole numbers at some steps.
        whole = int(LEVELS * ((start - stop) * left + stop))
        return torch.full((batch,), whole / LEVELS, dtype=torch.float64)

    return timesteps


def guided(scale: float) -> Prediction:
    """e_c + s (e_c - e_u), or Perp-Neg's e_u + s (...) with the negatives of a batch on the wrong samples (5 and 6)."""
    predictions.guided(scale)  # raises ValueError unless scale is a number

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        return _predict(query, x_t, query.t, scale)

    return prediction


def grid(t: int, steps: int, random: float) -> list[int]:
    """Timesteps of the inversion to t + d: 1 - 1000/n, 1, 1 + 1000/n, ... < t, then min(t + d, 999).

    d is the whole part of 1000 random / n, with random in [0, 1).
    """
    stride = LEVELS // steps
    below = [k for k in range(LOWEST, LOWEST + steps * stride, stride) if k < t]
    return [LOWEST - stride, *below, min(t + int(random * LEVELS // steps), LEVELS - 1)]


def inversion(
    steps: int = 10,
    scale: float = -7.5,
    eta: float = 0.3,
    random: float | None = None,
    fresh: Tensor | None = None,
) -> Noise:
    """The kappa for which x_t = alpha_t x + sigma_t kappa is x inverted to t + d (1 to 4).

    random in [0, 1), which decides d, and the fresh noise [steps, 1, ...] that eta adds are drawn from the query's
    generator unless they are given. Raises ValueError for settings out of range; the noise function does so for more
    than one view, and for a prior without a table of 1000 levels.
    """
    if not 1 <= steps <= LEVELS or not 0.0 <= eta <= 1.0 or not (random is None or 0.0 <= random < 1.0):
        raise ValueError(
            f"got steps={steps}, eta={eta}, random={random}: steps must lie in 1 to {LEVELS}, "
            "eta in [0, 1] and random in [0, 1)"
        )
    predictions.guided(scale)  # raises ValueError unless scale is a number

    def noise(query: Query) -> tuple[Tensor, int]:
        _check(query)
        schedule, x, nfe = query.prior.schedule, query.x, 0
        drawn = draw.uniform(1, query.generator).item() if random is None else random
        path = grid(round(query.t.item() * LEVELS), steps, drawn)
        times = query.t.new_tensor(path) / LEVELS
        alphas, sigmas = (value[:, None] for value in coefficients(schedule, times, x.expand(len(times), *x.shape[1:])))
        levels = list(zip(alphas, sigmas, strict=True))
        for k, (here, there) in enumerate(itertools.pairwise(levels)):
            eps, count = _predict(query, x, times[k : k + 1], scale)
            x, nfe = step_between(x, eps, here, there), nfe + count
            if eta > 0:
                fresh_noise = draw.normal(x, query.generator) if fresh is None else fresh[k].to(x)
                x = x + eta * _ddim_std(here, there) * fresh_noise
        return to_eps("x0", query.x, x, *coefficients(schedule, query.t, x)), nfe

    return noise


def _ddim_std(here: Levels, there: Levels) -> Tensor:
    """sigma_t / sigma_s sqrt(1 - alpha_s^2 / alpha_t^2): DDIM's own for the step down from there (s) to here (t)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = here, there
    return sigma_t / sigma_s * (1 - (alpha_s / alpha_t) ** 2).sqrt()


def _check(query: Query) -> None:
    if len(query.x) != 1:
        raise ValueError(f"sdi(released=True) inverts one view at a time, got {len(query.x)}: use batch 1 or sdi()")
    schedule = query.prior.schedule
    if not isinstance(schedule, Table) or len(schedule) != LEVELS:
        raise ValueError(
            f"sdi(released=True) needs a prior with {LEVELS} noise levels, unlike {query.prior.name}: use sdi()"
        )


def _predict(query: Query, x: Tensor, t: Tensor, scale: float) -> tuple[Tensor, int]:
    """The guided noise at x [B, ...], t [B], and the NFE: positive, negative and all of Perp-Neg's rows."""
    own, b = query.conditioning, len(x)
    conditions = [own.positive, own.negative]
    if own.perp is not None:
        conditions.append(own.perp)
    rows = sum(map(len, conditions))
    copies = torch.arange(rows, device=x.device) % b  # `perp` is ordered by view: its rows meet other samples
    e = query.prior.predict(x[copies], t[copies], Condition.cat(conditions))
    if own.perp is None or own.perp_weights is None:
        return cfg(e[b : 2 * b], e[:b], scale + 1), rows
    e_n = e[2 * b :].unflatten(0, (b, -1))
    return perp_neg(e[b : 2 * b], e[:b], e_n, own.perp_weights, scale), rows
