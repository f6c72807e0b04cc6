"""Fields that start from a mesh: its shape and colors become theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import KDTree

from distill3d.meshes.mesh import Mesh, faces_per_edge
from distill3d.render.raster import column_crossings
from distill3d.scenes.mesh import MIN_COLOR

if TYPE_CHECKING:
    from distill3d.scenes.hashgrid.field import HashField
    from distill3d.scenes.voxels import VoxelField

SAMPLES = 200_000  # points on the surface that distances are measured to
REACH = 3.0  # cells from the surface up to which distances are computed
STEEPNESS = 10.0  # raw density per cell across the surface, and its limit: opaque within a cell
AT_SURFACE = 3.0  # raw density at the surface: rays pass a little into the object before they stop
FITTING_STEPS = 400  # of a field without a lattice of its own
BOX = 1.0  # half of the box in which an object lies


def signed_distance(mesh: Mesh, resolution: int, half_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Distance to a mesh on a lattice of resolution^3 points of [-half_size, half_size]^3, negative inside.

    A point is inside if the surface winds around it, as counted along at least two of the three axes, so small holes
    do not matter. Open sheets have no inside and are made half a cell thick on either side.

    Returns:
        distance [Z, Y, X] in world units, at most REACH cells, and the color [Z, Y, X, 3] of the nearest point.
    """
    cell = 2 * half_size / (resolution - 1)
    votes = np.stack([_winds_around(mesh, resolution, half_size, axis) for axis in range(3)]).sum(0)
    face, weights = mesh.sample(SAMPLES)
    points = np.einsum("nc,ncr->nr", weights, mesh.vertices[mesh.faces[face]])
    axis = np.linspace(-half_size, half_size, resolution)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    lattice = np.stack((x, y, z), axis=-1).reshape(-1, 3)
    distance, nearest = KDTree(points, balanced_tree=False).query(lattice, distance_upper_bound=REACH * cell)
    distance = np.where(np.isfinite(distance), distance, REACH * cell).reshape(votes.shape)
    signed = np.where(votes >= 2, -distance, distance)
    if not _closed(mesh):
        signed = np.minimum(signed, distance - 0.5 * cell)
    colors = np.concatenate((mesh.colors(face, weights), [[0.5] * 3]))  # gray where no point is near
    return signed, colors[nearest].reshape(*votes.shape, 3)


def _winds_around(mesh: Mesh, resolution: int, half_size: float, axis: int) -> np.ndarray:
    """Lattice points [Z, Y, X] around which the surface winds, counted along an axis (0 is x)."""
    order = [(axis + 1) % 3, (axis + 2) % 3, axis]
    # Shifted off the lattice, because vertices of symmetric meshes lie on its lines and edges would count twice.
    corner = (mesh.vertices[:, order] + half_size) * ((resolution - 1) / (2 * half_size)) + [1.7e-4, 2.3e-4, 0.0]
    pixel, height, sign = column_crossings(torch.from_numpy(corner[mesh.faces]), resolution, resolution)
    below = height.floor().long().clamp(-1, resolution - 1) + 1  # number of lattice points below the crossing
    winding = torch.zeros(resolution * resolution, resolution + 1, dtype=torch.float64)
    winding.index_put_((pixel, below), sign, accumulate=True)
    inside = winding.flip(1).cumsum(1).flip(1)[:, 1:].abs() > 0.5
    grid = inside.view(resolution, resolution, resolution).numpy()  # [row, column, along]
    lies_on = {order[1]: 0, order[0]: 1, order[2]: 2}
    return grid.transpose(lies_on[2], lies_on[1], lies_on[0])


def _closed(mesh: Mesh) -> bool:
    """Whether each edge belongs to an even number of faces."""
    return bool((faces_per_edge(mesh) % 2 == 0).all())


def _raw(signed: np.ndarray, cell: float) -> np.ndarray:
    """Raw density: a ramp across the surface, steep enough to be opaque within a cell."""
    return np.clip(AT_SURFACE - STEEPNESS * signed / cell, -STEEPNESS, STEEPNESS)


@torch.no_grad()
def init_voxels(field: VoxelField, mesh: Mesh) -> None:
    """Sets density and color of a voxel field to those of a mesh in world units (see `meshes.mesh.placed`)."""
    signed, color = signed_distance(mesh, field.resolution, field.half_size)
    cell = 2 * field.half_size / (field.resolution - 1)
    raw = torch.tensor(_raw(signed, cell)).to(field.raw)
    field.raw[..., 0] = raw - field.blob
    field.raw[..., 1:] = torch.logit(torch.tensor(color).clamp(MIN_COLOR, 1 - MIN_COLOR)).to(field.raw)
    field.update_occupancy()


@torch.enable_grad()
def init_hash_field(field: HashField, mesh: Mesh, resolution: int = 96, batch: int = 1 << 14) -> None:
    """Fits density and color of a hash field to a mesh in world units, most of all near its surface."""
    signed, color = signed_distance(mesh, resolution, BOX)
    device = field.table.device
    generator = torch.Generator().manual_seed(0)
    cell = 2 * BOX / (resolution - 1)
    density = torch.nn.functional.softplus(torch.tensor(_raw(signed, cell))) * 10
    known = torch.cat((density[..., None].log1p(), torch.tensor(color)), dim=-1).float()
    near = torch.tensor(np.abs(signed) < 2.5 * cell).reshape(-1).nonzero()[:, 0]
    optimizer = torch.optim.Adam(field.parameters(), lr=0.01, eps=1e-15)
    for _ in range(FITTING_STEPS):
        index = near[torch.randint(len(near), (batch // 2,), generator=generator)]
        index = torch.cat((index, torch.randint(resolution**3, (batch // 2,), generator=generator)))
        at = torch.stack((index % resolution, index // resolution % resolution, index // resolution**2), dim=1)
        points = at * cell - BOX
        target = known.view(-1, 4)[index].to(device)
        found, rgb, _ = field.query(points.float().to(device))
        loss = (found.log1p() - target[:, 0]).square().mean() + (rgb - target[:, 1:])[: batch // 2].square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    field.occupancy.update(field.density)
