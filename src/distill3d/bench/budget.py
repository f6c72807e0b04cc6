"""The same budget for all variants: equal steps, or as many steps as a number of network evaluations (NFE) allows.

A step costs a different number of evaluations for each method: SDS takes 2 per view, SDI more. They are counted by a
dry run of the objective on a prior without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill3d.bench.protocol import Variant
from distill3d.diffusion.random import Generators
from distill3d.objectives import ESD, VSD, Method, Objective
from distill3d.prompts import ViewPrompts
from distill3d.render.texels import of_view
from distill3d.types import Condition, Conditioning, Prior, Schedule

DRY_STEPS = 100  # of a dry run: all schedules are fractions of a run


def with_budget(variants: Sequence[Variant], budget: str, prior: Prior) -> tuple[Variant, ...]:
    """The variants with their numbers of steps for a budget.

    Args:
        budget: "steps" keeps the recipes' steps. "nfe" gives every variant the network evaluations that the first one
            takes. A number gives each that many network evaluations.

    Raises:
        ValueError: for another word, or a number that is less than one step of a variant.
    """
    if budget == "steps":
        return tuple(variants)
    if budget == "nfe":
        allowed = nfe_of_a_step(variants[0], prior) * variants[0].recipe.steps
    elif budget.isdecimal() and int(budget) > 0:
        allowed = float(budget)
    else:
        raise ValueError(f"the budget must be steps, nfe or a number of network evaluations (NFE), got {budget!r}")

    def spending(variant: Variant) -> Variant:
        if variant.recipe.sampling is not None:
            raise ValueError(f"{variant.name} takes as many NFE whatever its steps: use --budget steps")
        price = nfe_of_a_step(variant, prior)
        steps = int(allowed / price + 1e-6)
        if steps < 1:
            raise ValueError(f"{allowed:.0f} NFE are too few: one step of {variant.name} takes {price:.0f}")
        return replace(variant, recipe=replace(variant.recipe, steps=steps))

    return tuple(map(spending, variants))


def nfe_of_a_step(variant: Variant, prior: Prior) -> float:
    """Network evaluations of one step of a variant, the mean over a run."""
    recipe = variant.recipe
    total = min(recipe.steps, DRY_STEPS)
    null, generator = _NullPrior(prior.schedule), torch.Generator().manual_seed(0)
    objective = _dry(recipe.objective, null, total, generator)
    second = _dry(recipe.supervision.objective, null, total, generator)
    prompts = ViewPrompts("anything", perp_neg=recipe.perp_neg)
    sampling, nfe = recipe.sampling, 0
    if sampling is not None:  # a call for all views at each level
        views = sampling.cameras()
        conditioning = prompts.conditioning(views.azimuth, views.elevation, null.embed)
        x = torch.zeros(len(views), *null.sample_shape)
        calls = sampling.joint_levels + sampling.levels
        rows = objective.guidance(x, null, conditioning, step=0, total=total, generator=generator).nfe
        return rows * calls / recipe.steps
    for step in range(total):
        views = recipe.cameras.sample(recipe.views, generator)
        conditioning = prompts.conditioning(views.azimuth, views.elevation, null.embed)
        x = torch.zeros(recipe.views, *null.sample_shape)
        seen = of_view(views, 1, 1)
        nfe += objective.guidance(x, null, conditioning, step=step, total=total, generator=generator, texels=seen).nfe
        if recipe.supervision.weight(step, total) > 0:
            nfe += second.guidance(x, null, conditioning, step=step, total=total, generator=generator).nfe
    return nfe / total


def _dry(method: Method, prior: Prior, total: int, generator: torch.Generator) -> Objective:
    """The objective of a method; one that trains a student gets a student that learns nothing."""
    if isinstance(method, VSD | ESD):
        return method.with_student(_NullStudent())
    return method.build(prior, total, generator)


@dataclass
class _NullPrior(Prior):
    """A prior with images of one pixel that predicts zero noise."""

    schedule: Schedule
    name: str = "a dry run"
    image_size: int = 1
    sample_shape: tuple[int, ...] = (1, 1, 1)
    device: torch.device = torch.device("cpu")

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :1]

    def decode(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)

    def embed(self, texts: Sequence[str]) -> Condition:
        return Condition(torch.zeros(len(texts), 1, 1))

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x_t)


class _NullStudent:
    """A student that predicts zero noise and learns nothing."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, with_camera: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    def learn(self, x: Tensor, conditioning: Conditioning, generator: Generators) -> int:
        return len(x)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass
