"""A scene's first shape from views with coverage: the visual hull (Laurentini 1994), and the colors that views see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill3d.cameras import project
from distill3d.types import Cameras, Scene

if TYPE_CHECKING:
    from distill3d.meshes.mesh import Mesh

RESOLUTION = 64  # lattice points per side of the hull as a mesh


@dataclass(frozen=True)
class Hull:
    """V square views of an object inside a ball about the origin.

    Args:
        cutouts: premultiplied color and coverage, in [0, 1].
        radius: of the ball, world units.
        tolerance: how many views may see the background at a point that is kept; 0 is the visual hull.
    """

    cameras: Cameras
    cutouts: Float[Tensor, "v 4 s s"]
    radius: float
    tolerance: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < len(self.cameras):
            raise ValueError(f"tolerance must be from 0 to {len(self.cameras) - 1} views, got {self.tolerance}")

    @torch.no_grad()
    def query(self, points: Float[Tensor, "n 3"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
        """Occupancy in [0, 1] and color in [0, 1] at points in world units.

        The occupancy is the coverage of the view that is next after the `tolerance` lowest ones; a point outside of an
        image counts as covered. The color is the mean over the views, weighted by their coverage.
        """
        size = self.cutouts.shape[-1]
        pixels, _ = project(self.cameras, points, size, size)
        at = (2 / size * pixels - 1)[:, None]
        color, coverage = F.grid_sample(self.cutouts, at, align_corners=False)[:, :, 0].split([3, 1], dim=1)
        total = coverage.sum(0).clamp_min(1e-3)
        coverage = torch.where((at[:, 0].abs() <= 1).all(-1), coverage[:, 0], 1.0)  # [V, N]
        occupancy = coverage.sort(0).values[self.tolerance] * (points.norm(dim=1) < self.radius)
        return occupancy, (color.sum(0) / total).T

    def mesh(self) -> Mesh:
        """The surface at occupancy 0.5 with vertex colors; ValueError where there is none."""
        from skimage.measure import marching_cubes

        from distill3d.meshes.mesh import Mesh

        axis = torch.linspace(-self.radius, self.radius, RESOLUTION).to(self.cutouts)
        points = torch.cartesian_prod(axis, axis, axis)
        values = self.query(points)[0].view(*[RESOLUTION] * 3).cpu().numpy()
        if not (values > 0.5).any():
            raise ValueError("the views show no object, so there is no shape to start from")
        step = 2 * self.radius / (RESOLUTION - 1)
        vertices, faces, _, _ = marching_cubes(np.pad(values, 1), 0.5, spacing=(step,) * 3)
        vertices = vertices - self.radius - step
        colors = self.query(torch.from_numpy(vertices).to(self.cutouts))[1]
        return Mesh(vertices, faces[:, ::-1].copy(), vertex_colors=colors.cpu().numpy())


def start_from_hull(scene: Scene, hull: Hull) -> None:
    """Gives the scene the shape and the colors of the hull, in place. Call it before the optimizer is made.

    Raises:
        ValueError: for a scene that cannot start from a shape, and where the views show no object.
    """
    from distill3d.scenes.voxels import VoxelField

    if isinstance(scene, VoxelField):  # soft, so that the fit can still carve it
        scene.init_from_occupancy(hull.query)
    else:
        scene.init_from_mesh(hull.mesh())
