"""Numbers that are not finite end a run, with the step, the first thing that is not finite, and what to do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distill3d.distill.loop import Progress

PARAMETER, PREDICTION, PENALTY = "the parameter", "the prediction of the network", "the penalty"
ADVICE = {  # by how the name of the culprit begins
    PARAMETER: "a lower --learning-rate",
    PREDICTION: "--dtype float32, or a lower --scale",
    PENALTY: "a lower weight, --set penalties.NAME.end=...",
}


class Diverged(ArithmeticError):
    """A step gave numbers that are not finite; `culprit` is the first of them in the order of computation."""

    def __init__(self, step: int, culprit: str):
        advice = next((text for start, text in ADVICE.items() if culprit.startswith(start)), ADVICE[PARAMETER])
        advice = advice.replace("NAME", culprit.rpartition(" ")[2])
        super().__init__(f"in step {step} {culprit} is not finite: try {advice}, or another --seed")
        self.step, self.culprit = step, culprit


def check_step(progress: Progress, parts: Iterable[tuple[str, Tensor]]) -> None:
    """Raises Diverged if a logged number of a step is not finite.

    `parts`, the tensors of the step by name in the order of computation, are looked at only then: a step that is fine
    costs no transfer from an accelerator.
    """
    if not all(map(math.isfinite, dataclasses.astuple(progress))):
        raise Diverged(progress.step, first_not_finite(parts) or "the loss")


def first_not_finite(parts: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is not finite."""
    return next((name for name, value in parts if not bool(torch.isfinite(value).all())), None)
