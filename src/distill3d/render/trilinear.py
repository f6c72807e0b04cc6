"""Trilinear interpolation in a lattice, fast on the CPU where `grid_sample` is slow (7x for 150,000 points).

With channels last, one point reads 8 short rows: the interpolation is a sparse matrix [N, Z*Y*X] with 8 entries a
row (see `gather`). The slow readable reference is `reference`, which is also what other devices use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.render.interpolate import weighted_rows


def trilinear(lattice: Tensor, points: Tensor) -> Tensor:
    """Values [N, C] of a lattice [Z, Y, X, C] at points [N, 3] = (x, y, z) in [-1, 1]^3, corners on lattice points.

    Points outside take the nearest value inside. Differentiable in the lattice, not in the points.
    """
    points = points.detach()
    if lattice.device.type != "cpu" or not len(points):
        return reference(lattice, points)
    first, share = _cells(lattice.shape[:3], points)
    if not (lattice.requires_grad and torch.is_grad_enabled()):
        return _interpolate(lattice, first, share)
    return weighted_rows(lattice.reshape(-1, lattice.shape[-1]), *_corners(lattice.shape[:3], first, share))


def reference(lattice: Tensor, points: Tensor) -> Tensor:
    """The same by `grid_sample`."""
    at = points.view(1, 1, 1, -1, 3)
    values = F.grid_sample(lattice.permute(3, 0, 1, 2)[None], at, padding_mode="border", align_corners=True)
    return values[0, :, 0, 0].T


def _cells(shape: torch.Size, points: Tensor) -> tuple[Tensor, Tensor]:
    """Flat index [N] (int32) of the lowest corner of the cell of each point, and the place [3, N] in the cell."""
    depth, height, width = shape
    last = points.new_tensor([[width], [height], [depth]]) - 1
    at = points.T.contiguous().add_(1).mul_(0.5 * last).clamp_min_(0).minimum(last)
    cell = torch.minimum(at.to(torch.int32), last.to(torch.int32) - 1)
    return cell[2].mul(height).add_(cell[1]).mul_(width).add_(cell[0]), at.sub_(cell)


def _offsets(shape: torch.Size) -> list[int]:
    """Flat distances of the 8 corners of a cell from the lowest, x fastest."""
    _, height, width = shape
    return [(k * height + j) * width + i for k in (0, 1) for j in (0, 1) for i in (0, 1)]


def _interpolate(lattice: Tensor, first: Tensor, share: Tensor) -> Tensor:
    """Values [N, C] without a graph: eight look-ups, seven mixtures."""
    rows = lattice.detach().reshape(-1, lattice.shape[-1])
    values = [rows.index_select(0, first + offset) for offset in _offsets(lattice.shape[:3])]
    for axis in share[..., None]:
        values = [torch.lerp(low, high, axis) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _corners(shape: torch.Size, first: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices (int32) and weights [N, 8] of the corners of the cells."""
    x, y, z = torch.stack((1 - share, share)).unbind(1)  # each [2, N]: weight of the low and of the high side
    weights = (z[:, None] * y)[:, :, None] * x
    offsets = torch.tensor(_offsets(shape), dtype=torch.int32)
    return first[:, None] + offsets, weights.view(8, -1).T.contiguous()
