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
    corner = torch.stack((x, y, inverse_depth), dim=-1)[faces]  # [F, 3 corners, 3]
    a, b, c = corner.unbind(1)
    # Rows count downwards, so a face that turns counter-clockwise in space turns clockwise in pixels.
    area = (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1]) - (c[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    turned = area < 0
    if not cull:
        corner, area = torch.where(turned[:, None, None], corner.flip(1), corner), area.abs()
    seen = in_front(points, faces) & (area > 0)

    face_image = points.new_full((height * width,), -1, dtype=torch.long)
    nearest = points.new_zeros(height * width)
    cpu = points.device.type == "cpu"
    barycentric = points.new_zeros(height * width + 1, 3)  # the last row is for what is hidden
    for index, total in _parts(corner, seen, height, width):
        local, column, row = _fragments(corner[index, :, :2], height, width, total)
        # The number of those inside would be waited for.
        inside, weights, depth = _barycentric(corner[index[local]], area[index[local]], column, row, cpu)
        face, pixel = index[local][inside], (row * width + column)[inside]
        nearest.scatter_reduce_(0, pixel, depth, "amax")
        winner = depth == nearest[pixel]
        # Of two faces at the same depth always the later one: an assignment with a repeated index may keep either.
        drawn = torch.where(winner, face + 1, 0)
        changed = torch.zeros_like(face_image).scatter_reduce_(0, pixel, drawn, "amax") - 1
        face_image = torch.where(changed >= 0, changed, face_image)
        barycentric[torch.where(winner & (changed[pixel] == face), pixel, height * width)] = weights
    barycentric = barycentric[:-1]
    if not cull:
        flipped = (face_image >= 0) & turned[face_image.clamp_min(0)]
        barycentric = torch.where(flipped[:, None], barycentric.flip(1), barycentric)
    return face_image.view(height, width), barycentric.view(height, width, 3)


def rasterize_plane(
    points: Float[Tensor, "v 2"], faces: Int[Tensor, "f 3"], height: int, width: int
) -> tuple[Int[Tensor, "h w"], Float[Tensor, "h w 3"]]:
    """Rasterizes triangles that lie in the image plane, such as a UV map; both windings are drawn.

    Args:
        points: x to the right and y down in pixels; (0.5, 0.5) is the center of the first pixel.

    Returns:
        face index (-1 where there is none, the last one where several overlap) and barycentric coordinates.
    """
    corner = (points - 0.5)[faces]
    a, b, c = corner.unbind(1)
    area = (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1]) - (c[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    corner = torch.cat((corner, torch.ones_like(corner[:, :, :1])), dim=2)
    turned = area < 0
    corner[turned] = corner[turned].flip(1)
    face_image = torch.full((height * width,), -1)
    barycentric = torch.zeros(height * width, 3, dtype=points.dtype)
    for index, total in _parts(corner, area != 0, height, width):
        local, column, row = _fragments(corner[index, :, :2], height, width, total)
        inside, weights, _ = _barycentric(corner[index[local]], area[index[local]].abs(), column, row)
        face, pixel = index[local][inside], (row * width + column)[inside]
        weights = torch.where(turned[face, None], weights.flip(1), weights)
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
    corner = (points - 0.5)[faces]
    a, b, c = corner.unbind(1)
    area = (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1]) - (c[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    corner = torch.where((area < 0)[:, None, None], corner.flip(1), corner)
    found = [(faces.new_zeros(0), faces.new_zeros(0), drawn[:0])]
    for index, total in _parts(corner, drawn & (area != 0), height, width):
        local, column, row = _fragments(corner[index], height, width, total)
        inside = (_edges(corner[index[local]], column, row) >= 0).all(1)
        found.append((index[local], row * width + column, inside))
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
    a, b, c = corner.unbind(1)
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    # The inside test expects the other orientation, because its rows count downwards.
    turned = torch.where((area > 0)[:, None, None], corner.flip(1), corner)
    found = []
    for index, total in _parts(turned, area != 0, height, width):
        local, column, row = _fragments(turned[index, :, :2], height, width, total)
        face = index[local]
        flat = torch.cat((turned[face][..., :2], torch.ones_like(turned[face][..., :1])), dim=2)
        inside, weights, _ = _barycentric(flat, area[face].abs(), column, row)
        z = (turned[face[inside], :, 2] * weights).sum(1)
        found.append(((row * width + column)[inside], z, area[face[inside]].sign()))
    if not found:
        return corner.new_zeros(0, dtype=torch.long), corner.new_zeros(0), corner.new_zeros(0)
    pixel, z, sign = zip(*found, strict=True)
    return torch.cat(pixel), torch.cat(z), torch.cat(sign)


def _parts(corner: Tensor, seen: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, int]]:
    """Indices of the faces `seen`, in parts of about a million candidate pixels, to bound the memory; their number."""
    low, high = _boxes(corner[..., :2], height, width)
    size = (high - low + 1).clamp_min(0).prod(1) * seen
    faces, total = torch.stack(((size > 0).sum(), size.sum())).tolist()
    index = marked(size > 0, faces)
    if total < PART:
        yield from [(index, total)] if faces else []
        return
    part = torch.div(size[index].cumsum(0), PART, rounding_mode="floor")
    for some in index.split(part.unique_consecutive(return_counts=True)[1].tolist()):
        yield some, int(size[some].sum())


def _boxes(corner: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """First and last pixel (column, row) [F, 2] of the bounding boxes of faces [F, 3 corners, 2]."""
    low = corner.amin(1).ceil().clamp_min(0).long()
    column, row = corner.amax(1).floor().long().unbind(1)
    return low, torch.stack((column.clamp_max(width - 1), row.clamp_max(height - 1)), 1)


def _fragments(corner: Tensor, height: int, width: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Face, column and row of all pixel centers, `total` of them, in the bounding boxes of faces [F, 3 corners, 2]."""
    low, high = _boxes(corner, height, width)
    extent = high - low + 1
    count = extent[:, 0] * extent[:, 1]
    face = torch.repeat_interleave(torch.arange(len(corner), device=corner.device), count, output_size=total)
    offset = torch.arange(total, device=corner.device) - (count.cumsum(0) - count)[face]
    column = low[face, 0] + offset % extent[face, 0]
    row = low[face, 1] + torch.div(offset, extent[face, 0], rounding_mode="floor")
    return face, column, row


def _barycentric(
    corner: Tensor, area: Tensor, column: Tensor, row: Tensor, chosen: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Which fragments are inside; their weights and inverse depth.

    Not `chosen`: all fragments, and those outside have the inverse depth -1.
    """
    edge = _edges(corner, column, row)
    covered = (edge >= 0).all(1)
    inside = covered.nonzero()[:, 0] if chosen else torch.arange(len(edge), device=edge.device)
    screen = edge[inside] / area[inside, None]
    weighted = screen * corner[inside, :, 2]  # perspective: interpolate 1/z linearly on the screen
    depth = weighted.sum(1) if chosen else torch.where(covered, weighted.sum(1), -1.0)
    return inside, weighted / depth[:, None], depth


def _edges(corner: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Twice the signed area of (pixel, next corner, corner after): the weight of the remaining corner, times area."""
    dx = corner[:, :, 0] - column[:, None]
    dy = corner[:, :, 1] - row[:, None]
    return dx.roll(-2, 1) * dy.roll(-1, 1) - dy.roll(-2, 1) * dx.roll(-1, 1)
