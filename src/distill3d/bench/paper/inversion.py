"""The paper's figure on how to find kappa: the residual of its equation 8 over t, for every way to look for it.

On the trajectory of a DDIM sampler x0(t) and kappa(t) are known and kappa = eps(x0 + sigma/alpha kappa, t, y) holds
exactly (Lukoianov et al. 2024, eq. 8). Each strategy is shown x0(t) alone and returns its kappa; the residual is the
mean square of eps(...) - kappa, and its price the network rows that it took.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

# (guidance scale of equation 8, DDIM's own kappa) -> the noise strategy under study
Strategy = Callable[[float, Tensor], Noise]


def inversion(steps: int, factor: float = 1.0, solver: ddim.Solver = "euler") -> Strategy:
    """DDIM inversion to t itself at `factor` times the scale of equation 8; 0 is the unconditional one."""
    return lambda scale, own: noise.ddim_inversion(steps, factor * scale, eta=0.0, solver=solver, overshoot=0.0)


STRATEGIES: dict[str, Strategy] = {
    "random draw": lambda scale, own: noise.gaussian(),
    "DDIM's own": lambda scale, own: noise.given(own),
    "fixed point, 10 steps": lambda scale, own: noise.fixed_point(10, scale, overshoot=0.0),
    "fixed point, 10 steps, damped": lambda scale, own: noise.fixed_point(10, scale, damping=0.5, overshoot=0.0),
    "fixed point, 10 steps, Anderson": lambda scale, own: noise.fixed_point(10, scale, memory=3, overshoot=0.0),
    "gradient descent, 10 steps": lambda scale, own: noise.descent(10, scale, overshoot=0.0),
    "inversion, 10 steps": inversion(10),
    "inversion, 40 steps": inversion(40),
    "inversion, 10 steps, second order (ab2)": inversion(10, solver="ab2"),
    "inversion, 5 steps, Heun": inversion(5, solver="heun"),
    "inversion, 10 steps, unconditional": inversion(10, 0.0),
    "inversion, 10 steps, negative scale": inversion(10, -1.0),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured: prompts x seeds, at `times` times of a DDIM trajectory, for each scale of equation 8."""

    prompts: tuple[str, ...] = ("a red mushroom", "a blue car", "a yellow duck", "a green house")
    seeds: int = 2
    scales: tuple[float, ...] = (1.0, 5.0)
    steps: int = 50
    times: int = 9

    def __post_init__(self) -> None:
        if not self.prompts or not self.scales or min(self.seeds, self.steps, self.times) < 1:
            raise ValueError("a study needs at least one prompt, scale, seed, step and time")
        if not all(math.isfinite(scale) for scale in self.scales):
            raise ValueError(f"guidance scales must be finite numbers, got {self.scales}")
        if self.times > self.steps:
            raise ValueError(f"{self.times} times cannot be told apart on {self.steps} steps: give more steps")


@dataclasses.dataclass(frozen=True)
class Point:
    """One strategy at one time, over all prompts and seeds."""

    scale: float
    strategy: str
    t: float
    residual: float  # mean over the samples of the mean squared residual of equation 8
    spread: float  # standard deviation over the samples
    nfe: float  # network rows a sample


@dataclasses.dataclass(frozen=True)
class Findings:
    """The points of the curves, and a picture of the first sample for each scale and strategy."""

    study: Study
    points: tuple[Point, ...]
    pictures: dict[tuple[float, str], Tensor]  # denoised through kappa at the middle time, [3, H, W]


@torch.no_grad()
def trajectory(
    prior: Prior, conditioning: Conditioning, scale: float, times: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """(x0, kappa), each [B, ...], of a DDIM sampler at each of its times [K], falling; it starts from pure noise."""
    seen: list[tuple[Tensor, Tensor]] = []
    model = Guided(prior, conditioning, scale)

    def watched(x: Tensor, t: Tensor) -> Tensor:
        eps = model(x, t)
        seen.append((from_eps("x0", eps, x, *coefficients(prior.schedule, t, x)), eps))
        return eps

    x = torch.zeros(len(conditioning), *prior.sample_shape, device=prior.device)
    x = coefficients(prior.schedule, times[:1].expand(len(x)), x)[1] * draw.normal(x, generator)
    ddim.sample(watched, x, prior.schedule, torch.cat([times, times.new_zeros(1)]))
    return seen


@torch.no_grad()
def investigate(
    prior: Prior,
    study: Study,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    on_point: Callable[[], None] = lambda: None,
) -> Findings:
    """Measures every strategy at every time; `on_point` is called after each scale, time and strategy."""
    prompts = [prompt for prompt in study.prompts for _ in range(study.seeds)]
    conditioning = Conditioning(prior.embed(prompts), prior.embed([""] * len(prompts)))
    grid = torch.linspace(0.98, 0.02, study.steps, dtype=torch.float64)
    places = sorted({round(i) for i in torch.linspace(0, study.steps - 1, study.times).tolist()})
    points, pictures = [], {}
    for scale in study.scales:
        seen = trajectory(prior, conditioning, scale, grid, torch.Generator().manual_seed(0))
        for place, (name, strategy) in itertools.product(places, strategies.items()):
            x, own = seen[place]
            t = grid[place].to(x).expand(len(x))
            generator = torch.Generator().manual_seed(1 + place)  # 0 drew the trajectory
            query = Query(x, t, prior, conditioning, generator, place, study.steps)
            kappa, rows = strategy(scale, own)(query)
            each, _ = noise.kappa_residual(kappa, x, t, prior, conditioning, scale)
            spread = float(each.std(correction=0))
            points.append(Point(scale, name, float(grid[place]), float(each.mean()), spread, rows / len(x)))
            if place == places[len(places) // 2]:
                pictures[scale, name] = prior.decode(_denoised(query, kappa, scale)[:1])[0].float().cpu()
            on_point()
    return Findings(study, tuple(points), pictures)


def _denoised(query: Query, kappa: Tensor, scale: float) -> Tensor:
    """x0_hat [B, ...] from x noised by kappa; x itself where kappa solves equation 8."""
    alpha, sigma = coefficients(query.prior.schedule, query.t, query.x)
    x_t = alpha * query.x + sigma * kappa
    eps, _ = guided_prediction(query.prior, x_t, query.t, query.conditioning, scale)
    return from_eps("x0", eps, x_t, alpha, sigma)


def write_points(path: str | Path, points: Sequence[Point]) -> None:
    """Writes the points as CSV, whole or not at all."""
    with replacing(path) as draft, draft.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(field.name for field in dataclasses.fields(Point))
        table.writerows(
            [f"{v:.6g}" if isinstance(v, float) else v for v in dataclasses.astuple(point)] for point in points
        )


# Okabe and Ito's colors, told apart by color-blind eyes, and in gray by their markers and dashes.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#7F7F7F")
MARKERS = ("x", "o", "s", "^", "D", "v", "P", "*", "<", ">", "h")
DASHES = ("-", "--", ":", "-.")
FLOOR = 1e-8  # what is exact, to the rounding of float32, is drawn here


def figure_class() -> Any:
    """matplotlib's Figure; ImportError with what to type where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: type  pip install 'distill3d[bench]'") from None
    return Figure


def draw_findings(path: str | Path, findings: Findings, caption: str) -> None:
    """Writes the figure: a panel for each scale, pictures of each strategy, and the caption; needs matplotlib."""
    scales = findings.study.scales
    names = list(dict.fromkeys(point.strategy for point in findings.points))
    width = max(7.2, 3.6 * len(scales))
    strip = width / len(names)
    legend, words = 0.22 * math.ceil(len(names) / 2) + 0.1, 0.9
    heights = [3.0, legend, *[strip + 0.25] * len(scales), words]
    figure = figure_class()(figsize=(width, sum(heights) + 0.5), dpi=200, layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights)
    handles = _curves(rows[0], findings, names)
    rows[1].legend(handles.values(), handles.keys(), ncols=2, loc="center", fontsize=7.5, frameon=False)
    for row, scale in zip(rows[2:-1], scales, strict=True):
        _strip(row, findings, names, scale)
    rows[-1].text(
        0.01, 0.95, "\n".join(textwrap.wrap(caption, int(width * 16))), va="top", fontsize=7.5, parse_math=False
    )
    with replacing(path) as draft:
        figure.savefig(draft)


def _curves(part: Any, findings: Findings, names: Sequence[str]) -> dict[str, Any]:
    """A panel for each scale; returns the lines by their label, with the price in it."""
    panels = part.subplots(1, len(findings.study.scales), sharey=True, squeeze=False)[0]
    handles = {}
    for panel, scale in zip(panels, findings.study.scales, strict=True):
        for (letter, name), (color, marker, dash) in zip(_lettered(names), _looks(), strict=False):
            points = [p for p in findings.points if (p.scale, p.strategy) == (scale, name)]
            price = [p.nfe for p in findings.points if p.strategy == name]
            (line,) = panel.plot(
                [p.t for p in points], [max(p.residual, FLOOR) for p in points],
                color=color, marker=marker, linestyle=dash, markersize=4, linewidth=1.2,
            )  # fmt: skip
            spent = f"{min(price):.0f} to {max(price):.0f}" if max(price) > min(price) else f"{max(price):.0f}"
            handles[f"{letter} {name} ({spent} NFE)"] = line
        panel.set_yscale("log")
        panel.set_title(f"guidance scale {scale:g}", fontsize=9)
        panel.set_xlabel("t (1 is pure noise)", fontsize=8)
        panel.tick_params(labelsize=7.5)
        panel.grid(alpha=0.3, linewidth=0.5)
    panels[0].set_ylabel(f"residual of equation 8 ({FLOOR:.0e} or less at the bottom)", fontsize=8)
    return handles


def _strip(part: Any, findings: Findings, names: Sequence[str], scale: float) -> None:
    part.suptitle(f"one step of denoising through kappa, guidance scale {scale:g}", fontsize=8)
    for panel, (letter, name) in zip(part.subplots(1, len(names), squeeze=False)[0], _lettered(names), strict=True):
        picture = findings.pictures[scale, name].clamp(0, 1).permute(1, 2, 0).numpy()
        panel.imshow(picture, interpolation="nearest")
        panel.set_xlabel(letter, fontsize=7.5)
        panel.set_xticks([])
        panel.set_yticks([])


def _lettered(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"({chr(ord('a') + i)})", name) for i, name in enumerate(names)]


def _looks() -> Iterator[tuple[str, str, str]]:
    """Color, marker and dashes for each curve, endlessly; none repeats within 88."""
    return ((COLORS[i % 8], MARKERS[i % 11], DASHES[i // 2 % 4]) for i in itertools.count())
