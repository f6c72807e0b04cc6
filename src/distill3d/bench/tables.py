"""Tables: the mean of each metric for each variant with its confidence interval, as Markdown, CSV and LaTeX.

Seeds of one prompt are not independent. They are averaged first, and the interval is Student's t over the prompts:
mean +- t(0.975, n - 1) s / sqrt(n), with s the sample standard deviation. With a single prompt it is over the seeds.
Differences are paired: prompt by prompt (or seed by seed), each variant minus the first one, which removes how
difficult a prompt is. Divergence is counted, and its interval is Wilson's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill3d.bench.judging import DIVERSITY, QUANTITIES, Scored
from distill3d.evaluation.metrics import Quantity
from distill3d.untrusted import csv_text

CONFIDENCE = 0.95
BINARY = ("diverged",)  # metrics that are 0 or 1 for each cell
ARROWS = {"higher": "↑", "lower": "↓", "one": "→ 1", "neither": ""}


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval; both ends are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int  # number of independent values

    @property
    def half(self) -> float | None:
        """Half the length of a symmetric interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and zero lies outside: then a difference is significant."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Table:
    """Estimates by (variant, metric); those that could not be measured are missing."""

    variants: tuple[str, ...]
    metrics: tuple[Quantity, ...]
    values: Mapping[tuple[str, str], Estimate]
    differences: Mapping[tuple[str, str], Estimate]  # to the first variant
    counts: Mapping[str, tuple[int, int]]  # variant -> (diverged, cells)

    @property
    def columns(self) -> tuple[Quantity, ...]:
        """The metrics of the printed tables, which show divergence as a count in a column of its own."""
        return tuple(metric for metric in self.metrics if metric.name not in BINARY)

    def best(self, metric: Quantity) -> str | None:
        """The variant with the best mean; None if all are equal or neither direction is better."""
        found = {v: self.values[v, metric.name].mean for v in self.variants if (v, metric.name) in self.values}
        if metric.better == "neither" or len(set(found.values())) < 2:
            return None
        return min(found, key=lambda v: metric.error(found[v]))

    def count(self, variant: str) -> str:
        """How many runs of a variant diverged: "2 of 8"."""
        return "{} of {}".format(*self.counts[variant])


def make_table(
    variants: Sequence[str],
    metrics: Sequence[str],
    cells: Sequence[Scored],
    diversities: Mapping[tuple[str, str], float] | None = None,
) -> Table:
    """The table of these variants and metrics; `diversities` are by (prompt, variant)."""
    one_prompt = len({cell.task.prompt for cell in cells}) == 1
    values: dict[tuple[str, str], Estimate] = {}
    differences: dict[tuple[str, str], Estimate] = {}
    for name in metrics:
        columns = {variant: _column(variant, name, cells, diversities or {}) for variant in variants}
        first = columns[variants[0]]
        for variant, column in columns.items():
            if column and name in BINARY:
                values[variant, name] = wilson(round(sum(column.values())), len(column))
            elif column:
                values[variant, name] = interval(independent(column, one_prompt))
            pairs = {key: column[key] - first[key] for key in column if key in first}
            if variant != variants[0] and pairs:
                differences[variant, name] = interval(independent(pairs, one_prompt))
    rows = {variant: [cell for cell in cells if cell.task.variant.name == variant] for variant in variants}
    counts = {variant: (sum(cell.diverged for cell in row), len(row)) for variant, row in rows.items()}
    shown = tuple(QUANTITIES[name] for name in metrics if any((v, name) in values for v in variants))
    return Table(tuple(variants), shown, values, differences, counts)


def independent(column: Mapping[tuple[str, int], float], one_prompt: bool) -> list[float]:
    """(prompt, seed) -> value as one value per prompt, or per seed if there is only one prompt."""
    if one_prompt:
        return list(column.values())
    prompts: dict[str, list[float]] = {}
    for (prompt, _), value in column.items():
        prompts.setdefault(prompt, []).append(value)
    return [statistics.fmean(values) for values in prompts.values()]


def interval(values: Sequence[float]) -> Estimate:
    """Student's interval for the mean of independent values.

    Raises:
        ValueError: for no values.
    """
    from scipy.stats import t

    if not values:
        raise ValueError("a mean needs at least one value")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def wilson(hits: int, n: int) -> Estimate:
    """A fraction of n with Wilson's interval (1927), which stays within [0, 1] and is not empty at 0 of n.

    Raises:
        ValueError: unless 0 <= hits <= n and n >= 1.
    """
    from scipy.stats import binomtest

    ends = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(ends.low), float(ends.high), n)


def markdown(table: Table, transposed: bool = False) -> str:
    """The table as Markdown with the best mean of each metric in bold, and the paired differences below.

    Args:
        transposed: a row for each metric and a column for each method, which fits a terminal; default: the reverse.
    """

    def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        first, *others = zip(heads, *rows, strict=True) if transposed else (heads, *rows)
        return _grid("pipe", first, others)

    def value(variant: str, metric: Quantity) -> str:
        text = plain(table.values.get((variant, metric.name)), " ± ")
        return f"**{text}**" if table.best(metric) == variant else text

    def difference(variant: str, metric: Quantity) -> str:
        found = table.differences.get((variant, metric.name))
        text = plain(found, " ± ", signed=True)
        return f"**{text}**" if found and found.excludes_zero else text

    heads = [heading(metric) for metric in table.columns]
    rows = [[_escaped(v), *(value(v, m) for m in table.columns), table.count(v)] for v in table.variants]
    parts = [grid(["method", *heads, "diverged"], rows)]
    if len(table.variants) > 1:
        rows = [[_escaped(v), *(difference(v, m) for m in table.columns)] for v in table.variants[1:]]
        parts.append(grid([f"minus {_escaped(table.variants[0])}", *heads], rows))
    return "\n\n".join([*parts, f"{_note(table)}\n"])


def latex(table: Table) -> str:
    """A LaTeX tabular for the package booktabs, with the best mean of each metric in bold."""

    def value(variant: str, metric: Quantity) -> str:
        found = table.values.get((variant, metric.name))
        if found is None:
            return "--"
        text = plain(found, r" \pm ")
        return rf"$\mathbf{{{text}}}$" if table.best(metric) == variant else f"${text}$"

    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "one": r" $\to 1$", "neither": ""}
    heads = [f"{_tex(m.name.replace('_', ' '))}{arrows[m.better]}" for m in table.columns]
    rows = [[_tex(v), *(value(v, m) for m in table.columns), table.count(v)] for v in table.variants]
    text = _grid("latex_raw", ["method", *heads, "diverged"], rows)
    for rule in ("toprule", "midrule", "bottomrule"):  # tabulate's own booktabs format would escape the mathematics
        text = text.replace(r"\hline", rf"\{rule}", 1)
    return f"% {_note(table)}\n{text}\n"


def _grid(style: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from tabulate import tabulate

    alignment = ("left", *["right"] * (len(heads) - 1))
    return tabulate(rows, heads, tablefmt=style, colalign=alignment, disable_numparse=True)


def summary_csv(table: Table) -> str:
    """A line for each variant and metric: mean, interval and n, and the same of the difference."""
    names = ("mean", "low", "high", "n")
    rows: list[list[object]] = []
    for variant in table.variants:
        for metric in table.metrics:
            value = table.values.get((variant, metric.name))
            if value is None:
                continue
            difference = table.differences.get((variant, metric.name))
            numbers = [*_numbers(value), *_numbers(difference)]
            rows.append([variant, metric.name, metric.unit, metric.better, *numbers])
    return csv_text([["variant", "metric", "unit", "better", *names, *(f"difference_{name}" for name in names)], *rows])


def cells_csv(metrics: Sequence[Quantity], cells: Sequence[Scored]) -> str:
    """A line for each cell with all its numbers."""
    rows: list[list[object]] = []
    for cell in cells:
        task, outcome = cell.task, cell.outcome
        numbers = [_number(cell.scores.get(metric.name)) for metric in metrics]
        rows.append([task.prompt, task.variant.name, task.seed, outcome.steps, outcome.failure, task.folder, *numbers])
    return csv_text([["prompt", "variant", "seed", "steps", "failure", "folder", *(m.name for m in metrics)], *rows])


def plain(estimate: Estimate | None, between: str, signed: bool = False) -> str:
    """ "27.3 ± 0.4", with as many digits as the interval justifies; "-" without an estimate."""
    if estimate is None:
        return "-"
    half = estimate.half
    digits = _digits(half or abs(estimate.mean) / 10)
    text = f"{estimate.mean:{'+' if signed else ''}.{digits}f}"
    return text if half is None else f"{text}{between}{half:.{digits}f}"


def readable(metric: Quantity) -> str:
    """The name of a metric for people, with its unit: "peak memory (GiB)"."""
    return metric.name.replace("_", " ") + (f" ({metric.unit})" if metric.unit else "")


def heading(metric: Quantity) -> str:
    """The name of a metric for people, with its unit and an arrow for the better direction."""
    return f"{readable(metric)} {ARROWS[metric.better]}".rstrip()


def _digits(size: float) -> int:
    """Decimals that show two digits of a number of this size, at most 4."""
    return 2 if not size or not math.isfinite(size) else max(0, min(4, 1 - math.floor(math.log10(size))))


def _column(
    variant: str, metric: str, cells: Sequence[Scored], diversities: Mapping[tuple[str, str], float]
) -> dict[tuple[str, int], float]:
    """(prompt, seed) -> value. Values that are not finite, and the cost of a failed run, count as not measured."""
    if metric == DIVERSITY.name:
        return {(prompt, 0): value for (prompt, name), value in diversities.items() if name == variant}
    rows = [c for c in cells if c.task.variant.name == variant and metric in c.scores]
    if metric not in BINARY:
        rows = [c for c in rows if not c.outcome.failure]
    return {(c.task.prompt, c.task.seed): c.scores[metric] for c in rows if math.isfinite(c.scores[metric])}


def _note(table: Table) -> str:
    ns = sorted({e.n for (_, name), e in table.values.items() if name not in BINARY})
    n = f"{ns[0]} to {ns[-1]}" if len(ns) > 1 else str(ns[0] if ns else 0)
    prompts = "prompt" if n == "1" else "prompts"
    return (
        f"Mean and half the length of its 95 % interval (Student's t; seeds are averaged first, n = {n} {prompts}, or "
        "seeds if there is one prompt). Bold: best mean, or a difference whose interval excludes zero."
    )


def _numbers(estimate: Estimate | None) -> list[str]:
    """Mean, interval and n for CSV; empty without an estimate."""
    if estimate is None:
        return [""] * 4
    return [_number(value) for value in (estimate.mean, estimate.low, estimate.high, estimate.n)]


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
