"""A run in 3D from a recipe, and the whole loop as one call."""

from __future__ import annotations

from dataclasses import replace

from distill3d.cameras import CameraSampler
from distill3d.distill.loop import ObjectRun, OnStep, optimize
from distill3d.distill.recipes import Recipe
from distill3d.distill.view_sampling import SamplingRun
from distill3d.objectives import Method
from distill3d.prompts import ViewPrompts
from distill3d.types import Prior, Scene


def object_run(
    recipe: Recipe,
    prompts: ViewPrompts,
    prior: Prior,
    seed: int = 0,
    second: Prior | None = None,
    scene: Scene | None = None,
) -> ObjectRun:
    """The run of a recipe at its start: it distills random views, or samples views where `recipe.sampling` says so.

    Arguments and errors as for `ObjectRun`.
    """
    kind = ObjectRun if recipe.sampling is None else SamplingRun
    return kind(recipe, prompts, prior, seed, second, scene)


def distill(
    scene: Scene,
    prior: Prior,
    objective: Method,
    prompts: ViewPrompts | str,
    recipe: Recipe = Recipe(),
    *,
    cameras: CameraSampler | None = None,
    steps: int | None = None,
    on_step: OnStep = lambda progress: None,
    seed: int = 0,
) -> None:
    """Distills a prior into a scene of yours, in place.

    Args:
        scene: any object that fits the `Scene` protocol; its parameters are optimized.
        objective: settings such as `SDI()`, or an `Objective`.
        prompts: the prompt, or `ViewPrompts` with texts for each direction.
        recipe: learning rates, regularizers and everything else; its scene and objective are not used.
        cameras, steps: replace those of the recipe.
        on_step: called with a `Progress` after each step; an exception ends the loop.

    Raises:
        ValueError: where prior, objective, recipe and scene do not fit together.
    """
    prompts = ViewPrompts(prompts, perp_neg=recipe.perp_neg) if isinstance(prompts, str) else prompts
    recipe = replace(
        recipe, objective=objective, cameras=cameras or recipe.cameras, steps=recipe.steps if steps is None else steps
    )
    run = object_run(recipe, prompts, prior, seed, scene=scene)
    optimize(run, range(recipe.steps), on_step)
