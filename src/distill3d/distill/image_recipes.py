"""Recipes for 2D images: defaults for each method, and the DDIM sampler that the methods are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from distill3d.objectives import CFD, METHODS, SDI, Method, Objective, SDICached
from distill3d.types import Prior

Space = Literal["latents", "pixels"]
STARTS = ("zero", "gray", "noise", "denoised")
DEFAULT_SCALE = 5.0  # guidance of ddim and effective guidance of sdi alike, so that they can be compared


@dataclass(frozen=True)
class DDIM:
    """The DDIM sampler itself, from N(0, sigma^2) at t = start to t = stop (Song et al. 2021)."""

    scale: float = DEFAULT_SCALE
    start: float = 0.98
    stop: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.stop <= self.start <= 1:
            raise ValueError(f"times must satisfy 0 <= stop <= start <= 1, got {self.stop} and {self.start}")

    def build(self, prior: Prior, steps: int, generator: torch.Generator) -> Objective:
        """Raises ValueError: the sampler is not an objective; only images can be made with it."""
        raise ValueError("ddim is a sampler of images, not an objective; choose a method, such as sdi")


MOST_STEPS = 10**7  # of any run
LARGEST_RATE = 1e6  # a learning rate; far above what any run survives, and below what float32 can hold


@dataclass(frozen=True)
class ImageRecipe:
    """How an image is made.

    `start` is one of STARTS or an image file: x = 0 (where DDIM starts), the encoding of mid-gray, N(0, I), or pure
    noise denoised in one step. `rate` is Adam's learning rate; None takes the whole target, x <- x - g. `project`
    decodes, clamps and encodes the latents before each step.
    """

    steps: int = 400
    objective: Method = SDI()
    space: Space = "latents"
    start: str = "noise"
    rate: float | None = 0.05
    project: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"an image needs at least one step, and at most {MOST_STEPS}, got {self.steps}")
        if self.rate is not None and not 0 < self.rate <= LARGEST_RATE:
            raise ValueError(f"the learning rate must lie in (0, {LARGEST_RATE:,.0f}], got {self.rate}")
        if self.space == "pixels" and self.rate is None:
            raise ValueError("pixels follow a gradient and need a learning rate, such as --learning-rate 0.05")
        if self.space == "pixels" and self.project:
            raise ValueError("only latents can be projected: with --space pixels also --set project=false")


IMAGE_RECIPES: Mapping[str, ImageRecipe] = {
    "ddim": ImageRecipe(steps=50, objective=DDIM(), start="zero", rate=None),
    # Free latents that are inverted at every step drift away from those of images, hence the projection.
    "sdi": ImageRecipe(
        steps=40,
        objective=SDI(DEFAULT_SCALE, 1.0, eta=0.0, stop=0.02, nominal=True),
        start="denoised",
        rate=None,
        project=True,
    ),
    "sdi_cached": ImageRecipe(steps=50, objective=SDICached(DEFAULT_SCALE), start="zero", rate=None),
    "cfd": ImageRecipe(steps=50, objective=CFD(DEFAULT_SCALE), start="zero", rate=None),
}
IMAGE_METHODS = tuple(dict.fromkeys([*IMAGE_RECIPES, *METHODS]))


def image_recipe(method: str) -> ImageRecipe:
    """The default recipe of a method by its name (in any case); ValueError for an unknown one."""
    key = method.lower().replace("-", "_")
    if key not in IMAGE_METHODS:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(IMAGE_METHODS)}")
    return IMAGE_RECIPES.get(key) or ImageRecipe(objective=METHODS[key])
