"""A field's colors on a mesh: as a texture, or at its vertices.

A picture of a field is no picture of one surface: along each ray colors blend over the depth in which the field
turns opaque. What a mesh is painted with is therefore what rays see that come down on it, emission-absorption
sums (see `render/volume`) over a short way from just outside the surface inwards, in the mean over a few directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill3d.meshes.mesh import Mesh
from distill3d.meshes.surface import Query
from distill3d.meshes.texture import paint_texels, unwrap
from distill3d.render.volume import alpha_weights

CHUNK = 1 << 15  # texels at once: bounds the memory


@dataclass(frozen=True)
class Look:
    """The rays that look at a texel: one straight down, and some around it. Lengths in world units."""

    above: float = 0.02  # from here outside the surface
    below: float = 0.2  # to here inside
    samples: int = 10
    slanted: int = 4  # rays beside the straight one
    slant: float = 45.0  # degrees from the straight one


def bake(query: Query, mesh: Mesh, size: int = 1024, half_size: float = 1.0, look: Look = Look()) -> Mesh:
    """Unwraps a mesh and paints it with a field's colors; texels between the islands repeat the nearest one.

    Args:
        query: maps points [N, 3] to density [N], color [N, 3] in [0, 1] and something ignored.
        mesh: the field's surface.
        size: texels a side.
        half_size: the field is queried inside [-half_size, half_size]^3 only.

    Raises:
        ValueError: for no size (`check_texture_size`).
    """
    uv, uv_faces = unwrap(mesh.vertices, mesh.faces, size)
    normals = mesh.vertex_normals()

    def colors(face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        points, outward = (np.einsum("nc,ncd->nd", weights, a[mesh.faces[face]]) for a in (mesh.vertices, normals))
        return (seen_colors(query, points, outward, half_size, look) * 255).round().to(torch.uint8).numpy()

    return mesh.with_texture(paint_texels(uv, uv_faces, size, colors), uv, uv_faces)


def paint_vertices(query: Query, mesh: Mesh, half_size: float = 1.0, look: Look = Look()) -> Mesh:
    """The same mesh with the field's colors at its vertices; arguments as for `bake`."""
    colors = seen_colors(query, mesh.vertices, mesh.vertex_normals(), half_size, look)
    return replace(mesh, vertex_colors=colors.double().numpy())


@torch.no_grad()
def seen_colors(
    query: Query, points: np.ndarray, normals: np.ndarray, half_size: float = 1.0, look: Look = Look()
) -> Tensor:
    """Colors [N, 3] in [0, 1] of points [N, 3] as they are seen from the side of their normals [N, 3].

    Each ray gives sum w_i c_i / sum w_i with the weights of emission and absorption over evenly spaced samples, or,
    where its way is empty, the color at the point itself; the rays are averaged.
    """
    colors = []
    parts = (torch.from_numpy(np.ascontiguousarray(a, np.float32)).split(CHUNK) for a in (points, normals))
    for origin, normal in zip(*parts, strict=True):
        seen = [_along(query, origin, direction, half_size, look) for direction in _directions(normal, look)]
        colors.append(torch.stack(seen).mean(0))
    return torch.cat(colors).clamp(0, 1)


def _directions(normal: Tensor, look: Look) -> list[Tensor]:
    """Unit vectors [N, 3] out of the surface: the normal, and those on a cone around it."""
    normal = torch.nn.functional.normalize(normal, dim=1)
    least = torch.nn.functional.one_hot(normal.abs().argmin(1), 3).to(normal)
    first = torch.nn.functional.normalize(torch.linalg.cross(normal, least), dim=1)
    second = torch.linalg.cross(normal, first)
    slant = math.radians(look.slant)
    around = [normal]
    for i in range(look.slanted):
        turn = 2 * math.pi * i / look.slanted
        sideways = math.cos(turn) * first + math.sin(turn) * second
        around.append(math.cos(slant) * normal + math.sin(slant) * sideways)
    return around


def _along(query: Query, origin: Tensor, direction: Tensor, half_size: float, look: Look) -> Tensor:
    """What rays against the directions [N, 3] see at the points [N, 3]."""
    step = (look.above + look.below) / look.samples
    t = (torch.arange(look.samples) + 0.5) * step - look.above
    way = (origin[:, None] - t[:, None] * direction[:, None]).clamp(-half_size, half_size)
    density, color, _ = query(way.view(-1, 3))
    color = color.view(-1, look.samples, 3)
    weights, _ = alpha_weights(density.view(-1, look.samples) * step)
    total = weights.sum(1, keepdim=True)
    blend = (weights[:, :, None] * color).sum(1) / total.clamp_min(1e-4)
    return torch.where(total > 1e-4, blend, color[:, int(t.abs().argmin())])
