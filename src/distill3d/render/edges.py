"""How a picture changes where surfaces begin and end: antialiasing of silhouettes, differentiable in the vertices.

A rasterized picture is constant around each pixel's center, so its derivative in the vertices lacks what happens at
silhouettes. Here each silhouette edge is followed through the picture. Where it passes between the centers of two
neighboring pixels, at the distance e from the center of the pixel that sees the surface, that pixel's share of the
two is e + 1/2: the surplus over 1 goes to the neighbor, and what lacks is filled with the neighbor's color. Edges
that are rather upright are followed by rows and the others by columns, so that no area is counted twice. For a straight
edge the covered area is exact, and so is its derivative.

The blend is that of Laine et al. 2020 ("Modular primitives for high-performance differentiable rendering", section
3.5); going through edges instead of pixels also finds those of faces smaller than a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEPTH_TOLERANCE = 0.05  # share of the depth by which a surface may bulge before its own silhouette


@dataclass(frozen=True)
class Edges:
    """The edges of a mesh, each once, and which faces they belong to."""

    ends: Tensor  # [E, 2] vertices
    edge: Tensor  # [3 F] edge of each side of each face
    third: Tensor  # [3 F] the face's vertex across from that side


@dataclass(frozen=True)
class Crossings:
    """K places where a silhouette passes between two neighboring pixels."""

    inner: Tensor  # [K] flat pixel on the surface's side
    outer: Tensor  # [K] its neighbor past the edge
    surplus: Tensor  # [K] in [-1/2, 1/2], by how much the surface covers more than the inner pixel; differentiable
    depth: Tensor  # [K] of the edge there


def mesh_edges(faces: Tensor) -> Edges:
    """Finds the edges of faces [F, 3]; vertices at one place must be one vertex, or seams are silhouettes."""
    sides = torch.stack((faces[:, [1, 2]], faces[:, [2, 0]], faces[:, [0, 1]]), dim=1).reshape(-1, 2)
    ends, edge = sides.sort(dim=1).values.unique(dim=0, return_inverse=True)
    return Edges(ends, edge, faces.reshape(-1))


def antialias(pictures: Tensor, depth: Tensor, pixels: Tensor, along: Tensor, edges: Edges) -> Tensor:
    """Pictures with the silhouettes of a mesh smoothed, differentiable in colors and places.

    Args:
        pictures: [B, H, W, C], colors multiplied by the opacity (one sample in the middle of each pixel).
        depth: [B, H, W] along the optical axis, infinite where nothing is seen.
        pixels: [B, V, 2] vertices in pixels, (0.5, 0.5) is the center of the first.
        along: [B, V] depth of the vertices; an edge with an end at or behind the camera is left out.
    """
    out = []
    for picture, behind, place, far in zip(pictures, depth, pixels, along, strict=True):
        height, width = behind.shape
        ends = silhouette(place.detach(), far.detach(), edges)
        upright = (place[ends[:, 0]] - place[ends[:, 1]]).detach().abs().diff(dim=1)[:, 0] >= 0
        flat = picture.reshape(height * width, -1)
        changes = torch.zeros_like(flat)
        for chosen, rows in ((upright, True), (~upright, False)):
            crossings = _visible(_crossings(place, far, edges, ends[chosen], (height, width), rows), behind)
            gap = flat[crossings.inner] - flat[crossings.outer]
            target = torch.where(crossings.surplus > 0, crossings.outer, crossings.inner)
            changes = changes.index_add(0, target, crossings.surplus[:, None] * gap)
        out.append((flat + changes).view_as(picture))
    return torch.stack(out)


def silhouette(pixels: Tensor, along: Tensor, edges: Edges) -> Tensor:
    """Vertices [S, 2] of the edges all of whose faces lie on one side of them in the picture [V, 2].

    The first to the second vertex has the faces on its left, rows counted downwards.
    """
    a, b = pixels[edges.ends[:, 0]], pixels[edges.ends[:, 1]]
    side = _cross(b[edges.edge] - a[edges.edge], pixels[edges.third] - a[edges.edge]).sign()
    total = torch.zeros_like(a[:, 0]).index_add(0, edges.edge, side)
    count = torch.zeros_like(total).index_add(0, edges.edge, side.abs())
    before = (along[edges.ends] > 0).all(1)
    kept = (count > 0) & (total.abs() == count) & before
    return torch.where((total > 0)[:, None], edges.ends.flip(1), edges.ends)[kept]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _crossings(
    pixels: Tensor, along: Tensor, edges: Edges, ends: Tensor, shape: tuple[int, int], rows: bool
) -> Crossings:
    """Where edges [S, 2] pass the lines through pixel centers, the rows or the columns."""
    across, down = (0, 1) if rows else (1, 0)
    lines, cells = shape if rows else shape[::-1]
    a, b = pixels[ends[:, 0]], pixels[ends[:, 1]]
    low = torch.minimum(a[:, down], b[:, down]).detach()
    high = torch.maximum(a[:, down], b[:, down]).detach()
    # A line through an end belongs to the edge that begins there, so that a chain of edges crosses it once.
    first = (low - 0.5).ceil().clamp(0, lines).long()
    last = (high - 0.5).ceil().clamp(0, lines).long()
    edge = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), last - first)
    begin = (last - first).cumsum(0) - (last - first)
    line = torch.arange(len(edge), device=ends.device) - begin[edge] + first[edge]
    a, b = a[edge], b[edge]
    share = (line + 0.5 - a[:, down]) / (b[:, down] - a[:, down])
    at = a[:, across] + share * (b[:, across] - a[:, across])
    start, stop = along[ends[edge, 0]].detach(), along[ends[edge, 1]].detach()
    far = 1 / torch.lerp(1 / start, 1 / stop, share.detach())

    # Faces lie to the left of the direction a -> b as seen: for an edge that goes down a row that is its right side.
    forward = (b[:, down] > a[:, down]) == rows
    cell = (at.detach() - 0.5).floor().long()
    ok = (cell >= 0) & (cell < cells - 1)
    distance = at - (cell + 0.5)  # from the center of the lower cell
    inner, outer = torch.where(forward, cell + 1, cell), torch.where(forward, cell, cell + 1)
    surplus = torch.where(forward, 0.5 - distance, distance - 0.5)
    step, stride = (1, shape[1]) if rows else (shape[1], 1)
    flat = line * stride
    return Crossings((flat + inner * step)[ok], (flat + outer * step)[ok], surplus[ok], far[ok])


def _visible(found: Crossings, behind: Tensor) -> Crossings:
    """The crossings that nothing hides: past the edge lies what is farther, and before it the surface itself."""
    inner, outer = behind.reshape(-1)[found.inner], behind.reshape(-1)[found.outer]
    seen = (outer > found.depth) & (inner < outer) & (inner > found.depth * (1 - DEPTH_TOLERANCE))
    return Crossings(*(getattr(found, name)[seen] for name in ("inner", "outer", "surplus", "depth")))
