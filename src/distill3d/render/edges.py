"""Antialiasing of silhouettes, differentiable in the vertices.

A rasterized image is constant around each pixel's center, so its derivative in the vertices lacks what happens at
silhouettes. Here each silhouette edge is followed through the image. Where it passes between the centers of two
neighboring pixels, at the distance e from the center of the pixel that sees the surface, the surface covers e + 1/2
pixels of the two: the surplus over 1 goes to the neighbor, and a deficit is filled with the neighbor's color. Steep
edges are followed row by row and flat ones column by column, so that no area is counted twice. For a straight edge
the covered area is exact, and so is its derivative.

The blend is that of Laine et al. 2020 ("Modular primitives for high-performance differentiable rendering", section
3.5); going through edges instead of pixels also finds those of faces smaller than a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DEPTH_TOLERANCE = 0.05  # fraction of the depth by which a surface may bulge in front of its own silhouette


@dataclass(frozen=True)
class Edges:
    """The edges of a mesh, each once, and which faces they belong to."""

    faces: Int[Tensor, "f 3"]
    ends: Int[Tensor, "e 2"]  # vertices
    edge: Int[Tensor, "f 3"]  # edge of each side of the faces, opposite to each corner
    turn: Int[Tensor, "f 3"]  # 1 where the side runs from the first end of its edge to the second, else -1


@dataclass(frozen=True)
class Crossings:
    """K places where a silhouette passes between two neighboring pixels."""

    inner: Int[Tensor, " k"]  # flat index of the pixel on the surface's side
    outer: Int[Tensor, " k"]  # its neighbor beyond the edge
    surplus: Float[Tensor, " k"]  # in [-1/2, 1/2], how much more than the inner pixel is covered; differentiable


def mesh_edges(faces: Int[Tensor, "f 3"]) -> Edges:
    """Finds the edges of faces. Vertices at the same place must be one vertex, otherwise seams count as silhouettes."""
    sides = torch.stack((faces[:, [1, 2]], faces[:, [2, 0]], faces[:, [0, 1]]), dim=1).reshape(-1, 2)
    ends, edge = sides.sort(dim=1).values.unique(dim=0, return_inverse=True)
    return Edges(faces, ends, edge.view_as(faces), (2 * (sides[:, 0] < sides[:, 1]) - 1).view_as(faces))


def antialias(
    images: Float[Tensor, "b h w c"],
    depth: Float[Tensor, "b h w"],
    pixels: Float[Tensor, "b v 2"],
    vertex_depth: Float[Tensor, "b v"],
    edges: Edges,
) -> Float[Tensor, "b h w c"]:
    """Images with the silhouettes of a mesh smoothed, differentiable in colors and positions.

    Args:
        images: colors multiplied by the opacity, one sample in the middle of each pixel.
        depth: along the optical axis, infinite where nothing is seen.
        pixels: vertices in pixels, (0.5, 0.5) is the center of the first.
        vertex_depth: depth of the vertices; an edge with an end at or behind the camera is skipped.
    """
    batch, height, width, _ = images.shape
    found = [silhouette(*view, edges) for view in zip(pixels.detach(), vertex_depth.detach(), strict=True)]
    # All views as one list of vertices, edges and pixels.
    ends = torch.cat([of_view + view * pixels.shape[1] for view, (of_view, _) in enumerate(found)])
    kept = torch.cat([of_view for _, of_view in found])
    first = torch.arange(batch, device=ends.device).repeat_interleave(len(edges.ends)) * (height * width)
    place, far, behind = pixels.flatten(0, 1), vertex_depth.flatten(), depth.flatten()
    upright = (place[ends[:, 0]] - place[ends[:, 1]]).detach().abs().diff(dim=1)[:, 0] >= 0
    sides = ((upright, True), (~upright, False))
    flat = images.flatten(0, 2)
    changes = torch.zeros_like(flat)
    spans = [_spans(place, ends, kept & chosen, height if rows else width, rows) for chosen, rows in sides]
    totals = torch.stack([count.sum() for _, count in spans]).tolist()
    for (_, rows), span, total in zip(sides, spans, totals, strict=True):
        crossings = _crossings(place, far, ends, first, span, total, behind, (height, width), rows)
        gap = flat[crossings.inner] - flat[crossings.outer]
        target = torch.where(crossings.surplus > 0, crossings.outer, crossings.inner)
        changes = changes.index_add(0, target, crossings.surplus[:, None] * gap)
    return (flat + changes).unflatten(0, (batch, height, width))


def silhouette(
    pixels: Float[Tensor, "v 2"], depth: Float[Tensor, " v"], edges: Edges
) -> tuple[Int[Tensor, "e 2"], Bool[Tensor, " e"]]:
    """Vertices of the edges, and which edges are in front of the camera with all their faces on one side in the image.

    Seen from the first to the second vertex the faces are on the left, with rows counted downwards.
    """
    a, b, c = pixels[edges.faces].unbind(1)
    side, edge = _cross(b - a, c - a).sign()[:, None] * edges.turn, edges.edge.reshape(-1)
    total = pixels.new_zeros(len(edges.ends)).index_add(0, edge, side.reshape(-1))
    count = torch.zeros_like(total).index_add(0, edge, side.abs().reshape(-1))
    before = (depth[edges.ends] > 0).all(1)
    kept = (count > 0) & (total.abs() == count) & before
    return torch.where((total > 0)[:, None], edges.ends.flip(1), edges.ends), kept


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


@torch.no_grad()
def _spans(pixels: Tensor, ends: Tensor, chosen: Tensor, lines: int, rows: bool) -> tuple[Tensor, Tensor]:
    """The first line through pixel centers, of rows or columns, that each edge [E, 2] crosses, and how many it does."""
    a, b = pixels[ends][..., 1 if rows else 0].unbind(1)
    # A line through an end belongs to the edge that begins there, so that a chain of edges crosses it once.
    first = (torch.minimum(a, b) - 0.5).ceil().clamp(0, lines).long()
    return first, ((torch.maximum(a, b) - 0.5).ceil().clamp(0, lines).long() - first) * chosen


def _crossings(
    pixels: Tensor,
    depth: Tensor,
    ends: Tensor,
    first_pixel: Tensor,
    span: tuple[Tensor, Tensor],
    total: int,
    behind: Tensor,
    shape: tuple[int, int],
    rows: bool,
) -> Crossings:
    """Where edges [E, 2] cross the lines of their `span`, `total` in all; the surplus is 0 where something hides it.

    Nothing hides it if beyond the edge something farther is seen, and before it the surface itself. `first_pixel`
    [E] is that of the edge's view, among those of `behind`, the depths of all pixels.
    """
    across, down = (0, 1) if rows else (1, 0)
    cells = shape[1] if rows else shape[0]
    first, count = span
    edge = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), count, output_size=total)
    begin = count.cumsum(0) - count
    line = torch.arange(total, device=ends.device) - begin[edge] + first[edge]
    a, b = pixels[ends[edge, 0]], pixels[ends[edge, 1]]
    u = (line + 0.5 - a[:, down]) / (b[:, down] - a[:, down])
    at = a[:, across] + u * (b[:, across] - a[:, across])
    start, stop = depth[ends[edge, 0]].detach(), depth[ends[edge, 1]].detach()
    far = 1 / torch.lerp(1 / start, 1 / stop, u.detach())

    # Faces lie to the left of the direction a -> b as seen: to the right in the image for an edge that goes down.
    forward = (b[:, down] > a[:, down]) == rows
    cell = (at.detach() - 0.5).floor().long()
    inside = (cell >= 0) & (cell < cells - 1)
    distance = at - (cell + 0.5)  # from the center of the lower cell
    surplus = torch.where(forward, 0.5 - distance, distance - 0.5)
    step, stride = (1, shape[1]) if rows else (shape[1], 1)
    lower = first_pixel[edge] + line * stride + cell.clamp(0, max(cells - 2, 0)) * step
    # With one cell there is no neighbor, and nothing is inside.
    upper = lower + step if cells > 1 else lower
    inner, outer = torch.where(forward, upper, lower), torch.where(forward, lower, upper)
    near, beyond = behind[inner], behind[outer]
    seen = inside & (beyond > far) & (near < beyond) & (near > far * (1 - DEPTH_TOLERANCE))
    return Crossings(inner, outer, torch.where(seen, surplus, 0.0))
