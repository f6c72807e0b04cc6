"""Methods published after SDI, in the form and the notation of methods.py.

Each is a point of the same design space; what is new is mostly where the noise comes from: a trajectory apart from the
object (DSD), one noise for the whole run (SCTD), a whole inversion (FlowDreamer). Settings out of range raise
ValueError.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from distill3d.devices import at_once, on_host
from distill3d.diffusion import ddim
from distill3d.diffusion import random as draw
from distill3d.diffusion.guidance import Guided, guided_prediction
from distill3d.diffusion.random import Generators
from distill3d.diffusion.schedule import coefficients, to_eps
from distill3d.objectives import noise, prediction, reference, timesteps, weighting
from distill3d.objectives.objective import (
    Noise,
    Objective,
    Prediction,
    PredictionAndReference,
    Query,
    Timesteps,
    check_count,
    check_fraction,
)
from distill3d.objectives.prediction import without_negative
from distill3d.types import Conditioning, Prior, Schedule


def dsd(
    scale: float = 7.5,
    steps: int = 10,
    gap: float = 0.1,
    start: float = 0.98,
    stop: float = 0.32,
    first: Tensor | None = None,
) -> Objective:
    """g = sigma_t^2 (eps_s(x_t, t) - e_c(x_t+, t+)), kappa = eps_s of a DDIM trajectory at t+, x at neither.

    Diverse score distillation (Xu et al. 2024). From one noise of the run (`first`), DDIM of `steps` steps simulates
    the image that the view's text would give, down to t+ = t + u gap (t - stop), u ~ U[0, 1); kappa is the noise
    predicted there. x_t and x_t+ are x with this kappa at both times. t falls from start to stop as sqrt(step).
    Constants: its public code, which simulates anew at every step. But kappa does not depend on x, so the trajectory of
    each text is stored: a step then costs five rows. Where conditions differ from view to view beyond their text (with
    Perp-Neg, a ControlNet or a camera-conditioned prior) there is nothing to store.
    """
    memory = Trajectories(scale, steps, gap, start, stop, first)
    return Objective(
        noise=memory.noise,
        timesteps=timesteps.square_root(start, stop),
        prediction=prediction.guided(scale),
        reference=None,
        weight=weighting.noise_variance,
        state=memory,
    )


def asd(scale: float = 7.5, gap: float = 0.1) -> Objective:
    """g = sigma_t^2 (eps_s(x_t, t) - e_c(x_t+, t+)), kappa ~ N(0, I) for both, t+ = t + u gap (t - low), u ~ U[0, 1).

    Asynchronous score distillation (Ma et al. 2024): the prior itself, asked at a noisier time, takes the place of
    VSD's student. t ~ U[low, high], which moves from U[0.5, 0.98] to U[0.02, 0.5] over the run. Constants: its public
    code. With gap 0 it is csd(scale - 1).
    """
    check_fraction("gap", gap)

    def later(query: Query, x_t: Tensor, kappa: Tensor) -> tuple[Tensor, int]:
        low = 0.5 + (0.02 - 0.5) * min(query.step / query.total, 1.0)
        (uniform,) = at_once(query.x.device, _uniform(query))
        t = (query.t + gap * uniform * (query.t - low).clamp(min=0)).clamp(max=1)
        alpha, sigma = coefficients(query.prior.schedule, t, x_t)
        conditioning = replace(query.conditioning, perp=None, perp_weights=None)
        return guided_prediction(query.prior, alpha * query.x + sigma * kappa, t, conditioning, 1.0)

    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.moving((0.5, 0.98), (0.02, 0.5)),
        prediction=prediction.guided(scale),
        reference=later,
        weight=weighting.noise_variance,
    )


def flowdreamer(
    scale: float = 60.0,
    inversion_scale: float = 1.0,
    inversion_steps: int = 3,
    warmup: float = 0.18,
    low: float = 0.02,
    high: float = 0.7,
) -> Objective:
    """g = v_s - (kappa - x) at x_t = (1 - t) x + t kappa, kappa the end of the flow through x.

    FlowDreamer (Li et al. 2024), for flow models only: RFDS whose noise x is coupled to. kappa is found by Euler's
    method from x at sigma = 0 to sigma = 1 in equal steps of sigma. In the fraction `warmup` of the run, at its
    beginning, x is no image yet, and kappa ~ N(0, I). t ~ U[low, high]. Constants: its public code for Stable
    Diffusion 3.
    """
    check_fraction("warmup", warmup)
    return Objective(
        noise=_end_of_the_flow(inversion_scale, inversion_steps, warmup),
        timesteps=timesteps.uniform(low, high),
        prediction=prediction.guided(scale),
        reference=reference.injected_noise,
        weight=weighting.velocity_matching,
        pull=1.0,
    )


def sctd(scale: float = 7.5, segments: int = 5, gap: float = 0.08, first: Tensor | None = None) -> Objective:
    """g = sigma_t / alpha_t (D_0(x_s, s -> e) - x_e + (s_g + 1) (x_e - D_s(x_t, t -> e))), x_s = D_s(x_t, t -> s).

    Segmented consistency trajectory distillation (SegmentDreamer, Zhu et al. 2025). D_s is a DDIM step with eps_s of
    scale s_g = scale, D_0 one without the prompt. [0.02, 0.5] is cut into `segments`; e is the edge at or below t, and
    s ~ U[e + 0.01, t - 0.01]. x_e is x with one noise of the run (`first`), from where DDIM inversion without the
    prompt leads to x_t, over s if t >= 0.15. t moves from U[0.5, 0.98] to U[0.02, 0.5] over 0.3 of the run and keeps
    `gap` from e. Constants: its public code. Neither inversion nor D_0 sees the user's negative words.
    """
    path = Segments(scale, segments, gap, first)
    return Objective(
        noise=path.noise,
        timesteps=path.apart(timesteps.moving((0.5, 0.98), (0.02, 0.5), over=0.3)),
        prediction=path.compared(prediction.guided(scale)),
        reference=None,
        weight=weighting.x0_matching,
        texts=("",),
        state=path,
    )


def bsd(denoising: float = 1.25, warmup: float = 0.3) -> Objective:
    """g = 2.56 sigma_t rms(e_u - kappa) m, m the shortest vector between e_c - e_u and denoising (e_u - kappa).

    Balanced score distillation (PlacidDreamer, Huang et al. 2024): the classifier's and the denoiser's direction are
    two goals, and m, their convex mix of least norm, does harm to neither, so that there is no guidance scale.
    kappa ~ N(0, I); t ~ U[0.02, top], top falling from 0.98 to 0.5 over the fraction `warmup` of the run. Constants:
    its public code, whose norm over 50 is 2.56 times the root mean square of Stable Diffusion's 16,384 values.
    """

    def weight(schedule: Schedule, t: Tensor) -> Tensor:
        return 2.56 * schedule.sigma(t)

    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.narrowing(0.02, 0.98, 0.5, over=warmup),
        prediction=prediction.balanced(denoising),
        reference=None,
        weight=weight,
    )


class Trajectories:
    """kappa from DDIM trajectories of one noise, stored for each text; see `dsd`.

    An instance belongs to one run, and its noise is the state of that: the trajectories follow from it. In 3D all views
    start from one noise, in 2D each image from its own.
    """

    def __init__(self, scale: float, steps: int, gap: float, start: float, stop: float, first: Tensor | None = None):
        check_count("steps", steps)
        check_fraction("gap", gap)
        self.scale, self.gap, self.stop, self.first = scale, gap, stop, first
        self.times = start * (1 - torch.arange(steps, dtype=torch.float64) / steps)  # [K], falling
        self._known: dict[object, tuple[Tensor, Tensor]] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """The noise of the run, for a checkpoint; empty before the first step."""
        return {} if self.first is None else {"first": self.first}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.first, self._known = state.get("first"), {}

    def noise(self, query: Query) -> tuple[Tensor, int, Tensor]:
        """kappa, and e_c of x with it at t+, the reference."""
        x, schedule, conditioning = query.x, query.prior.schedule, query.conditioning
        samples, eps, nfe = self._trajectories(query)
        above = (query.t - self.stop).clamp(min=0)
        uniform, times = at_once(x.device, _uniform(query), self.times.to(query.t.dtype))
        t = torch.minimum(query.t + self.gap * uniform * above, query.t.clamp(min=float(self.times[0])))
        rows = torch.arange(len(x), device=x.device)
        last = ((times >= t[:, None] - 1e-6).sum(1) - 1).clamp(min=0)  # the step that ends below t+
        here = ddim.ddim_step(samples[rows, last], eps[rows, last], schedule, times[last], t)
        kappa, simulated = guided_prediction(query.prior, here, t, conditioning, self.scale)
        alpha, sigma = coefficients(schedule, t, x)
        compared, more = guided_prediction(query.prior, alpha * x + sigma * kappa, t, conditioning, 1.0)
        return kappa, nfe + simulated + more, compared

    def _trajectories(self, query: Query) -> tuple[Tensor, Tensor, int]:
        """Samples and noises [B, K, ...] at the K times, and the NFE of those that had to be simulated."""
        conditioning, x = query.conditioning, query.x
        stride = 1 if conditioning.positive.camera is None else len(x)
        if self.first is None:
            self.first = draw.normal(x[::stride], draw.per_group(query.generator, stride))
        own = (
            conditioning.perp is not None or conditioning.positive.control is not None or query.prior.camera_conditioned
        )
        hidden = torch.stack([conditioning.positive.hidden, conditioning.negative.hidden], 1).detach().float().cpu()
        texts = [each.numpy().tobytes() for each in hidden]
        keys: list[object] = [i if own else (i // stride, text) for i, text in enumerate(texts)]
        missing = [i for i, key in enumerate(keys) if key not in self._known and key not in keys[:i]]
        nfe = 0
        if missing:
            rows = torch.tensor(missing, device=x.device)
            start = self.first.to(x).repeat_interleave(stride, 0)[rows]
            samples, noises, nfe = self._simulate(query.prior, conditioning[rows], start)
            self._known |= {keys[i]: (samples[k], noises[k]) for k, i in enumerate(missing)}
        found = [self._known[key] for key in keys]
        if own:
            self._known = {}
        return torch.stack([samples for samples, _ in found]), torch.stack([noises for _, noises in found]), nfe

    def _simulate(self, prior: Prior, conditioning: Conditioning, kappa: Tensor) -> tuple[Tensor, Tensor, int]:
        model, samples, noises = Guided(prior, conditioning, self.scale), [], []
        times = self.times.to(kappa)[:, None].expand(-1, len(kappa))
        x_t = coefficients(prior.schedule, times[0], kappa)[1] * kappa
        for t, s in itertools.pairwise([*times, times[-1]]):
            samples.append(x_t)
            noises.append(model(x_t, t))
            x_t = ddim.ddim_step(x_t, noises[-1], prior.schedule, t, s)
        return torch.stack(samples, 1), torch.stack(noises, 1), model.nfe


class Segments:
    """The path of `sctd` through a segment of time: x at its edge e with one noise of the run, and up to t."""

    def __init__(self, scale: float, segments: int, gap: float, first: Tensor | None = None):
        check_count("segments", segments)
        check_fraction("gap", gap)
        self.scale, self.gap, self.first = scale, gap, first
        self.edges = torch.linspace(0.02, 0.5, segments + 1, dtype=torch.float64)

    def state_dict(self) -> dict[str, Tensor]:
        """The noise of the run, for a checkpoint; empty before the first step."""
        return {} if self.first is None else {"first": self.first}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.first = state.get("first")

    def edge(self, t: Tensor) -> Tensor:
        """The edge at or below each t [B]; t itself below the first."""
        edges = self.edges.to(t)
        return torch.minimum(edges[((edges <= t[:, None] + 1e-6).sum(1) - 1).clamp(min=0)], t)

    def apart(self, times: Timesteps) -> Timesteps:
        """The same times, but at least `gap` above their edges."""

        def apart(step: int, total: int, batch: int, generator: Generators) -> Tensor:
            t = times(step, total, batch, generator)
            return torch.maximum(t, self.edge(t) + self.gap)

        return apart

    def noise(self, query: Query) -> tuple[Tensor, int]:
        """kappa between x and x_t, which is inverted without the prompt from x_e."""
        x, t, schedule = query.x, query.t, query.prior.schedule
        if self.first is None:  # with an offset for each channel, as in the public code
            offset = draw.normal(x[..., :1, :1], query.generator)
            self.first = draw.normal(x, query.generator) + 0.1 * offset
        end = on_host(t)
        e = self.edge(end)
        s = torch.minimum(e + 0.01 + _uniform(query) * (end - e - 0.02).clamp(min=0), end)
        times = torch.stack([e, torch.where(end >= 0.15, s, e), end])
        e, s = at_once(x.device, e, s)
        alpha, sigma = coefficients(schedule, e, x)
        x_e = alpha * x + sigma * self.first.to(x)
        model = Guided(query.prior, without_negative(query).conditioning, 0.0)
        x_t = ddim.invert(model, x_e, schedule, times)
        self._path = x_e, e, s
        return to_eps("x0", x, x_t, *coefficients(schedule, t, x)), model.nfe

    def compared(self, predict: Prediction) -> PredictionAndReference:
        """The prediction, and what it must be compared with so that their difference is g of `sctd` over its weight."""

        def compared(query: Query, x_t: Tensor) -> tuple[Tensor, int, Tensor]:
            (x_e, e, s), schedule = self._path, query.prior.schedule
            eps, nfe = predict(query, x_t)
            x_s = ddim.ddim_step(x_t, eps, schedule, query.t, s)
            conditioning = without_negative(query).conditioning
            e_u, more = guided_prediction(query.prior, x_s, s, conditioning, 0.0)
            consistency = ddim.ddim_step(x_s, e_u, schedule, s, e) - x_e
            guidance = x_e - ddim.ddim_step(x_t, eps, schedule, query.t, e)
            return eps, nfe + more, eps - (consistency + (self.scale + 1) * guidance)

        return compared


def _end_of_the_flow(scale: float, steps: int, warmup: float) -> Noise:
    """kappa by inversion from x to t = 1 in equal steps of sigma; N(0, I) during the warmup."""
    check_count("inversion_steps", steps)
    random = noise.gaussian()

    def end(query: Query) -> tuple[Tensor, int]:
        if query.step < timesteps.steps_of(warmup, query.total):
            return random(query)
        x, schedule = query.x, query.prior.schedule
        grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
        levels = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = grid[torch.searchsorted(schedule.sigma(grid), levels).clamp(max=1000)]  # to a thousandth
        model = Guided(query.prior, query.conditioning, scale)
        path = ddim.Path.of(x, times)
        last = ddim.invert(model, x, schedule, path)
        return to_eps("x0", x, last, *coefficients(schedule, path.end, x)), model.nfe

    return end


def _uniform(query: Query) -> Tensor:
    """U[0, 1) for each sample [B] on the host, the same within a group of views."""
    drawn = draw.uniform(len(query.x) // query.views, draw.per_group(query.generator, query.views))
    return drawn.to("cpu", query.t.dtype).repeat_interleave(query.views)
