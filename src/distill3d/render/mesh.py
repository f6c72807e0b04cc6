"""Pictures of triangle meshes: what each pixel sees of the surface, and look-ups in textures.

`see` finds face and place for all pixels of B views; both sides of a face are drawn. The places are differentiable
in the vertices: with the corners P_i in the camera's frame and the pixel's direction d, the point of the face on the
ray is sum_i w_i P_i with w_i proportional to d . (P_{i+1} x P_{i+2}). That is the gradient inside a face; how the
picture changes where faces begin and end is `distill3d.render.edges`.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill3d.cameras import Cameras
from distill3d.render.interpolate import weighted_rows
from distill3d.render.raster import rasterize

FAR = 100.0  # world units; beyond it the rasterizer for GPUs sees nothing


@dataclass(frozen=True)
class Seen:
    """What B pictures of H x W pixels see of a mesh. P pixels see anything, in the order of `face >= 0`."""

    face: Tensor  # [B, H, W] int64, -1 where no face
    weights: Tensor  # [P, 3] of the face's corners, perspective-correct
    depth: Tensor  # [P] along the optical axis, world units

    @property
    def hit(self) -> Tensor:
        """Pixels [B, H, W] bool that see a face."""
        return self.face >= 0

    def image(self, values: Tensor) -> Tensor:
        """Pictures [B, H, W, C] out of values [P, C], 0 where nothing is seen."""
        picture = values.new_zeros(*self.face.shape, values.shape[-1])
        return picture.index_put((self.hit,), values)

    def interpolate(self, values: Tensor, corners: Tensor) -> Tensor:
        """Attributes [P, C] of the places seen: values [V, C] at the corners [F, 3] of the faces."""
        rows = corners[self.face[self.hit]]
        if not self.weights.requires_grad:
            return weighted_rows(values, rows, self.weights)
        return (values[rows] * self.weights[..., None]).sum(1)


def see(cameras: Cameras, vertices: Tensor, faces: Tensor, height: int, width: int) -> Seen:
    """What cameras see of a mesh, one sample in the middle of each pixel.

    Args:
        vertices: [V, 3] world space; where they require a gradient, weights and depth have one.
        faces: [F, 3].
    """
    local = to_camera(cameras, vertices)
    with torch.no_grad():
        rows = [
            _rasterize(points, faces, float(fov), height, width)
            for points, fov in zip(local, cameras.fov_y, strict=True)
        ]
        face = torch.stack([row[0] for row in rows])
        weights = torch.stack([row[1] for row in rows])[face >= 0].to(vertices)
    view, row, column = (face >= 0).nonzero().unbind(1)
    corner = local[view[:, None], faces[face[view, row, column]]]  # [P, 3 corners, 3]
    if local.requires_grad:
        ray = _directions(cameras, view, row, column, height, width)
        cross = torch.linalg.cross(corner.roll(-1, 1), corner.roll(-2, 1))
        volume = (cross * ray[:, None]).sum(-1)
        total = volume.sum(1, keepdim=True)
        safe = total.abs() > 1e-12  # a face seen from its edge keeps the weights that it has
        weights = torch.where(safe, volume / torch.where(safe, total, 1.0), weights)
    return Seen(face, weights, -(corner[..., 2] * weights).sum(1))


def to_camera(cameras: Cameras, points: Tensor) -> Tensor:
    """World points [V, 3] in the frame of each camera, [B, V, 3]."""
    pose = cameras.camera_to_world.to(points)
    return (points - pose[:, None, :3, 3]) @ pose[:, :3, :3]


def texture_lookup(texture: Tensor, uv: Tensor) -> Tensor:
    """Bilinear samples [P, C] of a texture [H, W, C] at uv [P, 2], differentiable in both; edges are clamped.

    (0, 0) is the lower left corner of the texture, (1, 1) the upper right, row 0 its top.
    """
    height, width, channels = texture.shape
    x = (uv[:, 0] * width - 0.5).clamp(0, width - 1)
    y = ((1 - uv[:, 1]) * height - 0.5).clamp(0, height - 1)
    left, top = x.detach().floor().clamp_max(max(width - 2, 0)), y.detach().floor().clamp_max(max(height - 2, 0))
    fx, fy = x - left, y - top
    first = (top * width + left).long()
    right, below = min(1, width - 1), width * min(1, height - 1)
    indices = torch.stack((first, first + right, first + below, first + below + right), dim=1)
    weights = torch.stack(((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy), dim=1)
    return weighted_rows(texture.reshape(-1, channels), indices, weights.to(texture))


def shrink(pictures: Tensor, times: int) -> Tensor:
    """Means over blocks of times x times pixels: [B, H, W, C] to [B, H / times, W / times, C]."""
    if times == 1:
        return pictures
    return pictures.unflatten(2, (-1, times)).unflatten(1, (-1, times)).mean((2, 4))


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [F, 3], 0 for a face without area."""
    a, b, c = vertices[faces].unbind(1)
    return torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=1, eps=1e-20)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [V, 3], the mean over the faces around a vertex by area; 0 where there are none."""
    a, b, c = vertices[faces].unbind(1)
    area = torch.linalg.cross(b - a, c - a).repeat_interleave(3, 0)
    total = torch.zeros_like(vertices).index_add(0, faces.reshape(-1), area)
    return torch.nn.functional.normalize(total, dim=1, eps=1e-20)


def _directions(cameras: Cameras, view: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Camera-frame directions [P, 3], depth 1, through the centers of pixels."""
    focal = (0.5 * height / torch.tan(0.5 * cameras.fov_y))[view]
    x, y = (column + 0.5 - 0.5 * width) / focal, (0.5 * height - row - 0.5) / focal
    return torch.stack((x, y, -torch.ones_like(x)), dim=1)


def _rasterize(points: Tensor, faces: Tensor, fov: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Face and weights of one picture, by nvdiffrast where that is at hand and by our own rasterizer elsewhere."""
    library = _nvdiffrast() if points.is_cuda else None
    if library is None:
        return rasterize(points, faces, fov, height, width, cull=False)
    return _by_nvdiffrast(library, points, faces, fov, height, width)


def _nvdiffrast() -> Any:
    try:
        return importlib.import_module("nvdiffrast.torch")
    except ImportError:
        return None


def _by_nvdiffrast(
    library: Any, points: Tensor, faces: Tensor, fov: float, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The same as `rasterize`: nvdiffrast wants clip space, gives rows from the bottom and faces counted from 1."""
    near, focal = 1e-2, 1 / math.tan(0.5 * fov)
    x, y, z = points.float().unbind(1)
    depth = -z
    third = ((FAR + near) * depth - 2 * FAR * near) / (FAR - near)
    clip = torch.stack((focal * x * height / width, focal * y, third, depth), dim=1)[None].contiguous()
    context = library.RasterizeCudaContext(device=points.device)
    out = library.rasterize(context, clip, faces.int().contiguous(), (height, width))[0][0].flip(0)
    face = out[..., 3].long() - 1
    first, second = out[..., 0], out[..., 1]
    weights = torch.stack((first, second, 1 - first - second), dim=-1)
    return face, torch.where((face >= 0)[..., None], weights, 0.0)
