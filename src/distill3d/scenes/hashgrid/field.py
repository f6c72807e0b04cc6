"""A field on a hash encoding with small networks: the scene of the paper's recipe, for GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill3d.cameras import rays
from distill3d.export.options import FIELD_SETTINGS, ExportOptions
from distill3d.meshes.mesh import Mesh
from distill3d.render.shading import needs_normals
from distill3d.render.volume import Filters, Sampling, render_rays
from distill3d.scenes.hashgrid.encoding import HashLayout, encode
from distill3d.scenes.hashgrid.occupancy import OccupancyGrid
from distill3d.types import Cameras, Lighting, Rendering, Scene, SceneOptions


@dataclass(frozen=True)
class HashOptions(SceneOptions):
    """What a `HashField` is made of: the recipe of the SDI release. Lengths in world units.

    The blob is a fixed bias on the raw density. "magic3d": blob_height (1 - |p| / blob_radius) (Magic3D, Lin et al.
    2023, section 4.1). "dreamfusion": blob_height exp(-|p|^2 / (2 blob_radius^2)) (DreamFusion, appendix A; there
    with height 5 and radius 0.2).
    """

    layout: HashLayout = field(default_factory=HashLayout)
    half_size: float = 2.0  # the box is [-half_size, half_size]^3
    hidden: int = 64  # width of the one hidden layer of each network
    blob: Literal["magic3d", "dreamfusion"] = "magic3d"
    blob_height: float = 10.0
    blob_radius: float = 0.5
    normals: Literal["analytic", "difference"] = "analytic"
    difference: float = 0.01  # half the distance of the points whose difference is a normal
    first_levels: int = 8  # of the encoding, from the start on
    level_start: int = 2000  # one more every `level_steps` steps after this one
    level_steps: int = 500
    occupancy: int = 32  # cells a side
    occupied: float = 0.03  # density above which a cell is not skipped: what a voxel field takes too
    refresh: int = 16  # steps between two looks at the occupancy
    seed: int = 0  # of the initial weights
    sampling: Sampling = field(default_factory=lambda: Sampling(samples=512, chunk=4096, points=2**17, checkpoint=True))

    def __post_init__(self) -> None:
        if min(self.half_size, self.blob_radius, self.difference) <= 0:
            raise ValueError("half_size, blob_radius and difference must be above 0")
        if min(self.hidden, self.occupancy, self.refresh, self.level_steps) < 1:
            raise ValueError("hidden, occupancy, refresh and level_steps must be at least 1")
        if self.blob not in ("magic3d", "dreamfusion"):
            raise ValueError(f"the blob is magic3d or dreamfusion, got {self.blob!r}")
        if self.normals not in ("analytic", "difference"):
            raise ValueError(f"normals are analytic or difference, got {self.normals!r}")

    def build(self, device: torch.device | str | None = None) -> HashField:
        """A field with these options."""
        return HashField(self, device)

    def levels_at(self, step: int) -> int:
        """How many levels of the encoding count at a step: coarse to fine."""
        more = max(0, step - self.level_start) // self.level_steps
        return min(self.first_levels + more, self.layout.levels)


class HashField(nn.Module, Scene):
    """density = softplus(MLP(encoding) + blob), color = sigmoid(MLP(encoding)); no view direction.

    Both networks have one hidden layer with ReLU and no biases. Normals are minus the gradient of the raw density,
    which has the direction of the density's own (softplus only grows) and does not vanish in the empty parts. The
    gradient is written out: slopes of the encoding times the network's derivative, so that it can be trained through
    without second derivatives of the encoding.
    """

    export_settings = FIELD_SETTINGS
    levels: Tensor

    def __init__(self, options: HashOptions = HashOptions(), device: torch.device | str | None = None):
        super().__init__()
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(((2 * torch.rand(shape, generator=generator) - 1) * bound).to(device))

        layout, width = options.layout, options.hidden
        self.table = uniform(1e-4, layout.rows, layout.features)  # Instant-NGP, section 4
        self.density_in = uniform(layout.channels**-0.5, width, layout.channels)
        self.density_out = uniform(width**-0.5, width)
        self.color_in = uniform(layout.channels**-0.5, width, layout.channels)
        self.color_out = uniform(width**-0.5, 3, width)
        self.register_buffer("levels", torch.tensor(options.levels_at(0), device=device))
        self.occupancy = OccupancyGrid(options.occupancy, options.half_size, options.occupied).to(device)
        self.occupancy.look(self.density)

    @property
    def half_size(self) -> float:
        """Half of the box's edge, world units."""
        return self.options.half_size

    @property
    def bounds(self) -> Tensor:
        """Lowest and highest corner [2, 3] of the box."""
        return self.occupancy.bounds

    def train(self, mode: bool = True) -> Self:
        """Switches between training and evaluation; for evaluation the occupancy is looked at once more."""
        super().train(mode)
        if not mode:
            self.occupancy.look(self.density)
        return self

    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Switches levels on and looks at the occupancy, where `options` says so."""
        self.levels.fill_(self.options.levels_at(step))
        if step % self.options.refresh == 0:
            self.occupancy.look(self.density, torch.Generator().manual_seed(step))

    def init_from_mesh(self, mesh: Mesh) -> None:
        """Takes the shape and the colors of a mesh in world units, in place."""
        from distill3d.scenes.from_mesh import init_hash_field

        init_hash_field(self, mesh)

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
        normals = normals or needs_normals(lighting)
        return render_rays(
            rays(cameras, size, size),
            lambda points: self.query(points, normals),
            self.bounds,
            background,
            self.options.sampling,
            filters=Filters(self.density, self.occupancy.occupancy()),
            lighting=lighting,
            generator=generator,
        )

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """Density [N] at points [N, 3], without gradients."""
        return F.softplus(self._raw(self._encode(points)[0], points))

    def query(self, points: Tensor, normals: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Density [N], color [N, 3] in [0, 1] and, if asked for, unit outward normals [N, 3] at points [N, 3].

        Outside the box the encoding is that of the nearest point inside. Differentiable in the parameters, not in
        the points.
        """
        points = points.detach()
        slopes = normals and self.options.normals == "analytic"
        encoded = self._encode(points, slopes)
        raw = self._raw(encoded[0], points)
        color = torch.sigmoid(F.relu(encoded[0] @ self.color_in.T) @ self.color_out.T)
        if not normals:
            return F.softplus(raw), color, None
        slope = self._slope(encoded, points) if slopes else self._difference(points)
        return F.softplus(raw), color, F.normalize(-slope, dim=1, eps=1e-6)

    def _encode(self, points: Tensor, slopes: bool = False) -> Tensor:
        """Encoding [1, N, channels]; with slopes [4, N, channels], its derivatives in units of the box's edge."""
        at = points / (2 * self.options.half_size) + 0.5
        return encode(self.table, at, self.options.layout, int(self.levels), slopes)

    def _raw(self, encoded: Tensor, points: Tensor) -> Tensor:
        """Raw density [N]: that of the network and the blob."""
        return F.relu(encoded @ self.density_in.T) @ self.density_out + self._blob(points)

    def _slope(self, encoded: Tensor, points: Tensor) -> Tensor:
        """Gradient [N, 3] of the raw density by the points, from the encoding with its slopes [4, N, channels]."""
        on = (encoded[0] @ self.density_in.T > 0).to(encoded)
        by_encoding = (on * self.density_out) @ self.density_in
        slope = torch.einsum("knc,nc->nk", encoded[1:], by_encoding) / (2 * self.options.half_size)
        return slope + self._blob_slope(points)

    def _difference(self, points: Tensor) -> Tensor:
        """The same by central differences."""
        step = self.options.difference
        moves = step * torch.eye(3, dtype=points.dtype, device=points.device)
        near = torch.cat([points + sign * move for move in moves for sign in (1, -1)])
        raw = self._raw(self._encode(near)[0], near).view(3, 2, -1)
        return (raw[:, 0] - raw[:, 1]).T / (2 * step)

    def _blob(self, points: Tensor) -> Tensor:
        o = self.options
        if o.blob == "magic3d":
            return o.blob_height * (1 - points.norm(dim=1) / o.blob_radius)
        return o.blob_height * torch.exp(-0.5 * points.square().sum(1) / o.blob_radius**2)

    def _blob_slope(self, points: Tensor) -> Tensor:
        o = self.options
        if o.blob == "magic3d":
            return -o.blob_height / o.blob_radius * F.normalize(points, dim=1)
        return -self._blob(points)[:, None] * points / o.blob_radius**2
