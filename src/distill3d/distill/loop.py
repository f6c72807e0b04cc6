"""The loop: render, ask the objective which way the picture should move, move the parameters.

The only place where scenes and diffusion meet. What is rendered is a callable, so 3D (random cameras around a
field) and 2D (a picture is a scene with one view) share the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill3d.distill import regularizers
from distill3d.distill.family import companion
from distill3d.distill.recipes import Recipe, check_method
from distill3d.distill.supervision import ShapeObjective, prompts_for, suited, told
from distill3d.meshes.mesh import Mesh
from distill3d.objectives import Objective, attach
from distill3d.prompts import ViewPrompts
from distill3d.types import Conditioning, Prior, Rendering, Scene

Views = Callable[[int], tuple[Rendering, Conditioning]]
Penalties = Callable[[int, Rendering], dict[str, Tensor]]

PICTURE_PENALTIES: dict[str, Callable[[Rendering], Tensor]] = {
    "sparsity": regularizers.sparsity,
    "opaque": regularizers.opaque,
    "z_variance": regularizers.z_variance,
    "orientation": regularizers.orientation,
}
NEED_NORMALS = ("orientation", "convexity")


@dataclass(frozen=True)
class Progress:
    """What happened in one step; plain numbers, ready for metrics.jsonl."""

    step: int
    t: float  # mean time of the batch, in [0, 1]
    loss: float  # 0.5 mean((x - target)^2), that of the pictures added
    penalty: float  # sum of the weighted regularizers
    opacity: float  # mean opacity of the views
    nfe: int  # network rows so far
    shape: float = 0.0  # the second objective's loss, weighted


def distill(
    views: Views,
    prior: Prior,
    objective: Objective,
    optimizer: Callable[[int], torch.optim.Optimizer],
    penalties: Penalties,
    steps: range,
    total: int,
    generator: torch.Generator,
    on_step: Callable[[Progress], None],
    encode: Callable[[Tensor], Tensor] | None = None,
    nfe: int = 0,
    picture_weight: float = 0.0,
    shape: Callable[[int, Rendering], tuple[Tensor, int]] | None = None,
) -> None:
    """Runs `steps` of a run that is `total` long.

    Args:
        views: step -> rendering of B views, with gradients, and what the prior is told about them.
        optimizer: step -> the optimizer to use (a scene that is refined gets a new one).
        penalties: step, rendering -> weighted regularizers by name.
        on_step: called after each step; whatever it raises (an interrupt, say) ends the loop with the
            parameters in order.
        encode: rendered pictures -> x; default: prior.encode. A scene whose parameters are x itself gives the
            identity.
        nfe: network rows of the steps before these.
        picture_weight: of 0.5 mean((rgb - decode(x0_hat))^2), the pull of the pictures themselves towards the
            decoded target (HiFA, Zhu et al. 2023). The encoder overlooks much that a renderer can do: colors
            beyond the prior's, faint fog.
        shape: step, rendering -> loss and network rows of a second objective, on the shape alone.
    """
    encode = encode or prior.encode
    for step in steps:
        stepper = optimizer(step)
        rendering, conditioning = views(step)
        x = encode(rendering.rgb)
        guidance = objective.guidance(x, prior, conditioning, step=step, total=total, generator=generator)
        loss = attach(x, guidance.gradient)
        if picture_weight:
            with torch.no_grad():
                target = prior.decode(guidance.x0)
            loss = loss + picture_weight * 0.5 * (rendering.rgb - target).square().mean()
        second, rows = (loss.new_zeros(()), 0) if shape is None else shape(step, rendering)
        penalty = torch.stack([loss.new_zeros(()), *penalties(step, rendering).values()]).sum()
        stepper.zero_grad(set_to_none=True)
        (loss + penalty + second).backward()
        stepper.step()
        nfe += guidance.nfe + rows
        on_step(
            Progress(
                step=step,
                t=float(guidance.t.mean()),
                loss=float(loss.detach()),
                penalty=float(penalty.detach()),
                opacity=float(rendering.opacity.detach().mean()),
                nfe=nfe,
                shape=float(second.detach()),
            )
        )


class ObjectRun:
    """A scene, its optimizer and its cameras as a recipe says: all that `distill` wants."""

    def __init__(
        self,
        recipe: Recipe,
        method: str,
        prompts: ViewPrompts,
        prior: Prior,
        seed: int = 0,
        second: Prior | None = None,
    ):
        """`second` is the prior of the recipe's second objective; default: `prior`.

        Raises ValueError for an unknown method, for a prior that does not suit it or the recipe's views, and for a
        penalty that the scene does not have.
        """
        check_method(method)
        self.recipe, self.prompts, self.prior = recipe, prompts_for(prompts, prior), prior
        self.generator = torch.Generator().manual_seed(seed)
        self.student = companion(method, prior, self.generator)
        self.objective = suited(recipe.objective(method, self.student), prior, recipe)
        self.shape = ShapeObjective(recipe, prompts, second or prior) if recipe.supervision.on else None
        self.module = scene_module(recipe, prior.device)
        scene: Any = self.module["scene"]
        self.scene: Scene = scene
        self.background: Any = (
            self.module["background"] if "background" in self.module else recipe.background.build(prior.device)
        )
        self._check_penalties()
        self.restart_optimizer()

    def distill(self, steps: range, on_step: Callable[[Progress], None], nfe: int = 0) -> None:
        """Goes through `steps` of the recipe's; `nfe` network rows were spent before them."""
        distill(
            self.views, self.prior, self.objective, self.optimizer, self.penalties,
            steps, self.recipe.steps, self.generator, on_step, nfe=nfe,
            picture_weight=self.recipe.picture_weight, shape=self.shape_loss if self.shape else None,
        )  # fmt: skip

    def views(self, step: int) -> tuple[Rendering, Conditioning]:
        """Random cameras of this step, rendered over the background."""
        size = self.recipe.render_size or self.prior.image_size
        sample = self.recipe.cameras.sample(self.recipe.views, self.generator).to(self.prior.device)
        behind = self.background(sample, size, self.generator)
        normals = self.prior.control == "normal" or any(
            getattr(self.recipe.penalties, n)(step) > 0 for n in NEED_NORMALS
        )
        normals |= self.shape is not None and self.shape.needs_normals(step)
        shading = self.recipe.shading
        lighting = None if shading is None else shading.draw(step, sample, self.generator)
        rendering = self.scene.render(
            sample, size, behind, generator=self.generator, normals=normals, lighting=lighting
        )
        self.cameras, rendering = sample, sized(rendering, self.prior.image_size)
        return rendering, told(self.prompts, self.prior, rendering, sample)

    def shape_loss(self, step: int, rendering: Rendering) -> tuple[Tensor, int]:
        """The second objective on what `views` has just rendered: its weighted loss and its network rows."""
        assert self.shape is not None
        return self.shape.loss(step, rendering, self.cameras, self.generator)

    def penalties(self, step: int, rendering: Rendering) -> dict[str, Tensor]:
        """The regularizers whose weight is not zero at this step, weighted."""
        terms = {name: partial(penalty, rendering) for name, penalty in PICTURE_PENALTIES.items()}
        terms["convexity"] = partial(regularizers.convexity, rendering, self.cameras.camera_to_world)
        terms |= self.scene.penalties()
        weights = {name: getattr(self.recipe.penalties, name)(step) for name in terms}
        return {name: weights[name] * term() for name, term in terms.items() if weights[name] > 0}

    def optimizer(self, step: int) -> torch.optim.Optimizer:
        """The optimizer of this step, at its learning rate, the scene adapted."""
        self.scene.adapt(step, self.recipe.steps, self.adam)
        rate = self.recipe.rate(step)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["scale"]
        return self.adam

    def begin_with(self, mesh: Mesh) -> None:
        """Gives the scene the shape and the colors of a mesh in the scene's unit; ValueError where it cannot."""
        self.scene.init_from_mesh(mesh)
        self.restart_optimizer()

    def restart_optimizer(self) -> None:
        """Makes a new optimizer for the present parameters."""
        groups = [group for part in self.module.values() for group in part.parameter_groups()]  # type: ignore[operator]
        self.adam = torch.optim.Adam(groups, lr=self.recipe.learning_rate, betas=(0.9, 0.99), eps=self.recipe.adam_eps)

    def _check_penalties(self) -> None:
        known = {*PICTURE_PENALTIES, "convexity", *self.scene.penalties()} - self.scene.unsupported_penalties
        for field in fields(self.recipe.penalties):
            weight = getattr(self.recipe.penalties, field.name)
            if field.name not in known and (weight.start or weight.end):
                raise ValueError(
                    f"a {type(self.scene).__name__} has no penalty {field.name}: set its weight to 0, "
                    f"--penalties.{field.name.replace('_', '-')}.start 0 and .end 0"
                )


def sized(rendering: Rendering, size: int) -> Rendering:
    """The rendering with `size` pixels a side: itself where it has as many, else interpolated, all that is in it."""
    if rendering.rgb.shape[-1] == size:
        return rendering

    given = {field.name: getattr(rendering, field.name) for field in fields(rendering)}
    seen = ("depth", "depth_variance")  # 0 where nothing is, with which they must not be mixed: weighted by the opacity
    given |= {name: given[name] * rendering.opacity for name in seen}
    changed = {
        name: F.interpolate(value, (size, size), mode="bilinear", antialias=True)
        for name, value in given.items()
        if value is not None
    }
    opacity = changed["opacity"]
    changed |= {name: torch.where(opacity > 0, changed[name] / opacity.clamp_min(1e-6), 0.0) for name in seen}
    return replace(rendering, **changed)


def scene_module(recipe: Recipe, device: torch.device | str | None = None) -> nn.ModuleDict:
    """What a recipe optimizes: "scene" and, if it has parameters, "background"."""
    parts = {"scene": recipe.scene.build(device), "background": recipe.background.build(device)}
    return nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
