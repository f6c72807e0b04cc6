"""Images of triangle meshes: which place of the surface each pixel sees, and values there.

`rasterize_views` finds face and place for all pixels of B views; both sides of a face are drawn. The places are
differentiable in the vertices: with the corners P_i in the camera's frame and the pixel's direction d, the point of
the face on the ray is sum_i w_i P_i with w_i proportional to d . (P_{i+1} x P_{i+2}). That is the gradient inside a
face; how the image changes where faces begin and end is computed in `distill3d.render.edges`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill3d.cameras import focal_length, pixel_directions, world_to_camera
from distill3d.devices import on_host
from distill3d.render.interpolate import weighted_rows
from distill3d.render.raster import in_front, rasterize
from distill3d.types import Cameras


@dataclass(frozen=True)
class RasterOutput:
    """What B images of H x W pixels see of a mesh. P pixels see a face, in the order of `face >= 0`."""

    face: Int[Tensor, "b h w"]  # -1 where there is none
    weights: Float[Tensor, "p 3"]  # of the face's corners, perspective-correct
    depth: Float[Tensor, " p"]  # along the optical axis, world units

    @cached_property
    def seen(self) -> Int[Tensor, " p"]:
        """The pixels that see a face, as flat indices."""
        return self.hit.flatten().nonzero()[:, 0]

    @property
    def hit(self) -> Bool[Tensor, "b h w"]:
        """Pixels that see a face."""
        return self.face >= 0

    def image(self, values: Float[Tensor, "p c"]) -> Float[Tensor, "b h w c"]:
        """Values of the P pixels as images, 0 where nothing is seen."""
        image = values.new_zeros(self.face.numel(), values.shape[-1])
        return image.index_copy(0, self.seen, values).unflatten(0, self.face.shape)

    def interpolate(self, values: Float[Tensor, "v c"], faces: Int[Tensor, "f 3"]) -> Float[Tensor, "p c"]:
        """Values at the places seen, from values at the vertices."""
        return weighted_rows(values, faces[self.face.flatten()[self.seen]], self.weights)


def rasterize_views(
    cameras: Cameras, vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"], height: int, width: int
) -> RasterOutput:
    """Rasterizes a mesh for B cameras, one sample in the middle of each pixel.

    Faces with a corner nearer than `raster.NEAR`, or behind the camera, are not drawn.

    Args:
        vertices: world space; if they require a gradient, weights and depth have one.
    """
    local = world_to_camera(cameras, vertices)
    with torch.no_grad():
        views = [
            _rasterize(points, faces, fov, height, width)
            for points, fov in zip(local, on_host(cameras.fov_y).tolist(), strict=True)
        ]
        face = torch.stack([view[0] for view in views])
        seen = (face >= 0).flatten().nonzero()[:, 0]
        weights = torch.stack([view[1] for view in views]).flatten(0, 2)[seen].to(vertices)
    row, column = torch.div(seen, width, rounding_mode="floor"), seen % width
    view, row = torch.div(row, height, rounding_mode="floor"), row % height
    corner = local[view[:, None], faces[face.flatten()[seen]]]  # [P, 3 corners, 3]
    if local.requires_grad:
        pixels = torch.stack((column, row), dim=1) + 0.5
        ray = pixel_directions(pixels, focal_length(cameras.fov_y, height)[view], height, width)
        cross = torch.linalg.cross(corner.roll(-1, 1), corner.roll(-2, 1))
        volume = (cross * ray[:, None]).sum(-1)
        total = volume.sum(1, keepdim=True)
        safe = total.abs() > 1e-12  # a face seen edge-on keeps the weights of the rasterizer
        weights = torch.where(safe, volume / torch.where(safe, total, 1.0), weights)
    output = RasterOutput(face, weights, -(corner[..., 2] * weights).sum(1))
    output.__dict__["seen"] = seen  # known already
    return output


def downsample(images: Float[Tensor, "b h w c"], factor: int) -> Tensor:
    """Means over blocks of factor x factor pixels: [B, H / factor, W / factor, C]."""
    if factor == 1:
        return images
    return images.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).mean((2, 4))


def vertex_normals(vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> Float[Tensor, "v 3"]:
    """Unit normals, the area-weighted mean over the faces around each vertex; 0 where there are none."""
    a, b, c = vertices[faces].unbind(1)
    area = torch.linalg.cross(b - a, c - a).repeat_interleave(3, 0)
    total = torch.zeros_like(vertices).index_add(0, faces.reshape(-1), area)
    return F.normalize(total, dim=1, eps=1e-20)


def _rasterize(points: Tensor, faces: Tensor, fov: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Face and weights of one image, by nvdiffrast if it is installed and the points are on CUDA."""
    library = _nvdiffrast() if points.is_cuda else None
    if library is None:
        return rasterize(points, faces, fov, height, width, cull=False)
    drawn = in_front(points, faces).nonzero()[:, 0]  # nvdiffrast would clip faces instead
    if not len(drawn):
        return points.new_full((height, width), -1, dtype=torch.long), points.new_zeros(height, width, 3)
    clip = clip_coordinates(points, faces[drawn], fov, height, width)[None].contiguous()
    out, _ = library.rasterize(_cuda_context(points.device), clip, faces[drawn].int().contiguous(), (height, width))
    out = out[0].flip(0)  # its rows begin at the bottom, and it counts faces from 1
    face = out[..., 3].long() - 1
    first, second = out[..., 0], out[..., 1]
    weights = torch.stack((first, second, 1 - first - second), dim=-1)
    hit = face >= 0
    return torch.where(hit, drawn[face.clamp_min(0)], -1), torch.where(hit[..., None], weights, 0.0)


def clip_coordinates(
    points: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"], fov: float, height: int, width: int
) -> Float[Tensor, "v 4"]:
    """OpenGL clip coordinates of points in the camera's frame; the depth range fits the faces, so none is clipped.

    Args:
        fov: full vertical angle in radians.
    """
    x, y, z = points.float().unbind(1)
    depth, focal = -z, focal_length(fov, 2)
    used = depth[faces]
    near, far = 0.5 * used.min(), 2 * used.max()
    third = ((far + near) * depth - 2 * far * near) / (far - near)
    return torch.stack((focal * x * height / width, focal * y, third, depth), dim=1)


@cache
def _nvdiffrast() -> ModuleType | None:
    try:
        return importlib.import_module("nvdiffrast.torch")
    except ImportError:
        return None


@cache
def _cuda_context(device: torch.device) -> Any:
    """One context of nvdiffrast per device: each new one allocates memory that is not freed."""
    library = _nvdiffrast()
    assert library is not None
    return library.RasterizeCudaContext(device=device)
