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
from distill3d.evaluation.pictures import (
    edge_concentration,
    psnr,
    radial_power,
    saturation,
    sharpness,
    spectrum_gap,
)
from distill3d.types import Cameras

__all__ = [
    "METRICS", "Cell", "Metric", "divergence", "diversity", "edge_concentration", "frechet_distance",
    "kernel_distance", "measure", "psnr", "radial_power", "saturation", "sharpness", "spectrum_gap",
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
    background: float = 0.9  # the grey behind the pictures
    opacity: Tensor | None = None  # [V, 1, H, W], or means [V] where maps were not kept
    depth: Tensor | None = None  # [V, 1, H, W] expected ray length, world units
    vertices: np.ndarray | None = None  # [N, 3] of the exported mesh, world space
    faces: np.ndarray | None = None  # [F, 3]
    evaluator: Evaluator | None = None  # or a ToyboxJudge
    reference: Tensor | None = None  # [M, 3, H, W] pictures of what it should look like
    prompts: tuple[str, ...] = ()  # of the whole benchmark, its own among them; for R-precision
    seconds: float | None = None  # wall time
    evaluations: float | None = None  # network rows
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
    if any(not bool(torch.isfinite(t).all()) for t in seen):
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
    better: Literal["higher", "lower"]
    needs: tuple[str, ...]  # keys of NEEDS
    function: Callable[[Any], float]  # of a Cell that has what is needed


# What a metric may need, and whether a cell has it.
NEEDS: dict[str, Callable[[Cell], bool]] = {
    "pictures": lambda cell: cell.pictures is not None,
    "opacity": lambda cell: cell.opacity is not None,
    "evaluator": lambda cell: cell.evaluator is not None,
    "reference": lambda cell: cell.reference is not None,
    "seconds": lambda cell: cell.seconds is not None,
    "evaluations": lambda cell: cell.evaluations is not None,
    "peak_memory": lambda cell: cell.peak_memory is not None,
}

_ALL = [
    Metric("sharpness", "of the reference", "higher", ("pictures", "reference"),
           lambda c: sharpness(c.pictures, c.reference)),
    Metric("spectrum_gap", "", "lower", ("pictures", "reference"), lambda c: spectrum_gap(c.pictures, c.reference)),
    Metric("edge_concentration", "of the reference", "higher", ("pictures", "reference"),
           lambda c: edge_concentration(c.pictures, c.reference)),
    Metric("saturation", "", "higher", ("pictures",), lambda c: saturation(c.pictures)),
    Metric("diverged", "", "lower", (), lambda c: float(bool(divergence(c)))),
    Metric("seconds", "s", "lower", ("seconds",), lambda c: float(c.seconds)),
    Metric("evaluations", "rows", "lower", ("evaluations",), lambda c: float(c.evaluations)),
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
