"""Metrics against the toy world's own geometry: the shapes that a prompt names, silhouettes, surface distances.

Nothing is aligned. The prior was trained on toys in one pose and size (front +x, touching a sphere of radius 0.9), so
an object that is rotated, shifted or scaled differs from what its prompt means. A prompt names a kind of toy, a kind
has many shapes, and the closest of several counts.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.spatial import KDTree
from torch import Tensor

from distill3d.cameras import FOV, focal_length, orbit, project, world_to_camera
from distill3d.meshes.mesh import Mesh, sample_surface
from distill3d.render.raster import rasterize
from distill3d.types import Cameras

SHAPES = 8  # shapes (seeds) per kind
POINTS = 8192
PROBES, PROBE_SIZE = 26, 128  # cameras that decide which surface is outside, and their pixels per side


def true_kind(prompt: str) -> str | None:
    """The kind of toy that a prompt names, None if it names none."""
    from distill3d.toybox.captions import read_prompt

    return read_prompt(prompt).kind


def true_mesh(kind: str, seed: int) -> Mesh:
    """One shape of a kind, without colors."""
    from distill3d.toybox.world import build

    toy = build(kind, "red", seed=seed)  # the color does not change the shape
    return Mesh(toy.vertices, np.ascontiguousarray(toy.faces))


def silhouettes(mesh: Mesh, cameras: Cameras, size: int) -> Bool[Tensor, "views size size"]:
    """The pixels that a mesh covers in each view."""
    return torch.stack([depth > 0 for depth in _depths(mesh, cameras, size)])


def iou(masks: Bool[Tensor, "v h w"], reference: Bool[Tensor, "v h w"]) -> float:
    """Intersection over union, averaged over the views; two empty masks count as equal."""
    both = (masks & reference).flatten(1).sum(1)
    either = (masks | reference).flatten(1).sum(1)
    return float(torch.where(either > 0, both / either.clamp_min(1), 1.0).mean())


def silhouette_iou(masks: Bool[Tensor, "v h h"], cameras: Cameras, kind: str, shapes: int = SHAPES) -> float:
    """`iou` of an object's silhouettes with those of the best matching shape of its kind, in [0, 1]; higher is better.

    It only sees outlines: not colors, dents, or which side is the front if the outline is the same. Shapes of one kind
    agree with each other to 0.65 to 0.96, so values in that range are as good as ground truth.

    Args:
        masks: the pixels that the object covers.
        cameras: the cameras of the views.
    """
    columns = (cameras.azimuth, cameras.elevation, cameras.distance, torch.rad2deg(cameras.fov_y))
    poses = tuple(zip(*(column.tolist() for column in columns), strict=True))
    return max(iou(masks, _true_silhouettes(kind, seed, poses, masks.shape[-1])) for seed in range(shapes))


def foreground_mask(
    images: Float[Tensor, "v 3 h w"], background: float, tolerance: float = 0.03
) -> Bool[Tensor, "v h w"]:
    """Silhouettes from images over a gray background: pixels with any channel beyond the tolerance.

    For objects whose opacity was not kept. It misses what has the color of the background, but not soft edges.
    """
    return (images - background).abs().amax(1) > tolerance


def surface_points(mesh: Mesh, count: int = POINTS, seed: int = 0) -> Float[np.ndarray, "n 3"]:
    """About `count` points spread uniformly over the part of a surface that is visible from outside.

    Points are drawn by area. Those that none of 26 cameras all around sees (walls inside a body, where parts of a toy
    overlap) are dropped, and drawing is repeated until there are enough. Deterministic for a seed.

    Raises:
        ValueError: for a mesh without area.
    """
    corners = mesh.vertices[mesh.faces]
    if not np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).any():
        raise ValueError("the mesh has no surface to take points from")
    cameras = _surrounding_cameras(mesh.vertices)
    depths = _depths(mesh, cameras, PROBE_SIZE)
    rng = np.random.default_rng(seed)
    kept, drawn = [np.empty((0, 3))], 0
    while sum(map(len, kept)) < count and drawn < 20 * count:
        face, weights = sample_surface(mesh.vertices, mesh.faces, rng.random((3, count)))
        points = np.einsum("ni,nid->nd", weights, corners[face])
        kept.append(points[_visible(points, depths, cameras)])
        drawn += count
    return np.concatenate(kept)[:count]


def chamfer(points: Float[np.ndarray, "n 3"], reference: Float[np.ndarray, "m 3"]) -> float:
    """Mean distance to the nearest point of the other set, averaged over both directions; 0 is best.

    Symmetric, and 0 for a set and itself. Two draws of one surface of area A with n points each are about
    0.5 sqrt(A / n) apart, which is the resolution of the metric.
    """
    there = KDTree(reference).query(points)[0].mean()
    back = KDTree(points).query(reference)[0].mean()
    return float(0.5 * (there + back))


def chamfer_to_truth(mesh: Mesh, kind: str, shapes: int = SHAPES) -> float:
    """`chamfer` to the closest shape of a kind, in world units (toys fill a sphere of radius 0.9).

    It sees the outside of the shape, including dents and thickness. It does not see colors, and hardly sees small
    parts: a missing ear adds little to the mean. Shapes of one kind are 0.012 to 0.065 apart, two draws of one shape
    0.009 to 0.016.
    """
    points = surface_points(mesh)
    return min(chamfer(points, _true_points(kind, seed)) for seed in range(shapes))


@cache
def _true_points(kind: str, seed: int) -> np.ndarray:
    return surface_points(true_mesh(kind, seed), seed=seed)


@cache
def _true_silhouettes(kind: str, seed: int, poses: tuple[tuple[float, ...], ...], size: int) -> Tensor:
    azimuth, elevation, distance, fov = zip(*poses, strict=True)
    return silhouettes(true_mesh(kind, seed), orbit(azimuth, elevation, distance, fov), size)


def _depths(mesh: Mesh, cameras: Cameras, size: int) -> Tensor:
    """Depth along the optical axis [V, size, size] of a mesh seen from both sides, 0 where nothing is hit."""
    corners = torch.from_numpy(mesh.faces)
    depths = []
    local = world_to_camera(cameras, torch.from_numpy(mesh.vertices).float())
    for points, fov in zip(local, cameras.fov_y, strict=True):
        face, weights = rasterize(points, corners, float(fov), size, size, cull=False)
        depth = (-points[:, 2][corners[face.clamp_min(0)]] * weights).sum(-1)
        depths.append(torch.where(face >= 0, depth, 0.0))
    return torch.stack(depths)


def _surrounding_cameras(vertices: np.ndarray) -> Cameras:
    """Cameras uniformly around a mesh (a Fibonacci lattice), far enough away to see all of it."""
    i = np.arange(PROBES)
    elevation = np.degrees(np.arcsin(1 - 2 * (i + 0.5) / PROBES))
    azimuth = np.degrees(np.pi * (3 - np.sqrt(5)) * i)
    radius = max(float(np.linalg.norm(vertices, axis=1).max()), 1e-6)
    distance = 1.05 * radius / np.sin(np.radians(FOV / 2))
    return orbit(azimuth.tolist(), elevation.tolist(), float(distance), FOV)


def _visible(points: np.ndarray, depths: Tensor, cameras: Cameras) -> np.ndarray:
    """Which points [N] any camera sees: the mesh in front of them is no closer than by two pixels."""
    size = depths.shape[-1]
    pixels, depth = project(cameras, torch.from_numpy(points).float(), size, size)
    column, row = pixels.floor().long().clamp(0, size - 1).unbind(-1)
    front = depths[torch.arange(len(depths))[:, None], row, column]
    focal = focal_length(cameras.fov_y, size)[:, None]
    return ((front > 0) & (depth < front + 2 * depth / focal)).any(0).numpy()
