"""Polygons as triangles that lie inside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

MOST_CORNERS = 1000  # of a face that is not convex


def triangulate(
    vertices: Float[np.ndarray, "v 3"], polygons: Sequence[Sequence[int]]
) -> tuple[Int[np.ndarray, "f 3"], Int[np.ndarray, " f"], Int[np.ndarray, "f 3"]]:
    """Cuts polygons with n >= 3 corners, convex or not, into n - 2 triangles of the same winding.

    Convex ones are cut as fans from their first corner, others by ears (Meisters 1975) in the plane of their normal.

    Returns:
        faces, which polygon each comes from, and which corners of that polygon its corners are.
    """
    triangles: list[tuple[int, int, int]] = []
    count = np.array([len(polygon) for polygon in polygons], np.int64)
    concave = _concave(vertices, polygons, count)
    fans: dict[int, list[tuple[int, int, int]]] = {}
    for number, polygon in enumerate(polygons):
        n = len(polygon)
        if concave[number]:
            if n > MOST_CORNERS:  # the time to cut one grows with the third power
                raise ValueError(
                    f"a concave face has {n} corners, more than {MOST_CORNERS}: triangulate the mesh first"
                )
            triangles += _ears(_flat(vertices[list(polygon)]))
        elif n in fans:
            triangles += fans[n]
        else:
            triangles += fans.setdefault(n, [(0, i, i + 1) for i in range(1, n - 1)])
    source = np.repeat(np.arange(len(polygons)), (count - 2).clip(0))
    corners = np.array(triangles, np.int64).reshape(-1, 3)
    first = np.cumsum(np.append(0, count[:-1]))
    flat = np.fromiter((vertex for polygon in polygons for vertex in polygon), np.int64, int(count.sum()))
    return flat[first[source][:, None] + corners] if len(corners) else corners, source, corners


def _concave(vertices: np.ndarray, polygons: Sequence[Sequence[int]], count: np.ndarray) -> np.ndarray:
    """Which polygons turn the other way at a corner, or are no fan from their first corner."""
    found = np.zeros(len(polygons), bool)
    for n in np.unique(count[count > 3]):
        chosen = np.flatnonzero(count == n)
        index = np.array([polygons[int(i)] for i in chosen])
        if index.max() >= len(vertices) or index.min() < 0:
            raise ValueError(f"faces must be indices from 0 to {len(vertices) - 1} into vertices, got {index.max()}")
        corner = vertices[index]
        spokes = corner[:, 1:] - corner[:, :1]
        normals = np.cross(spokes[:, :-1], spokes[:, 1:])  # twice the areas of the fan's triangles
        total = normals.sum(1, keepdims=True)
        found[chosen] = ((normals * total).sum(2) < -1e-9 * (total**2).sum(2)).any(1)
        if n > 4:  # a star may be a fan from one corner and wind twice
            edge = np.roll(corner, -1, axis=1) - corner
            turn = (np.cross(edge, np.roll(edge, -1, axis=1)) * total).sum(2)
            found[chosen] |= (turn < -1e-9 * (total**2).sum(2)).any(1)
    return found


def _flat(corners: np.ndarray) -> np.ndarray:
    """The polygon [N, 2] seen against its normal, counter-clockwise, in a unit of its own."""
    corners = corners - corners.mean(0)
    corners = corners / max(np.abs(corners).max(), 1e-300)
    normal = np.cross(corners, np.roll(corners, -1, axis=0)).sum(0)
    axis = int(np.abs(normal).argmax())
    flat = corners[:, [(axis + 1) % 3, (axis + 2) % 3]]
    return flat if normal[axis] >= 0 else flat * [-1, 1]


def _ears(points: np.ndarray) -> list[tuple[int, int, int]]:
    """Cuts off ears, of the possible ones that with the least flat corner; a knot is cut as a fan at the end."""

    def cross(a: int, b: int, c: int) -> float:
        u, v = points[b] - points[a], points[c] - points[a]
        return float(u[0] * v[1] - u[1] * v[0])

    rest, triangles = list(range(len(points))), []
    while len(rest) > 3:
        best, highest = -1, 0.0
        for i in range(len(rest)):
            a, b, c = rest[i - 1], rest[i], rest[(i + 1) % len(rest)]
            size = cross(a, b, c)
            edges = [points[b] - points[a], points[c] - points[b], points[a] - points[c]]
            shape = size / max(sum(float(e @ e) for e in edges), 1e-300)
            if size <= 0 or shape <= highest:
                continue
            others = points[
                [j for j in rest if j not in (a, b, c) and not (points[j] == points[[a, b, c]]).all(1).any()]
            ]
            sides = [
                u[0] * (others[:, 1] - p[1]) - u[1] * (others[:, 0] - p[0])
                for u, p in zip(edges, points[[a, b, c]], strict=True)
            ]
            if not (np.minimum.reduce(sides) >= 0).any():
                best, highest = i, shape
        if best < 0:  # corners on one line, or edges that cross
            best = max(range(len(rest)), key=lambda i: -abs(cross(rest[i - 1], rest[i], rest[(i + 1) % len(rest)])))
        triangles.append((rest[best - 1], rest[best], rest[(best + 1) % len(rest)]))
        del rest[best]
    return [*triangles, (rest[0], rest[1], rest[2])]
