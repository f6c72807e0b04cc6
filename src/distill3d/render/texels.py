"""Which texels of a noise atlas each latent pixel of a view shows: see `texels.Texels`.

A texel is a place, and the noise of `objectives.atlas` stays there. Places may be the pixels of a view (`of_view`),
those of the views from each of some azimuths (`of_azimuth`), or on the surface of the object (`of_depth`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill3d.cameras import rays
from distill3d.devices import marked
from distill3d.render.raster import plane_fragments
from distill3d.texels import Texels
from distill3d.types import Cameras, Rendering

AZIMUTHS = 32
FINENESS = 4  # texels a side of a chart for each latent pixel of a view
SHELLS = 4  # by the distance from the origin
EXTENT = 1.0  # world units: shells are EXTENT / SHELLS thick, and the last one has no end
FOREGROUND = 0.1  # opacity above which something is seen


def of_view(cameras: Cameras, height: int, width: int) -> Texels:
    """A texel for each pixel, the same in all views."""
    size = height * width
    pixel = torch.arange(len(cameras) * size, device=cameras.azimuth.device)
    return Texels(size, pixel % size, pixel, (size,) * len(cameras))


def of_azimuth(cameras: Cameras, height: int, width: int) -> Texels:
    """A texel for each pixel and each of AZIMUTHS directions from which the object is seen."""
    size = height * width
    bins = (cameras.azimuth * (AZIMUTHS / 360)).round().long() % AZIMUTHS
    texel = bins[:, None] * size + torch.arange(size, device=bins.device)
    pixel = torch.arange(texel.numel(), device=bins.device)
    return Texels(AZIMUTHS * size, texel.flatten(), pixel, (size,) * len(cameras))


@torch.no_grad()
def of_depth(rendering: Rendering, cameras: Cameras, height: int, width: int) -> Texels:
    """Texels on the surface at the expected depth, for scenes that have no other (Yan et al. 2025, public code).

    Directions from the origin are mapped to six charts, the halves of the sphere along each axis, by a map that
    preserves areas, and each chart has SHELLS layers by radius. Two triangles for each latent pixel, between the mean
    surface points around its corners, are drawn into the charts; the pixel shows the texels whose centers they cover.
    A triangle is in one half along each axis or, where it crosses over, in none.

    Args:
        rendering: of square pixels, height and width multiples of those of the latent.
    """
    corners, seen = _corners(rendering, cameras, height, width)
    triangle, pixel, whole = _triangles(seen)
    points = corners.flatten(0, 2)
    side = FINENESS * max(height, width)
    radius = points.norm(dim=1)
    unit = points / radius.clamp_min(1e-12)[:, None]
    shell = (radius[triangle].mean(1) * (SHELLS / EXTENT)).long().clamp_max(SHELLS - 1)
    # The three axes one after the other: place, half and triangles of each.
    place = torch.cat([_square(unit.roll(2 - axis, 1)) for axis in range(3)])
    half = (unit.T > 0).long()[:, triangle]  # [axis, triangle, corner]
    drawn = (half == half[..., :1]).all(2) & whole
    faces = torch.cat([triangle + axis * len(unit) for axis in range(3)])
    face, cell, inside = plane_fragments((place + 1) * (side / 2), faces, drawn.flatten(), side, side)
    axis, face = torch.div(face, len(triangle), rounding_mode="floor"), face % len(triangle)
    chart = (2 * axis + half[axis, face, 0]) * SHELLS + shell[face]
    shown = torch.where(inside, pixel[face], -1)
    return _once(6 * SHELLS * side**2, chart * side**2 + cell, pixel[face], shown, height * width, len(cameras))


def _once(count: int, texel: Tensor, pixel: Tensor, shown: Tensor, size: int, views: int) -> Texels:
    """Texels without those that a view shows in a second pixel, the last of which keeps them; `shown`: pixel, or -1."""
    key = torch.div(pixel, size, rounding_mode="floor") * count + texel
    owner = pixel.new_full((views * count,), -1).scatter_reduce_(0, key, shown, "amax")
    used = owner >= 0
    counts = used.view(views, count).sum(1).tolist()
    key = marked(used, sum(counts))
    return Texels(count, key % count, owner[key], tuple(counts))


def _square(unit: Float[Tensor, "n 3"]) -> Float[Tensor, "n 2"]:
    """Unit vectors of the half space on one side of z = 0 to the square [-1, 1]^2; areas shrink by the same factor.

    Lambert's equal-area disk, then the concentric map of disk and square (Shirley & Chiu 1997).
    """
    x, y, z = unit.unbind(1)
    disk = (x.square() + y.square()).sqrt() / (1 + z.abs()).sqrt()
    large, small = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    lesser = disk * torch.atan2(small, large) * (4 / torch.pi)
    first = x.abs() >= y.abs()
    return torch.stack((x.sign() * torch.where(first, disk, lesser), y.sign() * torch.where(first, lesser, disk)), 1)


def _corners(
    rendering: Rendering, cameras: Cameras, height: int, width: int
) -> tuple[Float[Tensor, "b h1 w1 3"], Bool[Tensor, "b h1 w1"]]:
    """Mean surface points around the corners of latent pixels, and whether something is seen there."""
    rows, columns = rendering.opacity.shape[2:]
    ray = rays(cameras, rows, columns)
    points = (ray.origins + ray.directions * rendering.depth[:, 0, :, :, None]).permute(0, 3, 1, 2)
    solid = (rendering.opacity > FOREGROUND).to(points)
    window = [size // latent + size // latent % 2 for size, latent in ((rows, height), (columns, width))]
    stride = (rows // height, columns // width)

    def mean(image: Tensor) -> Tensor:
        padding = (window[0] // 2, window[1] // 2)
        return F.avg_pool2d(image, window, stride, padding, count_include_pad=False)

    share = mean(solid)
    points = mean(points * solid) / share.clamp_min(1e-6)
    seen = (mean(rendering.opacity) > FOREGROUND) & (share > 0)
    return points.permute(0, 2, 3, 1), seen[:, 0]


def _triangles(seen: Bool[Tensor, "b h1 w1"]) -> tuple[Int[Tensor, "f 3"], Int[Tensor, " f"], Bool[Tensor, " f"]]:
    """Two triangles for each latent pixel, the flat pixel of each, and whether all their corners are seen."""
    index = torch.arange(seen.numel(), device=seen.device).view(seen.shape)
    a, b, c, d = index[:, :-1, :-1], index[:, :-1, 1:], index[:, 1:, :-1], index[:, 1:, 1:]
    triangle = torch.stack((torch.stack((a, b, c), -1), torch.stack((b, d, c), -1)), 3).view(-1, 3)
    pixel = torch.arange(a.numel(), device=seen.device).repeat_interleave(2)
    return triangle, pixel, seen.flatten()[triangle].all(1)
