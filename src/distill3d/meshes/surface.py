"""From a density field to triangles: the level set, its connected parts, fewer faces, and repair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import trimesh
from jaxtyping import Float
from scipy.ndimage import binary_dilation, gaussian_filter, label
from skimage.measure import marching_cubes
from torch import Tensor

from distill3d.meshes.mesh import Mesh
from distill3d.render.volume import Field


@torch.no_grad()
def extract_surface(
    field: Field,
    level: float | None = 10.0,
    resolution: int = 128,
    half_size: float = 1.0,
    soften: float = 0.0,
    min_fraction: float = 0.02,
) -> Mesh:
    """The surface of a field at a density, by marching cubes; faces are counter-clockwise seen from outside.

    Closed cavities are filled: nobody sees their walls, and they would take faces and texels.

    Args:
        level: density per world unit at the surface; 1 / level is how deep one sees into the object. None takes the
            level with the outlines of the field's own renderings (`outline_level`).
        resolution: lattice points per side of [-half_size, half_size]^3, or of the smaller box that `shrink_box`
            finds. What reaches the box is closed just outside it.
        soften: lattice steps over which the log density is smoothed (`smooth_lattice`). Distilled surfaces are noisy;
            0.7 removes nine in ten of their needless tunnels and keeps what is visible.
        min_fraction: connected parts with less than this fraction of the largest part's area are removed as floaters.

    Raises:
        ValueError: if no point reaches the level.
    """
    if resolution < 2 or (level is not None and level <= 0):
        raise ValueError(f"level must be above 0 and resolution at least 2, got {level} and {resolution}")
    # Half as many points, and no density counts as empty that reaches the level.
    half_size = shrink_box(field, half_size, max(8, resolution // 2), 0.1 if level is None else min(0.1, level))
    density = torch.cat([field(chunk)[0] for chunk in _lattice(half_size, resolution)])
    spacing = 2 * half_size / (resolution - 1)
    if level is None:
        level = outline_level(density.view([resolution] * 3).numpy(), spacing)
    highest = float(density.max())
    if not highest > level:
        raise ValueError(f"nothing to export: the density reaches {highest:.3g}, the surface level is {level:.3g}")
    # The density jumps over orders of magnitude at a surface; its clamped logarithm interpolates evenly.
    value = (density.clamp_min(1e-12).log() - math.log(level)).clamp(-3, 3).view([resolution] * 3)
    padded = np.pad(value.numpy(), 1, constant_values=-3.0)
    padded[_cavities(padded > 0)] = 3.0
    if soften:
        padded = smooth_lattice(padded, soften)
        if not padded.max() > 0:
            raise ValueError(f"nothing to export: smoothing over {soften} lattice steps removes everything")
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="ascent")
    solid = trimesh.Trimesh((vertices - 1) * spacing - half_size, faces, process=True)
    _remove_floaters(solid, min_fraction)
    return _outward(solid)


def shrink_box(field: Field, half_size: float, points: int, empty: float) -> float:
    """Half the size of the box, halved while all densities above `empty` on `points`^3 of its points lie inside."""
    density = torch.cat([field(chunk)[0] for chunk in _lattice(half_size, points)])
    axis = torch.linspace(-half_size, half_size, points).abs()
    solid = (density > empty).view([points] * 3).nonzero()
    if not len(solid):
        return half_size
    reach = float(axis[solid].max()) + 2 * half_size / (points - 1)  # one cell more, for what lies between the points
    return halved(half_size, reach)


def halved(half_size: float, reach: float) -> float:
    """Half the size of a box, halved while the distance `reach` from its center lies inside."""
    assert reach > 0
    while 2 * reach <= half_size:
        half_size /= 2
    return half_size


def _lattice(half_size: float, count: int) -> Iterator[Tensor]:
    """The `count`^3 points of a cubic lattice, x slowest, in chunks [M, 3]: all at once would be the largest array."""
    axis = torch.linspace(-half_size, half_size, count)
    for first in range(0, count**3, 1 << 18):
        number = torch.arange(first, min(first + (1 << 18), count**3))
        x, y, z = number // count**2, number // count % count, number % count
        yield torch.stack((axis[x], axis[y], axis[z]), dim=1)


def smooth_lattice(value: Float[np.ndarray, "x y z"], width: float) -> Float[np.ndarray, "x y z"]:
    """Values without their finest detail; everything larger stays in its place.

    One Gaussian G (standard deviation `width`, in lattice steps) shifts a curved surface inwards by width^2 times its
    mean curvature; 2 G - G G, whose second moments are zero, preserves every quadratic and shrinks nothing.
    """
    once = gaussian_filter(value, width)
    return 2 * once - gaussian_filter(once, width)


def outline_level(density: Float[np.ndarray, "x y z"], spacing: float) -> float:
    """The density at which a hard surface best has the outlines of the soft field, in mean square.

    Along an axis the field has the opacity 1 - exp(-sum of density x spacing). The region above a level is opaque
    where the largest density on the ray is above it, so the two can be compared without making the surface.

    Args:
        density: per world unit, on a lattice with this spacing.

    Returns:
        one of 48 levels from 0.5 to 50.
    """
    opacity = np.stack([-np.expm1(-density.sum(axis) * spacing) for axis in range(3)])
    highest = np.stack([density.max(axis) for axis in range(3)])
    levels = np.geomspace(0.5, 50, 48)
    return float(levels[np.argmin([np.square(opacity - (highest > level)).mean() for level in levels])])


def _cavities(solid: np.ndarray) -> np.ndarray:
    """Empty lattice points [X, Y, Z] that are cut off from the outside once passages of two points are closed."""
    regions: Any = label(np.logical_not(binary_dilation(solid)))
    free = regions[0]
    cut_off = (free > 0) & (free != free[0, 0, 0])
    return binary_dilation(cut_off, iterations=2) & ~solid


def without_bumps(mesh: Mesh, rounds: int = 5) -> Mesh:
    """The same faces on a smoother surface of about the same size, by filtering vertices (Taubin 1995).

    A UV map of this surface also fits the bumpy one and has half as many islands.
    """
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    trimesh.smoothing.filter_taubin(solid, lamb=0.5, nu=0.53, iterations=rounds)
    vertices = np.asarray(solid.vertices, np.float64)
    return Mesh(vertices, mesh.faces) if np.isfinite(vertices).all() else mesh


def simplify(mesh: Mesh, faces: int) -> Mesh:
    """About `faces` triangles of the same shape, by quadric error metrics (Garland and Heckbert 1997).

    Collapsing edges folds and pinches a noisy surface here and there; the result is repaired (see `repair`), which may
    add a few faces. A mesh with at most so many faces is returned as it is.

    Raises:
        ValueError: for fewer than 4 faces, which enclose nothing.
    """
    import fast_simplification

    if faces < 4:
        raise ValueError(f"a surface needs at least 4 faces, got {faces}; 20000 is usual")
    if len(mesh.faces) <= faces:
        return mesh
    given: Any = (mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))
    fewer: Any = fast_simplification.simplify(*given, target_count=faces)
    return repair(Mesh(*fewer))


def repair(mesh: Mesh) -> Mesh:
    """Closes a mesh as far as simple means can, so that each edge has two faces, and turns all faces outwards.

    Folds (two faces on the same three vertices) are removed, sheets that touch along an edge are separated, and small
    holes are filled. Colors are dropped. `faces_per_edge` shows what is left open.
    """
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
    solid.update_faces(solid.nondegenerate_faces())
    _, first, count = np.unique(np.sort(solid.faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    solid.update_faces(count[first.reshape(-1)] == 1)
    solid.remove_unreferenced_vertices()
    if not solid.is_watertight:
        trimesh.repair.fill_holes(solid)
        for _ in range(4):  # a face that touches along two edges is separated from one at a time
            if not _separate_sheets(solid):
                break
    return _outward(solid)


def _outward(solid: trimesh.Trimesh) -> Mesh:
    """The mesh with its faces turned counter-clockwise as seen from outside."""
    if solid.volume < 0:
        solid.invert()
    return Mesh(np.array(solid.vertices, np.float64), np.array(solid.faces, np.int64))


def _remove_floaters(solid: trimesh.Trimesh, min_fraction: float) -> None:
    """Removes, in place, the connected parts with an area below `min_fraction` of the largest one's."""
    labels = trimesh.graph.connected_component_labels(solid.face_adjacency, node_count=len(solid.faces))
    area = np.bincount(labels, weights=solid.area_faces)
    solid.update_faces((area >= min_fraction * area.max())[labels])
    solid.remove_unreferenced_vertices()


def _separate_sheets(mesh: trimesh.Trimesh) -> bool:
    """Separates pairs of sheets that share an edge, in place: one of them gets a vertex in the middle of it.

    Returns:
        whether there was anything to separate.
    """
    ends = mesh.edges_sorted
    _, number, count = np.unique(ends, axis=0, return_inverse=True, return_counts=True)
    number = number.reshape(-1)
    shared = np.flatnonzero(count[number] == 4)
    if not len(shared):
        return False
    vertices, faces = mesh.vertices.tolist(), mesh.faces.tolist()
    touched: set[int] = set()
    for group in shared[np.argsort(number[shared], kind="stable")].reshape(-1, 4):
        pair = _sheet(mesh, group)
        if pair is None or touched & {half_edge // 3 for half_edge in pair}:
            continue
        middle = len(vertices)
        vertices.append(mesh.vertices[ends[group[0]]].mean(0).tolist())
        for half_edge in pair:
            face, corner = divmod(int(half_edge), 3)
            a, b, c = np.roll(mesh.faces[face], -corner).tolist()
            faces[face] = [a, middle, c]
            faces.append([middle, b, c])
            touched.add(face)
    mesh.vertices, mesh.faces = vertices, faces
    return bool(touched)


def _sheet(mesh: trimesh.Trimesh, group: np.ndarray) -> tuple[int, int] | None:
    """Two of four half-edges on one edge whose faces bound the same wedge of solid; None if windings disagree.

    A half-edge is 3 face + corner, and runs from that corner to the next.
    """
    start, end = mesh.edges_sorted[group[0]]
    axis = mesh.vertices[end] - mesh.vertices[start]
    axis = axis / max(float(np.linalg.norm(axis)), 1e-12)
    across = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    third = mesh.faces[group // 3, (group % 3 + 2) % 3]
    away = mesh.vertices[third] - mesh.vertices[start]
    angle = np.arctan2(away @ np.cross(axis, across), away @ across)
    along = mesh.faces[group // 3, group % 3] == start
    if along.sum() != 2:
        return None
    # A face that runs along the axis has its solid on the side of smaller angles.
    first = int(np.flatnonzero(along)[0])
    turn = (angle[first] - angle) % (2 * np.pi)
    turn[along] = np.inf
    return int(group[first]), int(group[turn.argmin()])
