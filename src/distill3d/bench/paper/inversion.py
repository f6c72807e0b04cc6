"""The paper's experiment on how to find kappa: the residual of its equation 8 over t, for each way to solve it.

On the trajectory of a DDIM sampler, x0(t) and kappa(t) are known, and kappa = eps(x0 + sigma/alpha kappa, t, y) holds
exactly (Lukoianov et al. 2024, eq. 8). Each strategy gets x0(t) alone and returns its kappa. The residual is the mean
square of eps(...) - kappa, and its cost the network function evaluations (NFE).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill3d.diffusion import ddim
from distill3d.diffusion import random as draw
from distill3d.diffusion.guidance import Guided, guided_prediction
from distill3d.diffusion.schedule import coefficients, from_eps
from distill3d.files import replacing
from distill3d.objectives import noise
from distill3d.objectives.objective import Noise, Query
from distill3d.types import Conditioning, Prior
from distill3d.untrusted import csv_text

# (guidance scale of equation 8, DDIM's own kappa, the noise its trajectory began with) -> a way to find the noise
Strategy = Callable[[float, Tensor, Tensor], Noise]


def inversion(steps: int, factor: float = 1.0, solver: ddim.Solver = "euler") -> Strategy:
    """DDIM inversion to t itself at `factor` times the guidance scale of equation 8; 0 is unconditional."""
    return lambda scale, own, first: noise.ddim_inversion(steps, factor * scale, eta=0.0, solver=solver, overshoot=0.0)


def solver(find: Callable[..., Noise], **settings: float) -> Strategy:
    """A solver of equation 8 at its scale, 10 steps from the noise that the trajectory began with."""
    return lambda scale, own, first: find(10, scale, start=noise.given(first), **settings)


STRATEGIES: dict[str, Strategy] = {
    "random draw": lambda scale, own, first: noise.gaussian(),
    "first noise": lambda scale, own, first: noise.given(first),
    "DDIM's own": lambda scale, own, first: noise.given(own),
    "fixed point, 10 steps": solver(noise.fixed_point),
    "fixed point, 10 steps, damped": solver(noise.fixed_point, damping=0.5),
    "fixed point, 10 steps, damped, Anderson": solver(noise.fixed_point, damping=0.5, memory=3),
    "sign descent, 10 steps": solver(noise.sign_descent),
    "continuation, 10 steps": solver(noise.continuation),
    "continuation, 10 steps, damped, Anderson": solver(noise.continuation, damping=0.5, memory=3),
    "gradient descent, 10 steps": solver(noise.descent),
    "inversion, 10 steps": inversion(10),
    "inversion, 40 steps": inversion(40),
    "inversion, 10 steps, second order (ab2)": inversion(10, solver="ab2"),
    "inversion, 5 steps, Heun": inversion(5, solver="heun"),
    "inversion, 10 steps, unconditional": inversion(10, 0.0),
    "inversion, 10 steps, negative scale": inversion(10, -1.0),
}


@dataclasses.dataclass(frozen=True)
class InversionSettings:
    """What is measured: prompts x seeds, at `times` times of a DDIM trajectory, for each scale of equation 8."""

    prompts: tuple[str, ...] = ("a red mushroom", "a blue car", "a yellow duck", "a green house")
    seeds: int = 2
    scales: tuple[float, ...] = (1.0, 5.0)
    steps: int = 50
    times: int = 9

    def __post_init__(self) -> None:
        if not self.prompts or not self.scales or min(self.seeds, self.steps, self.times) < 1:
            raise ValueError("the experiment needs at least one prompt, scale, seed, step and time")
        if not all(math.isfinite(scale) for scale in self.scales):
            raise ValueError(f"guidance scales must be finite numbers, got {self.scales}")
        if self.times > self.steps:
            raise ValueError(f"a trajectory of {self.steps} steps has fewer than {self.times} times: give more steps")


@dataclasses.dataclass(frozen=True)
class Residual:
    """The residual of one strategy at one time, over all prompts and seeds."""

    scale: float
    strategy: str
    t: float
    residual: float  # mean over the samples of the mean squared residual of equation 8
    spread: float  # standard deviation over the samples
    nfe: float  # per sample


@dataclasses.dataclass(frozen=True)
class InversionResult:
    """The residuals, and for each scale and strategy an image of the first sample."""

    settings: InversionSettings
    residuals: tuple[Residual, ...]
    images: dict[tuple[float, str], Tensor]  # denoised with kappa at the middle time, [3, H, W]


@torch.no_grad()
def trajectory(
    prior: Prior, conditioning: Conditioning, scale: float, times: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """(x0, kappa), each [B, ...], of a DDIM sampler that starts from pure noise, at each of its falling times [K]."""
    states: list[tuple[Tensor, Tensor]] = []
    model = Guided(prior, conditioning, scale)

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        eps = model(x, t)
        states.append((from_eps("x0", eps, x, *coefficients(prior.schedule, t, x)), eps))
        return eps

    x = torch.zeros(len(conditioning), *prior.sample_shape, device=prior.device)
    x = coefficients(prior.schedule, times[:1].expand(len(x)), x)[1] * draw.normal(x, generator)
    ddim.sample(recorded, x, prior.schedule, torch.cat([times, times.new_zeros(1)]))
    return states


@torch.no_grad()
def measure_residuals(
    prior: Prior,
    settings: InversionSettings,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    on_residual: Callable[[], None] = lambda: None,
) -> InversionResult:
    """Measures every strategy at every time; `on_residual` is called after each scale, time and strategy."""
    prompts = [prompt for prompt in settings.prompts for _ in range(settings.seeds)]
    conditioning = Conditioning(prior.embed(prompts), prior.embed([""] * len(prompts)))
    grid = torch.linspace(0.98, 0.02, settings.steps, dtype=torch.float64)
    indices = sorted({round(i) for i in torch.linspace(0, settings.steps - 1, settings.times).tolist()})
    residuals, images = [], {}
    for scale in settings.scales:
        states = trajectory(prior, conditioning, scale, grid, torch.Generator().manual_seed(0))
        first = draw.normal(states[0][0], torch.Generator().manual_seed(0))  # what the trajectory began with
        for index, (name, strategy) in itertools.product(indices, strategies.items()):
            x, own = states[index]
            t = grid[index].to(x).expand(len(x))
            generator = torch.Generator().manual_seed(1 + index)  # 0 drew the trajectory
            query = Query(x, t, prior, conditioning, generator, index, settings.steps)
            kappa, nfe = strategy(scale, own, first)(query)
            each, _ = noise.kappa_residual(kappa, x, t, prior, conditioning, scale)
            spread = float(each.std(correction=0))
            residuals.append(Residual(scale, name, float(grid[index]), float(each.mean()), spread, nfe / len(x)))
            if index == indices[len(indices) // 2]:
                images[scale, name] = prior.decode(_denoised(query, kappa, scale)[:1])[0].float().cpu()
            on_residual()
    return InversionResult(settings, tuple(residuals), images)


def _denoised(query: Query, kappa: Tensor, scale: float) -> Tensor:
    """x0_hat [B, ...] of x noised by kappa; x itself if kappa solves equation 8."""
    alpha, sigma = coefficients(query.prior.schedule, query.t, query.x)
    x_t = alpha * query.x + sigma * kappa
    eps, _ = guided_prediction(query.prior, x_t, query.t, query.conditioning, scale)
    return from_eps("x0", eps, x_t, alpha, sigma)


def write_residuals(path: str | Path, residuals: Sequence[Residual]) -> None:
    """Writes the residuals as CSV, completely or not at all."""
    values = [[f"{v:.6g}" if isinstance(v, float) else v for v in dataclasses.astuple(one)] for one in residuals]
    with replacing(path) as draft:
        draft.write_text(csv_text([[field.name for field in dataclasses.fields(Residual)], *values]), encoding="utf-8")
