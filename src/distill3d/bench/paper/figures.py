"""Figures of the paper's experiments, for print: pictures in rows and columns, numbers below, a caption.

One figure is 7.2 inches wide, its text 7 points or more; colors are those of `evaluation.paper`, told apart in gray by
their markers. Needs matplotlib.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill3d.bench.cells import read_outcome, read_views
from distill3d.bench.paper.experiments import Experiment, method_of, scale_of
from distill3d.bench.paper.inversion import COLORS, MARKERS, figure_class
from distill3d.bench.protocol import Protocol, Task
from distill3d.bench.tables import Estimate, Table, heading
from distill3d.evaluation.metrics import Quantity
from distill3d.files import replacing

WIDTH = 7.2  # inches: a page between its margins
ROWS, COLUMNS = 6, 8  # of pictures in one figure, at most
PANELS = 4
LINE = 0.135  # inches of a line of the caption
MISSING = 0.93  # gray where there is no object

Grid = tuple[list[list[Tensor]], list[str], list[str]]  # rows of pictures [3, H, W], names of rows and of columns


def draw_experiment(
    path: Path, folder: Path, experiment: Experiment, protocol: Protocol, table: Table, caption: str
) -> None:
    """Writes the figure of a finished bench: pictures, then its panels, then the caption.

    Raises:
        ImportError: where matplotlib is missing.
        ValueError: where pictures of a cell cannot be read.
    """
    grid = GRIDS[experiment.layout](folder, protocol)
    metrics = panel_metrics(table, experiment.panels)
    if experiment.layout == "scales":
        draw_figure(
            path, grid, metrics, lambda panel, metric: _curve(panel, protocol, table, metric), caption, 1.9, False
        )
    else:
        height = 0.6 + 0.16 * len(table.variants)
        draw_figure(path, grid, metrics, lambda panel, metric: _dots(panel, table, metric), caption, height)


def draw_figure(
    path: Path,
    grid: Grid,
    metrics: Sequence[Quantity],
    panel: Callable[[Any, Quantity], None],
    caption: str,
    height: float,
    named: bool = True,
) -> None:
    """Writes a figure of a grid of pictures, a panel of `height` inches for each metric, and the caption.

    named: the panels share their rows, which have names.
    """
    pictures, rows, columns = grid
    words = textwrap.wrap(caption, 138, break_on_hyphens=False)
    sizes = [_grid_height(pictures), *([height] if metrics else []), LINE * len(words) + 0.1]
    figure = figure_class()(figsize=(WIDTH, sum(sizes)), dpi=300, layout="constrained")
    parts = figure.subfigures(len(sizes), 1, height_ratios=sizes)
    _pictures(parts[0], pictures, rows, columns)
    if metrics:
        drawn = parts[1].subplots(1, len(metrics), squeeze=False, sharey=named)[0]
        for axes, metric in zip(drawn, metrics, strict=True):
            panel(axes, metric)
    parts[-1].text(0.01, 0.98, "\n".join(words), va="top", fontsize=7, linespacing=1.15, parse_math=False)
    with replacing(path) as draft:
        figure.savefig(draft)


def panel_metrics(table: Table, wanted: Sequence[str]) -> list[Quantity]:
    """The metrics that are drawn: those wanted that were measured, else the first of the table; at most four."""
    found = {metric.name: metric for metric in table.columns}
    chosen = [found[name] for name in wanted if name in found]
    return (chosen or list(found.values()))[:PANELS]


def looks(folder: Path, protocol: Protocol, task: Task, count: int) -> Tensor:
    """`count` views of an object side by side [3, size, count size], from the front on; plain gray where there is none.

    Raises:
        ValueError: where its pictures are missing or damaged.
    """
    cell = folder / "cells" / task.folder
    outcome = read_outcome(cell)
    if outcome is None or outcome.failure:
        return torch.full((3, protocol.size, count * protocol.size), MISSING)
    places = [i * protocol.views // count for i in range(count)]
    return torch.cat(list(read_views(cell, protocol)[places]), dim=2)


def draw_pictures(
    path: Path, made: Mapping[str, Sequence[Tensor]], prompts: Sequence[str], table: Table, wanted: Sequence[str],
    caption: str,
) -> None:  # fmt: skip
    """Writes the figure of pictures [3, H, W] by a row's name and prompt; pictures of no numbers are gray."""
    shown = prompts[:COLUMNS]
    rows = [[torch.nan_to_num(picture, nan=MISSING) for picture in made[name][:COLUMNS]] for name in made]
    metrics = panel_metrics(table, wanted)
    height = 0.6 + 0.16 * len(table.variants)
    draw_figure(
        path,
        (rows, list(made), list(shown)),
        metrics,
        lambda panel, metric: _dots(panel, table, metric),
        caption,
        height,
    )


def _by_prompts(folder: Path, protocol: Protocol) -> Grid:
    """A row for each prompt (the first seed), a column for each variant, several views of each object."""
    count = max(1, min(protocol.views, 4, 12 // len(protocol.variants)))
    prompts = protocol.prompts[:ROWS]
    rows = [
        [looks(folder, protocol, Task(variant, prompt, protocol.seeds[0]), count) for variant in protocol.variants]
        for prompt in prompts
    ]
    return rows, list(prompts), list(protocol.names)


def _by_scales(folder: Path, protocol: Protocol) -> Grid:
    """A row for each method and prompt (first seed), a column for each guidance scale."""
    methods = list(dict.fromkeys(method_of(variant) for variant in protocol.variants))
    shown = [(p, m) for p in protocol.prompts[: ROWS // len(methods)] for m in methods]
    rows, columns = [], sorted({scale_of(variant) for variant in protocol.variants})
    for prompt, method in shown:
        own = sorted((v for v in protocol.variants if method_of(v) == method), key=scale_of)
        rows.append([looks(folder, protocol, Task(variant, prompt, protocol.seeds[0]), 2) for variant in own])
    return rows, [f"{m}: {p}" for p, m in shown], [f"scale {scale:g}" for scale in columns]


def _by_seeds(folder: Path, protocol: Protocol) -> Grid:
    """A row for each prompt and variant, a column for each seed."""
    seeds = protocol.seeds[:8]
    shown = [(p, v) for p in protocol.prompts[: max(1, ROWS // len(protocol.variants))] for v in protocol.variants]
    rows = [[looks(folder, protocol, Task(v, p, seed), 2) for seed in seeds] for p, v in shown]
    return rows, [f"{v.name}: {p}" for p, v in shown], [f"seed {seed}" for seed in seeds]


GRIDS: dict[str, Callable[[Path, Protocol], Grid]] = {
    "prompts": _by_prompts, "scales": _by_scales, "seeds": _by_seeds,
}  # fmt: skip
NAMES, LARGEST = 1.0, 1.2  # inches for the names of the rows, and for the height of a picture


def _grid_height(pictures: Sequence[Sequence[Tensor]]) -> float:
    """Inches that a grid needs beside the names of its rows, with two lines for those of its columns."""
    _, high, wide = pictures[0][0].shape
    return min((WIDTH - NAMES) / len(pictures[0]) * high / wide, LARGEST) * len(pictures) + 0.45


def _pictures(part: Any, pictures: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str]) -> None:
    """All pictures as one image, so that they stay sharp, with white between them."""
    _, high, wide = pictures[0][0].shape
    gap = max(1, wide // 24)
    sheet = torch.ones(3, len(rows) * (high + gap) - gap, len(columns) * (wide + gap) - gap)
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            sheet[:, i * (high + gap) : i * (high + gap) + high, j * (wide + gap) : j * (wide + gap) + wide] = picture
    axes = part.subplots()
    axes.imshow(sheet.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    middles = ([i * (n + gap) + n / 2 for i in range(count)] for n, count in ((wide, len(columns)), (high, len(rows))))
    across = max(9, int(92 / len(columns)))  # characters above a column
    names = ["\n".join(textwrap.wrap(name, across)) for name in columns]
    axes.set_xticks(next(middles), names, fontsize=7, parse_math=False)  # a $ in a prompt is a dollar
    axes.set_yticks(next(middles), ["\n".join(textwrap.wrap(name, 14)) for name in rows], fontsize=7, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _dots(panel: Any, table: Table, metric: Quantity) -> None:
    """The mean of each variant with its interval, from top to bottom."""
    for i, variant in enumerate(table.variants):
        found = table.values.get((variant, metric.name))
        if found is not None:
            _point(panel, found.mean, i, i, xerr=_bars(found))
    panel.set_yticks(range(len(table.variants)), table.variants, fontsize=7, parse_math=False)
    panel.set_ylim(len(table.variants) - 0.5, -0.5)
    _style(panel, metric)


def _curve(panel: Any, protocol: Protocol, table: Table, metric: Quantity) -> None:
    """The mean over the guidance scale, a curve for each method."""
    for i, method in enumerate(dict.fromkeys(method_of(variant) for variant in protocol.variants)):
        own = sorted((v for v in protocol.variants if method_of(v) == method), key=scale_of)
        found = [(scale_of(v), table.values[v.name, metric.name]) for v in own if (v.name, metric.name) in table.values]
        if not found:
            continue
        scales, means = [scale for scale, _ in found], [e.mean for _, e in found]
        panel.plot(scales, means, color=COLORS[i], linestyle=("-", "--")[i % 2], linewidth=1.2, label=method)
        for scale, estimate in found:
            _point(panel, scale, estimate.mean, i, yerr=_bars(estimate))
    scales = sorted({scale_of(v) for v in protocol.variants})
    if min(scales) > 0:
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xticks(scales, [f"{scale:g}" for scale in scales])
    panel.set_xlabel("guidance scale", fontsize=7)
    panel.legend(fontsize=7, frameon=False)
    _style(panel, metric)


def _point(panel: Any, x: float, y: float, i: int, **bars: Any) -> None:
    panel.errorbar(x, y, color=COLORS[i % 8], marker=MARKERS[i % 11], markersize=4, linewidth=1.2, capsize=2, **bars)


def _bars(found: Estimate) -> list[list[float]] | None:
    if found.low is None or found.high is None:
        return None
    return [[found.mean - found.low], [found.high - found.mean]]


def _style(panel: Any, metric: Quantity) -> None:
    title = textwrap.fill(heading(metric), 24)
    for arrow, name in (("↑", "uparrow"), ("↓", "downarrow"), ("→", "to")):  # not in every font
        title = title.replace(arrow, rf"$\{name}$")
    panel.set_title(title, fontsize=7)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3, linewidth=0.5)
