"""Figures of the paper's experiments, for print: rows and columns of images, panels of numbers, and a caption.

Figures are 7.2 inches wide, with text of 7 points or more. Colors and markers are those of `bench.plots`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill3d.bench.cells import read_outcome, read_views
from distill3d.bench.paper.experiments import Experiment, method_of, scale_of
from distill3d.bench.paper.inversion import InversionResult
from distill3d.bench.plots import COLORS, DASHES, MARKERS, draw_estimate, draw_intervals, new_figure
from distill3d.bench.protocol import Protocol, Task, Variant
from distill3d.bench.tables import Table, heading
from distill3d.evaluation.metrics import Quantity
from distill3d.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase
    from matplotlib.lines import Line2D

WIDTH = 7.2  # inches: a page without its margins
ROWS, COLUMNS = 6, 8  # of images in one figure, at most
PANELS = 4
LINE = 0.135  # inches per line of the caption
MISSING = 0.93  # gray in place of a missing object
FLOOR = 1e-8  # residuals that are exact up to the rounding of float32 are drawn here

Grid = tuple[list[list[Tensor]], list[str], list[str]]  # rows of images [3, H, W], names of rows and of columns


def draw_experiment(
    path: Path, folder: Path, experiment: Experiment, protocol: Protocol, table: Table, caption: str
) -> None:
    """Writes the figure of a finished bench: images, then its panels, then the caption.

    Raises:
        ValueError: if the images of a cell cannot be read.
    """
    grid = GRIDS[experiment.layout](folder, protocol)
    if experiment.layout == "scales":
        _draw_figure(path, grid, table, experiment.panels, caption, lambda a, m: _draw_curves(a, protocol, table, m))
    else:
        _draw_figure(path, grid, table, experiment.panels, caption)


def draw_images(
    path: Path,
    images: Mapping[str, Sequence[Tensor]],
    prompts: Sequence[str],
    table: Table,
    panels: Sequence[str],
    caption: str,
) -> None:
    """Writes the figure of images [3, H, W] by a row's name and prompt; pixels that are NaN are gray."""
    rows = [[torch.nan_to_num(image, nan=MISSING) for image in row[:COLUMNS]] for row in images.values()]
    _draw_figure(path, (rows, list(images), list(prompts[:COLUMNS])), table, panels, caption)


def draw_residuals(path: str | Path, result: InversionResult, caption: str) -> None:
    """Writes the figure of the inversion experiment: a panel per scale, images of each strategy, and the caption."""
    scales = result.settings.scales
    names = list(dict.fromkeys(residual.strategy for residual in result.residuals))
    letters = [f"({chr(ord('a') + i)})" for i in range(len(names))]
    width = max(WIDTH, 3.6 * len(scales))
    legend = 0.22 * math.ceil(len(names) / 2) + 0.1
    heights = [3.0, legend, *[width / len(names) + 0.25] * len(scales), 0.9]
    figure = new_figure(width, sum(heights) + 0.5, dpi=200, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    lines = _draw_residual_panels(parts[0], result, names)
    labels = [f"{letter} {name} ({_cost(result, name)} NFE)" for letter, name in zip(letters, names, strict=True)]
    parts[1].legend(lines, labels, ncols=2, loc="center", fontsize=7.5, frameon=False)
    for part, scale in zip(parts[2:-1], scales, strict=True):
        part.suptitle(f"one step of denoising with kappa, guidance scale {scale:g}", fontsize=8)
        for axes, letter, name in zip(part.subplots(1, len(names), squeeze=False)[0], letters, names, strict=True):
            axes.imshow(result.images[scale, name].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(letter, fontsize=7.5)
    words = "\n".join(textwrap.wrap(caption, int(width * 16)))
    parts[-1].text(0.01, 0.95, words, va="top", fontsize=7.5, parse_math=False)
    with replacing(path) as draft:
        figure.savefig(draft)


def choose_panels(table: Table, wanted: Sequence[str]) -> list[Quantity]:
    """The metrics that are drawn: those wanted that were measured, else the first of the table; at most four."""
    found = {metric.name: metric for metric in table.columns}
    chosen = [found[name] for name in wanted if name in found]
    return (chosen or list(found.values()))[:PANELS]


def strip_of_views(folder: Path, protocol: Protocol, task: Task, count: int) -> Tensor:
    """`count` views of an object side by side [3, size, count size], beginning at the front; gray if there is none.

    Raises:
        ValueError: if its images are missing or damaged.
    """
    cell = folder / "cells" / task.folder
    outcome = read_outcome(cell)
    if outcome is None or outcome.failure:
        return torch.full((3, protocol.size, count * protocol.size), MISSING)
    indices = [i * protocol.views // count for i in range(count)]
    return torch.cat(list(read_views(cell, protocol)[indices]), dim=2)


def _draw_figure(
    path: Path,
    grid: Grid,
    table: Table,
    panels: Sequence[str],
    caption: str,
    draw_panel: Callable[[Axes, Quantity], None] | None = None,
) -> None:
    """Writes a figure of a grid of images, a panel for each metric, and the caption.

    By default the panels show intervals and share the names of the variants on their y axes.
    """
    metrics = choose_panels(table, panels)
    words = textwrap.wrap(caption, 138, break_on_hyphens=False)
    height = 1.9 if draw_panel else 0.6 + 0.16 * len(table.variants)
    heights = [_grid_height(grid[0]), *([height] if metrics else []), LINE * len(words) + 0.1]
    figure = new_figure(WIDTH, sum(heights), dpi=300, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_grid(parts[0], *grid)
    if metrics:
        every = parts[1].subplots(1, len(metrics), squeeze=False, sharey=draw_panel is None)[0]
        for axes, metric in zip(every, metrics, strict=True):
            if draw_panel:
                draw_panel(axes, metric)
            else:
                draw_intervals(axes, table, metric)
                axes.set_yticks(range(len(table.variants)), table.variants, fontsize=7, parse_math=False)
            _style(axes, metric)
    parts[-1].text(0.01, 0.98, "\n".join(words), va="top", fontsize=7, linespacing=1.15, parse_math=False)
    with replacing(path) as draft:
        figure.savefig(draft)


def _by_prompts(folder: Path, protocol: Protocol) -> Grid:
    """A row for each prompt (of the first seed), a column for each variant, several views of each object."""
    count = max(1, min(protocol.views, 4, 12 // len(protocol.variants)))
    prompts, seed = protocol.prompts[:ROWS], protocol.seeds[0]
    rows = [[strip_of_views(folder, protocol, Task(v, p, seed), count) for v in protocol.variants] for p in prompts]
    return rows, list(prompts), list(protocol.names)


def _by_scales(folder: Path, protocol: Protocol) -> Grid:
    """A row for each method and prompt (of the first seed), a column for each guidance scale."""
    methods = _methods(protocol)
    shown, seed = [(p, name) for p in protocol.prompts[: ROWS // len(methods)] for name in methods], protocol.seeds[0]
    rows = [[strip_of_views(folder, protocol, Task(v, p, seed), 2) for v in methods[name]] for p, name in shown]
    columns = sorted({scale_of(variant) for variant in protocol.variants})
    return rows, [f"{name}: {prompt}" for prompt, name in shown], [f"scale {scale:g}" for scale in columns]


def _by_seeds(folder: Path, protocol: Protocol) -> Grid:
    """A row for each prompt and variant, a column for each seed."""
    seeds = protocol.seeds[:COLUMNS]
    shown = [(p, v) for p in protocol.prompts[: max(1, ROWS // len(protocol.variants))] for v in protocol.variants]
    rows = [[strip_of_views(folder, protocol, Task(v, p, seed), 2) for seed in seeds] for p, v in shown]
    return rows, [f"{v.name}: {p}" for p, v in shown], [f"seed {seed}" for seed in seeds]


GRIDS: dict[str, Callable[[Path, Protocol], Grid]] = {
    "prompts": _by_prompts,
    "scales": _by_scales,
    "seeds": _by_seeds,
}
NAMES, LARGEST = 1.0, 1.2  # inches for the names of the rows, and for the height of an image


def _methods(protocol: Protocol) -> dict[str, list[Variant]]:
    """The variants of each method of a comparison of guidance scales, sorted by scale."""
    methods: dict[str, list[Variant]] = {}
    for variant in protocol.variants:
        methods.setdefault(method_of(variant), []).append(variant)
    return {name: sorted(variants, key=scale_of) for name, variants in methods.items()}


def _grid_height(images: Sequence[Sequence[Tensor]]) -> float:
    """Inches that a grid needs next to the names of its rows, with two lines for those of its columns."""
    _, height, width = images[0][0].shape
    return min((WIDTH - NAMES) / len(images[0]) * height / width, LARGEST) * len(images) + 0.45


def _draw_grid(
    part: FigureBase, images: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draws all images as one, so that they stay sharp, with white gaps."""
    _, height, width = images[0][0].shape
    gap = max(1, width // 24)
    sheet = torch.ones(3, len(rows) * (height + gap) - gap, len(columns) * (width + gap) - gap)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            sheet[:, top : top + height, left : left + width] = image
    axes = part.subplots()
    axes.imshow(sheet.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    across = max(9, int(92 / len(columns)))  # characters above a column
    names = ["\n".join(textwrap.wrap(name, across)) for name in columns]
    centers = [j * (width + gap) + width / 2 for j in range(len(columns))]
    axes.set_xticks(centers, names, fontsize=7, parse_math=False)  # a $ in a prompt is a dollar
    names = ["\n".join(textwrap.wrap(name, 14)) for name in rows]
    axes.set_yticks([i * (height + gap) + height / 2 for i in range(len(rows))], names, fontsize=7, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_curves(axes: Axes, protocol: Protocol, table: Table, metric: Quantity) -> None:
    """The mean over the guidance scale, a curve for each method."""
    measured = {name for name, key in table.values if key == metric.name}
    for i, (name, variants) in enumerate(_methods(protocol).items()):
        found = [(scale_of(v), table.values[v.name, metric.name]) for v in variants if v.name in measured]
        means = [estimate.mean for _, estimate in found]
        axes.plot([x for x, _ in found], means, color=COLORS[i], linestyle=DASHES[i % 2], linewidth=1.2, label=name)
        for scale, estimate in found:
            draw_estimate(axes, estimate, scale, i, upright=True)
    scales = sorted({scale_of(variant) for variant in protocol.variants})
    if min(scales) > 0:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set_xlabel("guidance scale", fontsize=7)
    axes.legend(fontsize=7, frameon=False)


def _draw_residual_panels(part: FigureBase, result: InversionResult, names: Sequence[str]) -> list[Line2D]:
    """The residual over t, a panel for each scale; returns one line per strategy for the legend."""
    panels = part.subplots(1, len(result.settings.scales), sharey=True, squeeze=False)[0]
    lines = []
    for axes, scale in zip(panels, result.settings.scales, strict=True):
        lines = []
        for i, name in enumerate(names):
            points = [(r.t, max(r.residual, FLOOR)) for r in result.residuals if (r.scale, r.strategy) == (scale, name)]
            color, marker, dash = COLORS[i % 8], MARKERS[i % 11], DASHES[i // 2 % 4]  # none repeats within 88
            lines += axes.plot(
                *zip(*points, strict=True), color=color, marker=marker, linestyle=dash, markersize=4, linewidth=1.2
            )
        axes.set_yscale("log")
        axes.set_title(f"guidance scale {scale:g}", fontsize=9)
        axes.set_xlabel("t (1 is pure noise)", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.3, linewidth=0.5)
    panels[0].set_ylabel(f"residual of equation 8 ({FLOOR:.0e} or less at the bottom)", fontsize=8)
    return lines


def _cost(result: InversionResult, name: str) -> str:
    """The NFE of a strategy per sample over all times: "10", or "2 to 20"."""
    nfe = [residual.nfe for residual in result.residuals if residual.strategy == name]
    return f"{min(nfe):.0f} to {max(nfe):.0f}" if max(nfe) > min(nfe) else f"{max(nfe):.0f}"


def _style(axes: Axes, metric: Quantity) -> None:
    title = textwrap.fill(heading(metric), 24)
    for arrow, name in (("↑", "uparrow"), ("↓", "downarrow"), ("→", "to")):  # not in every font
        title = title.replace(arrow, rf"$\{name}$")
    axes.set_title(title, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3, linewidth=0.5)
