"""DDIM: one step function for both directions; sampling and inversion are loops over it.

    notation            meaning                                     code
    x_t                 sample at time t                            x
    eps(x_t, t)         noise that the model predicts there         eps
    lambda              log(alpha^2 / sigma^2)                      log_snr
    rho = sigma/alpha   the variable in which the ODE reads         -
                        d(x/alpha) / d rho = eps(x, t)

The deterministic step is Euler's method for that equation, whether s lies below t or above. The solvers of second
order differ only in the eps that they pass to the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill3d.devices import at_once
from distill3d.diffusion.random import Generators, standard_normal
from distill3d.diffusion.schedule import coefficients, expand, from_eps
from distill3d.types import Schedule

Model = Callable[[Tensor, Tensor], Tensor]  # eps(x [N, ...], t [N]) -> [N, ...]
Solver = Literal["euler", "ab2", "heun"]
Levels = tuple[Tensor, Tensor]  # alpha and sigma of a time for each sample, shaped to multiply the samples


@runtime_checkable
class BatchModel(Protocol):
    """A model of B samples that may differ in their conditions, such as guidance.Guided; model[rows] is that of some.

    Only needed where the samples have times of their own, because some then finish before others.
    """

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...
    def __getitem__(self, rows: Tensor, /) -> Model: ...


def ddim_step(
    x: Float[Tensor, "b *shape"],
    eps: Float[Tensor, "b *shape"],
    schedule: Schedule,
    t: Float[Tensor, " b"],
    s: Float[Tensor, " b"],
    eta: float = 0.0,
    noise: Float[Tensor, "b *shape"] | None = None,
) -> Float[Tensor, "b *shape"]:
    """One step from time t to time s, up or down.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - f^2) eps + f noise
    f   = eta sigma_s sqrt(1 - exp(-|lambda_t - lambda_s|))

    Downwards this is DDIM (Song et al. 2020, eq. 12 and 16). The same f serves upwards, where eta = 1 gives
    the forward process itself; the variance is preserved for every eta in [0, 1] and either direction.
    Raises ValueError if eta is not in [0, 1], or positive without noise.
    """
    return step_between(x, eps, coefficients(schedule, t, x), coefficients(schedule, s, x), eta, noise)


def step_between(
    x: Float[Tensor, "b *shape"],
    eps: Float[Tensor, "b *shape"],
    here: Levels,
    there: Levels,
    eta: float = 0.0,
    noise: Float[Tensor, "b *shape"] | None = None,
) -> Float[Tensor, "b *shape"]:
    """`ddim_step` between two known levels, each alpha and sigma, shaped to multiply x."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1] (0: deterministic, 1: fully random), got {eta}")
    alpha_s, sigma_s = there
    x0 = from_eps("x0", eps, x, *here)
    if eta == 0.0:
        return alpha_s * x0 + sigma_s * eps
    if noise is None:
        raise ValueError(f"eta = {eta} needs noise: pass noise shaped like x, or a generator to the loop")
    gap = (_log_snr(*here) - _log_snr(*there)).abs()
    fresh = eta * (-torch.expm1(-gap)).sqrt()  # f / sigma_s
    return alpha_s * x0 + sigma_s * ((1 - fresh**2).sqrt() * eps + fresh * noise)


def _log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    return 2 * (alpha.log() - sigma.log())


@dataclass(frozen=True)
class Hop:
    """One step of those samples [N] whose time changes."""

    index: int  # of its time in `Path.times`; the next one is where it goes
    rows: Int[Tensor, " n"] | None  # None is all of them
    noise: Float[Tensor, "n *shape"] | None


@dataclass(frozen=True)
class Path:
    """The steps through some times, ready on the device of x."""

    hops: tuple[Hop, ...]
    times: Float[Tensor, "k b"]

    @property
    def end(self) -> Float[Tensor, " b"]:
        """The last times."""
        return self.times[-1]

    @staticmethod
    def of(
        x: Float[Tensor, "b *shape"],
        times: Float[Tensor, " k"] | Float[Tensor, "k b"],
        generator: Generators | None = None,
    ) -> Path:
        """The path of x through times on the host, in one copy; `generator` draws the noise of its hops, for eta."""
        times = (times[:, None].expand(-1, len(x)) if times.ndim == 1 else times).to("cpu", x.dtype)
        moving = [(k, (t != s).nonzero()[:, 0]) for k, (t, s) in enumerate(itertools.pairwise(times))]
        moving = [(k, rows) for k, rows in moving if len(rows)]
        some = [rows for _, rows in moving if len(rows) < len(x)]
        noise: list[Tensor] = []
        if generator is not None:
            shapes = [(len(rows), *x.shape[1:]) for _, rows in moving]
            owners = [rows.tolist() for _, rows in moving]
            drawn = (standard_normal(shape, generator, o) for shape, o in zip(shapes, owners, strict=True))
            noise = [one.to(x.dtype) for one in drawn]
        times, *rest = at_once(x.device, times, *some, *noise)
        parts, fresh = iter(rest[: len(some)]), iter(rest[len(some) :])
        hops = [Hop(k, None if len(rows) == len(x) else next(parts), next(fresh, None)) for k, rows in moving]
        return Path(tuple(hops), times)

    def levels(self, schedule: Schedule, like: Float[Tensor, "b *shape"]) -> list[Levels]:
        """alpha and sigma of each of the times, shaped to multiply `like`; from one look-up in the schedule."""
        shaped = like.new_empty(self.times.numel(), *[1] * (like.ndim - 1))
        every = coefficients(schedule, self.times.flatten(), shaped)
        alphas, sigmas = (value.unflatten(0, self.times.shape) for value in every)
        return list(zip(alphas, sigmas, strict=True))


def sample(
    model: Model,
    x: Float[Tensor, "b *shape"],
    schedule: Schedule,
    times: Float[Tensor, " k"] | Float[Tensor, "k b"] | Path,
    solver: Solver = "euler",
    eta: float = 0.0,
    generator: Generators | None = None,
    noise: Float[Tensor, "steps b *shape"] | None = None,
) -> Float[Tensor, "b *shape"]:
    """Takes x from the first of the times down to the last of them, which may be one list for all or one per sample.

    Where eta > 0, each step adds noise [K - 1, B, ...], or draws from the generator. A sample whose time stays equal
    takes no step and is not evaluated; if others go on meanwhile, the model must be a `BatchModel`. Raises ValueError
    if a time rises, for an unknown solver, for eta > 0 with a solver other than euler, and for a model that cannot be
    indexed where it has to be. A `Path` is taken as it is.
    """
    _check_direction(times, -1, "sample", "fall")
    return _solve(model, x, schedule, times, solver, eta, generator, noise)


def invert(
    model: Model,
    x: Float[Tensor, "b *shape"],
    schedule: Schedule,
    times: Float[Tensor, " k"] | Float[Tensor, "k b"] | Path,
    solver: Solver = "euler",
    eta: float = 0.0,
    generator: Generators | None = None,
    noise: Float[Tensor, "steps b *shape"] | None = None,
) -> Float[Tensor, "b *shape"]:
    """Takes x up the times: DDIM inversion. Arguments and errors as in `sample`."""
    _check_direction(times, 1, "invert", "rise")
    return _solve(model, x, schedule, times, solver, eta, generator, noise)


def descending(steps: int, start: float = 1.0, stop: float = 0.0) -> Float[Tensor, " k"]:
    """Times [steps + 1], evenly spaced from start down to stop, float64; ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def ascending(t: Float[Tensor, " b"], steps: int) -> Float[Tensor, "k b"]:
    """Inversion times for targets t: 0, 1/steps, 2/steps, ... < t, then t itself.

    All steps but the last have length 1/steps, so a low target takes fewer of them; columns that end early repeat
    their last time. Raises ValueError if steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    grid = torch.arange(steps + 1, device=t.device, dtype=t.dtype)[:, None] / steps
    # A target that lies on the grid must not be visited twice because of a rounding error.
    times = torch.where(grid < t - 1e-6, grid, t)
    count = int((times[1:] != times[:-1]).any(dim=1).sum())
    return times[: count + 1]


def _check_direction(times: Tensor | Path, sign: int, name: str, verb: str) -> None:
    if isinstance(times, Path):
        return
    if len(times) < 1 or bool((sign * times.diff(dim=0) < 0).any()):
        raise ValueError(f"{name} needs times that {verb}, got {times.tolist()}")


def _solve(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    times: Tensor | Path,
    solver: Solver,
    eta: float,
    generator: Generators | None,
    noise: Tensor | None,
) -> Tensor:
    if solver not in ("euler", "ab2", "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose euler, ab2 or heun")
    if eta > 0 and solver != "euler":
        raise ValueError(f"solver {solver!r} is deterministic: use eta = 0 or solver 'euler'")
    if eta > 0 and noise is None and generator is None:
        raise ValueError(f"eta = {eta} needs randomness: pass a generator, or noise [steps, B, ...]")
    path = times if isinstance(times, Path) else Path.of(x, times, generator if eta > 0 and noise is None else None)
    slope = _Slope(x) if solver == "ab2" else None
    levels = path.levels(schedule, x)
    for hop in path.hops:
        rows = slice(None) if hop.rows is None else hop.rows
        predict = model if hop.rows is None else _model_of(model, hop.rows)
        (t, s), here = path.times[hop.index : hop.index + 2, rows], x[rows]
        start, end = ((alpha[rows], sigma[rows]) for alpha, sigma in levels[hop.index : hop.index + 2])
        eps = predict(here, t)
        if slope is not None:
            eps = slope.extrapolate(eps, _log_snr(*start).flatten(), _log_snr(*end).flatten(), rows)
        elif solver == "heun":
            eps = (eps + predict(step_between(here, eps, start, end), s)) / 2
        fresh = hop.noise if noise is None else noise[hop.index][rows]
        there = step_between(here, eps, start, end, eta, fresh)
        x = there if hop.rows is None else x.index_copy(0, hop.rows, there)
    return x


def _model_of(model: Model, rows: Tensor) -> Model:
    if not isinstance(model, BatchModel):
        raise ValueError("some samples end before others: pass a model that can be indexed, such as guidance.Guided")
    return model[rows]


class _Slope:
    """The memory of Adams-Bashforth 2: eps in the middle of the next step, extrapolated in the log-SNR.

    The log-SNR, not rho, because its steps shrink where those of rho explode: the extrapolation stays short.
    """

    def __init__(self, x: Tensor):
        self.eps = torch.zeros_like(x)
        self.inverse_length = x.new_zeros(len(x))  # of the last step; 0 before the first one: Euler

    def extrapolate(self, eps: Tensor, log_snr: Tensor, next_log_snr: Tensor, rows: Tensor | slice) -> Tensor:
        length = next_log_snr - log_snr
        weight = expand(length * self.inverse_length[rows] / 2, eps)
        out = eps + weight * (eps - self.eps[rows])
        # Times beyond the ends of a schedule share one level: a step between them says nothing about the slope.
        self.eps[rows], self.inverse_length[rows] = eps, torch.where(length == 0, 0, 1 / length)
        return out
