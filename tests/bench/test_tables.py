"""Means and intervals against hand calculations and scipy; the three formats say the same."""

import csv
import dataclasses
import io
import re

import pytest
import scipy.stats

from distill3d.bench.cells import Outcome
from distill3d.bench.judging import Scored
from distill3d.bench.protocol import Task, Variant
from distill3d.bench.tables import (
    cells_csv,
    independent,
    interval,
    latex,
    make_table,
    markdown,
    plain,
    summary_csv,
    wilson,
)

SDI, SDS = Variant("sdi"), Variant("sds_50%")


def cell(variant, prompt, seed, failure="", **scores):
    outcome = Outcome(variant.name, prompt, seed, 4, 1.0, 16, 0, failure)
    return Scored(Task(variant, prompt, seed), outcome, scores)


# Two prompts, two seeds; the second prompt is harder for both.
CELLS = [
    cell(SDI, "a", 0, clip_score=30.0, diverged=0.0),
    cell(SDI, "a", 1, clip_score=34.0, diverged=0.0),
    cell(SDI, "b", 0, clip_score=20.0, diverged=0.0),
    cell(SDI, "b", 1, clip_score=24.0, diverged=1.0),
    cell(SDS, "a", 0, clip_score=29.0, diverged=0.0),
    cell(SDS, "a", 1, clip_score=32.0, diverged=0.0),
    cell(SDS, "b", 0, clip_score=18.0, diverged=0.0),
    cell(SDS, "b", 1, failure="out of memory", diverged=1.0),
]
METRICS = ("clip_score", "diverged")


@pytest.fixture(scope="module")
def table():
    return make_table(("sdi", "sds_50%"), METRICS, CELLS)


def test_an_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.302653
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([5.0]).low is None
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_an_interval_is_that_of_a_t_test():
    values = [0.31, 0.27, 0.45, 0.38, 0.29]
    found, theirs = interval(values), scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (3, 8), (8, 8), (1, 1), (40, 43)])
def test_the_ends_of_wilsons_interval_are_as_far_from_the_fraction_as_the_normal_quantile(hits, n):
    """Both ends p solve (hits / n - p)^2 = z^2 p (1 - p) / n: the score test rejects everything outside."""
    found, z = wilson(hits, n), scipy.stats.norm.ppf(0.975)
    assert found.mean == hits / n and 0 <= found.low <= found.mean <= found.high <= 1
    for p in (found.low, found.high):
        assert (hits / n - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / n, abs=1e-12)
    assert found.high - found.low > 0.05
    with pytest.raises(ValueError):
        wilson(n + 1, n)


def squeezed(text: str) -> str:
    """Without the spaces that align columns."""
    return re.sub(" +", " ", text)


def test_seeds_of_a_prompt_are_averaged_first():
    assert independent({("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 4.0}, one_prompt=False) == [2.0, 4.0]
    assert independent({("a", 0): 1.0, ("a", 1): 3.0}, one_prompt=False) == [2.0]  # b failed
    assert independent({("a", 0): 1.0, ("a", 1): 3.0}, one_prompt=True) == [1.0, 3.0]  # a is all there is


def test_the_table_by_hand(table):
    mean = table.values["sdi", "clip_score"]  # prompts 32 and 22: s = sqrt(50), t(0.975, 1) = 12.7062
    assert mean.mean == 27.0 and mean.n == 2
    assert mean.half == pytest.approx(12.7062 * 50**0.5 / 2**0.5, rel=1e-5)
    assert table.values["sds_50%", "clip_score"].mean == pytest.approx((30.5 + 18.0) / 2)
    # Paired: a: (-1 - 2) / 2 = -1.5, b: -2 (its other seed has no pair); far closer together than the means are.
    difference = table.differences["sds_50%", "clip_score"]
    assert difference.mean == pytest.approx(-1.75)
    assert difference.half == pytest.approx(12.7062 * 0.125**0.5 / 2**0.5, rel=1e-5)
    assert table.counts == {"sdi": (1, 4), "sds_50%": (1, 4)}
    assert table.values["sdi", "diverged"].mean == 0.25
    assert table.best(table.metrics[0]) == "sdi"


def test_the_better_one_depends_on_the_metric():
    cells = [cell(SDI, "a", 0, seconds=3.0), cell(SDS, "a", 0, seconds=2.0)]
    table = make_table(("sdi", "sds_50%"), ("seconds",), cells)
    assert table.best(table.metrics[0]) == "sds_50%"


def test_saturation_has_no_better_side():
    cells = [cell(SDI, "a", 0, saturation=0.3), cell(SDS, "a", 0, saturation=0.2)]
    table = make_table(("sdi", "sds_50%"), ("saturation",), cells)
    assert table.best(table.metrics[0]) is None
    assert "| method | saturation |" in squeezed(markdown(table)) and r"saturation $" not in latex(table)
    assert "neither" in summary_csv(table)


def test_sharpness_is_best_near_the_references():
    cells = [cell(SDI, "a", 0, sharpness=0.95), cell(SDS, "a", 0, sharpness=1.6)]
    table = make_table(("sdi", "sds_50%"), ("sharpness",), cells)
    assert table.best(table.metrics[0]) == "sdi" and "→ 1" in markdown(table) and r"$\to 1$" in latex(table)


def test_what_failed_costs_nothing_in_the_tables():
    cells = [cell(SDI, "a", 0, seconds=9.0), cell(SDS, "a", 0, failure="out of memory", seconds=0.0, diverged=1.0)]
    table = make_table(("sdi", "sds_50%"), ("seconds", "diverged"), cells)
    assert ("sds_50%", "seconds") not in table.values and table.best(table.metrics[0]) is None
    assert table.counts["sds_50%"] == (1, 1)


def test_what_is_no_number_counts_as_not_measured():
    cells = [cell(SDI, "a", 0, clip_score=float("nan")), cell(SDI, "b", 0, clip_score=2.0)]
    assert make_table(("sdi",), ("clip_score",), cells).values["sdi", "clip_score"].mean == 2.0


def test_a_method_without_any_object_has_a_row_all_the_same():
    table = make_table(("sdi", "sds_50%"), METRICS, [*CELLS[:4], CELLS[-1]])
    assert table.counts["sds_50%"] == (1, 1)
    assert "| sds_50% | - | 1 of 1 |" in squeezed(markdown(table))
    assert "sds\\_50\\% & -- & 1 of 1" in squeezed(latex(table))


def test_diversity_comes_from_outside():
    across = {("a", "sdi"): 0.2, ("b", "sdi"): 0.4, ("a", "sds_50%"): 0.1}
    table = make_table(("sdi", "sds_50%"), ("diversity",), CELLS, across)
    assert table.values["sdi", "diversity"].mean == pytest.approx(0.3)
    assert table.differences["sds_50%", "diversity"].mean == pytest.approx(-0.1)  # prompt a only


def test_markdown_and_latex_show_the_numbers(table):
    text = squeezed(markdown(table))
    assert "| sdi | **27 ± 64** | 1 of 4 |" in text
    assert "| sds_50% | -1.8 ± 3.2 |" in text and "| minus sdi |" in text
    written = squeezed(latex(table))
    assert r"sdi & $\mathbf{27 \pm 64}$ & 1 of 4 \\" in written and r"sds\_50\%" in written
    assert written.count("\\\\\n") == 3 and r"\hline" not in written
    assert [written.count(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")] == [1, 1, 1]
    assert written.index("toprule") < written.index("method") < written.index("midrule") < written.index("bottomrule")


@pytest.mark.parametrize(
    ("prompts", "counted"), [("a", "n = 1 prompt, or"), ("ab", "n = 2 prompts, or"), ("", "n = 0 prompts, or")]
)
def test_the_note_counts_prompts(prompts, counted):
    cells = [cell(SDI, prompt, 0, clip_score=1.0) for prompt in prompts]
    assert counted in markdown(make_table(("sdi",), ("clip_score",), cells))


def test_a_turned_table_has_the_same_cells_in_narrower_lines(table):
    def grids(text):
        tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
        return [[re.split(r" *\| *", line.strip("| ")) for line in (t[0], *t[2:])] for t in tables]

    straight, transposed = markdown(table), markdown(table, transposed=True)
    assert grids(transposed) == [[list(row) for row in zip(*grid, strict=True)] for grid in grids(straight)]
    assert len(grids(transposed)) == 2 and transposed.rpartition("\n\n")[2] == straight.rpartition("\n\n")[2]


def test_markdown_is_one_table_for_each_block_whatever_a_name_holds():
    names = ("a | b", "c\nd")
    cells = [cell(Variant(name, "sdi"), "a", seed, clip_score=1.0 + seed) for name in names for seed in (0, 1)]
    lines = markdown(make_table(names, ("clip_score",), cells)).splitlines()
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line]
    assert columns[:4] == [4, 4, 4, 4] and columns[4:7] == [3, 3, 3]


def test_the_csv_holds_everything_in_full(table):
    rows = list(csv.DictReader(io.StringIO(summary_csv(table))))
    (row,) = [r for r in rows if (r["variant"], r["metric"]) == ("sds_50%", "clip_score")]
    found = table.values["sds_50%", "clip_score"]
    assert float(row["mean"]) == pytest.approx(found.mean, rel=1e-8)
    assert float(row["low"]) == pytest.approx(found.low, rel=1e-8) and int(row["n"]) == 2
    assert float(row["difference_mean"]) == pytest.approx(-1.75)
    cells = list(csv.DictReader(io.StringIO(cells_csv(table.metrics, CELLS))))
    assert [c["clip_score"] for c in cells] == ["30", "34", "20", "24", "29", "32", "18", ""]
    assert cells[-1]["failure"] == "out of memory"


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [(27.3, 0.4, "27.30 ± 0.40"), (1234.6, 57, "1235 ± 57"), (0.01234, 3e-4, "0.0123 ± 0.0003"), (3, 0, "3.00 ± 0.00")],
)  # fmt: skip
def test_digits_follow_the_interval(mean, half, shown):
    estimate = interval([1.0, 2.0])
    assert plain(dataclasses.replace(estimate, mean=mean, low=mean - half, high=mean + half), " ± ") == shown
