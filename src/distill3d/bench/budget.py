"""The same budget for all: equal steps, or as many steps as the network evaluations allow.

What a step costs differs from method to method (SDS asks the network for 2 rows a view, SDI for more). It is counted
beforehand by a dry run of the objective on a prior that answers nothing and costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from distill3d.bench.protocol import Variant
from distill3d.diffusion.random import Generators
from distill3d.distill.family import TAUGHT
from distill3d.distill.recipes import Penalties, Recipe
from distill3d.distill.regularizers import WeightSchedule
from distill3d.prompts import ViewPrompts
from distill3d.types import Condition, Conditioning, Prior, Schedule

DRY_STEPS = 100  # of a dry run; the times of every method are spread over a run of any length alike


def with_budget(variants: Sequence[Variant], budget: str, prior: Prior) -> tuple[Variant, ...]:
    """The variants with their numbers of steps for a budget.

    Args:
        budget: "steps": as the recipes say. "nfe": every variant gets the network rows that the first one
            takes for its recipe's steps. A number: so many network rows.

    Raises:
        ValueError: for another word, or a number that is less than one step of a variant.
    """
    if budget == "steps":
        return tuple(variants)
    first = variants[0]
    if budget == "nfe":
        rows = rows_of_a_step(first, prior) * first.recipe.steps
    elif budget.isdecimal() and int(budget) > 0:
        rows = float(budget)
    else:
        raise ValueError(f"the budget must be steps, nfe or a number of network evaluations (NFE), got {budget!r}")
    return tuple(_spending(variant, rows, prior) for variant in variants)


def _spending(variant: Variant, rows: float, prior: Prior) -> Variant:
    price = rows_of_a_step(variant, prior)
    steps = int(rows / price + 1e-6)
    if steps < 1:
        raise ValueError(f"{rows:.0f} network evaluations are too few: one step of {variant.name} takes {price:.0f}")
    return dataclasses.replace(variant, recipe=with_steps(variant.recipe, steps))


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe over another number of steps; the schedules of its penalties are stretched along."""
    share = steps / recipe.steps

    def stretched(weight: WeightSchedule) -> WeightSchedule:
        ends = (round(share * weight.begin_step), round(share * weight.end_step))
        return WeightSchedule(weight.start, weight.end, *ends)

    names = [field.name for field in dataclasses.fields(Penalties)]
    penalties = Penalties(**{name: stretched(getattr(recipe.penalties, name)) for name in names})
    return dataclasses.replace(recipe, steps=steps, penalties=penalties)


def rows_of_a_step(variant: Variant, prior: Prior) -> float:
    """Network rows of one step of a variant, the mean over a run."""
    recipe = variant.recipe
    total = min(recipe.steps, DRY_STEPS)
    hollow, generator = _Hollow(prior.schedule), torch.Generator().manual_seed(0)
    short = dataclasses.replace(recipe, steps=total)
    objective = short.objective(variant.method, _Idle() if variant.method in TAUGHT else None)  # type: ignore[arg-type]
    shape = recipe.supervision.objective(total)
    prompts = ViewPrompts("anything", perp_neg=recipe.perp_neg)
    rows = 0
    for step in range(total):
        views = recipe.cameras.sample(recipe.views, generator)
        told = prompts.conditioning(views.azimuth, views.elevation, hollow.embed)
        x = torch.zeros(recipe.views, *hollow.sample_shape)
        rows += objective.guidance(x, hollow, told, step=step, total=total, generator=generator).nfe
        if recipe.supervision.weight(step * recipe.steps // total) > 0:
            rows += shape.guidance(x, hollow, told, step=step, total=total, generator=generator).nfe
    return rows / total


class _Hollow(Prior):
    """A prior whose pictures have one pixel and whose noise is none."""

    name, image_size, sample_shape, device = "a dry run", 1, (1, 1, 1), torch.device("cpu")

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :1]

    def decode(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)

    def embed(self, texts: Sequence[str]) -> Condition:
        return Condition(torch.zeros(len(texts), 1, 1))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x_t)


class _Idle:
    """A student that learns nothing."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, posed: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    def learn(self, x: Tensor, conditioning: Conditioning, generator: Generators) -> int:
        return len(x)
