"""A dense voxel grid as a scene: trilinear density and color in a box, no network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill3d.cameras import rays
from distill3d.export.options import FIELD_SETTINGS, ExportOptions
from distill3d.meshes.mesh import Mesh
from distill3d.render.shading import needs_normals
from distill3d.render.trilinear import trilinear
from distill3d.render.volume import Filters, Occupancy, Sampling, render_rays
from distill3d.scenes.parameters import replace_parameter
from distill3d.types import Cameras, Lighting, Rendering, Scene, SceneOptions


@dataclass(frozen=True)
class VoxelOptions(SceneOptions):
    """What a `VoxelField` is made of. Lengths in world units, densities per world unit.

    The blob is a fixed bias on the raw density, blob_height (1 - |p| / blob_radius) but not below -blob_floor
    (DreamFusion, appendix A, with a floor: with none, the corners would start beyond the reach of gradients).
    """

    resolution: int = 64  # lattice points a side
    half_size: float = 1.0  # the box is [-half_size, half_size]^3
    density_scale: float = 10.0  # density = density_scale * softplus(raw + blob)
    blob_height: float = 5.0
    blob_radius: float = 0.5
    blob_floor: float = 8.0
    occupied: float = 0.03  # cells with less density everywhere are skipped
    refine: tuple[tuple[float, float], ...] = ()  # (from this share of the steps on, times the resolution), in order
    harden: tuple[tuple[float, float], ...] = ()  # (after this share of the steps, times the raw density), in order
    refresh: int = 16  # training renders between two looks at the occupancy
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.resolution < 2:
            raise ValueError(f"a grid needs a resolution of at least 2, got {self.resolution}")
        if self.refresh < 1:
            raise ValueError(f"refresh is a number of renders, at least 1, got {self.refresh}")
        if any(round(times * self.resolution) < 2 for _, times in self.refine):
            raise ValueError(f"refine leaves a grid of fewer than 2 points a side: {self.refine}")
        if min(self.half_size, self.density_scale, self.blob_radius) <= 0:
            raise ValueError("half_size, density_scale and blob_radius must be above 0")
        if min([1.0, *(times for _, times in self.harden)]) <= 0:
            raise ValueError(f"harden multiplies the raw density by numbers above 0, got {self.harden}")

    def build(self, device: torch.device | str | None = None) -> VoxelField:
        """A field with these options."""
        return VoxelField(self, device)

    def resolution_at(self, share: float) -> int:
        """Lattice points a side after this share of the steps: coarse to fine."""
        reached = [1.0] + [times for begin, times in self.refine if share >= begin]
        return round(reached[-1] * self.resolution)

    def hardness_at(self, share: float) -> float:
        """By what the raw density has been multiplied after this share of the steps."""
        return math.prod(times for begin, times in self.harden if share >= begin)


class VoxelField(nn.Module, Scene):
    """Density and color on a lattice of resolution^3 points, trilinear between them.

    raw [Z, Y, X, 4] is interpolated first and activated after, so that surfaces can fall inside a cell:
    density = density_scale * softplus(raw_0 + blob), color = sigmoid(raw_1..3). Normals are minus the smoothed
    gradient of the raw density, which has the direction of the density's own gradient without its huge range.

    In training mode the occupancy is looked at again every `options.refresh` renders; a cell counts as occupied
    when it or one of its neighbors holds anything, so a surface may grow by a cell between two looks. Call
    `refresh_occupancy()` after changing parameters by other means than rendering in training mode.
    """

    export_settings = FIELD_SETTINGS
    blob: Tensor
    cells: Tensor
    march_bounds: Tensor
    renders: Tensor

    def __init__(self, options: VoxelOptions = VoxelOptions(), device: torch.device | str | None = None):
        super().__init__()
        self.options = options
        self.raw = nn.Parameter(torch.zeros(*[options.resolution] * 3, 4, device=device))
        self.register_buffer("blob", self._blob(), persistent=False)
        self.register_buffer("cells", torch.zeros([options.resolution - 1] * 3, dtype=torch.bool, device=device))
        self.register_buffer("march_bounds", self.bounds)
        self.register_buffer("renders", torch.zeros((), dtype=torch.int64))
        self.refresh_occupancy()

    @property
    def resolution(self) -> int:
        """Lattice points a side, now."""
        return self.raw.shape[0]

    @property
    def bounds(self) -> Tensor:
        """Lowest and highest corner [2, 3] of the box."""
        h = self.options.half_size
        return self.raw.new_tensor([[-h] * 3, [h] * 3])

    @property
    def half_size(self) -> float:
        """Half of the box's edge, world units."""
        return self.options.half_size

    def train(self, mode: bool = True) -> Self:
        """Switches between training and evaluation; for evaluation the occupancy is looked at again."""
        super().train(mode)
        if not mode:
            self.refresh_occupancy()
        return self

    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Refines the lattice where `options.refine` says so, and hardens it where `options.harden` does."""
        resolution = self.options.resolution_at(step / total)
        if resolution != self.resolution:
            coarse = self.raw
            self.upsample(resolution)
            replace_parameter(optimizer, coarse, self.raw)
        times = self.options.hardness_at(step / total) / self.options.hardness_at((step - 1) / total)
        if times != 1:
            self.harden(times)

    def penalties(self) -> dict[str, Callable[[], Tensor]]:
        """Total variation of raw density and of color."""
        return {
            "smooth_density": lambda: total_variation(self.raw[..., :1]),
            "smooth_color": lambda: total_variation(torch.sigmoid(self.raw[..., 1:])),
        }

    def init_from_mesh(self, mesh: Mesh) -> None:
        """Takes the shape and the colors of a mesh in world units, in place."""
        from distill3d.scenes.from_mesh import init_voxels

        init_voxels(self, mesh)

    def export(self, folder: Path, options: ExportOptions) -> list[Path]:
        """Writes the surface as mesh.glb; ValueError where the field is empty. See `to_mesh.export_field`."""
        from distill3d.scenes.to_mesh import export_field

        return export_field(self, folder, options)

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
        """See `Scene`, and `render_rays` for what is computed."""
        if self.training and torch.is_grad_enabled():
            if int(self.renders) % self.options.refresh == 0:
                self.refresh_occupancy()
            self.renders += 1
        lattice = self._biased()
        slope = self._slope() if normals or needs_normals(lighting) else None
        density_lattice = lattice.detach()[..., :1].contiguous()
        return render_rays(
            rays(cameras, size, size),
            lambda points: self._evaluate(lattice, slope, points),
            self.march_bounds,
            background,
            self.options.sampling,
            filters=Filters(
                lambda points: self._density(self._sample(density_lattice, points)[:, 0]),
                Occupancy(self.cells, self.bounds),
            ),
            lighting=lighting,
            generator=generator,
        )

    def query(self, points: Tensor, normals: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Density [N], color [N, 3] in [0, 1] and, if asked for, unit outward normals [N, 3] at points [N, 3].

        Outside the box the nearest value inside is given.
        """
        return self._evaluate(self._biased(), self._slope() if normals else None, points)

    def density_grid(self) -> Tensor:
        """Density [Z, Y, X] on the lattice."""
        return self._density(self.raw[..., 0] + self.blob)

    @torch.no_grad()
    def refresh_occupancy(self) -> None:
        """Marks the cells that hold density, and their neighbors, and tightens the box that rays march through.

        A trilinear cell lies below the largest of its corners, so none that holds `options.occupied` is missed.
        """
        corners = F.max_pool3d(self.density_grid()[None, None], 2, stride=1)
        occupied = (corners > self.options.occupied).to(corners)
        self.cells = F.max_pool3d(occupied, 3, stride=1, padding=1)[0, 0] > 0
        self.march_bounds = Occupancy(self.cells, self.bounds).tight()

    @torch.no_grad()
    def upsample(self, resolution: int) -> None:
        """Resamples to another lattice (coarse to fine) and keeps the picture.

        The parameter is replaced: an optimizer has to be made anew.
        """
        if resolution < 2:
            raise ValueError(f"a grid needs a resolution of at least 2, got {resolution}")
        coarse = self._biased().permute(3, 0, 1, 2)[None]
        fine = F.interpolate(coarse, [resolution] * 3, mode="trilinear", align_corners=True)[0].permute(1, 2, 3, 0)
        self._resize(resolution)
        self.raw.copy_(fine)
        self.raw[..., 0] -= self.blob
        self.refresh_occupancy()

    @torch.no_grad()
    def harden(self, times: float) -> None:
        """Multiplies the raw density, blob included: fog clears and what is dense grows denser.

        The surface where the density is density_scale ln 2 stays in its place.
        """
        self.raw[..., 0] += (times - 1) * (self.raw[..., 0] + self.blob)
        self.refresh_occupancy()

    def _resize(self, resolution: int) -> None:
        self.raw = nn.Parameter(self.raw.new_zeros(*[resolution] * 3, 4), requires_grad=self.raw.requires_grad)
        self.blob = self._blob()
        self.cells = torch.zeros([resolution - 1] * 3, dtype=torch.bool, device=self.raw.device)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Takes the resolution of what is loaded: a run that was refined continues from any fresh field."""
        saved = state_dict.get(prefix + "raw")
        if saved is not None and saved.shape[0] != self.resolution:
            self._resize(saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _blob(self) -> Tensor:
        """The bias [Z, Y, X] on the raw density."""
        o = self.options
        axis = torch.linspace(-o.half_size, o.half_size, self.resolution, device=self.raw.device, dtype=self.raw.dtype)
        square = axis.square()
        radius = (square[:, None, None] + square[:, None] + square).sqrt()
        return (o.blob_height * (1 - radius / o.blob_radius)).clamp_min(-o.blob_floor)

    def _biased(self) -> Tensor:
        """Raw values [Z, Y, X, 4], the blob added to the density."""
        return self.raw + F.pad(self.blob[..., None], (0, 3))

    def _slope(self) -> Tensor:
        """Minus the gradient [Z, Y, X, 3] of the raw density: central differences of a 3^3 mean."""
        smooth = F.pad((self.raw[..., 0] + self.blob)[None, None], [1] * 6, mode="replicate")
        smooth = F.pad(F.avg_pool3d(smooth, 3, stride=1), [1] * 6, mode="replicate")[0, 0]
        core = slice(1, -1)
        return torch.stack(
            (
                smooth[core, core, :-2] - smooth[core, core, 2:],
                smooth[core, :-2, core] - smooth[core, 2:, core],
                smooth[:-2, core, core] - smooth[2:, core, core],
            ),
            dim=-1,
        )

    def _sample(self, lattice: Tensor, points: Tensor) -> Tensor:
        """Trilinear values [N, C] of a lattice [Z, Y, X, C] at points [N, 3]."""
        return trilinear(lattice, points / self.options.half_size)

    def _density(self, raw: Tensor) -> Tensor:
        return self.options.density_scale * F.softplus(raw)

    def _evaluate(self, lattice: Tensor, slope: Tensor | None, points: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        values = self._sample(lattice, points)
        normal = None if slope is None else F.normalize(self._sample(slope, points), dim=1, eps=1e-6)
        return self._density(values[:, 0]), torch.sigmoid(values[:, 1:]), normal


def total_variation(lattice: Tensor) -> Tensor:
    """Mean squared difference of neighbors along each of the first three axes, summed, of [Z, Y, X, ...]."""
    return sum((lattice.diff(dim=axis).square().mean() for axis in range(3)), lattice.new_zeros(()))
