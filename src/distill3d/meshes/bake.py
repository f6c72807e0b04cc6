"""The colors of a field on a mesh: as a texture, or at its vertices.

A field has no color on a surface: along each ray colors blend over the depth in which the field turns opaque. A point
of the mesh therefore gets what rays towards it see, by emission and absorption (see `render/volume`) over a short way
from just outside the surface inwards, averaged over a few directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.meshes.mesh import Mesh
from distill3d.meshes.surface import without_bumps
from distill3d.meshes.texture import paint_texels, unwrap
from distill3d.render.volume import Field, alpha_weights

CHUNK = 1 << 15  # points at once: bounds the memory


@dataclass(frozen=True)
class BakeRays:
    """The rays towards a point of the surface: one against its normal, others on a cone around it.

    Lengths in world units.
    """

    above: float = 0.02  # rays start this far outside the surface
    below: float = 0.2  # and end this far inside
    samples: int = 10  # per ray
    slanted: int = 4  # number of rays on the cone
    slant: float = 45.0  # degrees between the cone and the normal


def bake(field: Field, mesh: Mesh, size: int = 1024, half_size: float = 1.0) -> Mesh:
    """Unwraps a mesh and paints it with a field's colors.

    Args:
        field: maps points to density and color.
        mesh: the field's surface.
        size: texels per side.
        half_size: the field is queried inside [-half_size, half_size]^3 only.

    Raises:
        ValueError: if this is not a size (`check_texture_size`).
    """
    uv, uv_faces = unwrap(without_bumps(mesh), size)
    normals = mesh.vertex_normals()

    def colors(face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        points, outward = (np.einsum("nc,ncd->nd", weights, a[mesh.faces[face]]) for a in (mesh.vertices, normals))
        return (surface_colors(field, points, outward, half_size) * 255).round().to(torch.uint8).numpy()

    return mesh.with_texture(paint_texels(uv, uv_faces, size, colors), uv, uv_faces)


def paint_vertices(field: Field, mesh: Mesh, half_size: float = 1.0) -> Mesh:
    """The same mesh with the field's colors at its vertices; arguments as for `bake`."""
    colors = surface_colors(field, mesh.vertices, mesh.vertex_normals(), half_size)
    return replace(mesh, vertex_colors=colors.double().numpy())


@torch.no_grad()
def surface_colors(
    field: Field,
    points: Float[np.ndarray, "n 3"],
    normals: Float[np.ndarray, "n 3"],
    half_size: float = 1.0,
    bake_rays: BakeRays = BakeRays(),
) -> Float[Tensor, "n 3"]:
    """Colors in [0, 1] of points as seen from the side of their normals; arguments as for `bake`.

    Each ray gives sum w_i c_i / sum w_i, with the weights of emission and absorption of evenly spaced samples, or the
    color at the point itself if the ray is empty; the rays are averaged.
    """
    colors = []
    chunks = (torch.from_numpy(np.ascontiguousarray(a, np.float32)).split(CHUNK) for a in (points, normals))
    for point, normal in zip(*chunks, strict=True):
        rays = [_ray_colors(field, point, d, half_size, bake_rays) for d in _directions(normal, bake_rays)]
        colors.append(torch.stack(rays).mean(0))
    return torch.cat(colors).clamp(0, 1)


def _directions(normal: Tensor, bake_rays: BakeRays) -> list[Tensor]:
    """Unit vectors [N, 3] out of the surface: the normal, and those on the cone around it."""
    normal = torch.nn.functional.normalize(normal, dim=1)
    smallest = torch.nn.functional.one_hot(normal.abs().argmin(1), 3).to(normal)
    first = torch.nn.functional.normalize(torch.linalg.cross(normal, smallest), dim=1)
    second = torch.linalg.cross(normal, first)
    slant = math.radians(bake_rays.slant)
    directions = [normal]
    for i in range(bake_rays.slanted):
        turn = 2 * math.pi * i / bake_rays.slanted
        sideways = math.cos(turn) * first + math.sin(turn) * second
        directions.append(math.cos(slant) * normal + math.sin(slant) * sideways)
    return directions


def _ray_colors(field: Field, point: Tensor, direction: Tensor, half_size: float, bake_rays: BakeRays) -> Tensor:
    """Colors [N, 3] that rays against the directions [N, 3] see at the points [N, 3]."""
    step = (bake_rays.above + bake_rays.below) / bake_rays.samples
    t = (torch.arange(bake_rays.samples) + 0.5) * step - bake_rays.above
    samples = (point[:, None] - t[:, None] * direction[:, None]).clamp(-half_size, half_size)
    density, color, _ = field(samples.view(-1, 3))
    color = color.view(-1, bake_rays.samples, 3)
    weights, _ = alpha_weights(density.view(-1, bake_rays.samples) * step)
    total = weights.sum(1, keepdim=True)
    blend = (weights[:, :, None] * color).sum(1) / total.clamp_min(1e-4)
    return torch.where(total > 1e-4, blend, color[:, int(t.abs().argmin())])
