"""Metrics by name: each has the formula's value, gets worse when a good result gets worse, and says what it needs."""

import dataclasses
import importlib.machinery
import math
import sys
import types

import numpy as np
import pytest
import scipy.ndimage
import torch

from distill3d.cameras import turntable
from distill3d.evaluation.distances import frechet_distance, kernel_distance
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.ground_truth import silhouette_iou, silhouettes, true_mesh
from distill3d.evaluation.metrics import METRICS, RunResult, measure
from distill3d.toybox.corruptions import lump, mottle
from distill3d.toybox.world import View, build, draw

PROMPTS = ("a red duck", "a blue car", "a green hat")
CAMERAS = turntable(6, 15.0, 2.8, 40.0)


def renders(kind: str, color: str) -> torch.Tensor:
    toy = build(kind, color, seed=2)
    images = np.stack([draw(toy, View(a, 15.0)) for a in CAMERAS.azimuth.tolist()])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


class EnglishJudge(ToyboxJudge):
    """The bundled judge, with a dictionary from the words of quality to those of its world."""

    def knows_words(self, texts) -> bool:
        return True

    def embed_texts(self, texts) -> torch.Tensor:
        good, bad = ("Good photo.", "Sharp photo.", "Real photo."), ("Bad photo.", "Blurry photo.", "Abstract photo.")
        words = dict.fromkeys(good, "a red duck") | dict.fromkeys(bad, "a blue car")
        return super().embed_texts([words.get(text, text) for text in texts])


@pytest.fixture(scope="module")
def result() -> RunResult:
    """A ground-truth toy as if a run had made it."""
    images, mesh = renders("duck", "red"), true_mesh("duck", 2)
    masks = silhouettes(mesh, CAMERAS, 64).float()[:, None]
    return RunResult(
        "a red duck",
        images,
        CAMERAS,
        opacity=masks,
        depth=2.8 * masks,
        mesh=mesh,
        evaluator=EnglishJudge(),
        reference=images,
        prompts=PROMPTS,
        seconds=3.5,
        nfe=80,
        peak_memory=1 << 30,
    )


@pytest.fixture
def reward_package(monkeypatch):
    """A stand-in for the package image-reward, whose weights are 1.8 GB: its reward is the judge's score."""
    from distill3d.evaluation import language

    judge = ToyboxJudge()

    class Model:
        def score(self, prompt, image):
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
            return float(judge.score(pixels, [prompt]))

    package = types.ModuleType("ImageReward")
    package.__spec__ = importlib.machinery.ModuleSpec("ImageReward", None)
    package.load = lambda name: Model()
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    language._reward_model.cache_clear()
    yield
    language._reward_model.cache_clear()


def blurred(result: RunResult) -> RunResult:
    images = scipy.ndimage.gaussian_filter(result.images.numpy(), (0, 0, 1.0, 1.0))
    return dataclasses.replace(result, images=torch.from_numpy(images))


def grainy(result: RunResult) -> RunResult:
    noise = torch.rand(result.images.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return dataclasses.replace(result, images=result.images + 0.6 * noise)


def another_object(result: RunResult) -> RunResult:
    return dataclasses.replace(result, images=renders("car", "blue"))


def front_everywhere(result: RunResult) -> RunResult:
    return dataclasses.replace(result, images=result.images[:1].expand(6, -1, -1, -1))


def another_object_every_other_view(result: RunResult) -> RunResult:
    images = result.images.clone()
    images[::2] = renders("car", "blue")[::2]
    return dataclasses.replace(result, images=images)


def brighter_every_other_view(result: RunResult) -> RunResult:
    return dataclasses.replace(result, images=result.images + torch.tensor([0.0, 0.3]).repeat(3).view(-1, 1, 1, 1))


def lumps(result: RunResult) -> RunResult:
    """A smooth blob with mottled colors in place of each view's object."""
    layers = torch.cat((result.images - 0.9 * (1 - result.opacity), result.opacity), dim=1)
    generator = torch.Generator().manual_seed(0)
    bad = mottle(lump(layers, layers, generator), layers, generator)
    return dataclasses.replace(result, images=bad[:, :3] + 0.9 * (1 - bad[:, 3:]))


def shifted(result: RunResult) -> RunResult:
    mesh = dataclasses.replace(result.mesh, vertices=result.mesh.vertices + np.array([0.2, 0.0, 0.0]))
    return dataclasses.replace(result, opacity=result.opacity.roll(8, -1), mesh=mesh)


def failed(result: RunResult) -> RunResult:
    return dataclasses.replace(result, failure="out of memory")


def expensive(result: RunResult) -> RunResult:
    return dataclasses.replace(result, seconds=7.0, nfe=160, peak_memory=1 << 31)


# What makes a good result worse in the eyes of each metric. Where 1 is best, too little and too much are worse.
WORSE = {
    "clip_score": [another_object],
    "clip_r_precision": [another_object],
    "clip_iqa_quality": [another_object],
    "clip_iqa_sharpness": [another_object],
    "clip_iqa_real": [another_object],
    "image_reward": [another_object],
    "sharpness": [blurred, grainy],
    "spectrum_gap": [blurred, grainy],
    "edge_concentration": [blurred, grainy],
    "frechet": [another_object],
    "kernel": [another_object],
    "janus_rate": [front_everywhere],
    "lost_back": [front_everywhere],
    "view_accuracy": [front_everywhere],
    "neighbor_similarity": [another_object_every_other_view],
    "warp_error": [brighter_every_other_view],
    "toy_rate": [lumps],
    "silhouette_iou": [shifted],
    "chamfer": [shifted],
    "diverged": [failed],
    "seconds": [expensive],
    "nfe": [expensive],
    "peak_memory": [expensive],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in WORSE for change in WORSE[name]])
def test_every_metric_gets_worse_when_the_result_does(name, change, result, reward_package):
    metric = METRICS[name]
    before, after = (measure(r, [name])[name] for r in (result, change(result)))
    assert metric.error(after) > metric.error(before)


def test_each_metric_has_a_way_to_get_worse_unless_neither_side_is_better():
    assert {name for name, metric in METRICS.items() if metric.better != "neither"} == WORSE.keys()
    assert METRICS["saturation"].error(0.1) == METRICS["saturation"].error(0.9)
    sharpness = METRICS["sharpness"]
    assert sharpness.error(0.7) == pytest.approx(sharpness.error(1.3)) and sharpness.error(1) == 0


def test_every_need_is_something_of_a_result_and_every_name_its_own(result):
    assert all(name == metric.name for name, metric in METRICS.items())
    for metric in METRICS.values():
        assert all(getattr(result, need) is not None for need in metric.needs)


def test_a_true_toy_is_as_good_as_it_gets(result):
    names = [n for n in METRICS if not n.startswith(("clip_iqa", "image_reward", "chamfer"))]
    values = measure(result, names)
    assert list(values) == names and all(map(math.isfinite, values.values()))
    best = dict(sharpness=1, spectrum_gap=0, edge_concentration=1, frechet=0, clip_r_precision=1, janus_rate=0)
    best |= dict(lost_back=0, view_accuracy=1, silhouette_iou=1, diverged=0, seconds=3.5, nfe=80, peak_memory=1)
    for name, value in best.items():
        assert values[name] == pytest.approx(value, abs=1e-4), name
    assert values["clip_score"] > 50


def test_chamfer_takes_the_mesh(result):
    assert measure(result, ["chamfer"])["chamfer"] < 0.02


def test_features_are_those_of_the_evaluator(result):
    other = another_object(result)
    made, wanted = (result.evaluator.embed_images(images) for images in (other.images, other.reference))
    values = measure(other, ["frechet", "kernel"])
    assert values["frechet"] == pytest.approx(frechet_distance(made, wanted))
    assert values["kernel"] == pytest.approx(1000 * kernel_distance(made, wanted, gamma=1.0))
    assert measure(result, ["kernel"])["kernel"] <= 0  # the same images: below 0 by what the diagonal adds
    with pytest.warns(UserWarning, match="frechet .needs features"):
        measure(dataclasses.replace(result, reference=result.reference[:1]), ["frechet"])


@pytest.mark.parametrize(("level", "counts"), [(0.45, False), (0.55, True)])
def test_half_opacity_decides_what_is_covered(level, counts, result):
    """A frame of opacity `level` around the images is part of the silhouette above one half only."""
    frame = torch.ones_like(result.opacity)
    frame[..., 8:-8, 8:-8] = 0
    framed = dataclasses.replace(result, opacity=torch.maximum(result.opacity, level * frame))
    expected = silhouette_iou((result.opacity + counts * frame)[:, 0] > 0, CAMERAS, "duck")
    assert measure(framed, ["silhouette_iou"])["silhouette_iou"] == pytest.approx(expected)
    assert (expected < 0.9) == counts


def test_what_a_result_lacks_is_left_out_with_one_warning():
    bare = RunResult("a corgi", torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.warns(UserWarning, match=r"not measured: .*clip_score \(needs evaluator\).*chamfer \(needs") as caught:
        values = measure(bare)
    assert len(caught) == 1 and set(values) == {"saturation", "diverged"}


def test_a_judge_that_does_not_read_english_is_not_asked_for_quality(result):
    with pytest.warns(UserWarning, match="clip_iqa_real .needs iqa_evaluator"):
        plain = dataclasses.replace(result, evaluator=ToyboxJudge())
        assert measure(plain, ["clip_iqa_real", "saturation"]).keys() == {"saturation"}


def test_a_missing_package_is_named(result):
    if not METRICS["image_reward"].installed:
        with pytest.warns(UserWarning, match="image_reward .needs ImageReward"):
            assert not measure(result, ["image_reward"])


def test_an_unknown_name_is_refused_with_the_known_ones(result):
    with pytest.raises(ValueError, match=r"unknown metric 'beauty'; allowed: clip_score, .*peak_memory"):
        measure(result, ["saturation", "beauty"])


def test_divergence_is_told_by_its_reason():
    half = torch.full((2, 1, 4, 4), 0.3)
    assert RunResult("x", half.expand(-1, 3, -1, -1), opacity=half).divergence == ""
    assert RunResult("x", half.expand(-1, 3, -1, -1) * math.nan).divergence == "nan"
    assert RunResult("x", opacity=half / 0).divergence == "nan"
    assert RunResult("x", failure="out of memory").divergence == "out of memory"
    assert measure(RunResult("x", failure="out of memory"), ["diverged"]) == {"diverged": 1}
    assert measure(RunResult("x"), ["diverged"]) == {"diverged": 0}


@pytest.mark.parametrize(
    ("mean", "reason"), [(0.0049, "empty"), (0.0051, ""), (0.89, ""), (0.91, "full"), (0.94, "full")]
)
def test_the_mean_opacity_of_all_views_says_what_is_empty_and_full(mean, reason):
    opacity = torch.full((2, 1, 4, 4), mean)
    opacity[0] *= 0.5
    opacity[1] *= 1.5
    assert RunResult("x", opacity=opacity).divergence == reason


def test_every_true_toy_is_neither_empty_nor_full():
    views = turntable(2, 15.0, 2.8, 40.0)
    for kind in ("airplane", "ice cream", "fish", "donut", "table lamp"):  # the thinnest and the thickest
        masks = silhouettes(true_mesh(kind, 0), views, 64).float()[:, None]
        assert RunResult("x", opacity=masks).divergence == ""


def test_images_that_are_not_finite_are_not_measured(result):
    broken = RunResult(result.prompt, result.images * math.nan, CAMERAS, evaluator=result.evaluator, seconds=1.0)
    with pytest.warns(UserWarning, match=r"clip_score \(needs images\)"):
        assert measure(broken, ["clip_score", "saturation", "diverged", "seconds"]) == {"diverged": 1, "seconds": 1}
