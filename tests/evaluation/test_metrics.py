"""Metrics by name: what a cell lacks is left out, what it has is what the functions say."""

import math

import numpy as np
import pytest
import torch

from distill3d.cameras import turntable
from distill3d.evaluation.distances import frechet_distance, kernel_distance
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.metrics import (
    METRICS,
    NEEDS,
    Cell,
    divergence,
    measure,
    pooled_features,
    seed_diversity,
)
from distill3d.evaluation.truth import silhouettes, true_mesh
from distill3d.toybox.world import View, build, draw

PROMPTS = ("a red duck", "a blue car", "a green hat")


@pytest.fixture(scope="module")
def cell() -> Cell:
    """A true toy as if a run had made it."""
    toy, cameras = build("duck", "red", seed=2), turntable(6, 15.0, 2.8, 40.0)
    pictures = np.stack([draw(toy, View(a, 15.0)) for a in cameras.azimuth.tolist()])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    masks = silhouettes(*true_mesh("duck", 2), cameras, 64).float()[:, None]
    return Cell(
        "a red duck", images, cameras.azimuth, opacity=masks, depth=2.8 * masks, vertices=toy.vertices,
        faces=toy.faces, evaluator=ToyboxJudge(), reference=images, prompts=PROMPTS, seconds=3.5, nfe=80,
        peak_memory=1 << 30,
    )  # fmt: skip


def test_every_need_is_known_and_every_name_its_own():
    assert all(name == metric.name for name, metric in METRICS.items())
    assert {need for metric in METRICS.values() for need in metric.needs} <= NEEDS.keys()


def test_a_true_toy_is_as_good_as_it_gets(cell):
    names = [n for n in METRICS if not n.startswith(("clip_iqa", "image_reward", "chamfer"))]
    values = measure(cell, names)
    assert list(values) == names and all(map(math.isfinite, values.values()))
    for name, best in [
        ("sharpness", 1), ("spectrum_gap", 0), ("edge_concentration", 1), ("frechet", 0), ("clip_r_precision", 1),
        ("janus_rate", 0), ("lost_back", 0), ("view_accuracy", 1), ("silhouette_iou", 1), ("diverged", 0),
        ("seconds", 3.5), ("nfe", 80), ("peak_memory", 1),
    ]:  # fmt: skip
        assert values[name] == pytest.approx(best, abs=1e-4), name
    assert values["clip_score"] > 50


def test_chamfer_takes_the_mesh(cell):
    assert measure(cell, ["chamfer"])["chamfer"] < 0.02


def test_what_a_cell_lacks_is_left_out_with_one_warning():
    bare = Cell("a corgi", torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.warns(UserWarning, match=r"not measured: .*clip_score \(needs evaluator\).*chamfer \(needs") as told:
        values = measure(bare)
    assert len(told) == 1 and set(values) == {"saturation", "diverged"}


def test_a_judge_that_does_not_read_english_is_not_asked_for_quality(cell):
    with pytest.warns(UserWarning, match="clip_iqa_real .needs evaluator that reads English"):
        assert measure(cell, ["clip_iqa_real", "saturation"]).keys() == {"saturation"}


def test_an_unknown_name_is_refused_with_the_known_ones(cell):
    with pytest.raises(ValueError, match=r"unknown metric 'beauty'; allowed: clip_score, .*peak_memory"):
        measure(cell, ["saturation", "beauty"])


def test_divergence_is_told_by_its_reason():
    half = torch.full((2, 1, 4, 4), 0.3)
    assert divergence(Cell("x", half.expand(-1, 3, -1, -1), opacity=half)) == ""
    assert divergence(Cell("x", opacity=half * 0.01)) == "empty"
    assert divergence(Cell("x", opacity=half * 0 + 1)) == "full"
    assert divergence(Cell("x", opacity=torch.tensor([0.3, 0.2]))) == ""  # means
    assert divergence(Cell("x", half * math.nan)) == divergence(Cell("x", opacity=half / 0)) == "nan"
    assert divergence(Cell("x", failure="out of memory")) == "out of memory"
    assert measure(Cell("x", failure="out of memory"), ["diverged"]) == {"diverged": 1}


def test_every_true_toy_is_neither_empty_nor_full():
    views = turntable(2, 15.0, 2.8, 40.0)
    for kind in ("airplane", "ice cream", "fish", "donut", "table lamp"):  # the thinnest and the thickest
        assert divergence(Cell("x", opacity=silhouettes(*true_mesh(kind, 0), views, 64).float()[:, None])) == ""


def test_pictures_that_are_no_numbers_are_not_measured(cell):
    broken = Cell(cell.prompt, cell.pictures * math.nan, cell.azimuths, evaluator=cell.evaluator, seconds=1.0)
    with pytest.warns(UserWarning, match=r"clip_score \(needs pictures\)"):
        assert measure(broken, ["clip_score", "saturation", "diverged", "seconds"]) == {"diverged": 1, "seconds": 1}


def test_seeds_are_compared_for_one_prompt(cell):
    other = Cell(cell.prompt, cell.pictures.flip(3), cell.azimuths, evaluator=cell.evaluator)
    a, b = (c.evaluator.pictures(c.pictures) for c in (cell, other))
    assert seed_diversity([cell, other]) == pytest.approx(float((1 - (a * b).sum(1)).mean()), abs=1e-6)
    assert seed_diversity([cell, cell]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two seeds"):
        seed_diversity([cell, Cell(cell.prompt, None, evaluator=cell.evaluator)])
    with pytest.raises(ValueError, match="one prompt"):
        seed_diversity([cell, Cell("a blue car", cell.pictures, evaluator=cell.evaluator)])


def test_a_method_is_compared_as_a_whole(cell):
    made, wanted = pooled_features([cell, cell, Cell("x", cell.pictures)])
    assert made.shape == wanted.shape == (12, 128)
    assert frechet_distance(made, wanted) == pytest.approx(0, abs=1e-6)
    assert kernel_distance(made, wanted, gamma=1.0) <= 0  # the same pictures: below 0 by what the diagonal adds
    with pytest.raises(ValueError, match="none of the runs"):
        pooled_features([Cell("x", cell.pictures)])
