"""The optimization loop: render, ask the objective for a gradient on the views, update the parameters.

This is where scenes and diffusion meet. `ObjectRun` is the state of a run in 3D, which run folders checkpoint;
`optimize` is the loop itself, shared by 3D objects and 2D images. `objects.distill` is both as one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill3d.devices import as_floats
from distill3d.diffusion.schedule import expand
from distill3d.distill import regularizers
from distill3d.distill.changes import Change, changed
from distill3d.distill.divergence import PARAMETER, PENALTY, PREDICTION, check_step
from distill3d.distill.observer import See, StepViews, Watch, nobody
from distill3d.distill.recipes import Recipe
from distill3d.distill.supervision import (
    GeometryObjective,
    condition_views,
    for_prior,
    noise_texels,
    objective_prompts,
    prompts_for,
    run_texts,
)
from distill3d.objectives import Objective, Stateful, attach
from distill3d.objectives.settings_base import Settings
from distill3d.prompts import ViewPrompts
from distill3d.types import Cameras, Guidance, Prior, Rendering, Scene

VIEW_PENALTIES: dict[str, Callable[[Rendering], Tensor]] = {
    "sparsity": regularizers.sparsity,
    "opaque": regularizers.opaque,
    "z_variance": regularizers.z_variance,
    "orientation": regularizers.orientation,
}


@dataclass(frozen=True)
class Progress:
    """What happened in one step: plain numbers, one line of metrics.jsonl."""

    step: int
    t: float  # mean time of the batch, in [0, 1]
    loss: float  # 0.5 mean((x - target)^2), plus the weighted loss on images
    penalty: float  # sum of the weighted regularizers
    opacity: float  # mean opacity of the views
    nfe: int  # network evaluations so far
    shape: float = 0.0  # weighted loss of the second objective
    seconds: float = 0.0  # since the start of the run
    retry: int = 0  # how often the run went on from a checkpoint with another seed, since it had diverged


OnStep = Callable[[Progress], None]


class Run(Protocol):
    """What `optimize` needs: parameters behind an optimizer, and a loss for each step."""

    def optimizer_at(self, step: int) -> torch.optim.Optimizer:
        """The optimizer of a step, at its learning rate, the scene adapted."""
        ...

    def loss(self, step: int, see: See | None = None) -> tuple[Tensor, Progress]:
        """The total loss, a scalar with gradients, and the numbers to log; `nfe` is that of this step alone.

        Args:
            see: is given the views of the step, if anybody looks.

        Raises:
            Diverged: for numbers that are not finite.
        """
        ...


def optimize(run: Run, steps: range, on_step: OnStep, nfe: int = 0, watch: Watch = nobody) -> None:
    """Takes `steps` of a run. `nfe` network evaluations were spent before them.

    `on_step` is called after each step; if it raises, the loop ends with the parameters in a consistent state. What
    `watch` returns for a step is given its views before that.

    Raises:
        Diverged: at a step whose numbers are not finite, with the parameters as they were before it.
    """
    for step in steps:
        optimizer = run.optimizer_at(step)
        see, views = watch(step), []
        loss, progress = run.loss(step, views.append) if see else run.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        nfe += progress.nfe
        for one in views:
            see(one)  # type: ignore[misc]  # there are views only where somebody looks
        on_step(replace(progress, nfe=nfe))


class ObjectRun:
    """The state of a run in 3D: scene, background, optimizer, objective and generator, as a recipe says."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: ViewPrompts,
        prior: Prior,
        seed: int = 0,
        second: Prior | None = None,
        scene: Scene | None = None,
    ):
        """`second` is the prior of the recipe's second objective; default: `prior`. `scene` replaces the recipe's.

        Raises ValueError for a prior that does not suit the objective or the recipe's views, and for a penalty that
        the scene does not have.
        """
        self.recipe, self.prior = recipe, prior
        self.written, self.changes = recipe, ()
        self.generator = torch.Generator().manual_seed(seed)
        self.objective = for_prior(recipe.objective.build(prior, recipe.steps, self.generator), prior, recipe)
        prior.prepare(run_texts(recipe, prompts, prior, self.objective))
        self.prompts = prompts_for(objective_prompts(prompts, self.objective), prior)
        self.geometry = GeometryObjective(recipe, prompts, second or prior) if recipe.supervision.weight else None
        self.scene: Scene = recipe.scene.build(prior.device) if scene is None else scene
        self.background = recipe.background.build(prior.device)
        self._check_penalties(recipe)
        self.restart_optimizer()

    def follow(self, changes: Sequence[Change]) -> None:
        """Changes settings from the steps on that `changes` name; they replace those of an earlier call.

        Raises ValueError for a penalty that the scene does not have.
        """
        self._check_penalties(changed(self.written, changes, self.written.steps))
        self.changes = tuple(changes)

    def _take_settings(self, step: int) -> None:
        """The settings of a step; an objective whose scale changes keeps its state."""
        recipe = changed(self.written, self.changes, step)
        before, self.recipe = self.recipe, recipe
        if recipe.objective != before.objective and isinstance(recipe.objective, Settings):
            self.objective = self._renewed(recipe.objective)

    def _renewed(self, settings: Settings) -> Objective:
        return settings.renewed(self.objective)

    @property
    def module(self) -> nn.ModuleDict:
        """What a checkpoint stores: "scene" and, if it has parameters, "background"."""
        parts = {"scene": self.scene, "background": self.background}
        return nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})

    @property
    def state(self) -> Stateful | None:
        """What a checkpoint stores beside parameters, optimizer and generator."""
        return self.objective.state

    def restart_optimizer(self) -> None:
        """Makes a new optimizer for the present parameters."""
        groups = [group for part in self.module.values() for group in part.parameter_groups()]  # type: ignore[operator]
        eps = self.recipe.adam_eps
        self.optimizer = torch.optim.Adam(groups, lr=self.recipe.learning_rate, betas=(0.9, 0.99), eps=eps)

    def optimizer_at(self, step: int) -> torch.optim.Optimizer:
        """See `Run`."""
        if self.changes:
            self._take_settings(step)
        self.scene.adapt(step, self.recipe.steps, self.optimizer)
        rate = self.recipe.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return self.optimizer

    def loss(self, step: int, see: See | None = None) -> tuple[Tensor, Progress]:
        """See `Run`: the objective on random views, the loss on images, the second objective and the regularizers."""
        recipe, prior = self.recipe, self.prior
        cameras = recipe.cameras.sample(recipe.views, self.generator).to(prior.device)
        rendering = self.render(step, cameras)
        conditioning = condition_views(self.prompts, prior, rendering, cameras)
        x = prior.encode(rendering.rgb)
        texels = noise_texels(self.objective.frame, self.scene, rendering, cameras, prior)
        guidance = self.objective.guidance(
            x, prior, conditioning, step=step, total=recipe.steps, generator=self.generator, texels=texels
        )
        loss, nfe = attach(x, guidance.gradient), guidance.nfe
        if self.pulls:
            loss = loss + self.image_loss(rendering.rgb, guidance)
        second = loss.new_zeros(())
        if self.geometry is not None:
            second, rows = self.geometry.loss(step, rendering, cameras, self.generator)
            nfe += rows
        terms = self.penalties(step, rendering, cameras)
        penalty = torch.stack([loss.new_zeros(()), *terms.values()]).sum()
        logged = (guidance.t.mean(), loss, penalty, rendering.opacity.mean(), second)
        t, loss_value, penalty_value, opacity, shape = as_floats(*logged)
        progress = Progress(step, t, loss_value, penalty_value, opacity, nfe, shape)

        def parts() -> Iterator[tuple[str, Tensor]]:
            yield from self.named_parameters()
            yield from (("the rendering", rendering.rgb), ("the encoded rendering", x))
            yield from ((PREDICTION, guidance.prediction), ("the gradient", guidance.gradient))
            yield from (("the loss", loss), *((f"{PENALTY} {name}", term) for name, term in terms.items()))
            yield "the second objective", second

        check_step(progress, parts())
        if see is not None:
            see(self._views(cameras, rendering.rgb, x, guidance, terms))
        return loss + penalty + second, progress

    def _views(
        self, cameras: Cameras, images: Tensor, x: Tensor, guidance: Guidance, terms: dict[str, Tensor]
    ) -> StepViews:
        def decoded(x: Tensor) -> Callable[[], Tensor]:
            return torch.no_grad()(lambda: self.prior.decode(x).clamp(0, 1))

        penalties = {name: term.detach() for name, term in terms.items()}
        target = decoded(x.detach() - guidance.gradient)
        return StepViews(cameras, images.detach(), target, decoded(guidance.x0), penalties)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers under the names by which errors call them."""
        return ((f"{PARAMETER} {name}", value) for name, value in self.module.state_dict().items())

    @property
    def pulls(self) -> bool:
        """Whether there is a loss on images."""
        return self.recipe.image_weight * self.objective.pull != 0 or self.objective.image_weight is not None

    def image_loss(self, images: Tensor, guidance: Guidance) -> Tensor:
        """0.5 mean(w (images - decode(x0_hat))^2): the recipe's pull, as far as it is the method's, and its own term.

        The encoder is blind to much that a renderer can produce: colors beyond the prior's, faint fog (HiFA).
        """
        with torch.no_grad():
            target = self.prior.decode(guidance.x0)
        squares = (images - target).square()
        loss = self.recipe.image_weight * self.objective.pull * 0.5 * squares.mean()
        if self.objective.image_weight is not None:
            own = self.objective.image_weight(self.prior.schedule, guidance.t)
            loss = loss + 0.5 * (expand(own, squares) * squares).mean()
        return loss

    def render(self, step: int, cameras: Cameras) -> Rendering:
        """The views of a step over the background, at the prior's image size, with gradients."""
        recipe, size = self.recipe, self.recipe.render_size or self.prior.image_size
        behind = self.background(cameras, size, self.generator)
        normals = self.prior.control == "normal" or self.needs_normals(step)
        normals |= self.geometry is not None and self.geometry.needs_normals(step)
        lighting = None if recipe.shading is None else recipe.shading.draw(step, recipe.steps, cameras, self.generator)
        rendering = self.scene.render(
            cameras, size, behind, generator=self.generator, normals=normals, lighting=lighting
        )
        return resized(rendering, self.prior.image_size)

    def needs_normals(self, step: int) -> bool:
        """Whether a regularizer of the step needs normals."""
        return any(self._weight(name, step) > 0 for name in ("orientation", "convexity"))

    def _weight(self, penalty: str, step: int) -> float:
        return getattr(self.recipe.penalties, penalty)(step, self.recipe.steps)

    def penalties(self, step: int, rendering: Rendering, cameras: Cameras) -> dict[str, Tensor]:
        """The regularizers whose weight is not zero at this step, weighted, by name."""
        terms: dict[str, Callable[[], Tensor]] = {
            name: lambda penalty=penalty: penalty(rendering) for name, penalty in VIEW_PENALTIES.items()
        }
        terms["convexity"] = lambda: regularizers.convexity(rendering, cameras.camera_to_world)
        terms |= self.scene.penalties()
        weights = {name: self._weight(name, step) for name in terms}
        return {name: weights[name] * term() for name, term in terms.items() if weights[name] > 0}

    @property
    def known_penalties(self) -> frozenset[str]:
        """The regularizers that the scene supports, by name."""
        return frozenset({*VIEW_PENALTIES, "convexity", *self.scene.penalties()}) - self.scene.unsupported_penalties

    def _check_penalties(self, recipe: Recipe) -> None:
        known = self.known_penalties
        for field in fields(recipe.penalties):
            if field.name not in known and getattr(recipe.penalties, field.name):
                raise ValueError(
                    f"{type(self.scene).__name__} does not support the penalty {field.name}: set its weight to 0, "
                    f"--set penalties.{field.name}.start=0 --set penalties.{field.name}.end=0"
                )


def resized(rendering: Rendering, size: int) -> Rendering:
    """The rendering with `size` pixels per side, all maps interpolated; unchanged if it has that size already."""
    if rendering.rgb.shape[-1] == size:
        return rendering
    maps = {field.name: getattr(rendering, field.name) for field in fields(rendering)}
    depths = ("depth", "depth_variance")  # 0 where nothing is hit: weighted by the opacity, so as not to mix with it
    maps |= {name: maps[name] * rendering.opacity for name in depths}
    maps = {
        name: F.interpolate(value, (size, size), mode="bilinear", antialias=True)
        for name, value in maps.items()
        if value is not None
    }
    opacity = maps["opacity"]
    maps |= {name: torch.where(opacity > 0, maps[name] / opacity.clamp_min(1e-6), 0.0) for name in depths}
    return replace(rendering, **maps)
