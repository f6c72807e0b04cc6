"""Conditioning for rendered views, and an optional second objective on normal or depth maps.

A prior that only sees colors accepts a painted ball. Fantasia3D (Chen et al. 2023) showed it rendered normals instead;
RichDreamer (Qiu et al. 2023) and HumanNorm (Huang et al. 2023) showed it both, with models trained on normal and depth
maps and a prompt that says so. Here any prior serves, the run's own or another one with its own LoRA weights or
ControlNet, with any objective that trains no student.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distill3d.diffusion.random import Generators
from distill3d.distill.recipes import Recipe, Supervision
from distill3d.objectives import Objective, attach
from distill3d.objectives.objective import NoiseFrame
from distill3d.prompts import ViewPrompts
from distill3d.render.maps import control_image, geometry_image
from distill3d.render.texels import of_azimuth, of_depth, of_view
from distill3d.texels import Texels
from distill3d.types import Cameras, Conditioning, Prior, Rendering, Scene


def condition_views(prompts: ViewPrompts, prior: Prior, rendering: Rendering, cameras: Cameras) -> Conditioning:
    """The conditioning of B rendered views: texts, cameras and, for a prior with a ControlNet, its control images."""
    conditioning = prompts.conditioning(cameras.azimuth, cameras.elevation, prior.embed)
    if prior.control is not None:
        images = control_image(rendering, cameras.camera_to_world, prior.control)
        conditioning = conditioning.with_control(images)
    return conditioning.with_camera(cameras.camera_to_world, negative=not prior.camera_guidance)


def noise_texels(
    frame: NoiseFrame, scene: Scene, rendering: Rendering, cameras: Cameras, prior: Prior
) -> Texels | None:
    """The texels of the noise that the rendered views show, for an objective's frame; None where it is for images."""
    if frame == "image":
        return None
    height, width = prior.sample_shape[1:]
    if frame == "surface":
        own = scene.noise_texels(cameras, height, width)
        return of_depth(rendering, cameras, height, width) if own is None else own
    return {"constant": of_view, "camera": of_azimuth}[frame](cameras, height, width)


def for_prior(objective: Objective, prior: Prior, recipe: Recipe) -> Objective:
    """The objective for this prior: a multi-view prior sees the batch in groups of views.

    Raises ValueError where the recipe's views are not such groups.
    """
    objective = replace(objective, fixed_views=recipe.sampling is not None)
    if prior.views == 1:
        return objective
    if recipe.perp_neg:
        raise ValueError(
            f"{prior.name} is a multi-view prior and does not support Perp-Neg; pass --set recipe.perp_neg=false"
        )
    if recipe.sampling is not None:
        return replace(objective, views=recipe.sampling.group)
    if prior.views == 4 and not recipe.cameras.orthogonal:
        raise ValueError(f"{prior.name} sees four views 90 degrees apart; pass --set cameras.orthogonal=true")
    if recipe.views % prior.views:
        raise ValueError(
            f"{prior.name} sees {prior.views} views at once: --views-per-step must be a multiple, got {recipe.views}"
        )
    return replace(objective, views=prior.views)


def objective_prompts(prompts: ViewPrompts, objective: Objective) -> ViewPrompts:
    """The prompts for an objective: where it has suffixes, they are appended to form the positive and negative text."""
    if objective.suffixes is None:
        return prompts
    positive, negative = objective.suffixes
    return replace(prompts.extended(positive), negative=prompts.prompt + negative)


def prompts_for(prompts: ViewPrompts, prior: Prior) -> ViewPrompts:
    """The prompts for a prior: without direction words for one that gets the camera itself."""
    return prompts.undirected() if prior.camera_conditioned else prompts


def geometry_prompts(prompts: ViewPrompts, settings: Supervision) -> ViewPrompts:
    """The prompts of the second objective: those of the run with ", normal map" or ", depth map" at the end."""
    return prompts.extended(f", {settings.kind} map")


def run_texts(recipe: Recipe, prompts: ViewPrompts, prior: Prior, objective: Objective) -> list[str]:
    """All texts that a run asks this prior to embed, those of a second objective without its own prior included."""
    supervision, texts = recipe.supervision, prompts_for(objective_prompts(prompts, objective), prior).texts
    if supervision.weight and not supervision.separate_prior:
        texts += prompts_for(geometry_prompts(prompts, supervision), prior).texts
    return [*texts, *objective.texts]


class GeometryObjective:
    """The second objective of a run, on rendered normals or depth."""

    def __init__(self, recipe: Recipe, prompts: ViewPrompts, prior: Prior):
        """prompts are the run's. Raises ValueError where the recipe's views do not suit the prior."""
        self.settings, self.prior, self.total = recipe.supervision, prior, recipe.steps
        objective = self.settings.objective.build(prior, recipe.steps, torch.Generator().manual_seed(0))
        self.prompts = prompts_for(objective_prompts(geometry_prompts(prompts, self.settings), objective), prior)
        self.objective = for_prior(objective, prior, recipe)
        if objective.frame != "image":
            raise ValueError(
                "the second objective has no noise on the object: choose another method than cfd or sdi_cached"
            )
        if self.settings.separate_prior:  # else its texts are among those of the run
            prior.prepare([*self.prompts.texts, *objective.texts])

    def needs_normals(self, step: int) -> bool:
        """Whether the rendering of a step must have normals."""
        return self.settings.weight(step, self.total) > 0 and "normal" in (self.settings.kind, self.prior.control)

    def loss(self, step: int, rendering: Rendering, cameras: Cameras, generator: Generators) -> tuple[Tensor, int]:
        """The weighted loss, a scalar, and its network evaluations; nothing is drawn at weight 0."""
        weight = self.settings.weight(step, self.total)
        if weight == 0:
            return rendering.rgb.new_zeros(()), 0
        image = geometry_image(rendering, cameras.camera_to_world, self.settings.kind)
        size = self.prior.image_size
        if image.shape[-1] != size:
            image = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
        x = self.prior.encode(image)
        conditioning = condition_views(self.prompts, self.prior, rendering, cameras)
        guidance = self.objective.guidance(
            x, self.prior, conditioning, step=step, total=self.total, generator=generator
        )
        return weight * attach(x, guidance.gradient), guidance.nfe
