"""Gaussian splats as a scene: they move, turn, grow, split and vanish (Kerbl et al. 2023, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill3d.export.options import ExportOptions
from distill3d.meshes.mesh import Mesh
from distill3d.render.shading import needs_normals, shade
from distill3d.render.splat import Splats, SplatSampling, render_splats
from distill3d.scenes.gaussian_start import in_ball, on_mesh
from distill3d.scenes.parameters import replace_parameter
from distill3d.types import Cameras, Lighting, Rendering, Scene, SceneOptions

SHRINK = 1.6  # what is split is replaced by two that are smaller by this factor


@dataclass(frozen=True)
class SplatRates:
    """Learning rates as multiples of the recipe's.

    The ratios are those of DreamGaussian (Tang et al. 2024), whose runs are as short as ours, with a slower
    opacity (10 there). The original's, for 30000 steps, are `ORIGINAL_RATES`. A raw color goes through a sigmoid
    here and through a spherical harmonic of 0.28 there: the slopes are alike.
    """

    means: float = 0.2
    quaternions: float = 1.0
    log_scales: float = 1.0
    opacities: float = 3.0
    colors: float = 2.0

    def __post_init__(self) -> None:
        if min(getattr(self, f.name) for f in fields(self)) < 0:
            raise ValueError("learning rates of splats must be at least 0")


ORIGINAL_RATES = SplatRates(means=0.032, quaternions=0.2, log_scales=1.0, opacities=10.0, colors=0.5)


@dataclass(frozen=True)
class Densification:
    """When and how splats are added and removed. Sizes are standard deviations in world units.

    The original adds splats where the gradient on the screen exceeds a number that belongs to its loss. Losses
    differ in scale here, so a share of all is taken: those that the pictures pull at most.
    """

    start: float = 0.05  # share of the steps
    stop: float = 0.6
    every: int = 25  # steps
    share: float = 0.1  # of the splats that are added each time, at most
    most: int = 10_000  # splats
    split_size: float = 0.02  # larger ones are split, smaller ones cloned
    max_size: float = 0.3  # larger ones are removed
    min_opacity: float = 0.01  # fainter ones are removed
    reset: tuple[float, ...] = ()  # shares of the steps at which all become nearly transparent, to be proved anew

    def __post_init__(self) -> None:
        if self.every < 1 or self.most < 1 or not 0 <= self.share <= 1:
            raise ValueError(
                "densification needs every and most of at least 1 and a share in [0, 1], "
                f"got {self.every}, {self.most} and {self.share}"
            )


@dataclass(frozen=True)
class GaussianOptions(SceneOptions):
    """What `Gaussians` start from and how they change."""

    count: int = 2000  # at the start
    radius: float = 0.6  # of the ball they start in, world units
    opacity: float = 0.1  # at the start
    seed: int = 0  # of all that is drawn
    rates: SplatRates = SplatRates()
    densification: Densification = Densification()
    sampling: SplatSampling = SplatSampling()

    def __post_init__(self) -> None:
        if self.count < 1 or self.radius <= 0 or not 0 < self.opacity < 1:
            raise ValueError(
                "splats need a count of at least 1, a radius above 0 and an opacity in (0, 1), "
                f"got {self.count}, {self.radius} and {self.opacity}"
            )

    def build(self, device: torch.device | str | None = None) -> Gaussians:
        """Splats in a ball."""
        return Gaussians(self, device)


class Gaussians(nn.Module, Scene):
    """Splats whose number changes while they are trained.

    Parameters: means [N, 3], quaternions [N, 4], log_scales [N, 3], opacities [N] (raw, see `Splats`) and
    raw_colors [N, 3] (before a sigmoid). What decides their growth is kept in buffers, the state of the random
    generator among them, so that a run that is resumed goes on as if it had not been interrupted.
    """

    unsupported_penalties = frozenset(
        {"orientation"}
    )  # there is no density whose slope could point one way or the other
    means: nn.Parameter
    quaternions: nn.Parameter
    log_scales: nn.Parameter
    opacities: nn.Parameter
    raw_colors: nn.Parameter
    pull: Tensor
    views: Tensor
    adapted: Tensor
    chance: Tensor

    def __init__(
        self,
        options: GaussianOptions = GaussianOptions(),
        device: torch.device | str | None = None,
        splats: Splats | None = None,
    ):
        """Starts from `splats` (see `Splats`; colors [N, 3]), or without them from a ball of gray ones."""
        super().__init__()
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)
        splats = splats or in_ball(options.count, options.radius, options.opacity, generator)
        self._start_from(splats, generator, device)

    def _start_from(self, splats: Splats, generator: torch.Generator, device: torch.device | str | None) -> None:
        """Makes parameters and buffers anew."""
        raw_colors = torch.logit(splats.colors.clamp(1e-3, 1 - 1e-3))
        for name, value in zip(
            NAMES,
            (splats.means, splats.quaternions, splats.log_scales, splats.opacities, raw_colors),
            strict=True,
        ):
            self.register_parameter(name, nn.Parameter(value.detach().to(device, torch.float32).clone()))
        self.register_buffer("pull", torch.zeros(len(splats), device=device))  # sum of screen gradients, by splat
        self.register_buffer("views", torch.zeros(len(splats), device=device))  # in which it had any
        self.register_buffer("adapted", torch.full((), -1, dtype=torch.int64))  # the last step of `adapt`
        self.register_buffer("chance", generator.get_state())

    def init_from_mesh(self, mesh: Mesh) -> None:
        """Starts anew from `options.count` splats on the surface of a mesh in world units, with its colors.

        Raises:
            ValueError: see `on_mesh`.
        """
        vertices, faces = torch.tensor(mesh.vertices), torch.tensor(mesh.faces)
        colors = torch.tensor(mesh.corner_colors)
        if mesh.textures:  # looked up at the corners
            face, corner = np.repeat(np.arange(len(mesh.faces)), 3), np.tile(np.eye(3), (len(mesh.faces), 1))
            colors = torch.tensor(mesh.colors(face, corner).reshape(-1, 3, 3))
        generator = torch.Generator().manual_seed(self.options.seed)
        splats = on_mesh(vertices, faces, colors, self.options.count, generator)
        self._start_from(splats, torch.Generator().manual_seed(self.options.seed), self.means.device)

    def export(self, folder: Path, options: ExportOptions) -> list[Path]:
        """Writes splats.ply, in the layout that splat viewers read; ValueError for another format."""
        from distill3d.export.splats import save_splats

        if options.format not in (None, "ply"):
            raise ValueError(f"splats are exported as PLY, not as {options.format}: type --format ply")
        path = folder / f"{options.name or 'splats'}.ply"
        save_splats(path, self.splats())
        return [path]

    def __len__(self) -> int:
        return self.means.shape[0]

    def splats(self) -> Splats:
        """The present splats, with gradients."""
        return Splats(self.means, self.quaternions, self.log_scales, self.opacities, torch.sigmoid(self.raw_colors))

    def render(
        self,
        cameras: Cameras,
        size: int,
        background: Tensor,
        *,
        generator: torch.Generator | None = None,
        normals: bool = False,
        lighting: Lighting | None = None,
    ) -> Rendering:
        """See `Scene`, and `render_splats` for what is computed; nothing is drawn from `generator`.

        Each splat is lit as a whole, as a piece of surface across its shortest axis.
        """
        watch = self._watch if self.training and torch.is_grad_enabled() else None
        splats = self.splats()
        if lighting is not None and needs_normals(lighting):
            splats = replace(splats, colors=_lit(splats, cameras, lighting))
        return render_splats(splats, cameras, size, background, self.options.sampling, normals=normals, watch=watch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group per kind of parameter; see `SplatRates`."""
        scales = (getattr(self.options.rates, f.name) for f in fields(SplatRates))
        return [{"params": [getattr(self, name)], "scale": s} for name, s in zip(NAMES, scales, strict=True)]

    @torch.no_grad()
    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Adds, removes and resets splats where `options.densification` says so; the same step twice counts once."""
        if step == int(self.adapted):
            return
        self.adapted.fill_(step)
        plan = self.options.densification
        if plan.start * total <= step < plan.stop * total and step % plan.every == 0 and step > 0:
            self._densify(plan, optimizer)
        if any(step == round(share * total) for share in plan.reset):
            self._replace("opacities", self.opacities.clamp_max(RESET), optimizer)

    def _densify(self, plan: Densification, optimizer: torch.optim.Optimizer) -> None:
        """Clones and splits what is pulled at most; removes the faint and the huge."""
        old = self._values()
        size = old["log_scales"].exp().amax(1)
        keep = (torch.sigmoid(old["opacities"]) > plan.min_opacity) & (size < plan.max_size)
        keep[old["opacities"].argmax()] = True  # a scene is never empty
        score = torch.where(keep & (self.views > 0), self.pull / self.views.clamp_min(1), 0.0)
        room = min(int(plan.share * int(keep.sum())), plan.most - int(keep.sum()))
        best = score.topk(max(0, room)).indices
        best = best[score[best] > 0]
        large = size[best] > plan.split_size

        cloned, split = best[~large], best[large]
        old["opacities"][cloned] = half_of_two(old["opacities"][cloned])
        clones = {name: value[cloned] for name, value in old.items()}
        halves = self._halves({name: value[split] for name, value in old.items()})
        keep[split] = False
        rows = keep.nonzero()[:, 0]
        for name, value in old.items():
            added = torch.cat((clones[name], halves[name]))
            self._replace(name, torch.cat((value[rows], added)), optimizer, _moments(rows, len(added)))
        self.pull, self.views = self.pull.new_zeros(len(self)), self.views.new_zeros(len(self))

    def _halves(self, parents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Two for each parent, at places drawn from it, and smaller."""
        generator = torch.Generator()
        generator.set_state(self.chance.cpu())
        halves = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in parents.items()}
        drawn = torch.randn(halves["means"].shape, generator=generator).to(halves["means"])
        self.chance.copy_(generator.get_state())
        shape = Splats(**{f.name: halves.get(f.name, halves["raw_colors"]) for f in fields(Splats)})
        halves["means"] += (shape.axes() @ (shape.log_scales.exp() * drawn)[..., None])[..., 0]
        halves["log_scales"] -= torch.tensor(SHRINK).log()
        return halves

    def _values(self) -> dict[str, Tensor]:
        """Copies of the parameters by name."""
        return {name: getattr(self, name).detach().clone() for name in NAMES}

    def _replace(
        self,
        name: str,
        value: Tensor,
        optimizer: torch.optim.Optimizer,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Makes `value` the parameter `name`, in the optimizer too; see `replace_parameter`."""
        old = getattr(self, name)
        setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))
        replace_parameter(optimizer, old, getattr(self, name), change)

    def _watch(self, gradient: Tensor) -> None:
        """Remembers how strongly each view [B, N, 2] pulls at each splat."""
        length = gradient.detach().norm(dim=-1)
        self.pull += length.sum(0)
        self.views += (length > 0).sum(0)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Takes the number of splats of what is loaded: a run whose splats grew continues from any fresh ones."""
        saved = state_dict.get(prefix + "means")
        if saved is not None and len(saved) != len(self):
            for name in NAMES:
                old = getattr(self, name)
                fresh = old.new_zeros(len(saved), *old.shape[1:])
                setattr(self, name, nn.Parameter(fresh, requires_grad=old.requires_grad))
            self.pull, self.views = self.pull.new_zeros(len(saved)), self.views.new_zeros(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


NAMES = ("means", "quaternions", "log_scales", "opacities", "raw_colors")
RESET = -4.6  # raw opacity after a reset: 0.01


def half_of_two(raw: Tensor) -> Tensor:
    """The raw opacity that two splats at one place need to hide as much as one did: o' = 1 - sqrt(1 - o).

    Rota Bulo et al. 2024, "Revising Densification in Gaussian Splatting".
    """
    half = 0.5 * F.logsigmoid(-raw)
    return (-torch.expm1(half)).log() - half


def _lit(splats: Splats, cameras: Cameras, lighting: Lighting) -> Tensor:
    """Colors [B, N, 3] of splats under a light for each view."""
    normals = splats.normals(cameras.camera_to_world[:, :3, 3])
    shape = normals.shape
    albedo, points, light = (
        values.expand(shape).reshape(-1, 3) for values in (splats.colors, splats.means, lighting.position[:, None])
    )
    return shade(albedo, normals.reshape(-1, 3), points, light, lighting).view(shape)


def _moments(rows: Tensor, added: int) -> Callable[[Tensor], Tensor]:
    """What becomes of Adam's moments: kept for these rows, zero for those that are added."""
    return lambda old: torch.cat((old[rows], old.new_zeros(added, *old.shape[1:])))
