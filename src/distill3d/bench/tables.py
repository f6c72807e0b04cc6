"""Tables: the mean of each metric for each variant, with a confidence interval, as Markdown, CSV and LaTeX.

Seeds of one prompt are not independent of each other. They are averaged first, and the interval is Student's t over
the prompts: mean +- t(0.975, n - 1) s / sqrt(n), s the sample's standard deviation. Where there is one prompt only it
is over the seeds. Differences are paired: prompt by prompt (seed by seed), the variant minus the first one, which takes
out of them how hard a prompt is. Divergence is counted, its interval is Wilson's.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distill3d.bench.judging import QUANTITIES, Scored
from distill3d.evaluation.metrics import Quantity

CONFIDENCE = 0.95
SHARES = ("diverged",)  # metrics that are 0 or 1 for each cell


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval; both ends are None where one value says nothing of its spread."""

    mean: float
    low: float | None
    high: float | None
    n: int  # independent values behind it

    @property
    def half(self) -> float | None:
        """Half the length of a symmetric interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Table:
    """Rows are variants, columns metrics; a cell that has no value is missing."""

    variants: tuple[str, ...]
    metrics: tuple[Quantity, ...]
    values: Mapping[tuple[str, str], Estimate]  # (variant, metric)
    differences: Mapping[tuple[str, str], Estimate]  # to the first variant
    counts: Mapping[str, tuple[int, int]]  # variant -> (diverged, cells)

    @property
    def columns(self) -> tuple[Quantity, ...]:
        """The metrics of the printed tables; what is counted instead of averaged has a column of its own there."""
        return tuple(metric for metric in self.metrics if metric.name not in SHARES)

    def best(self, metric: Quantity) -> str | None:
        """The variant with the best mean, None where none stands out or nothing is better."""
        found = {v: self.values[v, metric.name].mean for v in self.variants if (v, metric.name) in self.values}
        if metric.better == "neither" or len(found) < 2 or len(set(found.values())) < 2:
            return None
        if metric.better == "one":
            return min(found, key=lambda v: abs(found[v] - 1))
        return (max if metric.better == "higher" else min)(found, key=lambda v: found[v])


def make_table(
    variants: Sequence[str],
    metrics: Sequence[str],
    cells: Sequence[Scored],
    across: Mapping[tuple[str, str], float] | None = None,
) -> Table:
    """The table of these variants and metrics; `across` has what is known only of (prompt, variant): diversity."""
    seeds_count = len({cell.task.prompt for cell in cells}) == 1
    values: dict[tuple[str, str], Estimate] = {}
    differences: dict[tuple[str, str], Estimate] = {}
    for name in metrics:
        columns = {variant: _column(variant, name, cells, across or {}) for variant in variants}
        for variant, column in columns.items():
            if name in SHARES and column:
                flags = [c.scores[name] for c in cells if c.task.variant.name == variant and name in c.scores]
                values[variant, name] = wilson(round(sum(flags)), len(flags))
            elif column:
                values[variant, name] = interval(independent(column, seeds_count))
            first = columns[variants[0]]
            pairs = {key: column[key] - first[key] for key in column if key in first}
            if variant != variants[0] and pairs:
                differences[variant, name] = interval(independent(pairs, seeds_count))
    counts = {
        variant: (sum(c.diverged for c in rows), len(rows))
        for variant in variants
        for rows in [[c for c in cells if c.task.variant.name == variant]]
    }
    shown = tuple(QUANTITIES[name] for name in metrics if any((v, name) in values for v in variants))
    return Table(tuple(variants), shown, values, differences, counts)


def independent(column: Mapping[tuple[str, int], float], seeds_count: bool) -> list[float]:
    """(prompt, seed) -> value as one value a prompt; in a bench of one prompt, where seeds count, one a seed."""
    prompts: dict[str, list[float]] = {}
    for (prompt, _), value in column.items():
        prompts.setdefault(prompt, []).append(value)
    if seeds_count:
        return list(column.values())
    return [statistics.fmean(values) for values in prompts.values()]


def interval(values: Sequence[float]) -> Estimate:
    """Student's interval of the mean of independent values; ValueError for none."""
    from scipy.stats import t

    if not values:
        raise ValueError("a mean needs at least one value")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def wilson(hits: int, n: int) -> Estimate:
    """A share of n, with Wilson's interval (1927), which stays within [0, 1] and has a length at 0 of n too."""
    if not 0 <= hits <= n or not n:
        raise ValueError(f"a share needs 0 <= hits <= n and n >= 1, got {hits} of {n}")
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share, scale = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), n)


def markdown(table: Table) -> str:
    """The table as Markdown, the best mean of each metric in bold, and the paired differences below."""

    def row(words: Sequence[str]) -> str:
        return "| " + " | ".join(words) + " |"

    def block(title: str, variants: Sequence[str], word: Callable[[str, Quantity], str], extra: bool) -> list[str]:
        head = [title, *map(heading, table.columns), *(["diverged"] if extra else [])]
        lines = [row(head), row(["---", *["---:"] * (len(head) - 1)])]
        for variant in variants:
            counts = ["{} of {}".format(*table.counts[variant])] if extra else []
            lines.append(row([_escaped(variant), *(word(variant, m) for m in table.columns), *counts]))
        return lines

    def value(variant: str, metric: Quantity) -> str:
        text = plain(table.values.get((variant, metric.name)), " ± ")
        return f"**{text}**" if table.best(metric) == variant else text

    def difference(variant: str, metric: Quantity) -> str:
        found = table.differences.get((variant, metric.name))
        text = plain(found, " ± ", signed=True)
        return f"**{text}**" if found and clear(found) else text

    lines = block("method", table.variants, value, True)
    if len(table.variants) > 1:
        title = f"minus {_escaped(table.variants[0])}"
        lines += ["", *block(title, table.variants[1:], difference, False)]
    return "\n".join([*lines, "", _note(table), ""])


def latex(table: Table) -> str:
    """A LaTeX tabular for booktabs; the best mean of each metric in bold."""

    def word(variant: str, metric: Quantity) -> str:
        found = table.values.get((variant, metric.name))
        if found is None:
            return "--"
        text = plain(found, r" \pm ")
        return rf"$\mathbf{{{text}}}$" if table.best(metric) == variant else f"${text}$"

    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "one": r" $\to 1$", "neither": ""}
    heads = [f"{_tex(m.name.replace('_', ' '))}{arrows[m.better]}" for m in table.columns]
    rows = [
        " & ".join([_tex(v), *(word(v, m) for m in table.columns), "{} of {}".format(*table.counts[v])]) + r" \\"
        for v in table.variants
    ]
    return "\n".join([
        f"% {_note(table)}", rf"\begin{{tabular}}{{l{'r' * (len(heads) + 1)}}}", r"\toprule",
        " & ".join(["method", *heads, "diverged"]) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def summary_csv(table: Table) -> str:
    """A line for each variant and metric: mean, ends of the interval, n; and the same of the difference."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["mean", "low", "high", "n"]
    writer.writerow(["variant", "metric", "unit", "better", *names, *(f"difference_{name}" for name in names)])
    for variant in table.variants:
        for metric in table.metrics:
            found = [part.get((variant, metric.name)) for part in (table.values, table.differences)]
            if found[0] is None:
                continue
            numbers = [_number(getattr(one, name, None)) for one in found for name in names]
            writer.writerow([variant, metric.name, metric.unit, metric.better, *numbers])
    return text.getvalue()


def cells_csv(metrics: Sequence[Quantity], cells: Sequence[Scored]) -> str:
    """A line for each cell, all its numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [metric.name for metric in metrics]
    writer.writerow(["prompt", "variant", "seed", "steps", "failure", "folder", *names])
    for cell in cells:
        task, outcome = cell.task, cell.outcome
        numbers = [_number(cell.scores.get(name)) for name in names]
        writer.writerow(
            [task.prompt, task.variant.name, task.seed, outcome.steps, outcome.failure, task.folder, *numbers]
        )
    return text.getvalue()


def plain(estimate: Estimate | None, between: str, signed: bool = False) -> str:
    """ "27.3 ± 0.4": digits as the interval allows; a dash where there is nothing."""
    if estimate is None:
        return "-"
    half = estimate.half
    digits = _digits(half or abs(estimate.mean) / 10)
    text = f"{estimate.mean:{'+' if signed else ''}.{digits}f}"
    return text if half is None else f"{text}{between}{half:.{digits}f}"


def clear(difference: Estimate) -> bool:
    """Whether the interval of a difference leaves out zero."""
    return difference.low is not None and difference.high is not None and not difference.low <= 0 <= difference.high


ARROWS = {"higher": "↑", "lower": "↓", "one": "→ 1", "neither": ""}


def heading(metric: Quantity) -> str:
    """The name of a metric for people, its unit, and which way is better."""
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{metric.name.replace('_', ' ')}{unit} {ARROWS[metric.better]}".rstrip()


def _digits(size: float) -> int:
    """Decimals that show two digits of a number of this size, at most 4."""
    return 2 if not size or not math.isfinite(size) else max(0, min(4, 1 - math.floor(math.log10(size))))


def _column(
    variant: str, metric: str, cells: Sequence[Scored], across: Mapping[tuple[str, str], float]
) -> dict[tuple[str, int], float]:
    """(prompt, seed) -> value; what is no finite number counts as not measured, nor what a failed object cost."""
    if any(name == variant for _, name in across) and metric == "diversity":
        return {(prompt, 0): value for (prompt, name), value in across.items() if name == variant}
    rows = [c for c in cells if c.task.variant.name == variant and metric in c.scores]
    if metric not in SHARES:
        rows = [c for c in rows if not c.outcome.failure]
    return {(c.task.prompt, c.task.seed): c.scores[metric] for c in rows if math.isfinite(c.scores[metric])}


def _note(table: Table) -> str:
    ns = sorted({e.n for (_, name), e in table.values.items() if name not in SHARES})
    n = str(ns[0]) if len(ns) == 1 else f"{ns[0]} to {ns[-1]}" if ns else "0"
    return (
        f"Mean and half the length of its 95 % interval (Student's t; seeds are averaged first, n = {n} prompts, or "
        "seeds where there is one prompt); bold: best mean, or a difference whose interval leaves out zero."
    )


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
