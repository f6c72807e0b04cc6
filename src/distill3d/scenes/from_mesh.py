"""Density and color of a mesh on a lattice, from which fields start."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import KDTree

from distill3d.meshes.mesh import Mesh, faces_per_edge
from distill3d.render.raster import column_crossings

SAMPLES = 200_000  # points on the surface that distances are measured to
REACH = 3.0  # cells from the surface up to which distances are computed
STEEPNESS = 10.0  # raw density per cell across the surface, and its limit: opaque within a cell
AT_SURFACE = 3.0  # raw density at the surface: rays pass a little into the object before they stop


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


def raw_density(signed: np.ndarray, cell: float) -> np.ndarray:
    """Raw density at signed distances: a ramp across the surface, steep enough to be opaque within a cell."""
    return np.clip(AT_SURFACE - STEEPNESS * signed / cell, -STEEPNESS, STEEPNESS)
