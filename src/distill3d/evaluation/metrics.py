"""All metrics by name, and what one run leaves behind for them to measure.

The formulas are in the files beside this one: `pictures` (pictures alone), `language` (pictures and texts), `views`
(one view and the next), `truth` (against the toy world's geometry), `distances` (sets of features), `cost` (time and
memory). docs/metrics.md says of each what it can and cannot see.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill3d.cameras import orbit
from distill3d.evaluation.distances import diversity, frechet_distance, kernel_distance
from distill3d.evaluation.evaluator import Evaluator
from distill3d.evaluation.images import (
    edge_concentration,
    psnr,
    radial_power,
    saturation,
    sharpness,
    spectrum_gap,
)
from distill3d.evaluation.language import (
    IQA_PAIRS,
    clip_iqa,
    clip_r_precision,
    clip_score,
    has_image_reward,
    image_reward,
)
from distill3d.evaluation.truth import chamfer_to_truth, silhouette_iou, true_kind
from distill3d.evaluation.views import (
    janus_rate,
    lost_back,
    neighbor_similarity,
    sees_behind,
    view_accuracy,
    warp_error,
)
from distill3d.types import Cameras

__all__ = [
    "METRICS", "Cell", "Metric", "divergence", "diversity", "edge_concentration", "frechet_distance",
    "kernel_distance", "measure", "pooled_features", "psnr", "radial_power", "saturation", "seed_diversity",
    "sharpness", "spectrum_gap",
]  # fmt: skip

EMPTY, FULL = 0.005, 0.9  # mean opacity over the views


@dataclass(frozen=True)
class Cell:
    """What one run (a prompt, a method, a seed) left behind, and what a metric may compare it with.

    Whatever is None was not kept or not given; the metrics that need it are left out.
    """

    prompt: str
    pictures: Tensor | None = None  # [V, 3, H, W] of evenly spaced views; None where the run left nothing
    azimuths: Tensor | None = None  # [V] degrees, 0 the front
    elevation: float = 15.0  # degrees
    distance: float = 2.8  # world units
    fov: float = 40.0  # degrees
    background: float = 0.9  # the gray behind the pictures
    opacity: Tensor | None = None  # [V, 1, H, W], or means [V] where maps were not kept
    depth: Tensor | None = None  # [V, 1, H, W] expected ray length, world units
    vertices: np.ndarray | None = None  # [N, 3] of the exported mesh, world space
    faces: np.ndarray | None = None  # [F, 3]
    evaluator: Evaluator | None = None  # or a ToyboxJudge
    reference: Tensor | None = None  # [M, 3, H, W] pictures of what it should look like
    prompts: tuple[str, ...] = ()  # of the whole benchmark, its own among them; for R-precision
    seconds: float | None = None  # wall time
    nfe: float | None = None  # network rows
    peak_memory: float | None = None  # bytes
    failure: str = ""  # why the run ended early: "out of memory", "nan"; empty where it did not

    @property
    def cameras(self) -> Cameras:
        """The cameras of the pictures."""
        assert self.azimuths is not None
        return orbit(self.azimuths.float(), self.elevation, self.distance, self.fov)


def divergence(cell: Cell) -> str:
    """Why a run counts as diverged: "out of memory", "nan", "empty" or "full"; "" where it does not.

    The paper's Table 1 counts runs that ran out of memory and runs that ended in an empty volume; one with numbers
    that are none, and one where nothing but a wall is seen, are no objects either. Empty and full: a mean opacity
    over all views below 0.005 or above 0.9.
    """
    if cell.failure:
        return cell.failure
    seen = [t for t in (cell.pictures, cell.opacity) if t is not None]
    if not all(map(_finite, seen)):
        return "nan"
    if cell.opacity is None:
        return ""
    mean = float(cell.opacity.float().mean())
    return "empty" if mean < EMPTY else "full" if mean > FULL else ""


@dataclass(frozen=True)
class Metric:
    """A number about a cell."""

    name: str
    unit: str
    better: Literal["higher", "lower", "one", "neither"]  # one: the nearer to 1
    needs: tuple[str, ...]  # keys of NEEDS
    function: Callable[[Any], float]  # of a Cell that has what is needed


def _finite(values: Tensor | None) -> bool:
    return values is not None and bool(torch.isfinite(values).all())


def _several(pictures: Tensor | None) -> bool:
    return pictures is not None and len(pictures) > 1


def _reads_english(cell: Cell) -> bool:
    return cell.evaluator is not None and cell.evaluator.reads([text for pair in IQA_PAIRS.values() for text in pair])


# What a metric may need, and whether a cell has it.
NEEDS: dict[str, Callable[[Any], bool]] = {
    "pictures": lambda cell: _finite(cell.pictures),
    "azimuths": lambda cell: cell.azimuths is not None,
    "views from behind": lambda cell: cell.azimuths is not None and sees_behind(cell.azimuths),
    "opacity": lambda cell: _finite(cell.opacity) and cell.opacity.ndim == 4,
    "depth": lambda cell: _finite(cell.depth),
    "mesh": lambda cell: cell.vertices is not None and cell.faces is not None and len(cell.faces) > 0,
    "evaluator": lambda cell: cell.evaluator is not None,
    "evaluator that reads English": _reads_english,
    "prompts": lambda cell: len(set(cell.prompts)) > 1,
    "reference": lambda cell: cell.reference is not None,
    "several pictures and references": lambda cell: _several(cell.pictures) and _several(cell.reference),
    "toybox": lambda cell: true_kind(cell.prompt) is not None,
    "imagereward": lambda cell: has_image_reward(),
    "seconds": lambda cell: cell.seconds is not None,
    "nfe": lambda cell: cell.nfe is not None,
    "peak_memory": lambda cell: cell.peak_memory is not None,
}


def _iqa(name: str) -> Callable[[Any], float]:
    return lambda c: float(clip_iqa(c.pictures, IQA_PAIRS[name], c.evaluator).mean())


def _kernel(cell: Any) -> float:
    """Of unit embeddings, times 1000: the kernel is (cosine + 1)^3."""
    see = cell.evaluator.pictures
    return 1000 * kernel_distance(see(cell.pictures), see(cell.reference), gamma=1.0)


def _silhouettes(cell: Any) -> float:
    return silhouette_iou(cell.opacity[:, 0] > 0.5, cell.cameras, true_kind(cell.prompt) or "")


SEEN, TOLD, COMPARED = ("pictures",), ("pictures", "evaluator"), ("pictures", "reference")
SETS = (*TOLD, "reference", "several pictures and references")
ENGLISH, TURNED = (*SEEN, "evaluator that reads English"), (*TOLD, "azimuths")
_ALL = [
    Metric("clip_score", "", "higher", TOLD, lambda c: clip_score(c.pictures, c.prompt, c.evaluator)),
    Metric("clip_r_precision", "", "higher", (*TOLD, "prompts"),
           lambda c: clip_r_precision(c.pictures, c.prompt, c.prompts, c.evaluator)),
    Metric("clip_iqa_quality", "", "higher", ENGLISH, _iqa("quality")),
    Metric("clip_iqa_sharpness", "", "higher", ENGLISH, _iqa("sharpness")),
    Metric("clip_iqa_real", "", "higher", ENGLISH, _iqa("real")),
    Metric("image_reward", "", "higher", (*SEEN, "imagereward"), lambda c: image_reward(c.pictures, c.prompt)),
    Metric("sharpness", "of the reference", "one", COMPARED, lambda c: sharpness(c.pictures, c.reference)),
    Metric("spectrum_gap", "", "lower", COMPARED, lambda c: spectrum_gap(c.pictures, c.reference)),
    Metric("edge_concentration", "of the reference", "one", COMPARED,
           lambda c: edge_concentration(c.pictures, c.reference)),
    Metric("saturation", "", "neither", SEEN, lambda c: saturation(c.pictures)),
    Metric("frechet", "", "lower", SETS,
           lambda c: frechet_distance(c.evaluator.pictures(c.pictures), c.evaluator.pictures(c.reference))),
    Metric("kernel", "x 1000", "lower", SETS, _kernel),
    Metric("janus_rate", "", "lower", TURNED,
           lambda c: janus_rate(c.pictures, c.azimuths, c.prompt, c.evaluator)),
    Metric("lost_back", "", "lower", (*TURNED, "views from behind"),
           lambda c: lost_back(c.pictures, c.azimuths, c.prompt, c.evaluator)),
    Metric("view_accuracy", "", "higher", TURNED,
           lambda c: view_accuracy(c.pictures, c.azimuths, c.prompt, c.evaluator)),
    Metric("neighbor_similarity", "", "higher", TOLD, lambda c: neighbor_similarity(c.pictures, c.evaluator)),
    Metric("warp_error", "", "lower", (*SEEN, "azimuths", "opacity", "depth"),
           lambda c: warp_error(c.pictures, c.depth, c.opacity, c.cameras)),
    Metric("silhouette_iou", "", "higher", ("azimuths", "opacity", "toybox"), _silhouettes),
    Metric("chamfer", "world units", "lower", ("mesh", "toybox"),
           lambda c: chamfer_to_truth(c.vertices, c.faces, true_kind(c.prompt) or "")),
    Metric("diverged", "", "lower", (), lambda c: float(bool(divergence(c)))),
    Metric("seconds", "s", "lower", ("seconds",), lambda c: float(c.seconds)),
    Metric("nfe", "rows", "lower", ("nfe",), lambda c: float(c.nfe)),
    Metric("peak_memory", "GiB", "lower", ("peak_memory",), lambda c: c.peak_memory / 2**30),
]  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def check_metrics(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in METRICS."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; allowed: {', '.join(METRICS)}")


def measure(cell: Cell, names: Sequence[str] = tuple(METRICS)) -> dict[str, float]:
    """The metrics of these names, in their order; those whose needs the cell lacks are left out, with one warning.

    Raises:
        ValueError: for an unknown name, before anything is measured.
    """
    check_metrics(names)
    values, missing = {}, {}
    for name in dict.fromkeys(names):
        lacking = [need for need in METRICS[name].needs if not NEEDS[need](cell)]
        if lacking:
            missing[name] = lacking[0]
        else:
            values[name] = METRICS[name].function(cell)
    if missing:
        told = ", ".join(f"{name} (needs {need})" for name, need in missing.items())
        warnings.warn(f"not measured: {told}", stacklevel=2)
    return values


def seed_diversity(cells: Sequence[Cell]) -> float:
    """`diversity` of runs of one prompt with different seeds, seen by their evaluator from the same views.

    Raises:
        ValueError: for fewer than two runs with pictures, for several prompts, or different numbers of views.
    """
    kept: list[Any] = [cell for cell in cells if _finite(cell.pictures) and cell.evaluator is not None]
    if len({(cell.prompt, len(cell.pictures)) for cell in kept}) > 1:
        raise ValueError("diversity compares seeds of one prompt from the same views, got several")
    if len(kept) < 2:
        raise ValueError(f"diversity needs at least two seeds with pictures and an evaluator, got {len(kept)}")
    return diversity(torch.stack([cell.evaluator.pictures(cell.pictures) for cell in kept]))


def pooled_features(cells: Sequence[Cell]) -> tuple[Tensor, Tensor]:
    """Evaluator embeddings [N, D] and [M, D] of all pictures and of all references of many runs.

    For `frechet_distance` and `kernel_distance` of a whole method, which mean more than those of single cells.
    """
    whole: list[Any] = [c for c in cells if _finite(c.pictures) and _finite(c.reference) and c.evaluator is not None]
    if not whole:
        raise ValueError("none of the runs has pictures, a reference and an evaluator")
    made, wanted = ([c.evaluator.pictures(getattr(c, n)) for c in whole] for n in ("pictures", "reference"))
    return torch.cat(made), torch.cat(wanted)
