"""Gaussian splats as a scene: they move, turn, grow, split and disappear (Kerbl et al. 2023, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.export.options import ExportOptions
from distill3d.meshes.mesh import Mesh, sample_surface
from distill3d.render.shading import needs_normals, shade
from distill3d.render.splat import Splats, render_splats
from distill3d.render.splat_compositing import SplatSampling
from distill3d.scenes.parameters import replace_parameter
from distill3d.types import Cameras, Lighting, Rendering, Scene, SceneOptions

NAMES = ("means", "quaternions", "log_scales", "opacities", "raw_colors")
SHRINK = 1.6  # a split replaces a splat by two that are smaller by this factor
RESET = -4.6  # raw opacity after a reset: 0.01
SURFACE_OPACITY = 0.9  # of splats that start on a mesh
FLATNESS = 0.2  # their thickness as a fraction of their width


@dataclass(frozen=True)
class SplatRates:
    """Learning rates as multiples of the recipe's.

    The ratios are those of DreamGaussian (Tang et al. 2024), whose runs are similarly short, with a slower opacity (10
    there). The original's, for 30000 steps, are 0.032, 0.2, 1, 10 and 0.5. A raw color passes through a sigmoid here
    and through a spherical harmonic of 0.28 there: the slopes are similar.
    """

    means: float = 0.2
    quaternions: float = 1.0
    log_scales: float = 1.0
    opacities: float = 3.0
    colors: float = 2.0

    def __post_init__(self) -> None:
        if min(getattr(self, f.name) for f in fields(self)) < 0:
            raise ValueError(f"learning rates of splats must be at least 0, got {self}")


MOST_SPLATS = 10_000_000


@dataclass(frozen=True)
class Densification:
    """When and how splats are added and removed. Sizes are standard deviations in world units.

    The original adds splats where the gradient on the screen exceeds a threshold that fits its loss. Losses differ in
    scale here, so it is a fraction of all splats instead: those with the largest gradients.
    """

    start: float = 0.05  # fraction of the run
    stop: float = 0.6
    every: int = 25  # steps
    fraction: float = 0.1  # of the splats that are added each time, at most
    max_splats: int = 10_000
    split_size: float = 0.02  # larger splats are split, smaller ones cloned
    max_size: float = 0.3  # larger splats are removed
    min_opacity: float = 0.01  # fainter splats are removed
    reset: tuple[float, ...] = ()  # fractions of the run at which all opacities are reset to 0.01

    def __post_init__(self) -> None:
        if self.every < 1 or not 1 <= self.max_splats <= MOST_SPLATS or not 0 <= self.fraction <= 1:
            raise ValueError(
                f"every must be at least 1, max_splats 1 to {MOST_SPLATS} and fraction must lie in [0, 1], "
                f"got {self.every}, {self.max_splats} and {self.fraction}"
            )


@dataclass(frozen=True)
class GaussianOptions(SceneOptions):
    """How `Gaussians` start and how they change."""

    count: int = 2000  # at the start
    radius: float = 0.6  # of the ball they start in, world units
    opacity: float = 0.1  # at the start
    seed: int = 0  # of everything that is drawn
    rates: SplatRates = SplatRates()
    densification: Densification = Densification()
    sampling: SplatSampling = SplatSampling()

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_SPLATS or self.radius <= 0 or not 0 < self.opacity < 1:
            raise ValueError(
                f"count must be 1 to {MOST_SPLATS}, radius above 0 and opacity in (0, 1), "
                f"got {self.count}, {self.radius} and {self.opacity}"
            )

    def build(self, device: torch.device | str | None = None) -> Gaussians:
        """Splats in a ball."""
        return Gaussians(self, device)


class Gaussians(nn.Module, Scene):
    """Splats whose number changes during training.

    Parameters: means [N, 3], quaternions [N, 4], log_scales [N, 3], opacities [N] (raw, see `Splats`) and
    raw_colors [N, 3] (before a sigmoid). What controls their growth is kept in buffers, including the state of the
    random generator, so that a resumed run continues exactly.
    """

    unsupported_penalties = frozenset({"orientation"})  # splats have no outward direction
    means: nn.Parameter
    quaternions: nn.Parameter
    log_scales: nn.Parameter
    opacities: nn.Parameter
    raw_colors: nn.Parameter
    gradient_sum: Tensor
    gradient_count: Tensor
    last_adapt_step: Tensor
    rng_state: Tensor

    def __init__(
        self,
        options: GaussianOptions = GaussianOptions(),
        device: torch.device | str | None = None,
        splats: Splats | None = None,
    ):
        """Starts from `splats` (see `Splats`; colors [N, 3]), or by default from a ball of gray ones."""
        super().__init__()
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)
        splats = splats or splats_in_ball(options.count, options.radius, options.opacity, generator)
        self._start_from(splats, generator, device)

    def _start_from(self, splats: Splats, generator: torch.Generator, device: torch.device | str | None) -> None:
        """Replaces all parameters and buffers."""
        raw_colors = torch.logit(splats.colors.clamp(1e-3, 1 - 1e-3))
        values = (splats.means, splats.quaternions, splats.log_scales, splats.opacities, raw_colors)
        for name, value in zip(NAMES, values, strict=True):
            self.register_parameter(name, nn.Parameter(value.detach().to(device, torch.float32).clone()))
        # Over the views with a gradient on the screen, its length summed and their number, for each splat.
        self.register_buffer("gradient_sum", torch.zeros(len(splats), device=device))
        self.register_buffer("gradient_count", torch.zeros(len(splats), device=device))
        self.register_buffer("last_adapt_step", torch.full((), -1, dtype=torch.int64))
        self.register_buffer("rng_state", generator.get_state())

    def init_from_mesh(self, mesh: Mesh) -> None:
        """Starts again from `options.count` splats on the surface of a mesh in world units, with its colors.

        Raises:
            ValueError: see `splats_on_mesh`.
        """
        seed, device = self.options.seed, self.means.device
        splats = splats_on_mesh(mesh, self.options.count, torch.Generator().manual_seed(seed))
        self._start_from(splats, torch.Generator().manual_seed(seed), device)

    def export(self, folder: Path, options: ExportOptions) -> list[Path]:
        """Writes splats.ply, in the layout that splat viewers read; ValueError for another format."""
        from distill3d.export.splats import save_splats

        if options.format not in (None, "ply"):
            raise ValueError(f"splats are exported as PLY, not as {options.format}: type --format ply")
        if options.up != "auto" or options.size is not None or options.pivot is not None:
            raise ValueError("splats are exported in their own place and size: leave out --up, --size and --pivot")
        path = folder / f"{options.name or 'splats'}.ply"
        save_splats(path, self.splats())
        return [path]

    def __len__(self) -> int:
        return self.means.shape[0]

    def splats(self) -> Splats:
        """The current splats, with gradients."""
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
        """See `Scene.render`, and `render_splats` for how it is computed; the generator is not used.

        Each splat has one shade, that of a piece of surface across its shortest axis.
        """
        watch = self._watch if self.training and torch.is_grad_enabled() else None
        splats = self.splats()
        if lighting is not None and needs_normals(lighting):
            splats = replace(splats, colors=_shaded(splats, cameras, lighting))
        return render_splats(splats, cameras, size, background, self.options.sampling, normals=normals, watch=watch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group per kind of parameter; see `SplatRates`."""
        scales = (getattr(self.options.rates, f.name) for f in fields(SplatRates))
        return [{"params": [getattr(self, name)], "scale": s} for name, s in zip(NAMES, scales, strict=True)]

    @torch.no_grad()
    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Adds, removes and resets splats as `options.densification` says; the same step twice counts once."""
        if step == int(self.last_adapt_step):
            return
        self.last_adapt_step.fill_(step)
        plan = self.options.densification
        if plan.start * total <= step < plan.stop * total and step % plan.every == 0 and step > 0:
            self._densify(plan, optimizer)
        if any(step == round(fraction * total) for fraction in plan.reset):
            self._replace("opacities", self.opacities.clamp_max(RESET), optimizer)

    def _densify(self, plan: Densification, optimizer: torch.optim.Optimizer) -> None:
        """Clones and splits the splats with the largest gradients; removes faint and huge ones."""
        old = {name: getattr(self, name).detach().clone() for name in NAMES}
        size = old["log_scales"].exp().amax(1)
        keep = (torch.sigmoid(old["opacities"]) > plan.min_opacity) & (size < plan.max_size)
        keep[old["opacities"].argmax()] = True  # so that a scene is never empty
        mean_gradient = self.gradient_sum / self.gradient_count.clamp_min(1)
        score = torch.where(keep & (self.gradient_count > 0), mean_gradient, 0.0)
        room = min(int(plan.fraction * int(keep.sum())), plan.max_splats - int(keep.sum()))
        best = score.topk(max(0, room)).indices
        best = best[score[best] > 0]
        large = size[best] > plan.split_size

        cloned, split = best[~large], best[large]
        old["opacities"][cloned] = split_opacity(old["opacities"][cloned])
        clones = {name: value[cloned] for name, value in old.items()}
        halves = self._halves({name: value[split] for name, value in old.items()})
        keep[split] = False
        rows = keep.nonzero()[:, 0]
        for name, value in old.items():
            added = torch.cat((clones[name], halves[name]))
            self._replace(name, torch.cat((value[rows], added)), optimizer, _moments(rows, len(added)))
        self._reset_gradients(len(self))

    def _halves(self, parents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Two smaller splats for each parent, at positions drawn from it."""
        generator = torch.Generator()
        generator.set_state(self.rng_state.cpu())
        halves = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in parents.items()}
        drawn = torch.randn(halves["means"].shape, generator=generator).to(halves["means"])
        self.rng_state.copy_(generator.get_state())
        shape = Splats(**{f.name: halves.get(f.name, halves["raw_colors"]) for f in fields(Splats)})
        halves["means"] += (shape.axes() @ (shape.log_scales.exp() * drawn)[..., None])[..., 0]
        halves["log_scales"] -= torch.tensor(SHRINK).log()
        return halves

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
        """Accumulates the lengths of the screen gradients [B, N, 2] of B views."""
        length = gradient.detach().norm(dim=-1)
        self.gradient_sum += length.sum(0)
        self.gradient_count += (length > 0).sum(0)

    def _reset_gradients(self, count: int) -> None:
        self.gradient_sum, self.gradient_count = self.means.new_zeros(count), self.means.new_zeros(count)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Takes the number of splats of the checkpoint, so that a run whose splats grew can be loaded."""
        saved = state_dict.get(prefix + "means")
        if saved is not None and len(saved) != len(self):
            for name in NAMES:
                old = getattr(self, name)
                fresh = old.new_zeros(len(saved), *old.shape[1:])
                setattr(self, name, nn.Parameter(fresh, requires_grad=old.requires_grad))
            self._reset_gradients(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def split_opacity(raw: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The raw opacity with which two splats at one place hide as much as one did: o' = 1 - sqrt(1 - o).

    Rota Bulo et al. 2024, "Revising Densification in Gaussian Splatting".
    """
    half = 0.5 * F.logsigmoid(-raw)
    return (-torch.expm1(half)).log() - half


def _shaded(splats: Splats, cameras: Cameras, lighting: Lighting) -> Tensor:
    """Colors [B, N, 3] of splats under the light of each view."""
    normals = splats.normals(cameras.camera_to_world[:, :3, 3])
    shape = normals.shape
    albedo, points, light = (
        values.expand(shape).reshape(-1, 3) for values in (splats.colors, splats.means, lighting.position[:, None])
    )
    return shade(albedo, normals.reshape(-1, 3), points, light, lighting).view(shape)


def _moments(rows: Tensor, added: int) -> Callable[[Tensor], Tensor]:
    """How Adam's moments change: kept for these rows, zero for those that are added."""
    return lambda old: torch.cat((old[rows], old.new_zeros(added, *old.shape[1:])))


def splats_in_ball(count: int, radius: float, opacity: float, generator: torch.Generator) -> Splats:
    """`count` gray round splats in a ball about the origin, densest in the middle.

    Their number per volume decreases as 1 - r / radius, like the blob that fields start from (DreamFusion, appendix
    A). Each is as wide as the root mean square distance to its three nearest neighbors (Kerbl et al. 2023, section
    5.1).
    """
    # r / radius then has the density ~ u^2 (1 - u): the third smallest of four uniform draws.
    u = torch.rand(count, 4, generator=generator).sort(1).values[:, 2:3]
    means = radius * u * F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    width = neighbor_distance(means, fallback=radius)
    return Splats(
        means,
        F.normalize(torch.randn(count, 4, generator=generator), dim=1),
        width.log()[:, None].repeat(1, 3),
        torch.logit(torch.full((count,), opacity)),
        0.5 + 0.05 * (2 * torch.rand(count, 3, generator=generator) - 1),
    )


def splats_on_mesh(mesh: Mesh, count: int, generator: torch.Generator) -> Splats:
    """`count` flat splats spread evenly over the surface of a mesh in world units, each lying in its face.

    Raises:
        ValueError: if the mesh has no area or colors that are not finite.
    """
    corners, colors = mesh.vertices[mesh.faces], mesh.corner_colors()  # [F, 3, 3]
    if not np.isfinite(colors).all():
        raise ValueError("splats cannot start from this mesh: it has NaN or infinite colors")
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = 0.5 * float(np.linalg.norm(normal, axis=1).sum())
    if not area > 0:
        raise ValueError("splats cannot start from this mesh: its faces have no area")
    draws = torch.rand(3, count, generator=generator).double().numpy()
    draws[0] = (np.arange(count) + draws[0]) / count
    face, weights = sample_surface(mesh.vertices, mesh.faces, draws)
    means, seen = (np.einsum("nc,ncd->nd", weights, values[face]) for values in (corners, colors))
    up = F.normalize(torch.from_numpy(normal[face]).float(), dim=1)
    # Discs that cover the surface: a spacing of sqrt(area / count), half of it as standard deviation.
    scales = 0.5 * math.sqrt(area / count) * torch.tensor([1.0, 1.0, FLATNESS])
    opacities = torch.logit(torch.full((count,), SURFACE_OPACITY))
    return Splats(
        torch.from_numpy(means).float(),
        rotation_from_z(up),
        scales.log().repeat(count, 1),
        opacities,
        torch.from_numpy(seen).float().clamp(0, 1),
    )


def rotation_from_z(directions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 4"]:
    """Unit quaternions of the shortest rotations from the z axis to unit directions."""
    x, y, z = directions.unbind(1)
    halfway = torch.stack((1 + z, -y, x, torch.zeros_like(z)), 1)  # 1 + cos, sin times the axis
    flipped = torch.tensor([0.0, 1.0, 0.0, 0.0]).to(directions)  # straight down, about x
    return F.normalize(torch.where(z[:, None] < -1 + 1e-6, flipped, halfway), dim=1)


def neighbor_distance(points: Float[Tensor, "n 3"], neighbors: int = 3, fallback: float = 1.0) -> Float[Tensor, " n"]:
    """Root mean square distance of each point to its nearest neighbors; `fallback` for a single point."""
    neighbors = min(neighbors, len(points) - 1)
    if neighbors < 1:
        return points.new_full((len(points),), fallback)
    rows = [torch.cdist(part, points).topk(neighbors + 1, largest=False).values for part in points.split(1024)]
    return torch.cat(rows)[:, 1:].square().mean(1).sqrt().clamp_min(1e-4 * fallback)
