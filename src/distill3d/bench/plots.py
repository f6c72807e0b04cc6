"""Plots of a bench: curves over a run, and means with their intervals; as inline SVG for the report, or on any axes.

Everything that imports matplotlib starts at `new_figure`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

import numpy as np

from distill3d.bench.tables import Estimate, Table, plain
from distill3d.evaluation.metrics import Quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors of Okabe and Ito, which color-blind people can tell apart; markers and dashes do it in gray.
COLORS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
DASHES = ("-", "--", ":", "-.")
BINS = 60  # points per curve
STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten

# The report's page defines its colors as CSS variables, so that plots follow its light and dark schemes.
QUIET, RULE = "#66645f", "#dcd9d2"
CSS_COLORS = {QUIET: "var(--quiet)", RULE: "var(--rule)"} | {color: f"var(--c{i})" for i, color in enumerate(COLORS)}
WIDTH = 320  # of an SVG, in its own pixels


@dataclass(frozen=True)
class Curve:
    """One curve: the place of its variant in the table, which decides its color, a name, and its points."""

    index: int
    name: str
    x: Sequence[float]
    y: Sequence[float]


def new_figure(width: float, height: float, dpi: int = 72, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty matplotlib figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout=layout)


def line_plot(curves: Sequence[Curve], title: str, x_label: str, log: bool = False) -> str:
    """SVG of several curves, each averaged over at most 60 bins; "" if there are no points.

    With a logarithmic y axis, points that are not positive are left out.
    """
    binned = [(curve, points) for curve in curves if len(points := _binned(curve, log))]
    if not binned:
        return ""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    figure, axes = _svg_axes(170, left=44, right=10, bottom=33)
    for curve, points in binned:
        dash = DASHES[curve.index // len(COLORS) % len(DASHES)]
        (line,) = axes.plot(*points.T, color=COLORS[curve.index % len(COLORS)], linestyle=dash, linewidth=1.4)
        line.set_gid(f"curve:{curve.name}")
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=6))
        axes.minorticks_off()
    else:
        if all((points >= 0).all() for _, points in binned):
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.tick_params(axis="x", pad=6)
    axes.grid(axis="y", color=RULE, linewidth=0.75)
    axes.set_xlabel(x_label, color=QUIET, fontsize=10)
    axes.set_title(title, loc="left", fontsize=11)
    return _svg(figure, f"{title}, over {x_label}: {', '.join(dict.fromkeys(curve.name for curve, _ in binned))}")


def interval_plot(table: Table, metric: Quantity, title: str) -> str:
    """SVG of the mean of a metric for each variant with its 95 % interval; "" if there are none."""
    found = {name: table.values[name, metric.name] for name in table.variants if (name, metric.name) in table.values}
    if not found:
        return ""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = _svg_axes(44 + 20 * len(table.variants), left=84, right=96, bottom=22)
    draw_intervals(axes, table, metric)
    names = [_shortened(name) for name in table.variants]
    axes.set_yticks(range(len(names)), names, ha="left", parse_math=False)
    axes.tick_params(axis="y", pad=84)
    for i, name in enumerate(table.variants):
        place, units = (1, i), ("axes fraction", "data")
        value = plain(found.get(name), " ± ")
        axes.annotate(value, place, (94, 0), units, "offset points", ha="right", va="center", color=QUIET, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.grid(axis="x", color=RULE, linewidth=0.75)
    axes.annotate(title, (0, 1), (-84, 6), "axes fraction", "offset points", fontsize=11)
    values = "; ".join(f"{name} {plain(estimate, ' ± ')}" for name, estimate in found.items())
    return _svg(figure, f"{title}: {values}")


def draw_intervals(axes: Axes, table: Table, metric: Quantity) -> None:
    """Draws the mean of each variant with its interval on axes, one variant per row from top to bottom."""
    for i, variant in enumerate(table.variants):
        estimate = table.values.get((variant, metric.name))
        if estimate is not None:
            draw_estimate(axes, estimate, i, i)
    axes.set_ylim(len(table.variants) - 0.5, -0.5)


def draw_estimate(axes: Axes, estimate: Estimate, at: float, index: int, upright: bool = False) -> None:
    """Draws a mean with its interval in the color and with the marker of a variant, at a place on the other axis."""
    mean, bar = estimate.mean, None
    if estimate.low is not None and estimate.high is not None:
        bar = [[mean - estimate.low], [estimate.high - mean]]
    x, y = (at, mean) if upright else (mean, at)
    drawn = axes.errorbar(
        x,
        y,
        xerr=None if upright else bar,
        yerr=bar if upright else None,
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        linewidth=1.2,
        capsize=2,
    )
    drawn.lines[0].set_gid("mean:")
    for line in drawn.lines[2]:
        line.set_gid("interval:")


def _svg_axes(height: int, left: int, right: int, bottom: int, top: int = 22) -> tuple[Figure, Axes]:
    """A figure for an SVG with plain axes, its margins given in pixels."""
    figure = new_figure(WIDTH / 72, height / 72)
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    axes = figure.add_axes(box, frameon=False)
    axes.tick_params(which="both", length=0, pad=3, labelsize=10, labelcolor=QUIET)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """A figure as an inline <svg> element: without what a page does not need, and with the page's fonts and colors.

    The group id "KIND:NAME" becomes the class KIND, with NAME as its tooltip.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distill3d"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r' transform="rotate\(-0 [^"]*"| ?font-family: [^;"]*;|(?<=>)\s+(?=<)', "", buffer.getvalue())
    for color, variable in CSS_COLORS.items():
        text = text.replace(color, variable)
    root = ElementTree.fromstring(text.replace('xlink:href="#', 'href="#'))
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in [c for c in parent if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
        kind, colon, name = parent.get("id", "").partition(":")
        if colon:
            parent.set("class", kind)
            if name:
                ElementTree.SubElement(parent, "title").text = name
        if parent.tag == "g":
            parent.attrib.pop("id", None)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _binned(curve: Curve, log: bool) -> np.ndarray:
    """The means [N, 2] of at most 60 bins of the points that can be drawn."""
    points = np.stack([np.asarray(curve.x, float), np.asarray(curve.y, float)], axis=1)
    points = points[np.isfinite(points[:, 1]) & ((points[:, 1] > 0) if log else True)]
    if not len(points):
        return points
    starts = np.arange(0, len(points), -(-len(points) // BINS))
    return np.add.reduceat(points, starts) / np.diff(np.append(starts, len(points)))[:, None]


def _shortened(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "…"
