"""Small plots as inline SVG: lines over a run, and means with their intervals. Colors come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from distill3d.bench.tables import Table, plain
from distill3d.evaluation.metrics import Quantity

WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 22, 30
COLORS = 8  # of the page; more lines than that are told apart by their dashes
BINS = 60  # points of a line


@dataclass(frozen=True)
class Line:
    """One curve: its place among the variants, and its points."""

    index: int
    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_plot(lines: Sequence[Line], title: str, across: str, log: bool = False) -> str:
    """Curves in one frame, each the mean of at most 60 bins; a logarithmic y axis leaves out what is not positive."""
    drawn = [(line, _binned(line, log)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    x_low, x_high = _widened(0.0, max(xs))
    y_low, y_high = _widened(min(ys), max(ys)) if log else _widened(min(0.0, *ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 12, title, "title")]
    for value in _powers(y_low, y_high) if log else ticks(y_low, y_high):
        _, y = place(x_low, value)
        shown = f"{10**value:.3g}" if log else f"{value:.4g}"
        parts += [f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>', _text(LEFT - 5, y + 3, shown, "end")]
    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(_text(x, HEIGHT - BOTTOM + 13, f"{value:,.0f}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, across, "middle"))
    for line, points in drawn:
        path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in points)
        parts.append(f'<path class="{_look(line.index)}" d="M{path}"><title>{escape(line.name)}</title></path>')
    label = f"{title}, over {across}: {', '.join(dict.fromkeys(line.name for line, _ in drawn))}"
    return _svg(parts, label, HEIGHT)


def interval_plot(table: Table, metric: Quantity, title: str) -> str:
    """The mean of a metric for each variant, a dot with its interval."""
    rows = [
        (i, v, table.values[v, metric.name]) for i, v in enumerate(table.variants) if (v, metric.name) in table.values
    ]
    if not rows:
        return ""
    ends = [end for _, _, e in rows for end in (e.mean, e.low, e.high) if end is not None]
    low, high = _widened(min(ends), max(ends))
    left, right, step = 84, 96, 20
    height = TOP + step * len(rows) + 22

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - right)

    parts = [_text(0, 12, title, "title")]
    marks = ticks(low, high)
    for value in marks if len(marks) < 4 else marks[::2]:
        parts += [f'<path class="grid" d="M{place(value):.1f} {TOP}V{height - 18}"/>',
                  _text(place(value), height - 5, f"{value:.4g}", "middle")]  # fmt: skip
    for row, (i, variant, e) in enumerate(rows):
        y = TOP + step * (row + 0.5)
        parts.append(_text(0, y + 3, _shortened(variant), "start"))
        if e.low is not None and e.high is not None:
            parts.append(f'<path class="bar c{i % COLORS}" d="M{place(e.low):.1f} {y}H{place(e.high):.1f}"/>')
        parts.append(f'<circle class="dot f{i % COLORS}" cx="{place(e.mean):.1f}" cy="{y}" r="3.5"/>')
        parts.append(_text(WIDTH, y + 3, plain(e, " ± "), "end"))
    told = "; ".join(f"{variant} {plain(e, ' ± ')}" for _, variant, e in rows)
    return _svg(parts, f"{title}: {told}", height)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], three to six of them."""
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Logarithms at which a logarithmic axis is labeled."""
    whole = [float(i) for i in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) > 5:
        whole = whole[:: -(-len(whole) // 5)]
    return whole if len(whole) > 1 else [low, (low + high) / 2, high]


def _binned(line: Line, log: bool) -> list[tuple[float, float]]:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y) and (y > 0 or not log)]
    size = max(1, -(-len(points) // BINS))
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]
    return [(x, math.log10(y)) for x, y in means] if log else means


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range of some length, a little wider than what lies in it."""
    room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return (low if low == 0 else low - room), high + room


def _look(index: int) -> str:
    return f"line c{index % COLORS} d{index // COLORS % 4}"


def _shortened(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "…"


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _svg(parts: Sequence[str], label: str, height: float) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'
