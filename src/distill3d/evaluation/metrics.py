"""All metrics by name, and the result of a run that they measure.

The formulas are in the files beside this one: `images` (images alone), `language` (images and texts), `views`
(consistency between views), `ground_truth` (the toy world's geometry), `distances` (sets of features), `cost` (time
and memory). docs/metrics.md says what each can and cannot see.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.evaluation.critic import toy_rate
from distill3d.evaluation.distances import frechet_distance, kernel_distance
from distill3d.evaluation.evaluator import Evaluator
from distill3d.evaluation.ground_truth import chamfer_to_truth, silhouette_iou, true_kind
from distill3d.evaluation.images import edge_concentration, saturation, sharpness, spectrum_gap
from distill3d.evaluation.language import clip_r_precision, clip_score, image_reward, knows_iqa, mean_clip_iqa
from distill3d.evaluation.views import (
    has_back_views,
    janus_rate,
    lost_back,
    neighbor_similarity,
    view_accuracy,
    warp_error,
)
from distill3d.meshes.mesh import Mesh
from distill3d.types import Cameras

EMPTY, FULL = 0.005, 0.9  # mean opacity over all views


@dataclass(frozen=True)
class Quantity:
    """A column of a table: its name, which values are better ("one": the closer to 1), and its unit."""

    name: str
    better: Literal["higher", "lower", "one", "neither"]
    unit: str

    def error(self, value: float) -> float:
        """The value transformed so that smaller is better; 0 for every value if neither direction is better."""
        return {"higher": -value, "lower": value, "one": abs(value - 1), "neither": 0.0}[self.better]


@dataclass(frozen=True)
class Metric(Quantity):
    """A quantity that is measured from one `RunResult`."""

    needs: tuple[str, ...]  # attributes of RunResult, passed to `function` in this order
    function: Callable[..., float]
    package: str = ""  # optional Python package that it uses

    @property
    def installed(self) -> bool:
        """Whether the package that it uses is installed; imports nothing."""
        return not self.package or find_spec(self.package) is not None


@dataclass(frozen=True)
class RunResult:
    """What one run (a prompt, a method, a seed) produced, and what it is compared with.

    A field that is None was not kept or not given; the metrics that need it are skipped.
    """

    prompt: str
    images: Float[Tensor, "v 3 h w"] | None = None  # in [0, 1], views in a circle
    cameras: Cameras | None = None  # of the images
    opacity: Float[Tensor, "v 1 h w"] | None = None
    depth: Float[Tensor, "v 1 h w"] | None = None  # expected distance along the ray, world units
    mesh: Mesh | None = None  # in world space
    evaluator: Evaluator | None = None
    reference: Float[Tensor, "m 3 y x"] | None = None  # images of what the prompt asks for
    prompts: tuple[str, ...] = ()  # of the whole benchmark, including this one
    seconds: float | None = None  # wall time
    nfe: float | None = None  # network function evaluations
    peak_memory: float | None = None  # bytes
    failure: str = ""  # why the run stopped early: "out of memory" or "nan"; empty if it finished

    @property
    def azimuths(self) -> Tensor | None:
        """Azimuth of each view in degrees, 0 is the front."""
        return None if self.cameras is None else self.cameras.azimuth

    @property
    def azimuths_with_back(self) -> Tensor | None:
        """The azimuths if any view is from behind, else None."""
        return self.azimuths if self.azimuths is not None and has_back_views(self.azimuths) else None

    @property
    def prompt_pool(self) -> tuple[str, ...] | None:
        """The prompts of the benchmark if there are at least two, else None."""
        return self.prompts if len(set(self.prompts)) > 1 else None

    @property
    def iqa_evaluator(self) -> Evaluator | None:
        """The evaluator if it knows the words of CLIP-IQA, else None."""
        return self.evaluator if self.evaluator is not None and knows_iqa(self.evaluator) else None

    @property
    def kind(self) -> str | None:
        """The kind of toy that the prompt names, None if it names none."""
        return true_kind(self.prompt)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor] | None:
        """Embeddings of the images and of the reference if there are at least two of each, else None."""
        images, reference, evaluator = self.images, self.reference, self.evaluator
        if images is None or reference is None or evaluator is None or min(len(images), len(reference)) < 2:
            return None
        if not (_usable(images) and _usable(reference)):
            return None
        return evaluator.embed_images(images), evaluator.embed_images(reference)

    @property
    def divergence(self) -> str:
        """Why the run counts as diverged: "out of memory", "nan", "empty" or "full"; empty if it did not diverge.

        The paper's Table 1 counts runs that ran out of memory and runs that ended in an empty volume. Runs that
        produce NaNs, and volumes so full that every view is solid, count as diverged too. Empty and full mean an
        average opacity over all views below 0.005 or above 0.9.
        """
        if self.failure:
            return self.failure
        if not all(_usable(values) for values in (self.images, self.opacity) if values is not None):
            return "nan"
        mean = None if self.opacity is None else float(self.opacity.float().mean())
        return "" if mean is None else "empty" if mean < EMPTY else "full" if mean > FULL else ""

    def missing(self, metric: Metric) -> str:
        """The first thing a metric needs that this run lacks, "" if the metric can be measured."""
        if not metric.installed:
            return metric.package
        return next((need for need in metric.needs if not _usable(getattr(self, need))), "")


def _usable(value: object) -> bool:
    """Whether a value is there: not None, and finite if it is a tensor."""
    return bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else value is not None


def _kernel(features: tuple[Tensor, Tensor]) -> float:
    """1000 times the kernel distance of unit embeddings, with the kernel (cosine + 1)^3."""
    return 1000 * kernel_distance(*features, gamma=1.0)


def _silhouette_iou(opacity: Tensor, cameras: Cameras, kind: str) -> float:
    return silhouette_iou(opacity[:, 0] > 0.5, cameras, kind)


TEXT, COMPARED = ("images", "prompt", "evaluator"), ("images", "reference")
VIEWS, IQA = ("images", "azimuths", "prompt", "evaluator"), ("images", "iqa_evaluator")
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("clip_score", "higher", "", TEXT, clip_score),
        Metric("clip_r_precision", "higher", "", ("images", "prompt", "prompt_pool", "evaluator"), clip_r_precision),
        Metric("clip_iqa_quality", "higher", "", IQA, partial(mean_clip_iqa, name="quality")),
        Metric("clip_iqa_sharpness", "higher", "", IQA, partial(mean_clip_iqa, name="sharpness")),
        Metric("clip_iqa_real", "higher", "", IQA, partial(mean_clip_iqa, name="real")),
        Metric("image_reward", "higher", "", ("images", "prompt"), image_reward, package="ImageReward"),
        Metric("sharpness", "one", "of the reference", COMPARED, sharpness),
        Metric("spectrum_gap", "lower", "", COMPARED, spectrum_gap),
        Metric("edge_concentration", "one", "of the reference", COMPARED, edge_concentration),
        Metric("saturation", "neither", "", ("images",), saturation),
        Metric("frechet", "lower", "", ("features",), lambda features: frechet_distance(*features)),
        Metric("kernel", "lower", "x 1000", ("features",), _kernel),
        Metric("janus_rate", "lower", "", VIEWS, janus_rate),
        Metric("lost_back", "lower", "", ("images", "azimuths_with_back", "prompt", "evaluator"), lost_back),
        Metric("view_accuracy", "higher", "", VIEWS, view_accuracy),
        Metric("neighbor_similarity", "higher", "", ("images", "evaluator"), neighbor_similarity),
        Metric("warp_error", "lower", "", ("images", "depth", "opacity", "cameras"), warp_error),
        Metric("toy_rate", "higher", "", ("images", "kind"), lambda images, kind: toy_rate(images)),
        Metric("silhouette_iou", "higher", "", ("opacity", "cameras", "kind"), _silhouette_iou),
        Metric("chamfer", "lower", "world units", ("mesh", "kind"), chamfer_to_truth),
        Metric("diverged", "lower", "", ("divergence",), lambda reason: float(bool(reason))),
        Metric("seconds", "lower", "s", ("seconds",), float),
        Metric("nfe", "lower", "", ("nfe",), float),
        Metric("peak_memory", "lower", "GiB", ("peak_memory",), lambda size: size / 2**30),
    )
}


def check_metrics(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in METRICS."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; allowed: {', '.join(METRICS)}")


def measure(result: RunResult, names: Sequence[str] = tuple(METRICS)) -> dict[str, float]:
    """Measures the metrics of these names, in order; metrics whose needs are missing are skipped with one warning.

    Raises:
        ValueError: for an unknown name, before anything is measured.
    """
    check_metrics(names)
    values, skipped = {}, []
    for metric in (METRICS[name] for name in dict.fromkeys(names)):
        missing = result.missing(metric)
        if missing:
            skipped.append(f"{metric.name} (needs {missing})")
        else:
            values[metric.name] = metric.function(*(getattr(result, need) for need in metric.needs))
    if skipped:
        warnings.warn(f"not measured: {', '.join(skipped)}", stacklevel=1)
    return values
