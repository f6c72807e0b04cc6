"""A density and color field on a hash encoding with small networks: the scene of the paper's recipe, for GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.cameras import rays
from distill3d.meshes.mesh import Mesh
from distill3d.render.shading import needs_normals
from distill3d.render.volume import FieldValues, Filters, Sampling, render_rays
from distill3d.scenes.field import FieldScene
from distill3d.scenes.hashgrid.encoding import encode
from distill3d.scenes.hashgrid.layout import HashLayout
from distill3d.scenes.hashgrid.occupancy import OccupancyGrid
from distill3d.types import Cameras, Lighting, Rendering, SceneOptions


@dataclass(frozen=True)
class HashOptions(SceneOptions):
    """Settings of a `HashField`; the defaults are those of the SDI release. Lengths in world units.

    The blob is a fixed bias on the raw density. "magic3d": blob_height (1 - |p| / blob_radius) (Magic3D, Lin et al.
    2023, section 4.1). "dreamfusion": blob_height exp(-|p|^2 / (2 blob_radius^2)) (DreamFusion, appendix A, which
    uses height 5 and radius 0.2).
    """

    layout: HashLayout = field(default_factory=HashLayout)
    half_size: float = 2.0  # the box is [-half_size, half_size]^3
    hidden: int = 64  # width of the one hidden layer of each network
    blob: str = "magic3d"  # or dreamfusion
    blob_height: float = 10.0
    blob_radius: float = 0.5
    first_levels: int = 8  # of the encoding that are active from the start
    level_start: float = 0.2  # fraction of the run after which a level is added per `level_interval`
    level_interval: float = 0.05  # fraction of the run
    occupancy_resolution: int = 32  # cells a side
    occupancy_threshold: float = 0.03  # density above which a cell is not skipped
    occupancy_interval: int = 16  # steps between two updates of the occupancy
    seed: int = 0  # of the initial weights
    sampling: Sampling = field(default_factory=lambda: Sampling(samples=512, chunk=4096, points=2**17, checkpoint=True))

    def __post_init__(self) -> None:
        if min(self.half_size, self.blob_radius, self.level_interval) <= 0:
            raise ValueError(
                "half_size, blob_radius and level_interval must be above 0, "
                f"got {self.half_size}, {self.blob_radius} and {self.level_interval}"
            )
        if min(self.hidden, self.occupancy_resolution, self.occupancy_interval) < 1:
            raise ValueError(
                "hidden, occupancy_resolution and occupancy_interval must be at least 1, "
                f"got {self.hidden}, {self.occupancy_resolution} and {self.occupancy_interval}"
            )
        if self.blob not in ("magic3d", "dreamfusion"):
            raise ValueError(f"blob must be magic3d or dreamfusion, got {self.blob!r}")

    def build(self, device: torch.device | str | None = None) -> HashField:
        """A field with these settings."""
        return HashField(self, device)

    def levels_at(self, step: int, total: int) -> int:
        """Number of active levels of the encoding at a step of a run of `total` steps: coarse to fine."""
        start, interval = round(self.level_start * total), max(1, round(self.level_interval * total))
        return min(self.first_levels + max(0, step - start) // interval, self.layout.levels)


class HashField(nn.Module, FieldScene):
    """density = softplus(MLP(encoding) + blob), color = sigmoid(MLP(encoding)); no view direction.

    Both networks have one hidden layer with ReLU and no biases. Normals are minus the gradient of the raw density,
    which is parallel to that of the density (softplus is increasing) and does not vanish in empty space. The gradient
    is written out as the slopes of the encoding times the derivative of the network, so training through it needs no
    second derivatives of the encoding.
    """

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
        # On the host, which decides by it what to compute.
        self.register_buffer("levels", torch.tensor(min(options.first_levels, layout.levels)))
        grid = OccupancyGrid(options.occupancy_resolution, options.half_size, options.occupancy_threshold)
        self.occupancy = grid.to(device)
        self.occupancy.update(self.density)

    @property
    def half_size(self) -> float:
        """Half of the box's edge, world units."""
        return self.options.half_size

    @property
    def bounds(self) -> Float[Tensor, "2 3"]:
        """Lowest and highest corner of the box."""
        return self.occupancy.bounds

    def train(self, mode: bool = True) -> HashField:
        """Switches between training and evaluation; evaluation starts with an update of the occupancy."""
        super().train(mode)
        if not mode:
            self.occupancy.update(self.density)
        return self

    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Activates levels and updates the occupancy at the steps that `options` gives."""
        self.levels.fill_(self.options.levels_at(step, total))
        if step % self.options.occupancy_interval == 0:
            self.occupancy.update(self.density, torch.Generator().manual_seed(step))

    @torch.enable_grad()
    def init_from_mesh(self, mesh: Mesh, resolution: int = 96, steps: int = 400, batch: int = 1 << 14) -> None:
        """Fits density and color to a mesh in world units, on a lattice over [-1, 1]^3, mostly near its surface.

        Args:
            resolution: lattice points a side.
            steps: updates of the parameters.
            batch: points per update.
        """
        from distill3d.scenes.from_mesh import raw_density, signed_distance

        cell, device = 2 / (resolution - 1), self.table.device
        signed, color = signed_distance(mesh, resolution, 1.0)
        density = F.softplus(torch.tensor(raw_density(signed, cell))) * 10
        known = torch.cat((density[..., None].log1p(), torch.tensor(color)), dim=-1).float().view(-1, 4)
        near = torch.tensor(abs(signed) < 2.5 * cell).reshape(-1).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-15)
        for _ in range(steps):
            index = near[torch.randint(len(near), (batch // 2,), generator=generator)]
            index = torch.cat((index, torch.randint(resolution**3, (batch // 2,), generator=generator)))
            at = torch.stack((index % resolution, index // resolution % resolution, index // resolution**2), dim=1)
            found, rgb, _ = self.query((at * cell - 1.0).float().to(device))
            target = known[index].to(device)
            loss = (found.log1p() - target[:, 0]).square().mean()
            loss = loss + (rgb - target[:, 1:])[: batch // 2].square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.occupancy.update(self.density)

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
    def density(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Density per world unit, without gradients."""
        return F.softplus(self._raw(self._encode(points)[0], points))

    def query(self, points: Float[Tensor, "n 3"], normals: bool = False) -> FieldValues:
        """Density [N], color [N, 3] in [0, 1] and, if requested, outward unit normals [N, 3].

        Outside the box the encoding is that of the nearest point inside. Differentiable in the parameters, not in
        the points.
        """
        points = points.detach()
        encoded = self._encode(points, slopes=normals)
        density = F.softplus(self._raw(encoded[0], points))
        color = torch.sigmoid(F.relu(encoded[0] @ self.color_in.T) @ self.color_out.T)
        normal = F.normalize(-self._slope(encoded, points), dim=1, eps=1e-6) if normals else None
        return density, color, normal

    def _encode(self, points: Tensor, slopes: bool = False) -> Tensor:
        """Encoding [1, N, channels]; with slopes [4, N, channels], its derivatives in units of the box's edge."""
        at = points / (2 * self.options.half_size) + 0.5
        return encode(self.table, at, self.options.layout, int(self.levels), slopes)

    def _raw(self, encoded: Tensor, points: Tensor) -> Tensor:
        """Raw density [N]: the network's plus the blob."""
        return F.relu(encoded @ self.density_in.T) @ self.density_out + self._blob(points)

    def _slope(self, encoded: Tensor, points: Tensor) -> Tensor:
        """Gradient [N, 3] of the raw density by the points, from the encoding with its slopes [4, N, channels]."""
        active = (encoded[0] @ self.density_in.T > 0).to(encoded)
        by_encoding = (active * self.density_out) @ self.density_in
        slope = torch.einsum("knc,nc->nk", encoded[1:], by_encoding) / (2 * self.options.half_size)
        return slope + self._blob_slope(points)

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
