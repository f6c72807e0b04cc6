"""Settings of 2D runs as values: a default for each method, and the objective that they mean.

`ddim` is the sampler that the others are measured against; every other name is an objective.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from distill3d.distill.family import FAMILY, companion, family_objective
from distill3d.objectives import Objective, sdi, sdi_cached
from distill3d.types import Prior

Space = Literal["latents", "pixels"]
STARTS = ("zero", "gray", "noise", "denoised")
DEFAULT_SCALE = 5.0  # for ddim and sdi alike, so that they can be compared


@dataclass(frozen=True)
class PictureRecipe:
    """How a picture is made.

    `start` is one of STARTS or a picture's file: x = 0 (where DDIM starts), the encoding of mid-gray, N(0, I), or
    pure noise denoised in one step. `rate` is Adam's; 0 takes the target whole, x <- x - g. `project` decodes,
    clamps and encodes the latents before each step. Times and inversion settings are for the methods that use
    them: the others bring their own.
    """

    steps: int = 400
    scale: float | None = None  # guidance; None is the method's own
    space: Space = "latents"
    start: str = "noise"
    rate: float = 0.05
    project: bool = False
    first: float = 0.98  # time of the first step, for ddim and sdi
    last: float = 0.02
    inversion_scale: float = -5.0
    inversion_steps: int = 10
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a picture needs at least one step, got {self.steps}")
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise ValueError(f"the rate must be 0 (the target taken whole) or positive, got {self.rate}")
        for name in ("scale", "inversion_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name.replace('_', ' ')} must be a finite number, got {value}")
        if not 0 <= self.last <= self.first <= 1:
            raise ValueError(f"times must satisfy 0 <= last <= first <= 1, got {self.last} and {self.first}")
        if self.space == "pixels" and self.rate == 0:
            raise ValueError("pixels follow a gradient and cannot take a target whole: give a rate above 0")
        if self.space == "pixels" and self.project:
            raise ValueError("pixels need no projection: it is for latents")
        if self.start not in STARTS and not Path(self.start).is_file():
            raise ValueError(f"unknown start {self.start!r}: choose {', '.join(STARTS)}, or a picture's file")

    @property
    def guidance(self) -> float:
        """The guidance scale, DEFAULT_SCALE where it is left open."""
        return DEFAULT_SCALE if self.scale is None else self.scale


WHOLE = PictureRecipe(steps=50, scale=DEFAULT_SCALE, rate=0.0)

PICTURE_METHODS = ("ddim", "sdi", "sdi_cached", *FAMILY)

PICTURE_RECIPES: dict[str, PictureRecipe] = {
    "ddim": dataclasses.replace(WHOLE, start="zero"),
    "sdi_cached": dataclasses.replace(WHOLE, start="zero"),
    # Free latents that are inverted at every step drift away from what a picture can encode to.
    "sdi": dataclasses.replace(WHOLE, steps=40, start="denoised", project=True),
}


def picture_recipe(method: str) -> PictureRecipe:
    """The settings that a method has unless told otherwise; ValueError for an unknown name."""
    if method not in PICTURE_METHODS:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(PICTURE_METHODS)}")
    return PICTURE_RECIPES.get(method, PictureRecipe())


def picture_objective(method: str, recipe: PictureRecipe, prior: Prior, generator: torch.Generator) -> Objective:
    """The objective behind a name with a recipe's settings, fresh for one run.

    Raises:
        ValueError: for `ddim`, which is none, for an unknown name, and for settings or a prior that do not fit.
    """
    if method not in PICTURE_METHODS or method == "ddim":
        raise ValueError(f"unknown objective {method!r}; allowed: {', '.join(PICTURE_METHODS[1:])}")
    if method == "sdi":
        inversion = (recipe.inversion_scale, recipe.inversion_steps, recipe.eta)
        return sdi(recipe.guidance, *inversion, recipe.first, recipe.last)
    if method == "sdi_cached":
        return sdi_cached(recipe.guidance, recipe.first, recipe.last)
    return family_objective(method, recipe.steps, recipe.scale, companion(method, prior, generator))
