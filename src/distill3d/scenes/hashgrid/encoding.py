"""Multi-resolution hash encoding of points (Mueller et al. 2022, "Instant Neural Graphics Primitives", section 3).

A level is a lattice over the unit cube with feature vectors on its points, trilinear between them. Coarse lattices
are stored whole; fine ones share a table of fixed size through a spatial hash, equation 4. Features and their slopes
are linear in the table, so both are made by one sparse product a level, and the gradient is the transposed product:
no second derivative is needed to train through normals.

Three ways compute the same: `reference` (readable), a fast one for CPUs, and kernels for GPUs (`encoding_triton`).
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.render.interpolate import spread_rows

PRIMES = (1, 2654435761, 805459861)  # Instant-NGP, equation 4
_WRAPPED = tuple(p - 2**32 if p >= 2**31 else p for p in PRIMES)  # as int32: only the low bits of a product are used


@dataclass(frozen=True)
class HashLayout:
    """Where the features of each level lie in the table: level after level, `rows` in all.

    Level l has a lattice of floor(coarsest * growth^l) cells a side, the last one `finest`.
    """

    levels: int = 16
    features: int = 2  # a level
    log2_table: int = 19  # at most 2^this rows a level
    coarsest: int = 16  # cells a side
    finest: int = 4096

    def __post_init__(self) -> None:
        if self.levels < 1 or self.features < 1:
            raise ValueError(f"levels and features must be at least 1, got {self.levels} and {self.features}")
        if not 1 <= self.coarsest <= self.finest:
            raise ValueError(f"cells must satisfy 1 <= coarsest <= finest, got {self.coarsest} and {self.finest}")
        if not 1 <= self.log2_table <= 24:
            raise ValueError(f"log2_table must lie in [1, 24], got {self.log2_table}")

    @property
    def channels(self) -> int:
        """Numbers that a point is encoded as."""
        return self.levels * self.features

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """Cells a side of each level."""
        growth = (self.finest / self.coarsest) ** (1 / max(1, self.levels - 1))
        return tuple(int(self.coarsest * growth**level + 1e-6) for level in range(self.levels))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of the table that each level has."""
        return tuple(min((n + 1) ** 3, 2**self.log2_table) for n in self.cells)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each level."""
        return tuple(itertools.accumulate(self.sizes, initial=0))[:-1]

    @property
    def rows(self) -> int:
        """Rows of the whole table."""
        return sum(self.sizes)

    def dense(self, level: int) -> bool:
        """Whether every lattice point of a level has a row of its own."""
        return (self.cells[level] + 1) ** 3 <= 2**self.log2_table


def encode(
    table: Tensor, points: Tensor, layout: HashLayout, levels: int | None = None, slopes: bool = False
) -> Tensor:
    """Features of points, and if asked for their slopes.

    Args:
        table: [layout.rows, layout.features].
        points: [N, 3] in the unit cube; those outside take the nearest value inside.
        levels: how many levels count, from the coarsest; the channels of the others are 0. None is all.

    Returns:
        [1, N, channels], or with slopes [4, N, channels]: the features, then their derivatives by x, y and z.
        Differentiable in the table, not in the points (that is what slopes are for).
    """
    levels = layout.levels if levels is None else levels
    if table.shape != (layout.rows, layout.features):
        raise ValueError(f"the table must be {[layout.rows, layout.features]}, got {list(table.shape)}")
    if not 0 <= levels <= layout.levels:
        raise ValueError(f"levels must lie in [0, {layout.levels}], got {levels}")
    points = points.detach()
    if table.device.type == "cpu":
        return _Encode.apply(table, points, layout, levels, slopes)  # type: ignore[return-value]
    if table.device.type == "cuda" and importlib.util.find_spec("triton"):
        from distill3d.scenes.hashgrid.encoding_triton import encode_triton

        return encode_triton(table, points, layout, levels, slopes)
    return reference(table, points, layout, levels, slopes)


def reference(table: Tensor, points: Tensor, layout: HashLayout, levels: int, slopes: bool) -> Tensor:
    """The same as `encode`, level by level and corner by corner."""
    out = table.new_zeros(4 if slopes else 1, len(points), layout.levels, layout.features)
    for level in range(levels):
        n = layout.cells[level]
        at = points.clamp(0, 1) * n
        cell = at.floor().clamp(max=n - 1)
        share = at - cell
        parts = []
        for corner in itertools.product((0, 1), repeat=3):
            side = cell.new_tensor(corner)
            near = torch.where(side > 0, share, 1 - share)  # weight along each axis
            x, y, z = near.unbind(1)
            weights = [x * y * z]
            if slopes:
                dx, dy, dz = (2 * side - 1) * n
                weights += [dx * y * z, dy * x * z, dz * x * y]
            row = layout.starts[level] + lattice_rows(layout, level, (cell + side).long())
            parts.append(torch.stack(weights)[..., None] * table[row])
        out[:, :, level] = torch.stack(parts).sum(0)
    return out.flatten(2)


def lattice_rows(layout: HashLayout, level: int, corner: Tensor) -> Tensor:
    """Row [N] within its level of lattice points [N, 3] (int64, each in [0, cells]): x fastest, or hashed."""
    x, y, z = corner.unbind(1)
    if layout.dense(level):
        side = layout.cells[level] + 1
        return x + side * (y + side * z)
    mixed = (x * PRIMES[0]) ^ (y * PRIMES[1]) ^ (z * PRIMES[2])
    return mixed % 2**layout.log2_table


class _Encode(torch.autograd.Function):
    """The fast path for CPUs. Only the points are kept for the backward pass: indices are cheap to find again."""

    @staticmethod
    def forward(ctx, table: Tensor, points: Tensor, layout: HashLayout, levels: int, slopes: bool) -> Tensor:
        ctx.save_for_backward(points)
        ctx.settings = (layout, levels, slopes, table.shape)
        out = table.new_zeros(4 if slopes else 1, len(points), layout.levels, layout.features)
        if not len(points):
            return out.flatten(2)
        for level in range(levels):
            rows = table.detach().narrow(0, layout.starts[level], layout.sizes[level])
            index, share = _corners(points, layout, level)
            for k, weights in enumerate(_weights(share, layout.cells[level], slopes)):
                out[k, :, level] = F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")
        return out.flatten(2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (points,) = ctx.saved_tensors
        layout, levels, slopes, shape = ctx.settings
        gradient = gradient.unflatten(2, (layout.levels, layout.features))
        out = gradient.new_zeros(shape)
        for level in range(levels if len(points) else 0):
            index, share = _corners(points, layout, level)
            size = layout.sizes[level]
            rows = out.narrow(0, layout.starts[level], size)
            for weights, of in zip(_weights(share, layout.cells[level], slopes), gradient[:, :, level], strict=True):
                rows += spread_rows(index, weights, of, size)
        return out, None, None, None, None


def _corners(points: Tensor, layout: HashLayout, level: int) -> tuple[Tensor, Tensor]:
    """Rows [N, 8] (int32, within the level) of the corners of each point's cell, x fastest, and its place [3, N]."""
    n = layout.cells[level]
    at = points.T.contiguous().clamp_(0, 1).mul_(n)
    cell = at.to(torch.int32).clamp_(max=n - 1)
    share = at.sub_(cell)
    x, y, z = torch.stack((cell, cell + 1), 1)  # each [2, N]; points stay innermost, which keeps the loops long
    if layout.dense(level):
        index = (z[:, None] * (n + 1) + y)[:, :, None] * (n + 1) + x
    else:
        x, y, z = (side * prime for side, prime in zip((x, y, z), _WRAPPED, strict=True))
        index = ((z[:, None] ^ y)[:, :, None] ^ x).bitwise_and_(2**layout.log2_table - 1)
    return index.view(8, -1).T.contiguous(), share


def _weights(share: Tensor, cells: int, slopes: bool) -> list[Tensor]:
    """Weights [N, 8] of the corners, and with slopes those of the derivatives by x, y and z."""
    x, y, z = torch.stack((1 - share, share), 1)  # each [2, N]
    sides = [(x, y, z)]
    if slopes:
        rise = share.new_tensor([[-cells], [cells]])
        sides += [(rise, y, z), (x, rise, z), (x, y, rise)]
    return [((z[:, None] * y)[:, :, None] * x).view(8, -1).T.contiguous() for x, y, z in sides]
