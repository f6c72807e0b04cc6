"""A sampler's step carried into 3D: views are sampled, and the scene is fitted to what the sampler turns them into.

A fixed set of views is denoised level by level. At each level all views are rendered and encoded without gradients, the
objective moves them as a sampler would, x <- x - g, the results are decoded, and a few optimizer steps fit the scene to
them. With the objective `cfd` every view takes the steps of the DDIM sampler, as far as one scene can follow them all.

1. A multi-view prior first denoises the views without a scene, from x = 0: joint samples of a whole orbit.
2. The scene starts from the visual hull of these samples and is fitted to them.
3. From a lower noise level on, the scene is in the loop, which settles where the views disagree.

The scene is fitted to the object in each target, cut out by its matte and composited over a new random color at each
step; otherwise fog in the color of the background would cost nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill3d.devices import as_floats, at_once, on_host
from distill3d.distill.changes import scaled
from distill3d.distill.divergence import PENALTY, PREDICTION, Diverged, check_step, first_not_finite
from distill3d.distill.loop import ObjectRun, Progress
from distill3d.distill.observer import See, StepViews
from distill3d.distill.recipes import Recipe
from distill3d.distill.supervision import condition_views, noise_texels
from distill3d.objectives import Objective, starting_at
from distill3d.objectives.objective import Stateful
from distill3d.objectives.settings_base import Settings
from distill3d.priors.components.matting import border_matte
from distill3d.priors.wrapped import WrappedPrior
from distill3d.prompts import ViewPrompts
from distill3d.scenes.hull import Hull, start_from_hull
from distill3d.types import Cameras, Condition, Guidance, Prior, Rendering, Scene

L1_WEIGHT = 0.2  # of the absolute difference beside the squared one
CHUNK = 4  # views that the CPU renders at once without gradients


class Targets:
    """What the scene is fitted to at a level: V cutouts, premultiplied colors and coverage. A state for checkpoints."""

    def __init__(self, objective: Stateful | None) -> None:
        self.objective = objective
        self.level = -1  # -1 before there are any
        self.t = 1.0  # time of the level
        self.cutouts: Float[Tensor, "v 4 s s"] | None = None
        self.x0: Float[Tensor, "v 3 s s"] | None = None  # to look at, so not in checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Level, time, cutouts and the state of the objective."""
        state = {"level": torch.tensor(self.level), "t": torch.tensor(self.t, dtype=torch.float64)}
        if self.cutouts is not None:
            state["cutouts"] = self.cutouts
        if self.objective is not None:
            state |= {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.x0 = None
        self.level, self.t, self.cutouts = int(state["level"]), float(state["t"]), state.get("cutouts")
        if self.objective is not None:
            names = [name for name in state if name.startswith("objective.")]
            self.objective.load_state_dict({name.removeprefix("objective."): state[name] for name in names})


class SamplingRun(ObjectRun):
    """The state of a run that samples views, as `recipe.sampling` says."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: ViewPrompts,
        prior: Prior,
        seed: int = 0,
        second: Prior | None = None,
        scene: Scene | None = None,
    ):
        """As for `ObjectRun`. Raises ValueError for a recipe with a second objective, shading or a render size."""
        assert recipe.sampling is not None
        if recipe.supervision.weight or recipe.shading is not None or recipe.render_size is not None:
            raise ValueError(
                "a recipe that samples views has no second objective, shading or render size: leave them out, or set "
                "recipe.sampling to null"
            )
        self.settings = recipe.sampling
        # The objective of the base class is that of the levels with the scene in the loop.
        looped = replace(recipe, objective=starting_at(recipe.objective, self.settings.start))
        super().__init__(looped, prompts, prior, seed, second, scene)
        self.method = recipe.objective
        self.cameras = self.settings.cameras().to(prior.device)
        self.targets = Targets(self.objective.state)

    @property
    def state(self) -> Targets:
        """What a checkpoint stores beside parameters, optimizer and generator."""
        return self.targets

    def _renewed(self, settings: Settings) -> Objective:
        """The objective with the scene in the loop; that of the levels before it follows."""
        method = scaled(self.method, settings.scale)  # type: ignore[attr-defined]
        assert method is not None
        self.method = method
        objective = super()._renewed(settings)
        self.targets.objective = objective.state
        return objective

    def level_at(self, step: int) -> int:
        """Which targets a step is fitted to: 0 for those sampled without a scene, then one number per level."""
        first = round(self.settings.first * self.recipe.steps) if self.settings.joint_levels else 0
        if not self.settings.levels or step < first:
            return 0
        return 1 + (step - first) * self.settings.levels // (self.recipe.steps - first)

    def loss(self, step: int, see: See | None = None) -> tuple[Tensor, Progress]:
        """See `Run`: the difference from the targets of some views over random colors, and the regularizers."""
        level, nfe, targets = self.level_at(step), 0, self.targets
        if level != targets.level:
            nfe = self._sample_without_scene(step) if level == 0 else self._sample_with_scene(step, level - 1)
            targets.level = level
        assert targets.cutouts is not None
        rows = torch.randperm(len(self.cameras), generator=self.generator)[: self.recipe.views]
        colors = torch.rand(len(rows), 3, generator=self.generator)
        rows, colors = at_once(targets.cutouts.device, rows, colors)
        cameras, cutouts = self.cameras[rows], targets.cutouts[rows]
        colors = colors.to(cutouts)
        rendering = self.scene.render(
            cameras, self.prior.image_size, colors, generator=self.generator, normals=self.needs_normals(step)
        )
        wanted = cutouts[:, :3] + (1 - cutouts[:, 3:]) * colors[:, :, None, None]
        difference = rendering.rgb - wanted
        loss = difference.square().mean() + L1_WEIGHT * difference.abs().mean()
        terms = self.penalties(step, rendering, cameras)
        penalty = torch.stack([loss.new_zeros(()), *terms.values()]).sum()
        loss_value, penalty_value, opacity = as_floats(loss, penalty, rendering.opacity.mean())
        progress = Progress(step, targets.t, loss_value, penalty_value, opacity, nfe)
        named = [(f"{PENALTY} {name}", term) for name, term in terms.items()]
        check_step(progress, chain(self.named_parameters(), [("the rendering", rendering.rgb), *named]))
        if see is not None:
            see(self._views_of(rows, cameras, rendering.rgb, wanted, terms))
        return loss + penalty, progress

    def _views_of(
        self, rows: Tensor, cameras: Cameras, images: Tensor, wanted: Tensor, terms: dict[str, Tensor]
    ) -> StepViews:
        x0, penalties = self.targets.x0, {name: term.detach() for name, term in terms.items()}
        return StepViews(cameras, images.detach(), lambda: wanted, None if x0 is None else lambda: x0[rows], penalties)

    @torch.no_grad()
    def _sample_without_scene(self, step: int) -> int:
        """Targets from the prior alone, and the scene's start; returns the NFE.

        The scene lies in a ball that all views show completely, so what is outside of its outline is background: these
        parts of x are kept.
        """
        prior, total = self.prior, self.settings.joint_levels
        objective = self.method.build(prior, total, self.generator)
        objective = replace(objective, views=self.objective.views, fixed_views=True)
        blank = self._background(len(self.cameras))
        ground = prior.encode(blank.rgb)
        inside = disc(*prior.sample_shape[1:]).to(ground.device)
        x, nfe = torch.where(inside, torch.zeros_like(ground), ground), 0
        for level in range(total):
            guidance = self._guidance(objective, x, blank, level, total)
            x, nfe = torch.where(inside, moved(objective, x, guidance), ground), nfe + guidance.nfe
        self._set_targets(step, x, x, t=0.0)
        if self.settings.hull:
            assert self.targets.cutouts is not None
            radius = self.settings.distance * math.sin(math.radians(self.settings.fov) / 2)
            try:
                start_from_hull(self.scene, Hull(self.cameras, self.targets.cutouts, radius, self.settings.tolerance))
            except ValueError as error:
                warnings.warn(f"the scene starts as it is: {error}", stacklevel=2)
            self.restart_optimizer()
        return nfe

    @torch.no_grad()
    def _sample_with_scene(self, step: int, level: int) -> int:
        """Targets from the renderings of all views; returns the NFE."""
        prior, chunk = self.prior, CHUNK if self.prior.device.type == "cpu" else len(self.cameras)
        background = self._background(chunk).rgb[:, :, 0, 0]
        normals = prior.control == "normal"
        self.scene.eval()
        parts = [
            self.scene.render(cameras, prior.image_size, background[: len(cameras)], normals=normals)
            for cameras in (self.cameras[i : i + chunk] for i in range(0, len(self.cameras), chunk))
        ]
        self.scene.train()
        rendering = concatenated(parts)
        x = prior.encode(rendering.rgb)
        guidance = self._guidance(self.objective, x, rendering, level, self.settings.levels)
        self._set_targets(step, moved(self.objective, x, guidance), guidance.x0, float(on_host(guidance.t).mean()))
        return guidance.nfe

    def _guidance(self, objective: Objective, x: Tensor, rendering: Rendering, step: int, total: int) -> Guidance:
        conditioning = condition_views(self.prompts, self.prior, rendering, self.cameras)
        texels = noise_texels(objective.frame, self.scene, rendering, self.cameras, self.prior)

        def evaluate(prior: Prior) -> Guidance:
            return objective.guidance(
                x, prior, conditioning, step=step, total=total, generator=self.generator, texels=texels
            )

        if self.prior.views == 1:
            return evaluate(self.prior)
        before = self.prior.views
        self.prior.join(objective.views)
        try:
            if objective.views == len(x):
                return evaluate(self.prior)
            # Other groups at each level, so that all views agree.
            return evaluate(Regrouped(self.prior, torch.randperm(len(x), generator=self.generator).to(x.device)))
        finally:
            self.prior.join(before)

    def _set_targets(self, step: int, x: Tensor, x0: Tensor, t: float) -> None:
        """Cuts the object out of the images of x [V, ...]; its coverage is that in those of x0, without noise."""
        if first_not_finite([("x", x)]):  # before the scene starts from them
            raise Diverged(step, first_not_finite(self.named_parameters()) or PREDICTION)
        images = self.prior.decode(x).clamp(0, 1)
        estimates = images if x0 is x else self.prior.decode(x0).clamp(0, 1)
        matte = self.prior.matte(estimates)
        matte = border_matte(estimates) if matte is None else matte
        behind = (1 - matte) * self.settings.background
        self.targets.cutouts = torch.cat((torch.minimum((images - behind).clamp_min(0), matte), matte), dim=1)
        self.targets.t, self.targets.x0 = t, estimates

    def _background(self, views: int) -> Rendering:
        size = self.prior.image_size
        zeros = torch.zeros(views, 1, size, size, device=self.prior.device)
        return Rendering(zeros.expand(-1, 3, -1, -1) + self.settings.background, zeros, zeros, zeros)


class Regrouped(WrappedPrior):
    """A multi-view prior that sees its batches of B views in another order, so that other views form a group."""

    def __init__(self, prior: Prior, order: Int[Tensor, " b"]):
        super().__init__(prior)
        self.order = order

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The noise of N rows, whole batches of B."""
        first = torch.arange(0, len(x_t), len(self.order), device=self.order.device)
        rows = (first[:, None] + self.order).flatten()
        eps = self.prior.predict(x_t[rows], t[rows], condition[rows])
        return torch.empty_like(eps).index_copy_(0, rows, eps)


def moved(objective: Objective, x: Tensor, guidance: Guidance) -> Tensor:
    """x after a sampler's step: x - g if the objective takes a fraction of each step, else its denoised sample."""
    return guidance.x0 if objective.step_size is None else x - guidance.gradient


def disc(height: int, width: int) -> Bool[Tensor, "h w"]:
    """The cells of a lattice that touch the ellipse inscribed in it."""
    y, x = torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2
    nearest_y, nearest_x = (y.abs() - 0.5).clamp_min(0) / (height / 2), (x.abs() - 0.5).clamp_min(0) / (width / 2)
    return nearest_y[:, None].square() + nearest_x.square() < 1


def concatenated(parts: Sequence[Rendering]) -> Rendering:
    """Renderings as one batch."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Rendering)}
    return Rendering(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})
