"""A dense voxel grid as a scene: trilinear density and color in a box, without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.cameras import rays
from distill3d.meshes.mesh import Mesh
from distill3d.render.interpolate import trilinear
from distill3d.render.shading import needs_normals
from distill3d.render.volume import FieldValues, Filters, Occupancy, Sampling, render_rays
from distill3d.scenes.field import FieldScene
from distill3d.scenes.parameters import color_logits, replace_parameter
from distill3d.types import Cameras, Lighting, Rendering, SceneOptions

MOST_POINTS = 1024  # lattice points a side: four values at each are 16 GiB
EMPTY, OPAQUE = -7.0, 3.0  # raw densities of a field that starts from an occupancy


@dataclass(frozen=True)
class VoxelOptions(SceneOptions):
    """Settings of a `VoxelField`. Lengths in world units, densities per world unit.

    The blob is a fixed bias on the raw density, blob_height (1 - |p| / blob_radius) but at least -blob_floor
    (DreamFusion, appendix A, with a floor: without it the gradients in the corners would vanish).
    """

    resolution: int = 64  # lattice points a side
    half_size: float = 1.0  # the box is [-half_size, half_size]^3
    density_scale: float = 10.0  # density = density_scale * softplus(raw + blob)
    blob_height: float = 5.0
    blob_radius: float = 0.5
    blob_floor: float = 8.0
    occupancy_threshold: float = 0.03  # cells with less density everywhere are skipped
    refine: tuple[tuple[float, float], ...] = ()  # (fraction of the run, multiple of the first resolution), in order
    density_gain: tuple[tuple[float, float], ...] = ()  # (fraction of the run, factor on the raw density), in order
    occupancy_interval: int = 16  # training renders between two updates of the occupancy
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not 2 <= self.resolution <= MOST_POINTS:
            raise ValueError(f"resolution must be 2 to {MOST_POINTS}, got {self.resolution}")
        if self.occupancy_interval < 1:
            raise ValueError(f"occupancy_interval must be at least 1 render, got {self.occupancy_interval}")
        if any(round(multiple * self.resolution) < 2 for _, multiple in self.refine):
            raise ValueError(f"refine must leave a resolution of at least 2, got {self.refine}")
        if min(self.half_size, self.density_scale, self.blob_radius) <= 0:
            raise ValueError(
                "half_size, density_scale and blob_radius must be above 0, "
                f"got {self.half_size}, {self.density_scale} and {self.blob_radius}"
            )
        if min([1.0, *(factor for _, factor in self.density_gain)]) <= 0:
            raise ValueError(f"density_gain must have factors above 0, got {self.density_gain}")

    def build(self, device: torch.device | str | None = None) -> VoxelField:
        """A field with these settings."""
        return VoxelField(self, device)

    def resolution_at(self, fraction: float) -> int:
        """Lattice points a side after a fraction of the run: coarse to fine."""
        reached = [1.0] + [multiple for begin, multiple in self.refine if fraction >= begin]
        return round(reached[-1] * self.resolution)

    def density_gain_at(self, fraction: float) -> float:
        """The factor by which the raw density has been multiplied after a fraction of the run."""
        return math.prod(factor for begin, factor in self.density_gain if fraction >= begin)


class VoxelField(nn.Module, FieldScene):
    """Density and color on a lattice of resolution^3 points, trilinear between them.

    raw [Z, Y, X, 4] is interpolated first and activated afterwards, so that surfaces can lie inside a cell:
    density = density_scale * softplus(raw_0 + blob), color = sigmoid(raw_1..3). Normals are minus the smoothed
    gradient of the raw density, which is parallel to the density's own gradient without its huge range.

    In training mode the occupancy is updated every `options.occupancy_interval` renders; a cell counts as occupied
    when it or one of its neighbors holds density, so a surface may grow by a cell between two updates. Call
    `update_occupancy()` after changing parameters without rendering in training mode.
    """

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
        self.update_occupancy()

    @property
    def resolution(self) -> int:
        """Lattice points a side, now."""
        return self.raw.shape[0]

    @property
    def bounds(self) -> Tensor:
        """Lowest and highest corner [2, 3] of the box."""
        h = self.options.half_size
        return torch.stack((self.raw.new_full((3,), -h), self.raw.new_full((3,), h)))

    @property
    def half_size(self) -> float:
        """Half of the box's edge, world units."""
        return self.options.half_size

    def train(self, mode: bool = True) -> VoxelField:
        """Switches between training and evaluation; evaluation starts with an update of the occupancy."""
        super().train(mode)
        if not mode:
            self.update_occupancy()
        return self

    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Refines the lattice and scales its density at the fractions of the run that `options` gives."""
        resolution = self.options.resolution_at(step / total)
        if resolution != self.resolution:
            coarse = self.raw
            self.upsample(resolution)
            replace_parameter(optimizer, coarse, self.raw)
        gain = self.options.density_gain_at(step / total) / self.options.density_gain_at((step - 1) / total)
        if gain != 1:
            self.scale_density(gain)

    def penalties(self) -> dict[str, Callable[[], Tensor]]:
        """Total variation of raw density and of color."""
        return {
            "smooth_density": lambda: total_variation(self.raw[..., :1]),
            "smooth_color": lambda: total_variation(torch.sigmoid(self.raw[..., 1:])),
        }

    @torch.no_grad()
    def init_from_mesh(self, mesh: Mesh) -> None:
        """Takes the shape and the colors of a mesh in world units, in place."""
        from distill3d.scenes.from_mesh import raw_density, signed_distance

        signed, color = signed_distance(mesh, self.resolution, self.half_size)
        raw = torch.tensor(raw_density(signed, 2 * self.half_size / (self.resolution - 1)))
        self.raw[..., 0] = raw.to(self.raw) - self.blob
        self.raw[..., 1:] = color_logits(torch.tensor(color)).to(self.raw)
        self.update_occupancy()

    @torch.no_grad()
    def init_from_occupancy(self, query: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Takes occupancy [N] and color [N, 3] in [0, 1] at points [N, 3] from a function, in place.

        The raw density goes linearly from `EMPTY` to `OPAQUE`: soft enough for an optimizer to carve it.

        Raises:
            ValueError: where the occupancy is 0.5 or less everywhere; the field then stays as it is.
        """
        axis = torch.linspace(-self.half_size, self.half_size, self.resolution).to(self.raw)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        occupancy, color = query(torch.stack((x, y, z), dim=-1).view(-1, 3))
        if not bool((occupancy > 0.5).any()):
            raise ValueError("there is no object to start from: the occupancy is 0.5 or less everywhere")
        raw = EMPTY + (OPAQUE - EMPTY) * occupancy.view_as(self.blob)
        self.raw[..., 0] = raw.to(self.raw) - self.blob
        self.raw[..., 1:] = color_logits(color.view(*self.blob.shape, 3)).to(self.raw)
        self.update_occupancy()

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
        """See `Scene.render`, and `render_rays` for how it is computed."""
        if self.training and torch.is_grad_enabled():
            if int(self.renders) % self.options.occupancy_interval == 0:
                self.update_occupancy()
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

    def query(self, points: Float[Tensor, "n 3"], normals: bool = False) -> FieldValues:
        """Density [N], color [N, 3] in [0, 1] and, if requested, outward unit normals [N, 3].

        A point outside the box takes the nearest value inside.
        """
        return self._evaluate(self._biased(), self._slope() if normals else None, points)

    def density_grid(self) -> Float[Tensor, "z y x"]:
        """Density at the lattice points."""
        return self._density(self.raw[..., 0] + self.blob)

    @torch.no_grad()
    def update_occupancy(self) -> None:
        """Marks the cells that hold density and their neighbors, and tightens the box that rays march through.

        A trilinear cell is below its largest corner, so no cell above `options.occupancy_threshold` is missed.
        """
        corners = F.max_pool3d(self.density_grid()[None, None], 2, stride=1)
        occupied = (corners > self.options.occupancy_threshold).to(corners)
        self.cells = F.max_pool3d(occupied, 3, stride=1, padding=1)[0, 0] > 0
        self.march_bounds = Occupancy(self.cells, self.bounds).tight()

    @torch.no_grad()
    def upsample(self, resolution: int) -> None:
        """Resamples to another lattice (coarse to fine); renderings stay the same.

        The parameter is replaced, so a new optimizer is needed (or `replace_parameter`).
        """
        if resolution < 2:
            raise ValueError(f"resolution must be at least 2, got {resolution}")
        coarse = self._biased().permute(3, 0, 1, 2)[None]
        fine = F.interpolate(coarse, [resolution] * 3, mode="trilinear", align_corners=True)[0].permute(1, 2, 3, 0)
        self._resize(resolution)
        self.raw.copy_(fine)
        self.raw[..., 0] -= self.blob
        self.update_occupancy()

    @torch.no_grad()
    def scale_density(self, factor: float) -> None:
        """Multiplies the raw density, blob included: fog becomes thinner and dense regions become denser.

        The surface at density density_scale ln 2 does not move.
        """
        self.raw[..., 0] += (factor - 1) * (self.raw[..., 0] + self.blob)
        self.update_occupancy()

    def _resize(self, resolution: int) -> None:
        self.raw = nn.Parameter(self.raw.new_zeros(*[resolution] * 3, 4), requires_grad=self.raw.requires_grad)
        self.blob = self._blob()
        self.cells = torch.zeros([resolution - 1] * 3, dtype=torch.bool, device=self.raw.device)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Takes the resolution of the checkpoint, so that a refined run can be loaded into a new field."""
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
        """Raw values [Z, Y, X, 4], with the blob added to the density."""
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

    def _evaluate(self, lattice: Tensor, slope: Tensor | None, points: Tensor) -> FieldValues:
        values = self._sample(lattice, points)
        normal = None if slope is None else F.normalize(self._sample(slope, points), dim=1, eps=1e-6)
        return self._density(values[:, 0]), torch.sigmoid(values[:, 1:]), normal


def total_variation(lattice: Float[Tensor, "z y x ..."]) -> Float[Tensor, ""]:
    """Mean squared difference of neighbors along each of the first three axes, summed."""
    return sum((lattice.diff(dim=axis).square().mean() for axis in range(3)), lattice.new_zeros(()))
