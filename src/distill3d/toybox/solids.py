"""Rounded building blocks of the toy world: closed triangle solids, z up, and how to place them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import trimesh

_AXIS = {"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)}


@dataclass(frozen=True)
class Solid:
    """A closed surface: vertices [V, 3] and outward-facing triangles [F, 3]."""

    vertices: np.ndarray
    faces: np.ndarray

    def at(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Solid:
        """Moved by (x, y, z)."""
        return Solid(self.vertices + np.array([x, y, z]), self.faces)

    def turn(self, axis: str, degrees: float) -> Solid:
        """Turned about a world axis through the origin, counter-clockwise."""
        matrix = np.asarray(trimesh.transformations.rotation_matrix(np.radians(degrees), _AXIS[axis]))[:3, :3]
        return Solid(self.vertices @ matrix.T, self.faces)

    def stretch(self, x: float = 1.0, y: float = 1.0, z: float = 1.0) -> Solid:
        """Scaled along the world axes by positive factors."""
        return Solid(self.vertices * np.array([x, y, z]), self.faces)


def solid(vertices: np.ndarray, faces: np.ndarray) -> Solid:
    """Cleans a triangle soup: coincident vertices merged, slivers dropped, orientation outward."""
    rounded, index = np.unique(np.round(vertices, 6), axis=0, return_inverse=True)
    faces = index.reshape(-1)[faces]
    a, b, c = rounded[faces].transpose(1, 0, 2)
    cross = np.cross(b - a, c - a)
    keep = np.linalg.norm(cross, axis=1) > 1e-10
    outward = np.einsum("fi,fi->", a, cross) > 0  # six times the signed volume
    return Solid(rounded, faces[keep] if outward else faces[keep][:, ::-1])


_SPHERE = trimesh.creation.icosphere(subdivisions=2)


def ball(rx: float, ry: float | None = None, rz: float | None = None) -> Solid:
    """Ellipsoid with the given radii (one radius: a sphere)."""
    radii = np.array([rx, rx if ry is None else ry, rx if rz is None else rz])
    return Solid(_SPHERE.vertices * radii, _SPHERE.faces)


def curve(points: Sequence[tuple[float, float]], per_span: int = 5) -> list[tuple[float, float]]:
    """Catmull-Rom spline through points, as a polyline."""
    p = np.array([points[0], *points, points[-1]], dtype=float)
    u = np.linspace(0, 1, per_span, endpoint=False)[:, None]
    spans = [
        0.5
        * (
            2 * p[i]
            + (p[i + 1] - p[i - 1]) * u
            + (2 * p[i - 1] - 5 * p[i] + 4 * p[i + 1] - p[i + 2]) * u**2
            + (3 * p[i] - p[i - 1] - 3 * p[i + 1] + p[i + 2]) * u**3
        )
        for i in range(1, len(p) - 2)
    ]
    line = np.concatenate([*spans, p[-1:]])
    line[:, 0] = line[:, 0].clip(0)
    return [(float(r), float(z)) for r, z in line]


def lathe(profile: Sequence[tuple[float, float]], sections: int = 28) -> Solid:
    """Surface of revolution about z of a profile of (radius, z); open ends are closed towards the axis."""
    r, z = np.array([(0.0, profile[0][1]), *profile, (0.0, profile[-1][1])]).T
    angle = np.arange(sections) * 2 * np.pi / sections
    ring = np.stack((np.cos(angle), np.sin(angle)), axis=-1)
    vertices = np.concatenate((r[:, None, None] * ring, np.broadcast_to(z[:, None, None], (len(z), sections, 1))), -1)
    i, j = np.meshgrid(np.arange(len(r) - 1), np.arange(sections), indexing="ij")
    a, b = i * sections + j, i * sections + (j + 1) % sections
    c, d = a + sections, b + sections
    faces = np.concatenate((np.stack((a, b, d), -1).reshape(-1, 3), np.stack((a, d, c), -1).reshape(-1, 3)))
    return solid(vertices.reshape(-1, 3), faces)


def rod(start: Sequence[float], end: Sequence[float], radius: float, end_radius: float | None = None) -> Solid:
    """Tapered cylinder between two points, with slightly rounded rims."""
    low, high = np.asarray(start, float), np.asarray(end, float)
    length = float(np.linalg.norm(high - low))
    top = radius if end_radius is None else end_radius
    bevel = min(0.25 * max(radius, top), 0.25 * length)
    profile = [
        (max(radius - bevel, 0), 0.0),
        (radius, bevel),
        (top, length - bevel),
        (max(top - bevel, 0), length),
    ]
    return _along(lathe(profile, sections=16), low, (high - low) / length)


def capsule(start: Sequence[float], end: Sequence[float], radius: float) -> Solid:
    """Cylinder with half-spherical ends between two points."""
    low, high = np.asarray(start, float), np.asarray(end, float)
    length = float(np.linalg.norm(high - low))
    angle = np.linspace(0, np.pi / 2, 5)
    below = [(radius * np.sin(a), -radius * np.cos(a)) for a in angle]
    above = [(radius * np.cos(a), length + radius * np.sin(a)) for a in angle]
    return _along(lathe(below + above, sections=16), low, (high - low) / length)


def _along(body: Solid, start: np.ndarray, direction: np.ndarray) -> Solid:
    """The solid with its z axis turned into a unit direction, then moved to a point."""
    matrix = np.asarray(trimesh.geometry.align_vectors([0, 0, 1], direction))[:3, :3]
    return Solid(body.vertices @ matrix.T + start, body.faces)


def box(sx: float, sy: float, sz: float, rounding: float = 0.05) -> Solid:
    """Box with the given full side lengths and rounded edges, centered at the origin.

    The Minkowski sum of a smaller box and a ball: each octant of a sphere moves to its corner, and the
    triangles across the coordinate planes stretch into the flat sides.
    """
    half = np.array([sx, sy, sz]) / 2
    r = min(rounding, 0.99 * half.min())
    polar = np.pi * (np.arange(8) + 0.5) / 8
    azimuth = 2 * np.pi * (np.arange(16) + 0.5) / 16
    ring = np.stack((np.cos(azimuth), np.sin(azimuth)), -1)
    direction = np.concatenate(
        (np.sin(polar)[:, None, None] * ring, np.broadcast_to(np.cos(polar)[:, None, None], (8, 16, 1))), -1
    ).reshape(-1, 3)
    vertices = np.sign(direction) * (half - r) + r * direction
    hull = trimesh.convex.convex_hull(vertices)
    return Solid(np.asarray(hull.vertices), np.asarray(hull.faces))


def ring(radius: float, thickness: float, axis: str = "z") -> Solid:
    """Torus about an axis: radius of the circle, radius of the tube."""
    torus = trimesh.creation.torus(radius, thickness, major_sections=28, minor_sections=12)
    body = solid(np.asarray(torus.vertices), np.asarray(torus.faces))
    return {"z": body, "x": body.turn("y", 90), "y": body.turn("x", 90)}[axis]


def plate(outline: Sequence[tuple[float, float]], thickness: float) -> Solid:
    """Flat shape facing +x: an outline of (y, z), star-shaped about its mean, extruded along x."""
    points = np.array(outline, dtype=float)
    n = len(points)
    center = points.mean(0, keepdims=True)
    layer = np.concatenate((points, center))
    x = np.full((n + 1, 1), thickness / 2)
    vertices = np.concatenate((np.hstack((x, layer)), np.hstack((-x, layer))))
    i, j, back = np.arange(n), (np.arange(n) + 1) % n, n + 1
    faces = np.concatenate(
        (
            np.stack((np.full(n, n), i, j), -1),
            np.stack((np.full(n, n + back), j + back, i + back), -1),
            np.stack((i, i + back, j + back), -1),
            np.stack((i, j + back, j), -1),
        )
    )
    return solid(vertices, faces)


def star(radius: float, points: int = 5, inner: float = 0.45) -> list[tuple[float, float]]:
    """Outline of a star in (y, z), one point up."""
    angle = np.pi / 2 + np.arange(2 * points) * np.pi / points
    r = radius * np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return [(float(a), float(b)) for a, b in zip(r * np.cos(angle), r * np.sin(angle), strict=True)]


def heart(radius: float) -> list[tuple[float, float]]:
    """Outline of a heart in (y, z)."""
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    y = 16 * np.sin(t) ** 3
    z = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(float(a), float(b)) for a, b in zip(radius * y / 17, radius * z / 17, strict=True)]


def corner_normals(vertices: np.ndarray, faces: np.ndarray, crease: float = 50.0) -> np.ndarray:
    """Shading normals [F, 3, 3] of face corners: smooth over edges flatter than `crease` degrees, sharp elsewhere."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    weighted = np.cross(b - a, c - a)  # length: twice the area
    unit = weighted / np.linalg.norm(weighted, axis=1, keepdims=True).clip(1e-12)
    corners = faces.reshape(-1)
    order = np.argsort(corners, kind="stable")
    degree = np.bincount(corners, minlength=len(vertices))
    first = np.cumsum(degree) - degree
    # All pairs (corner, other face at the same vertex).
    repeat = degree[corners]
    mine = np.repeat(np.arange(len(corners)), repeat)
    within = np.arange(len(mine)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    other = order[first[corners[mine]] + within] // 3
    smooth = np.einsum("ij,ij->i", unit[mine // 3], unit[other]) > np.cos(np.radians(crease))
    total = np.zeros((len(corners), 3))
    for axis in range(3):
        total[:, axis] = np.bincount(mine[smooth], weighted[other[smooth], axis], minlength=len(corners))
    total /= np.linalg.norm(total, axis=1, keepdims=True).clip(1e-12)
    return total.reshape(-1, 3, 3)
