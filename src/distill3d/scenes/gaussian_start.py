"""Where splats begin: in a ball, or on the surface of a mesh."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill3d.meshes.mesh import Mesh, sample_surface
from distill3d.render.splat import Splats

FLATNESS = 0.2  # thickness of a splat on a surface, as a fraction of its width
SURFACE_OPACITY = 0.9


def splats_in_ball(count: int, radius: float, opacity: float, generator: torch.Generator) -> Splats:
    """`count` gray round splats in a ball about the origin, densest in the middle.

    Their number per volume decreases as 1 - r / radius, like the blob that fields start from (DreamFusion, appendix
    A). Each is as wide as the root mean square distance to its three nearest neighbors (Kerbl et al. 2023, section
    5.1).
    """
    # r / radius then has the density ~ u^2 (1 - u): the third smallest of four uniform draws.
    u = torch.rand(count, 4, generator=generator).sort(1).values[:, 2:3]
    means = radius * u * F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    width = neighbor_distance(means, fallback=radius)
    return Splats(
        means,
        F.normalize(torch.randn(count, 4, generator=generator), dim=1),
        width.log()[:, None].repeat(1, 3),
        torch.logit(torch.full((count,), opacity)),
        0.5 + 0.05 * (2 * torch.rand(count, 3, generator=generator) - 1),
    )


def splats_on_mesh(mesh: Mesh, count: int, generator: torch.Generator) -> Splats:
    """`count` flat splats spread evenly over the surface of a mesh in world units, each lying in its face.

    Raises:
        ValueError: if the mesh has no area or colors that are not finite.
    """
    corners, colors = mesh.vertices[mesh.faces], mesh.corner_colors()  # [F, 3, 3]
    if not np.isfinite(colors).all():
        raise ValueError("splats cannot start from this mesh: it has NaN or infinite colors")
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = 0.5 * float(np.linalg.norm(normal, axis=1).sum())
    if not area > 0:
        raise ValueError("splats cannot start from this mesh: its faces have no area")
    draws = torch.rand(3, count, generator=generator).double().numpy()
    draws[0] = (np.arange(count) + draws[0]) / count
    face, weights = sample_surface(mesh.vertices, mesh.faces, draws)
    means, seen = (np.einsum("nc,ncd->nd", weights, values[face]) for values in (corners, colors))
    up = F.normalize(torch.from_numpy(normal[face]).float(), dim=1)
    # Discs that cover the surface: a spacing of sqrt(area / count), half of it as standard deviation.
    scales = 0.5 * math.sqrt(area / count) * torch.tensor([1.0, 1.0, FLATNESS])
    opacities = torch.logit(torch.full((count,), SURFACE_OPACITY))
    return Splats(
        torch.from_numpy(means).float(),
        rotation_from_z(up),
        scales.log().repeat(count, 1),
        opacities,
        torch.from_numpy(seen).float().clamp(0, 1),
    )


def rotation_from_z(directions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 4"]:
    """Unit quaternions of the shortest rotations from the z axis to unit directions."""
    x, y, z = directions.unbind(1)
    halfway = torch.stack((1 + z, -y, x, torch.zeros_like(z)), 1)  # 1 + cos, sin times the axis
    flipped = torch.tensor([0.0, 1.0, 0.0, 0.0]).to(directions)  # straight down, about x
    return F.normalize(torch.where(z[:, None] < -1 + 1e-6, flipped, halfway), dim=1)


def neighbor_distance(points: Float[Tensor, "n 3"], neighbors: int = 3, fallback: float = 1.0) -> Float[Tensor, " n"]:
    """Root mean square distance of each point to its nearest neighbors; `fallback` for a single point."""
    neighbors = min(neighbors, len(points) - 1)
    if neighbors < 1:
        return points.new_full((len(points),), fallback)
    rows = [torch.cdist(part, points).topk(neighbors + 1, largest=False).values for part in points.split(1024)]
    return torch.cat(rows)[:, 1:].square().mean(1).sqrt().clamp_min(1e-4 * fallback)
