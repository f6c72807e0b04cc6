"""Objects against the toy world's own geometry: the true shapes of a prompt, silhouettes, distances of surfaces.

Nothing is aligned: the prior was trained on toys in one pose and size (front +x, touching a sphere of 0.9), and an
object that is turned, shifted or scaled differs from what the prompt means there. A prompt names a kind, and the kind
has many shapes; the nearest of several counts.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from distill3d.cameras import orbit
from distill3d.render.raster import rasterize
from distill3d.types import Cameras

SHAPES = 8  # seeds of a kind
POINTS = 8192
EYES, EYE_SIZE = 26, 128  # cameras that decide what is outside, and their pixels


def true_kind(prompt: str) -> str | None:
    """The kind of toy that a prompt names, None for a prompt of another world."""
    from distill3d.toybox.captions import read_prompt

    return read_prompt(prompt).kind


def true_mesh(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] and faces [F, 3] of one true shape."""
    from distill3d.toybox.world import build

    toy = build(kind, "red", seed=seed)  # colors do not matter here
    return toy.vertices, np.ascontiguousarray(toy.faces)


def silhouettes(vertices: np.ndarray, faces: np.ndarray, cameras: Cameras, size: int) -> Tensor:
    """Which pixels [V, size, size] bool see a mesh from V cameras."""
    return torch.stack([depth > 0 for depth in _depths(vertices, faces, cameras, size)])


def iou(masks: Tensor, reference: Tensor) -> float:
    """Intersection over union [V, H, W] of bool masks, the mean over views; two empty masks agree."""
    both = (masks & reference).flatten(1).sum(1)
    either = (masks | reference).flatten(1).sum(1)
    return float(torch.where(either > 0, both / either.clamp_min(1), 1.0).mean())


def silhouette_iou(masks: Tensor, cameras: Cameras, kind: str, shapes: int = SHAPES) -> float:
    """`iou` of an object's silhouettes with those of the true shape that fits best; in [0, 1], higher is better.

    It sees outlines only: not colors, nor dents, nor which side is the front where the outline is the same. Shapes of
    one kind agree with each other to 0.65 to 0.96, so that much is as good as true.

    Args:
        masks: [V, H, H] bool, where the object covers the pixel.
    """
    poses = tuple(zip(*(v.tolist() for v in _angles(cameras)), strict=True))
    truths = (_true_silhouettes(kind, seed, poses, masks.shape[-1]) for seed in range(shapes))
    return max(iou(masks, truth) for truth in truths)


def covered(pictures: Tensor, background: float, tolerance: float = 0.03) -> Tensor:
    """Silhouettes [V, H, W] out of pictures over a gray: any channel is further from it than the tolerance.

    For objects of which no opacity was kept. What has the background's own color is missed, soft edges are not.
    """
    return (pictures - background).abs().amax(1) > tolerance


def surface_points(vertices: np.ndarray, faces: np.ndarray, count: int = POINTS, seed: int = 0) -> np.ndarray:
    """About `count` points [N, 3] spread evenly over what can be seen of a surface from outside.

    Points are drawn by area; those that none of 26 cameras all around sees (walls inside a body, where parts of a toy
    overlap) are dropped, and the draw is repeated until there are enough. The same arguments give the same points.

    Raises:
        ValueError: for a mesh without area.
    """
    corners = np.asarray(vertices, np.float64)[faces]
    area = 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    if not len(faces) or not area.sum() > 0:
        raise ValueError("the mesh has no surface to take points from")
    depths = _depths(vertices, faces, cameras := _eyes(vertices), EYE_SIZE)
    rng = np.random.default_rng(seed)
    kept, drawn = [np.empty((0, 3))], 0
    while sum(map(len, kept)) < count and drawn < 20 * count:
        face = rng.choice(len(faces), count, p=area / area.sum())
        u, v = np.sqrt(rng.random(count)), rng.random(count)
        weights = np.stack((1 - u, u * (1 - v), u * v), axis=1)
        points = np.einsum("ni,nid->nd", weights, corners[face])
        kept.append(points[_visible(points, depths, cameras)])
        drawn += count
    return np.concatenate(kept)[:count]


def chamfer(points: np.ndarray, reference: np.ndarray) -> float:
    """Mean distance to the nearest point of the other set, both ways, halved; in the unit of the points, 0 is best.

    Symmetric, and 0 for a set and itself. Two draws of one surface of area A with n points each are about
    0.5 sqrt(A / n) apart: that is the least that can be told.
    """
    there = KDTree(reference).query(points)[0].mean()
    back = KDTree(points).query(reference)[0].mean()
    return float(0.5 * (there + back))


def chamfer_to_truth(vertices: np.ndarray, faces: np.ndarray, kind: str, shapes: int = SHAPES) -> float:
    """`chamfer` to the nearest true shape of a kind, in world units (the toys' spheres have a radius of 0.9).

    It sees the outside of the shape, dents and thickness included. It does not see colors, and hardly small parts: a
    missing ear is a small mean. Shapes of one kind are 0.012 to 0.065 apart, two draws of one shape 0.009 to 0.016.
    """
    points = surface_points(vertices, faces)
    return min(chamfer(points, _true_points(kind, seed)) for seed in range(shapes))


@cache
def _true_points(kind: str, seed: int) -> np.ndarray:
    return surface_points(*true_mesh(kind, seed), seed=seed)


@cache
def _true_silhouettes(kind: str, seed: int, poses: tuple[tuple[float, ...], ...], size: int) -> Tensor:
    azimuth, elevation, distance, fov = zip(*poses, strict=True)
    return silhouettes(*true_mesh(kind, seed), orbit(azimuth, elevation, distance, fov), size)


def _angles(cameras: Cameras) -> tuple[Tensor, ...]:
    return cameras.azimuth, cameras.elevation, cameras.distance, torch.rad2deg(cameras.fov_y)


def _local(cameras: Cameras, points: Tensor) -> Tensor:
    """World points [N, 3] in the frame of each camera, [V, N, 3]."""
    pose = cameras.camera_to_world.to(points)
    return (points - pose[:, None, :3, 3]) @ pose[:, :3, :3]


def _depths(vertices: np.ndarray, faces: np.ndarray, cameras: Cameras, size: int) -> Tensor:
    """Depth along the axis [V, size, size] of a mesh, 0 where it is not hit; both sides of a face are seen."""
    corners = torch.from_numpy(np.ascontiguousarray(faces)).long()
    pictures = []
    for points, fov in zip(_local(cameras, torch.from_numpy(np.asarray(vertices)).float()), cameras.fov_y, strict=True):
        face, weights = rasterize(points, corners, float(fov), size, size, cull=False)
        depth = (-points[:, 2][corners[face.clamp_min(0)]] * weights).sum(-1)
        pictures.append(torch.where(face >= 0, depth, 0.0))
    return torch.stack(pictures)


def _eyes(vertices: np.ndarray) -> Cameras:
    """Cameras evenly around a mesh (a Fibonacci lattice), far enough to see all of it."""
    i = np.arange(EYES)
    elevation = np.degrees(np.arcsin(1 - 2 * (i + 0.5) / EYES))
    azimuth = np.degrees(np.pi * (3 - np.sqrt(5)) * i)
    radius = max(float(np.linalg.norm(vertices, axis=1).max()), 1e-6)
    fov = 40.0
    distance = 1.05 * radius / np.sin(np.radians(fov / 2))
    return orbit(azimuth.tolist(), elevation.tolist(), float(distance), fov)


def _visible(points: np.ndarray, depths: Tensor, cameras: Cameras) -> np.ndarray:
    """Which points [N] any camera sees: none of the mesh lies in front of it by more than two pixels."""
    size = depths.shape[-1]
    local = _local(cameras, torch.from_numpy(points).float())
    depth = -local[..., 2]
    focal = 0.5 * size / torch.tan(0.5 * cameras.fov_y)[:, None]
    column = (0.5 * size + focal * local[..., 0] / depth).floor().long().clamp(0, size - 1)
    row = (0.5 * size - focal * local[..., 1] / depth).floor().long().clamp(0, size - 1)
    front = depths[torch.arange(len(depths))[:, None], row, column]
    slack = 2 * depth / focal
    return ((front > 0) & (depth < front + slack)).any(0).numpy()
