"""What a prior is told of rendered views, and the second objective: the shape alone, as a picture that is distilled.

A prior that sees only colors is content with a painted ball. Fantasia3D (Chen et al. 2023) showed it renderings of
the normals instead, RichDreamer (Qiu et al. 2023) and HumanNorm (Huang et al. 2023) gave it both and used models
that had learned normal and depth maps, told so by words after the prompt. Here any prior serves, the run's own or
another one with LoRA weights or a ControlNet of its own, with any objective that trains no companion.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distill3d.diffusion.random import Generators
from distill3d.distill.recipes import Recipe, Supervision
from distill3d.objectives import Objective, attach
from distill3d.prompts import ViewPrompts
from distill3d.render.maps import control_picture, geometry_picture
from distill3d.types import Cameras, Conditioning, Prior, Rendering


def told(prompts: ViewPrompts, prior: Prior, rendering: Rendering, cameras: Cameras) -> Conditioning:
    """What a prior is told of B rendered views: texts, cameras and, if it has a ControlNet, a picture for that."""
    conditioning = prompts.conditioning(cameras.azimuth, cameras.elevation, prior.embed)
    if prior.control is not None:
        conditioning = conditioning.with_control(control_picture(rendering, cameras.camera_to_world, prior.control))
    return conditioning.with_camera(cameras.camera_to_world)


def suited(objective: Objective, prior: Prior, recipe: Recipe) -> Objective:
    """The objective for this prior: in groups of views for one that sees several at once.

    Raises ValueError where the recipe's views are not such groups.
    """
    views = prior.views
    if views == 1:
        return objective
    if recipe.perp_neg:
        raise ValueError(f"{prior.name} is a multi-view prior and does not support Perp-Neg; pass --no-perp-neg")
    if views == 4 and not recipe.cameras.orthogonal:
        raise ValueError(f"{prior.name} sees four views a quarter turn apart: set --cameras.orthogonal")
    if recipe.views % views:
        raise ValueError(f"{prior.name} sees {views} views at once: set --views to a multiple, got {recipe.views}")
    return replace(objective, views=views)


def prompts_for(prompts: ViewPrompts, prior: Prior) -> ViewPrompts:
    """The texts as a prior should read them: without view directions if it is conditioned on the cameras."""
    return prompts.undirected() if prior.camera_conditioned else prompts


def shape_prompts(prompts: ViewPrompts, settings: Supervision) -> ViewPrompts:
    """The texts of the second objective: those of the first and what kind of picture it looks at."""
    return prompts.extended(f", {settings.kind} map" if settings.suffix is None else settings.suffix)


class ShapeObjective:
    """The second objective of a run."""

    def __init__(self, recipe: Recipe, prompts: ViewPrompts, prior: Prior):
        """prompts are the run's. Raises ValueError where the recipe's views do not suit the prior."""
        self.settings, self.prior = recipe.supervision, prior
        self.prompts = prompts_for(shape_prompts(prompts, self.settings), prior)
        self.objective = suited(self.settings.objective(recipe.steps), prior, recipe)
        self.total = recipe.steps

    def needs_normals(self, step: int) -> bool:
        """Whether the rendering of a step has to have normals."""
        return self.settings.weight(step) > 0 and "normal" in (self.settings.kind, self.prior.control)

    def loss(self, step: int, rendering: Rendering, cameras: Cameras, generator: Generators) -> tuple[Tensor, int]:
        """Its weight times `attach` of its gradient, a scalar, and the network rows; nothing is drawn at weight 0."""
        weight = self.settings.weight(step)
        if weight == 0:
            return rendering.rgb.new_zeros(()), 0
        picture = geometry_picture(rendering, cameras.camera_to_world, self.settings.kind)
        size = self.prior.image_size
        if picture.shape[-1] != size:
            picture = torch.nn.functional.interpolate(picture, (size, size), mode="bilinear", antialias=True)
        x = self.prior.encode(picture)
        conditioning = told(self.prompts, self.prior, rendering, cameras)
        guidance = self.objective.guidance(
            x, self.prior, conditioning, step=step, total=self.total, generator=generator
        )
        return weight * attach(x, guidance.gradient), guidance.nfe
