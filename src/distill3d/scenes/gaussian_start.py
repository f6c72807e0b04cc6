"""Where splats begin: in a ball, or on the surface of a mesh."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.render.splat import Splats

FLAT = 0.2  # thickness of a splat on a surface, as a share of its width
SURFACE_OPACITY = 0.9


def in_ball(count: int, radius: float, opacity: float, generator: torch.Generator) -> Splats:
    """`count` gray round splats in a ball about the origin, densest in the middle.

    Their number per volume falls as 1 - r / radius, as the blob does that fields start from (DreamFusion,
    appendix A). Each is as wide as the root mean square distance to its three nearest neighbors (Kerbl et al.
    2023, section 5.1).
    """
    # The share r / radius then has density ~ u^2 (1 - u): the third smallest of four uniform draws.
    share = torch.rand(count, 4, generator=generator).sort(1).values[:, 2:3]
    means = radius * share * F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    width = neighbor_distance(means, fallback=radius)
    return Splats(
        means,
        F.normalize(torch.randn(count, 4, generator=generator), dim=1),
        width.log()[:, None].repeat(1, 3),
        torch.logit(torch.full((count,), opacity)),
        0.5 + 0.05 * (2 * torch.rand(count, 3, generator=generator) - 1),
    )


def on_mesh(vertices: Tensor, faces: Tensor, colors: Tensor, count: int, generator: torch.Generator) -> Splats:
    """`count` flat splats spread evenly over a surface, each lying in its face.

    Args:
        vertices: [V, 3] world units.
        faces: [F, 3] indices.
        colors: in [0, 1], [V, 3] of the vertices or [F, 3, 3] of the corners of the faces.

    Raises:
        ValueError: where the mesh has no area, or a number is not finite.
    """
    vertices, faces, colors = vertices.float().cpu(), faces.long().cpu(), colors.float().cpu()
    if not bool(vertices.isfinite().all() and colors.isfinite().all()):
        raise ValueError("a mesh that splats start from has vertices or colors that are not finite")
    corners = vertices[faces]  # [F, 3, 3]
    along, across = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = torch.linalg.cross(along, across)
    area = 0.5 * normal.norm(dim=1)
    if not len(faces) or not float(area.sum()) > 0:
        raise ValueError("a mesh that splats start from needs faces with an area, got none")
    # Evenly spaced places along the sum of areas: every face gets its share, give or take one.
    ends = area.double().cumsum(0)
    places = (torch.arange(count) + torch.rand(count, generator=generator).double()) / count * ends[-1]
    face = torch.searchsorted(ends, places).clamp_max(len(faces) - 1)
    root, second = torch.rand(2, count, generator=generator)
    root = root.sqrt()
    weights = torch.stack((1 - root, root * (1 - second), root * second), 1)[:, None]
    paint = colors[face] if colors.ndim == 3 else colors[faces[face]]
    # Discs that cover the surface: a spacing of sqrt(area / count), half of it as standard deviation.
    width = 0.5 * (area.sum() / count).sqrt()
    scales = width * torch.tensor([1.0, 1.0, FLAT])
    return Splats(
        (weights @ corners[face])[:, 0],
        turning_up(F.normalize(normal[face], dim=1)),
        scales.log().repeat(count, 1),
        torch.logit(torch.full((count,), SURFACE_OPACITY)),
        (weights @ paint)[:, 0].clamp(0, 1),
    )


def turning_up(directions: Tensor) -> Tensor:
    """Unit quaternions [N, 4] that turn the z axis into unit directions [N, 3], by the shortest way."""
    x, y, z = directions.unbind(1)
    halfway = torch.stack((1 + z, -y, x, torch.zeros_like(z)), 1)  # 1 + cos, sin times the axis
    flipped = torch.tensor([0.0, 1.0, 0.0, 0.0]).to(directions)  # straight down, about x
    return F.normalize(torch.where(z[:, None] < -1 + 1e-6, flipped, halfway), dim=1)


def neighbor_distance(points: Tensor, neighbors: int = 3, fallback: float = 1.0) -> Tensor:
    """Root mean square distance [N] to the nearest neighbors of each point [N, 3]; `fallback` for a lone point."""
    neighbors = min(neighbors, len(points) - 1)
    if neighbors < 1:
        return points.new_full((len(points),), fallback)
    rows = [torch.cdist(part, points).topk(neighbors + 1, largest=False).values for part in points.split(1024)]
    return torch.cat(rows)[:, 1:].square().mean(1).sqrt().clamp_min(1e-4 * fallback)
