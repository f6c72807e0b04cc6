"""Triangle rasterization in plain torch: which face covers which pixel, and where inside the face.

Every triangle's bounding box is expanded into candidate pixels (fragments), all fragments of a picture are
tested at once, and the nearest one a pixel survives. No loop over triangles, so a toy of a few thousand faces
takes milliseconds on one core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

NEAR = 1e-3  # world units: what is closer to the camera's plane is not drawn


def rasterize(
    points: Tensor, faces: Tensor, fov_y: float, height: int, width: int, cull: bool = True
) -> tuple[Tensor, Tensor]:
    """Rasterizes a mesh given in the camera frame; faces that reach behind the camera are left out.

    Args:
        points: vertices [V, 3] in the OpenGL camera frame (x right, y up, looking along -z).
        faces: vertex indices [F, 3].
        fov_y: vertical field of view in radians.
        cull: only front faces (counter-clockwise as seen) are drawn; else both sides are.

    Returns:
        face [H, W] (index into `faces`, -1 where no face) and perspective-correct barycentric coordinates
        [H, W, 3] (0 where no face).
    """
    focal = 0.5 * height / math.tan(0.5 * fov_y)
    before = (points[:, 2] < -NEAR)[faces].all(1)
    inverse_depth = 1.0 / (-points[:, 2]).clamp_min(NEAR)
    x = 0.5 * width - 0.5 + focal * points[:, 0] * inverse_depth
    y = 0.5 * height - 0.5 - focal * points[:, 1] * inverse_depth
    corner = torch.stack((x, y, inverse_depth), dim=-1)[faces]  # [F, 3 corners, 3]
    a, b, c = corner.unbind(1)
    # Rows grow downwards, so a face that turns counter-clockwise in space turns clockwise in pixels.
    area = (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1]) - (c[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    turned = area < 0
    if not cull:
        corner, area = torch.where(turned[:, None, None], corner.flip(1), corner), area.abs()
    seen = before & (area > 0)

    face_image = points.new_full((height * width,), -1, dtype=torch.long)
    nearest = points.new_zeros(height * width)
    barycentric = points.new_zeros(height * width, 3)
    for index in _parts(corner, seen, height, width):
        local, column, row = _fragments(corner[index, :, :2], seen[index], height, width)
        inside, weights, depth = _barycentric(corner[index[local]], area[index[local]], column, row)
        face, pixel = index[local][inside], (row * width + column)[inside]
        nearest.scatter_reduce_(0, pixel, depth, "amax")
        winner = depth == nearest[pixel]
        face, pixel, weights = face[winner], pixel[winner], weights[winner]
        # Two faces at the very same depth: the later one, always; an assignment with an index twice may keep either.
        changed = torch.zeros_like(face_image).scatter_reduce_(0, pixel, face + 1, "amax") - 1
        kept = changed[pixel] == face
        face_image[pixel[kept]] = face[kept]
        barycentric[pixel[kept]] = weights[kept]
    if not cull:
        flipped = (face_image >= 0) & turned[face_image.clamp_min(0)]
        barycentric = torch.where(flipped[:, None], barycentric.flip(1), barycentric)
    return face_image.view(height, width), barycentric.view(height, width, 3)


def rasterize_plane(points: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rasterizes triangles that lie in the picture's own plane, such as a UV map; either winding is drawn.

    Args:
        points: [V, 2], x to the right and y down in pixels; (0.5, 0.5) is the center of the first pixel.
        faces: [F, 3].

    Returns:
        face [H, W] (-1 where none; the later one where several are) and barycentric coordinates [H, W, 3].
    """
    corner = (points - 0.5)[faces]
    a, b, c = corner.unbind(1)
    area = (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1]) - (c[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    corner = torch.cat((corner, torch.ones_like(corner[:, :, :1])), dim=2)
    turned = area < 0
    corner[turned] = corner[turned].flip(1)
    face_image = torch.full((height * width,), -1)
    barycentric = torch.zeros(height * width, 3, dtype=points.dtype)
    for index in _parts(corner, area != 0, height, width):
        local, column, row = _fragments(corner[index, :, :2], area[index] != 0, height, width)
        inside, weights, _ = _barycentric(corner[index[local]], area[index[local]].abs(), column, row)
        face, pixel = index[local][inside], (row * width + column)[inside]
        weights = torch.where(turned[face, None], weights.flip(1), weights)
        # The later face, always: an assignment with an index twice may keep either.
        face_image.scatter_reduce_(0, pixel, face, "amax")
        kept = face_image[pixel] == face
        barycentric[pixel[kept]] = weights[kept]
    return face_image.view(height, width), barycentric.view(height, width, 3)


def column_crossings(corner: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where lines along the third axis through all pixel centers pass through faces: every face, not the nearest.

    Args:
        corner: [F, 3 corners, 3], x to the right and y down in pixels (0 is the center of the first), z free.

    Returns:
        flat pixel, z, and +1 where the face turns from x to y as seen from large z (its normal has a positive z),
        else -1; each [K].
    """
    a, b, c = corner.unbind(1)
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    # The inside test wants faces to turn the other way, for its rows grow downwards.
    turned = torch.where((area > 0)[:, None, None], corner.flip(1), corner)
    found = []
    for index in _parts(turned, area != 0, height, width):
        local, column, row = _fragments(turned[index, :, :2], area[index] != 0, height, width)
        face = index[local]
        flat = torch.cat((turned[face][..., :2], torch.ones_like(turned[face][..., :1])), dim=2)
        inside, weights, _ = _barycentric(flat, area[face].abs(), column, row)
        z = (turned[face[inside], :, 2] * weights).sum(1)
        found.append(((row * width + column)[inside], z, area[face[inside]].sign()))
    if not found:
        return corner.new_zeros(0, dtype=torch.long), corner.new_zeros(0), corner.new_zeros(0)
    pixel, z, sign = zip(*found, strict=True)
    return torch.cat(pixel), torch.cat(z), torch.cat(sign)


def _parts(corner: Tensor, seen: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Indices of faces that are seen, as many at once as give about a million candidate pixels: bounds the memory."""
    low, high = _boxes(corner[..., :2], height, width)
    size = (high - low + 1).clamp_min(0).prod(1) * seen
    index = size.nonzero()[:, 0]
    part = torch.div(size[index].cumsum(0), 1 << 20, rounding_mode="floor")
    yield from index.split(part.unique_consecutive(return_counts=True)[1].tolist())


def _boxes(corner: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """First and last pixel (column, row) [F, 2] of the bounding boxes of faces [F, 3 corners, 2]."""
    low = corner.amin(1).ceil().clamp_min(0).long()
    return low, torch.minimum(corner.amax(1).floor().long(), low.new_tensor([width - 1, height - 1]))


def _fragments(corner: Tensor, seen: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Face, column and row of every pixel center in the bounding box of a face [F, 3 corners, 2] that is seen [F]."""
    low, high = _boxes(corner, height, width)
    extent = (high - low + 1).clamp_min(0) * seen[:, None]
    count = extent[:, 0] * extent[:, 1]
    face = torch.repeat_interleave(torch.arange(len(corner), device=corner.device), count)
    offset = torch.arange(len(face), device=corner.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
    column = low[face, 0] + offset % extent[face, 0]
    row = low[face, 1] + torch.div(offset, extent[face, 0], rounding_mode="floor")
    return face, column, row


def _barycentric(corner: Tensor, area: Tensor, column: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inside test of all fragments; weights and inverse depth of those inside."""
    dx = corner[:, :, 0] - column[:, None]
    dy = corner[:, :, 1] - row[:, None]
    # Twice the signed area of (pixel, next corner, corner after) is the weight of the remaining corner.
    edge = dx.roll(-2, 1) * dy.roll(-1, 1) - dy.roll(-2, 1) * dx.roll(-1, 1)
    inside = (edge >= 0).all(1)
    screen = edge[inside] / area[inside, None]
    weighted = screen * corner[inside, :, 2]  # perspective: interpolate 1/z linearly on the screen
    depth = weighted.sum(1)
    return inside, weighted / depth[:, None], depth
