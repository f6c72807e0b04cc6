"""Triangle rasterization in plain torch: which face covers which pixel, and where inside the face.

Every triangle's bounding box is expanded into candidate pixels (fragments), all fragments of an image are tested at
once, and the nearest one per pixel is kept. There is no loop over triangles, so a mesh of a few thousand faces takes
milliseconds on one core.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill3d.cameras import focal_length
from distill3d.devices import marked

PART = 1 << 20  # candidate pixels that are tested at once
NEAR = 1e-3  # world units: faces with a corner closer to the camera's plane, or behind it, are not drawn


def in_front(points: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> Bool[Tensor, " f"]:
    """Faces all of whose corners, in the camera frame, are at least NEAR in front of the camera's plane."""
    return (points[:, 2] < -NEAR)[faces].all(1)


def rasterize(
    points: Float[Tensor, "v 3"],
    faces: Int[Tensor, "f 3"],
    fov_y: float,
    height: int,
    width: int,
    cull: bool = True,
) -> tuple[Int[Tensor, "h w"], Float[Tensor, "h w 3"]]:
    """Rasterizes a mesh given in the camera frame; faces that are not completely `in_front` are not drawn.

    Args:
        points: vertices in the OpenGL camera frame (x right, y up, looking along -z).
        fov_y: vertical field of view in radians.
        cull: draws front faces (counter-clockwise as seen) only; otherwise both sides.

    Returns:
        face index (-1 where there is none) and perspective-correct barycentric coordinates (0 where there is none).
    """
    focal = focal_length(fov_y, height)
    inverse_depth = 1.0 / (-points[:, 2]).clamp_min(NEAR)
    x = 0.5 * width - 0.5 + focal * points[:, 0] * inverse_depth
    y = 0.5 * height - 0.5 - focal * points[:, 1] * inverse_depth
    corner = _corners(torch.stack((x, y, inverse_depth), dim=-1), faces)
    area = _area(corner)
    seen = in_front(points, faces) & (area > 0 if cull else area != 0)

    face_image = points.new_full((height * width,), -1, dtype=torch.long)
    nearest = points.new_zeros(height * width)
    cpu = points.device.type == "cpu"
    barycentric = points.new_zeros(height * width + 1, 3)  # the last row is for what is hidden
    for face, column, row in _fragments(corner, seen, height, width):
        # The number of those inside would be waited for.
        inside, weights, depth = _barycentric(corner.index_select(0, face), area[face], column, row, cpu)
        face, pixel = face[inside], (row * width + column)[inside]
        nearest.scatter_reduce_(0, pixel, depth, "amax")
        winner = depth == nearest[pixel]
        # Of two faces at the same depth always the later one: an assignment with a repeated index may keep either.
        drawn = torch.where(winner, face + 1, 0)
        changed = torch.zeros_like(face_image).scatter_reduce_(0, pixel, drawn, "amax") - 1
        face_image = torch.where(changed >= 0, changed, face_image)
        barycentric[torch.where(winner & (changed[pixel] == face), pixel, height * width)] = weights
    return face_image.view(height, width), barycentric[:-1].view(height, width, 3)


def rasterize_plane(
    points: Float[Tensor, "v 2"], faces: Int[Tensor, "f 3"], height: int, width: int
) -> tuple[Int[Tensor, "h w"], Float[Tensor, "h w 3"]]:
    """Rasterizes triangles that lie in the image plane, such as a UV map; both windings are drawn.

    Args:
        points: x to the right and y down in pixels; (0.5, 0.5) is the center of the first pixel.

    Returns:
        face index (-1 where there is none, the last one where several overlap) and barycentric coordinates.
    """
    corner = _corners(torch.cat((points - 0.5, torch.ones_like(points[:, :1])), dim=1), faces)
    area = _area(corner)
    face_image = torch.full((height * width,), -1)
    barycentric = torch.zeros(height * width, 3, dtype=points.dtype)
    for face, column, row in _fragments(corner, area != 0, height, width):
        inside, weights, _ = _barycentric(corner.index_select(0, face), area[face], column, row)
        face, pixel = face[inside], (row * width + column)[inside]
        # Always the later face: an assignment with a repeated index may keep either.
        face_image.scatter_reduce_(0, pixel, face, "amax")
        kept = face_image[pixel] == face
        barycentric[pixel[kept]] = weights[kept]
    return face_image.view(height, width), barycentric.view(height, width, 3)


def plane_fragments(
    points: Float[Tensor, "v 2"], faces: Int[Tensor, "f 3"], drawn: Bool[Tensor, " f"], height: int, width: int
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"], Bool[Tensor, " k"]]:
    """Pairs (face, flat pixel) of the faces `drawn`, and whether the center of the pixel lies in the face.

    Edges count as inside. Pairs outside are left in, because to take them out an accelerator would have to wait.

    Args:
        points: x to the right and y down in pixels; (0.5, 0.5) is the center of the first pixel.
    """
    corner = _corners(points - 0.5, faces)
    area = _area(corner)
    found = [(faces.new_zeros(0), faces.new_zeros(0), drawn[:0])]
    for face, column, row in _fragments(corner, drawn & (area != 0), height, width):
        screen = _screen_weights(corner.index_select(0, face), area[face], column, row)
        found.append((face, row * width + column, _covered(screen)))
    face, pixel, inside = zip(*found, strict=True)
    return torch.cat(face), torch.cat(pixel), torch.cat(inside)


def column_crossings(
    corner: Float[Tensor, "f 3 3"], height: int, width: int
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Where lines along the third axis through all pixel centers cross faces: all crossings, not the nearest.

    Args:
        corner: three corners of each face, x to the right and y down in pixels (0 is the center of the first), any z.

    Returns:
        flat pixel, z, and +1 where the face turns from x to y as seen from large z (its normal has a positive z),
        else -1.
    """
    area = _area(corner)
    found = []
    for face, column, row in _fragments(corner, area != 0, height, width):
        screen = _screen_weights(corner.index_select(0, face), area[face], column, row)
        inside = _covered(screen).nonzero()[:, 0]
        face, weights = face[inside], torch.stack([weight[inside] for weight in screen], dim=1)
        found.append(((row * width + column)[inside], (corner[face, :, 2] * weights).sum(1), -area[face].sign()))
    if not found:
        return corner.new_zeros(0, dtype=torch.long), corner.new_zeros(0), corner.new_zeros(0)
    pixel, z, sign = zip(*found, strict=True)
    return torch.cat(pixel), torch.cat(z), torch.cat(sign)


def _fragments(corner: Tensor, drawn: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Face, column and row of all pixel centers in the bounding boxes of the faces `drawn`.

    In parts of about a million, to bound the memory. The corners are [F, 3, 2 or more].
    """
    a, b, c = corner[..., :2].unbind(1)
    left, top = torch.minimum(torch.minimum(a, b), c).ceil().clamp_min(0).long().unbind(1)
    right, bottom = torch.maximum(torch.maximum(a, b), c).floor().long().unbind(1)
    across = (right.clamp_max(width - 1) - left + 1).clamp_min(0)
    size = across * (bottom.clamp_max(height - 1) - top + 1).clamp_min(0) * drawn
    faces, total = torch.stack(((size > 0).sum(), size.sum())).tolist()
    index = marked(size > 0, faces)
    parts = [(index, total)] if faces else []
    if total >= PART:
        part = torch.div(size[index].cumsum(0), PART, rounding_mode="floor")
        split = index.split(part.unique_consecutive(return_counts=True)[1].tolist())
        parts = [(some, int(size[some].sum())) for some in split]
    for some, total in parts:
        count = size[some]
        rank = torch.repeat_interleave(torch.arange(len(some), device=some.device), count, output_size=total)
        offset = torch.arange(total, device=some.device) - (count.cumsum(0) - count)[rank]
        face = some[rank]
        down = torch.div(offset, across[face], rounding_mode="floor")
        yield face, left[face] + offset - down * across[face], top[face] + down


def _corners(points: Tensor, faces: Tensor) -> Tensor:
    """Values [F, 3 corners, C] of the faces' corners, from values [V, C] at the vertices."""
    return points.index_select(0, faces.reshape(-1)).unflatten(0, (-1, 3))


def _area(corner: Tensor) -> Tensor:
    """Twice the signed area [F] of faces in pixels.

    Positive for faces that turn counter-clockwise in space: rows count downwards, so in pixels they turn clockwise.
    """
    a, b, c = corner[..., :2].unbind(1)
    return (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1]) - (c[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])


def _barycentric(
    corner: Tensor, area: Tensor, column: Tensor, row: Tensor, chosen: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Which fragments are inside; their weights and inverse depth.

    Not `chosen`: all fragments, and those outside have the inverse depth -1.
    """
    weights = _screen_weights(corner, area, column, row)
    covered = _covered(weights)
    inside = covered.nonzero()[:, 0] if chosen else torch.arange(len(covered), device=covered.device)
    # Perspective: 1/z is linear on the screen.
    weighted = torch.stack([weight[inside] for weight in weights], dim=1) * corner[inside, :, 2]
    depth = weighted.sum(1) if chosen else torch.where(covered, weighted.sum(1), -1.0)
    return inside, weighted / depth[:, None], depth


def _screen_weights(corner: Tensor, area: Tensor, column: Tensor, row: Tensor) -> list[Tensor]:
    """Barycentric weights of fragments on the screen: the area of (pixel, next corner, corner after) over the face's.

    All are positive inside a face, whichever way it turns.
    """
    x, y = ([corner[:, i, axis] - at for i in range(3)] for axis, at in enumerate((column, row)))
    return [(x[i - 1] * y[i - 2] - y[i - 1] * x[i - 2]) / area for i in range(3)]


def _covered(weights: list[Tensor]) -> Tensor:
    """Whether fragments with these weights are inside; edges count as inside."""
    first, second, third = weights
    return (first >= 0) & (second >= 0) & (third >= 0)
