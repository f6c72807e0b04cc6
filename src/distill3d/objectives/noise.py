"""Where kappa in x_t = alpha_t x + sigma_t kappa comes from: query -> (kappa [B, ...], network rows).

DDIM, rewritten on its own denoised image, is a score-distillation update whose noise solves
kappa = eps(x + sigma/alpha kappa, t, y) (Lukoianov et al. 2024, eq. 8). Random noise does not; each other
function here is a way towards that solution, and kappa_residual says how near it comes.

Whatever solves the equation exactly at the time t at which the objective then asks the network leaves
nothing to correct there. All these functions therefore look for kappa at the noisier t + tau, tau being
`overshoot`, or drawn per sample from the length of one hop.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill3d.diffusion import ddim
from distill3d.diffusion import random as draw
from distill3d.diffusion.guidance import Guided, guided_prediction
from distill3d.diffusion.schedule import coefficients, to_eps
from distill3d.objectives import checks
from distill3d.objectives.objective import Noise, Prediction, Query
from distill3d.objectives.timesteps import steps_of
from distill3d.types import Conditioning, Prior

HOP = 0.1  # tau of the solvers without hops: that of ten inversion steps, the release's setting
INTERVAL_START = "eps at the start of the interval"  # a key of Query.notes


@torch.no_grad()
def kappa_residual(
    kappa: Tensor, x: Tensor, t: Tensor, prior: Prior, conditioning: Conditioning, scale: float = 7.5
) -> tuple[Tensor, int]:
    """mean (eps_s(alpha_t x + sigma_t kappa, t) - kappa)^2 for each sample [B], and the network rows.

    How far kappa [B, ...] is from solving eq. 8 for x [B, ...] at t [B], conditions and scale being those of the
    trajectory that is meant. Zero for the noise that DDIM itself predicted at t on its way to x.
    """
    checks.number("scale", scale)
    alpha, sigma = coefficients(prior.schedule, t, x)
    eps, rows = guided_prediction(prior, alpha * x + sigma * kappa, t.to(x), conditioning, scale)
    return (eps - kappa).square().flatten(1).mean(1), rows


def gaussian(shared: bool = False) -> Noise:
    """kappa ~ N(0, I), drawn anew at each step (DreamFusion); shared: the same for all views of a group."""

    def noise(query: Query) -> tuple[Tensor, int]:
        every = query.views if shared else 1
        kappa = draw.normal(query.x[::every], draw.per_group(query.generator, every))
        return kappa.repeat_interleave(every, 0), 0

    return noise


def given(kappa: Tensor) -> Noise:
    """The same kappa [B, ...] at every step."""
    return lambda query: (kappa.to(query.x), 0)


def fixed_point(
    steps: int = 10,
    scale: float = 7.5,
    damping: float = 1.0,
    memory: int = 0,
    overshoot: float | None = None,
    start: Noise | None = None,
) -> Noise:
    """kappa <- kappa + damping (eps_s(x + rho kappa) - kappa), rho = sigma / alpha, `steps` times: eq. 8 iterated.

    damping 1 is the plain iteration, less damps it: descent on the squared residual without the network's
    Jacobian is the same thing. memory m > 0 mixes the last m + 1 iterates so that their residuals, taken as
    linear in kappa, cancel best (Anderson 1965, in the form of Walker & Ni 2011), each sample for itself.
    start is the first kappa, N(0, I) unless told; it is asked at t + tau, so give another solver overshoot=0.
    It converges only where eps_s contracts: large scales diverge. Raises ValueError for settings out of range.
    """
    checks.count("memory", memory, 0)
    if not 0.0 < damping <= 1.0:
        raise ValueError(f"damping must lie above 0 and up to 1 (1: none), got {damping}")
    _check_solver(steps, scale, overshoot)

    def noise(query: Query) -> tuple[Tensor, int]:
        query, kappa, rows = _begin(query, overshoot, start)
        points, errors = [kappa], []
        for _ in range(steps):
            eps, count = _ask(query, points[-1], scale)
            rows += count
            errors = [*errors, eps - points[-1]][-memory - 1 :]
            points = [*points[-memory - 1 :], _mixed(points[-memory - 1 :], errors, damping)]
        return points[-1], rows

    return noise


def descent(
    steps: int = 10,
    scale: float = 7.5,
    rate: float = 0.5,
    overshoot: float | None = None,
    start: Noise | None = None,
) -> Noise:
    """kappa <- kappa - rate d/dkappa |eps_s(alpha x + sigma kappa) - kappa|^2 / 2, `steps` times: through the network.

    The gradient is (sigma J - I)^T (eps_s - kappa) with J = d eps_s / d x_t, so each step costs a backward
    pass beside its counted rows. fixed_point(damping=rate) is the form without J. start as in fixed_point.
    Raises ValueError for settings out of range.
    """
    checks.positive("rate", rate)
    _check_solver(steps, scale, overshoot)

    def noise(query: Query) -> tuple[Tensor, int]:
        query, kappa, rows = _begin(query, overshoot, start)
        for _ in range(steps):
            with torch.enable_grad():
                kappa = kappa.detach().requires_grad_()
                eps, count = _ask(query, kappa, scale)
                (gradient,) = torch.autograd.grad((eps - kappa).square().sum() / 2, kappa)
            kappa, rows = (kappa - rate * gradient).detach(), rows + count
        return kappa, rows

    return noise


def ddim_inversion(
    steps: int = 10,
    scale: float = -7.5,
    eta: float = 0.3,
    solver: ddim.Solver = "euler",
    overshoot: float | None = None,
) -> Noise:
    """kappa by DDIM inversion of x under its own prompt (Lukoianov et al. 2024).

    x itself, taken as the sample of the lowest level, is walked up in hops of 1/steps to t + tau and kappa is
    the noise that tells the end point from x: kappa = (x_{t+tau} - alpha x) / sigma, both at t + tau. tau is
    overshoot, or drawn from U[0, 1/steps) per sample. scale 0 is the unconditional inversion. eta adds fresh
    noise at constant variance (solver euler only). Raises ValueError for settings out of range.

    Even exact inversion does not solve eq. 8: it ends where the trajectory through x began, and the noise
    predicted there is not the straight line from x to it.
    """
    _check_solver(steps, scale, overshoot)
    checks.share("eta", eta)
    if solver not in ("euler", "ab2", "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose euler, ab2 or heun")
    if eta > 0 and solver != "euler":
        raise ValueError(f"solver {solver!r} needs eta = 0, got {eta}: fresh noise breaks its second order")

    def noise(query: Query) -> tuple[Tensor, int]:
        x, schedule = query.x, query.prior.schedule
        times = ddim.ascending(_raised(query, overshoot, 1 / steps), steps)
        model = Guided(query.prior, query.conditioning, scale)
        end = ddim.invert(model, x, schedule, times, solver, eta, query.generator)
        alpha, sigma = coefficients(schedule, times[-1], x)
        return to_eps("x0", x, end, alpha, sigma), model.nfe

    return noise


def interval_inversion(steps: int = 5, wide: float = 0.1, narrow: float = 0.08, warmup: float = 0.3) -> Noise:
    """kappa by unconditional inversion to s = t - gap in hops of 1/steps, then one hop to t (ISM, Liang et al. 2023).

    x_s by inversion, x_t = DDIM(x_s, s -> t) with e_u(x_s, s), which reference.interval_start gives back. gap
    shrinks from wide to narrow over the fraction `warmup` of the run; with gap 0 x_t is x_s, and e_u is
    taken there. Defaults are those of the public code: 80 to 100 of 1000, hops of 200, 1500 of 5000 steps.
    Raises ValueError for settings out of range.
    """
    checks.count("steps", steps)
    checks.share("warmup", warmup)
    checks.share("wide", wide)
    checks.share("narrow", narrow)

    def noise(query: Query) -> tuple[Tensor, int]:
        x, t, schedule = query.x, query.t, query.prior.schedule
        warming = steps_of(warmup, query.total)
        gap = narrow + (wide - narrow) * (1 - min(query.step / warming, 1.0) if warming else 0.0)
        s = (t - gap).clamp(min=0)
        model = Guided(query.prior, query.conditioning, 0.0)
        x_s = ddim.invert(model, x, schedule, ddim.ascending(s, steps))
        e_u = model(x_s, s)
        query.notes[INTERVAL_START] = e_u
        x_t = ddim.ddim_step(x_s, e_u, schedule, s, t)
        return to_eps("x0", x, x_t, *coefficients(schedule, t, x)), model.nfe

    return noise


class Cached:
    """kappa as the network predicted it one step before; exact as long as x is the same picture (2D).

    An instance remembers one run: its `noise` and its `remember(prediction)` go into one Objective. The
    first kappa is `first` [B, ...], or drawn from N(0, I).
    """

    def __init__(self, first: Tensor | None = None):
        self.kappa = first

    def state_dict(self) -> dict[str, Tensor]:
        """The remembered kappa, for a checkpoint; empty before the first step."""
        return {} if self.kappa is None else {"kappa": self.kappa}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        self.kappa = state.get("kappa")

    def noise(self, query: Query) -> tuple[Tensor, int]:
        """The remembered kappa [B, ...]."""
        if self.kappa is None:
            self.kappa = draw.normal(query.x, query.generator)
        return self.kappa.to(query.x), 0

    def remember(self, prediction: Prediction) -> Prediction:
        """The same prediction, its result kept for the next step."""

        def remembered(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
            self.kappa, rows = prediction(query, x_t)
            return self.kappa, rows

        return remembered


def _check_solver(steps: int, scale: float, overshoot: float | None) -> None:
    checks.count("steps", steps)
    checks.number("scale", scale)
    if overshoot is not None:
        checks.share("overshoot", overshoot)


def _raised(query: Query, overshoot: float | None, hop: float) -> Tensor:
    """t + tau [B], at most 1; tau from U[0, hop), one for each group, where no overshoot is given."""
    tau = overshoot
    if tau is None:
        drawn = draw.uniform(len(query.x) // query.views, draw.per_group(query.generator, query.views))
        tau = (drawn * hop).to(query.x).repeat_interleave(query.views)
    return (query.t + tau).clamp(max=1.0)


def _begin(query: Query, overshoot: float | None, start: Noise | None) -> tuple[Query, Tensor, int]:
    """The query at t + tau, the first kappa for it, and the rows that this one took."""
    raised = dataclasses.replace(query, t=_raised(query, overshoot, HOP))
    return raised, *(start or gaussian())(raised)


def _ask(query: Query, kappa: Tensor, scale: float) -> tuple[Tensor, int]:
    """The right side of eq. 8 at kappa."""
    alpha, sigma = coefficients(query.prior.schedule, query.t, query.x)
    return guided_prediction(query.prior, alpha * query.x + sigma * kappa, query.t, query.conditioning, scale)


def _mixed(points: Sequence[Tensor], errors: Sequence[Tensor], damping: float) -> Tensor:
    """The next of the points [B, ...], oldest first, whose errors are known: Anderson's step; damped with one."""
    step = points[-1] + damping * errors[-1]
    if len(points) == 1:
        return step
    moves, turns = (_differences(values) for values in (points, errors))  # [B, D, m]
    gram = turns.mT @ turns
    # Converged differences are all rounding; a ridge far below them keeps the system solvable.
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-300
    wanted = turns.mT @ errors[-1].flatten(1).double()[..., None]
    shares = torch.linalg.solve_ex(gram + ridge * torch.eye(len(points) - 1).to(gram), wanted)[0]
    return step - ((moves + damping * turns) @ shares).to(step).view_as(step)


def _differences(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([(b - a).flatten(1) for a, b in itertools.pairwise(values)], 2).double()
