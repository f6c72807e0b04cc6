"""Where kappa in x_t = alpha_t x + sigma_t kappa comes from: functions query -> (kappa [B, ...], NFE).

DDIM, rewritten on its own denoised image, is a score-distillation update whose noise solves
kappa = eps(x + sigma/alpha kappa, t, y) (Lukoianov et al. 2024, eq. 8). Random noise does not; each other
function here approximates the solution, and kappa_residual measures how closely.

An exact solution at t would make the gradient at t zero: kappa belongs to a level t + tau above. Where a step takes the
fraction h of its target and t falls by delta, tau has to satisfy h E[tau] = delta. For whole targets that is the level
that made x, the time of the step before: `at_previous_level`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.devices import at_once, on_host
from distill3d.diffusion import ddim
from distill3d.diffusion import random as draw
from distill3d.diffusion.guidance import Guided, guided_prediction
from distill3d.diffusion.schedule import coefficients, expand, to_eps
from distill3d.objectives.objective import (
    Noise,
    NoiseAndReference,
    Prediction,
    Query,
    Timesteps,
    check_count,
    check_fraction,
    check_number,
)
from distill3d.objectives.timesteps import steps_of
from distill3d.types import Conditioning, Prior

Update = Callable[[Tensor, Tensor], Tensor]  # kappa, eps - kappa -> the next kappa, all [B, ...]
SCALES = (1.0, 2.0, 3.5, 5.0)  # of continuation, on the way to its own


@torch.no_grad()
def kappa_residual(
    kappa: Float[Tensor, "b *shape"],
    x: Float[Tensor, "b *shape"],
    t: Float[Tensor, " b"],
    prior: Prior,
    conditioning: Conditioning,
    scale: float = 7.5,
) -> tuple[Float[Tensor, " b"], int]:
    """mean (eps_s(alpha_t x + sigma_t kappa, t) - kappa)^2 for each sample, and the NFE.

    How far kappa is from solving eq. 8 for x at t; conditioning and scale must be those of the trajectory that is
    meant. Zero for the noise that DDIM itself predicted at t on its way to x.
    """
    check_number("scale", scale)
    alpha, sigma = coefficients(prior.schedule, t, x)
    eps, nfe = guided_prediction(prior, alpha * x + sigma * kappa, t.to(x), conditioning, scale)
    return (eps - kappa).square().flatten(1).mean(1), nfe


def gaussian(shared: bool = False) -> Noise:
    """kappa ~ N(0, I), drawn anew at each step (DreamFusion); shared: the same for all views of a group."""

    def noise(query: Query) -> tuple[Tensor, int]:
        stride = query.views if shared else 1
        kappa = draw.normal(query.x[::stride], draw.per_group(query.generator, stride))
        return kappa.repeat_interleave(stride, 0), 0

    return noise


def given(kappa: Float[Tensor, "b *shape"]) -> Noise:
    """The same kappa at every step."""
    return lambda query: (kappa.to(query.x), 0)


def at_previous_level(find: Noise, times: Timesteps, start: Noise) -> Noise:
    """`find` at the level that made x: the time of the step before in `times`, the deterministic ones of the run.

    The first x was made at no level; its kappa is `start`. With exact solutions, whole targets and one scale, x <-
    x - g then is the DDIM sampler from x = 0.
    """

    def noise(query: Query) -> tuple[Tensor, int]:
        if query.step == 0:
            return start(query)
        before = times(query.step - 1, query.total, len(query.x) // query.views, query.generator)
        (t,) = at_once(query.x.device, before.to(query.x.dtype).repeat_interleave(query.views))
        return find(dataclasses.replace(query, t=t))

    return noise


# The solvers solve eq. 8 at the query's own time. They begin at `start`, N(0, I) by default, take `steps` steps, and
# return the iterate of least residual of each sample, the first included; knowing the last one's residual takes one
# more evaluation. A start that is drawn anew at each step also draws anew what the equation leaves open (near t = 1
# nearly all of kappa): in a run, begin with a noise that stays, such as `Constant.start`.


def fixed_point(
    steps: int = 10, scale: float = 7.5, damping: float = 1.0, memory: int = 0, start: Noise | None = None
) -> Noise:
    """kappa <- kappa + damping (eps_s(x + rho kappa) - kappa), rho = sigma / alpha: eq. 8 iterated.

    damping 1 is the plain iteration; less is descent on the squared residual without the network's Jacobian.
    memory m > 0 mixes the last m + 1 iterates so that their residuals, taken as linear in kappa, cancel best
    (Anderson 1965, in the form of Walker & Ni 2011), for each sample separately. The plain iteration converges only
    where eps_s is a contraction, and no damping helps where the Jacobian of the denoiser has a negative eigenvalue, as
    guidance above 1 may give it. Raises ValueError for settings out of range.
    """
    check_count("memory", memory, 0)
    if not 0.0 < damping <= 1.0:
        raise ValueError(f"damping must lie above 0 and up to 1 (1: none), got {damping}")

    def mixing() -> Update:
        points: list[Tensor] = []
        errors: list[Tensor] = []

        def update(kappa: Tensor, error: Tensor) -> Tensor:
            points[:], errors[:] = [*points, kappa][-memory - 1 :], [*errors, error][-memory - 1 :]
            return _anderson_step(points, errors, damping)

        return update

    return _solver(steps, scale, start, mixing)


def sign_descent(steps: int = 10, scale: float = 7.5, start: Noise | None = None) -> Noise:
    """kappa <- kappa + mean|r| sign(r), r = eps_s(x + rho kappa) - kappa, the mean over each sample.

    The step that the public code of GNRI (Meiri et al. 2023, version 5) takes. Its length is the residual's own, so it
    stays bounded where the plain iteration diverges. Raises ValueError for settings out of range.
    """

    def update(kappa: Tensor, error: Tensor) -> Tensor:
        return kappa + expand(error.abs().flatten(1).mean(1), kappa) * error.sign()

    return _solver(steps, scale, start, lambda: update)


def continuation(
    steps: int = 10, scale: float = 7.5, damping: float = 1.0, memory: int = 0, start: Noise | None = None
) -> Noise:
    """`fixed_point` at the scales 1, 2, 3.5 and 5 as far as they lie below `scale`, then there.

    Each begins with the solution of the one before; at scale 1 there is exactly one. `steps` is shared evenly, at least
    one for each. Raises ValueError for settings out of range.
    """
    check_count("steps", steps)
    check_number("scale", scale)
    lower = [s for s in SCALES if s < scale]
    each = max(steps // (len(lower) + 1), 1)
    for s in lower:
        start = fixed_point(each, s, damping, memory, start)
    return fixed_point(each, scale, damping, memory, start)


def cfg_plus_plus(
    steps: int = 10, scale: float = 0.6, damping: float = 1.0, memory: int = 0, start: Noise | None = None
) -> Noise:
    """kappa = e_u(x + rho kappa'), kappa' the solution of eq. 8 at the scale in [0, 1] by `fixed_point`.

    With a prediction at the same scale this is SDI of CFG++ (Chung et al. 2024), a sampler that denoises with eps_s and
    adds e_u: its scale is never above 1, where eq. 8 has one solution. One unconditional evaluation more. Raises
    ValueError for settings out of range.
    """
    check_fraction("scale", scale)
    solver = fixed_point(steps, scale, damping, memory, start)

    def noise(query: Query) -> tuple[Tensor, int]:
        kappa, nfe = solver(query)
        kappa, count = _predict(query, kappa, 0.0)
        return kappa, nfe + count

    return noise


def descent(steps: int = 10, scale: float = 7.5, rate: float = 0.5, start: Noise | None = None) -> Noise:
    """kappa <- kappa - rate d/dkappa |eps_s(alpha x + sigma kappa) - kappa|^2 / 2.

    The gradient is (sigma J - I)^T (eps_s - kappa) with J = d eps_s / d x_t, so each step costs a backward
    pass through the network beside its NFE. fixed_point(damping=rate) is the form without J. Raises ValueError for
    settings out of range.
    """
    check_number("rate", rate)
    if rate <= 0:
        raise ValueError(f"rate must be above 0, got {rate}")

    def update(kappa: Tensor, error: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(error.square().sum() / 2, kappa)
        return kappa - rate * gradient

    return _solver(steps, scale, start, lambda: update, backward=True)


def ddim_inversion(
    steps: int = 10,
    scale: float = -7.5,
    eta: float = 0.3,
    solver: ddim.Solver = "euler",
    overshoot: float | None = None,
) -> Noise:
    """kappa by DDIM inversion of x under its own prompt (Lukoianov et al. 2024).

    x, taken as the sample of the lowest level, is inverted in steps of 1/steps to t + tau. kappa is the noise
    between x and the end point: kappa = (x_{t+tau} - alpha x) / sigma, both at t + tau. tau is overshoot, or drawn
    from U[0, 1/steps) per sample. scale 0 is the unconditional inversion. eta adds fresh noise at constant variance
    (solver euler only). Raises ValueError for settings out of range.

    Even exact inversion does not solve eq. 8: it ends where the trajectory through x began, and the noise
    predicted there is not the straight line from x to it.
    """
    check_count("steps", steps)
    check_number("scale", scale)
    if overshoot is not None:
        check_fraction("overshoot", overshoot)
    check_fraction("eta", eta)
    if solver not in ("euler", "ab2", "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose euler, ab2 or heun")
    if eta > 0 and solver != "euler":
        raise ValueError(f"solver {solver!r} needs eta = 0, got {eta}: fresh noise breaks its second order")

    def noise(query: Query) -> tuple[Tensor, int]:
        x, schedule = query.x, query.prior.schedule
        times = ddim.ascending(_overshot(query, overshoot, 1 / steps), steps)
        path = ddim.Path.of(x, times, query.generator if eta > 0 else None)
        model = Guided(query.prior, query.conditioning, scale)
        end = ddim.invert(model, x, schedule, path, solver, eta, query.generator)
        alpha, sigma = coefficients(schedule, path.end, x)
        return to_eps("x0", x, end, alpha, sigma), model.nfe

    return noise


def interval_inversion(
    steps: int = 5, wide: float = 0.1, narrow: float = 0.08, warmup: float = 0.3
) -> NoiseAndReference:
    """kappa by unconditional inversion to s = t - gap in steps of 1/steps, then one step to t (ISM, Liang et al. 2023).

    x_t = DDIM(x_s, s -> t) with e_u(x_s, s), which is ISM's reference and returned as such. gap shrinks from wide to
    narrow over the fraction `warmup` of the run; s is never below 0. With gap 0 x_t is x_s, and e_u is taken there.
    Defaults are those of the public code: 100 to 80 of 1000, steps of 200, 1500 of 5000 steps. Raises ValueError for
    settings out of range.
    """
    check_count("steps", steps)
    for name, value in (("warmup", warmup), ("wide", wide), ("narrow", narrow)):
        check_fraction(name, value)

    def noise(query: Query) -> tuple[Tensor, int, Tensor]:
        x, t, schedule = query.x, query.t, query.prior.schedule
        warming = steps_of(warmup, query.total)
        gap = narrow + (wide - narrow) * (1 - min(query.step / warming, 1.0) if warming else 0.0)
        s = (on_host(t) - gap).clamp(min=0)
        model = Guided(query.prior, query.conditioning, 0.0)
        x_s = ddim.invert(model, x, schedule, ddim.ascending(s, steps))
        s = s.to(t)
        e_u = model(x_s, s)
        x_t = ddim.ddim_step(x_s, e_u, schedule, s, t)
        return to_eps("x0", x, x_t, *coefficients(schedule, t, x)), model.nfe, e_u

    return noise


class Constant:
    """The same kappa at every step of a run, one for each sample of the batch (2D).

    An instance belongs to one run: its `noise` goes into an Objective, and it is the state of that. kappa is `first`
    [B, ...], or drawn from N(0, I) at the first step.
    """

    name = "cfd"

    def __init__(self, first: Tensor | None = None):
        self.kappa = first

    def state_dict(self) -> dict[str, Tensor]:
        """The kappa that is kept, for a checkpoint; empty before the first step."""
        return {} if self.kappa is None else {"kappa": self.kappa}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.kappa = state.get("kappa")

    def noise(self, query: Query) -> tuple[Tensor, int]:
        """The kappa that is kept.

        Raises ValueError in 3D, where x is another view at every step.
        """
        if not query.same_images:
            raise ValueError(
                f"{self.name} with noise='image' is for 2D: in 3D every step shows another view; set noise='surface' "
                "(--set objective.noise=surface)"
            )
        return self.start(query)

    def start(self, query: Query) -> tuple[Tensor, int]:
        """The kappa that is kept, for a solver to begin with; one for all views where they change."""
        if self.kappa is None:
            stride = 1 if query.same_images else len(query.x)
            self.kappa = draw.normal(query.x[::stride], draw.per_group(query.generator, stride))
        return self.kappa.to(query.x).expand_as(query.x), 0


class Cached(Constant):
    """kappa as the network predicted it at the step before; exact as long as x is the same image (2D).

    An instance belongs to one run: its `noise` and its `remember(prediction)` go into one Objective, and it is the
    state of that. The first kappa is `first` [B, ...], or drawn from N(0, I).
    """

    name = "sdi_cached"

    def remember(self, prediction: Prediction) -> Prediction:
        """The same prediction; its result is kept for the next step."""

        def remembered(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
            self.kappa, nfe = prediction(query, x_t)
            return self.kappa, nfe

        return remembered


def _overshot(query: Query, overshoot: float | None, largest: float) -> Tensor:
    """t + tau [B] on the host, at most 1; without an overshoot tau ~ U[0, largest), one draw per group."""
    tau = overshoot
    if tau is None:
        drawn = draw.uniform(len(query.x) // query.views, draw.per_group(query.generator, query.views))
        tau = (drawn * largest).to("cpu", query.t.dtype).repeat_interleave(query.views)
    return (on_host(query.t) + tau).clamp(max=1.0)


def _solver(
    steps: int, scale: float, start: Noise | None, updating: Callable[[], Update], backward: bool = False
) -> Noise:
    """The iterate of least residual among the start and `steps` updates of it; backward: an update needs the graph."""
    check_count("steps", steps)
    check_number("scale", scale)

    def noise(query: Query) -> tuple[Tensor, int]:
        kappa, nfe = (start or gaussian())(query)
        update, best, least = updating(), kappa, torch.full_like(query.t, torch.inf)
        for step in range(steps + 1):
            with torch.set_grad_enabled(backward and step < steps):
                kappa = kappa.detach().requires_grad_(backward)
                eps, count = _predict(query, kappa, scale)
                error, nfe = eps - kappa, nfe + count
                following = update(kappa, error) if step < steps else kappa
            residual = error.detach().square().flatten(1).mean(1).to(least)
            best = torch.where(expand(residual < least, kappa).bool(), kappa.detach(), best)  # NaN is never less
            least, kappa = torch.fmin(residual, least), following
        return best, nfe

    return noise


def _predict(query: Query, kappa: Tensor, scale: float) -> tuple[Tensor, int]:
    """The right side of eq. 8 at kappa."""
    alpha, sigma = coefficients(query.prior.schedule, query.t, query.x)
    x_t = alpha * query.x + sigma * kappa
    return guided_prediction(query.prior, x_t, query.t, query.conditioning, scale, query.apg)


def _anderson_step(points: Sequence[Tensor], errors: Sequence[Tensor], damping: float) -> Tensor:
    """The iterate after points [B, ...], oldest first, with their residuals; a damped step if there is only one."""
    step = points[-1] + damping * errors[-1]
    if len(points) == 1:
        return step
    moves, turns = _differences(points), _differences(errors)  # [B, D, m]
    gram = turns.mT @ turns
    # Differences of a converged iteration are all rounding; a ridge far below them keeps the system solvable.
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-300
    right = turns.mT @ _float64(errors[-1].flatten(1)[..., None])
    mix = torch.linalg.solve_ex(gram + ridge * torch.eye(len(points) - 1).to(gram), right)[0]
    return step - ((moves + damping * turns) @ mix).to(step).view_as(step)


def _differences(values: Sequence[Tensor]) -> Tensor:
    return _float64(torch.stack([(b - a).flatten(1) for a, b in itertools.pairwise(values)], 2))


def _float64(x: Tensor) -> Tensor:
    """In double precision; on the CPU where the device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()
