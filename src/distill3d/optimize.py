"""The loop: render, ask the objective which way the picture should move, move the parameters.

The only place where scenes and diffusion meet. What is rendered is a callable, so 3D (random cameras around a
field) and 2D (a picture is a scene with one view) share the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill3d import cameras, regularizers
from distill3d.family import companion
from distill3d.objectives import Objective, attach
from distill3d.prompts import ViewPrompts
from distill3d.recipes import Recipe, check_method
from distill3d.render.control import control_picture
from distill3d.scenes.background import RandomGrey
from distill3d.scenes.field import VoxelField
from distill3d.types import Conditioning, Prior, Rendering

Views = Callable[[int], tuple[Rendering, Conditioning]]
Penalties = Callable[[int, Rendering], dict[str, Tensor]]


@dataclass(frozen=True)
class Progress:
    """What happened in one step; plain numbers, ready for metrics.jsonl."""

    step: int
    t: float  # mean time of the batch, in [0, 1]
    loss: float  # 0.5 mean((x - target)^2), that of the pictures added
    penalty: float  # sum of the weighted regularisers
    opacity: float  # mean opacity of the views
    evaluations: int  # network rows so far


def distill(
    views: Views,
    prior: Prior,
    objective: Objective,
    optimiser: Callable[[int], torch.optim.Optimizer],
    penalties: Penalties,
    steps: range,
    total: int,
    generator: torch.Generator,
    on_step: Callable[[Progress], None],
    encode: Callable[[Tensor], Tensor] | None = None,
    evaluations: int = 0,
    picture_weight: float = 0.0,
) -> None:
    """Runs `steps` of a run that is `total` long.

    Args:
        views: step -> rendering of B views, with gradients, and what the prior is told about them.
        optimiser: step -> the optimiser to use (a scene that is refined gets a new one).
        penalties: step, rendering -> weighted regularisers by name.
        on_step: called after each step; whatever it raises (an interrupt, say) ends the loop with the
            parameters in order.
        encode: rendered pictures -> x; default: prior.encode. A scene whose parameters are x itself gives the
            identity.
        evaluations: network rows of the steps before these.
        picture_weight: of 0.5 mean((rgb - decode(x0_hat))^2), the pull of the pictures themselves towards the
            decoded target (HiFA, Zhu et al. 2023). The encoder overlooks much that a renderer can do: colours
            beyond the prior's, faint fog.
    """
    encode = encode or prior.encode
    for step in steps:
        stepper = optimiser(step)
        rendering, conditioning = views(step)
        x = encode(rendering.rgb)
        guidance = objective.guidance(x, prior, conditioning, step, generator, total)
        loss = attach(x, guidance.gradient)
        if picture_weight:
            with torch.no_grad():
                target = prior.decode(guidance.x0)
            loss = loss + picture_weight * 0.5 * (rendering.rgb - target).square().mean()
        penalty = torch.stack([loss.new_zeros(()), *penalties(step, rendering).values()]).sum()
        stepper.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        stepper.step()
        evaluations += guidance.evaluations
        on_step(
            Progress(
                step=step,
                t=float(guidance.t.mean()),
                loss=float(loss.detach()),
                penalty=float(penalty.detach()),
                opacity=float(rendering.opacity.detach().mean()),
                evaluations=evaluations,
            )
        )


class FieldRun:
    """A voxel field, its optimiser and its cameras as a recipe says: all that `distill` wants."""

    def __init__(self, recipe: Recipe, method: str, prompts: ViewPrompts, prior: Prior, seed: int = 0):
        """Raises ValueError for an unknown method, and for a prior that does not suit it."""
        check_method(method)
        self.recipe, self.prompts, self.prior = recipe, prompts, prior
        self.generator = torch.Generator().manual_seed(seed)
        self.student = companion(method, prior, self.generator)
        self.objective = recipe.objective(method, self.student)
        self.scene = VoxelField(recipe.field).to(prior.device)
        self.background = RandomGrey(*recipe.background)
        self._optimiser = self._new_optimiser()

    def distill(self, steps: range, on_step: Callable[[Progress], None], evaluations: int = 0) -> None:
        """Goes through `steps` of the recipe's; `evaluations` network rows were spent before them."""
        distill(
            self.views, self.prior, self.objective, self.optimiser, self.penalties,
            steps, self.recipe.steps, self.generator, on_step, evaluations=evaluations,
            picture_weight=self.recipe.picture_weight,
        )  # fmt: skip

    def views(self, step: int) -> tuple[Rendering, Conditioning]:
        """Random cameras of this step, rendered over random greys."""
        batch = self.recipe.views
        sample = self.recipe.cameras.sample(batch, self.generator).to(self.prior.device)
        rays = cameras.rays(sample, self.prior.image_size, self.prior.image_size)
        grey = self.background(batch, self.generator).to(self.prior.device)
        steered = getattr(self.prior, "controlnet", None) is not None
        control = self.prior.control if steered else None  # type: ignore[attr-defined]
        normals = self.recipe.penalties.orientation(step) > 0 or control == "normal"
        rendering = self.scene.render(rays, grey, generator=self.generator, normals=normals)
        told = self.prompts.conditioning(sample.azimuth, sample.elevation, self.prior.embed)
        if control is not None:
            told = told.steered(control_picture(rendering, sample.camera_to_world, control))
        return rendering, replace(told, camera=sample.camera_to_world)

    def penalties(self, step: int, rendering: Rendering) -> dict[str, Tensor]:
        """The regularisers whose weight is not zero at this step."""
        terms: dict[str, Callable[[], Tensor]] = {
            "sparsity": lambda: regularizers.sparsity(rendering),
            "opaque": lambda: regularizers.opaque(rendering),
            "z_variance": lambda: regularizers.z_variance(rendering),
            "orientation": lambda: regularizers.orientation(rendering),
            "smooth_density": lambda: regularizers.total_variation(self.scene.raw[..., :1]),
            "smooth_colour": lambda: regularizers.total_variation(torch.sigmoid(self.scene.raw[..., 1:])),
        }
        weights = {name: getattr(self.recipe.penalties, name)(step) for name in terms}
        return {name: weights[name] * term() for name, term in terms.items() if weights[name] > 0}

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """The optimiser of this step; refines the grid first where the recipe says so."""
        resolution = self.recipe.resolution(step)
        if resolution != self.scene.resolution:
            self.scene.upsample(resolution)
            self.restart_optimiser()
        rate = self.recipe.rate(step)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        return self._optimiser

    def restart_optimiser(self) -> None:
        """Makes a new optimiser for the scene's present parameters."""
        self._optimiser = self._new_optimiser()

    def _new_optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            self.scene.parameters(), lr=self.recipe.learning_rate, betas=(0.9, 0.99), eps=self.recipe.adam_eps
        )
