"""Multi-resolution hash encoding of points (Mueller et al. 2022, "Instant Neural Graphics Primitives", section 3).

A level is a lattice over the unit cube with feature vectors on its points and trilinear interpolation between them.
Coarse lattices are stored completely; fine ones share a table of fixed size through a spatial hash (equation 4).
Features and their slopes are linear in the table, so both are computed by one sparse product per level, and their
gradient is the transposed product: training through normals needs no second derivative.

There are three implementations: `reference` (readable), a fast one for CPUs, and Triton kernels for GPUs.
"""

from __future__ import annotations

import importlib.util
import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill3d.render.interpolate import corner_products, spread_rows
from distill3d.scenes.hashgrid.layout import PRIMES, HashLayout

INT32_PRIMES = tuple(p - 2**32 if p >= 2**31 else p for p in PRIMES)  # only the low bits of a product are used


def encode(
    table: Float[Tensor, "rows features"],
    points: Float[Tensor, "n 3"],
    layout: HashLayout,
    levels: int | None = None,
    slopes: bool = False,
) -> Float[Tensor, "k n channels"]:
    """Features of points, and optionally their derivatives.

    Args:
        table: [layout.rows, layout.features].
        points: in the unit cube; a point outside takes the nearest value inside.
        levels: number of active levels, from the coarsest; the channels of the others are 0. None is all.
        slopes: whether to compute derivatives too.

    Returns:
        [1, N, channels], or with slopes [4, N, channels]: the features, then their derivatives by x, y and z.
        Differentiable in the table, not in the points (use the slopes for that).

    Raises:
        ValueError: for a table or a number of levels that does not fit the layout.
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
    """Slow, readable version of `encode`: level by level and corner by corner."""
    out = table.new_zeros(4 if slopes else 1, len(points), layout.levels, layout.features)
    for level in range(levels):
        n = layout.cells[level]
        at = points.clamp(0, 1) * n
        cell = at.floor().clamp(max=n - 1)
        local = at - cell
        parts = []
        for corner in itertools.product((0, 1), repeat=3):
            x, y, z = (u if side else 1 - u for u, side in zip(local.unbind(1), corner, strict=True))  # along each axis
            weights = [x * y * z]
            if slopes:
                dx, dy, dz = ((2 * side - 1) * n for side in corner)
                weights += [dx * y * z, dy * x * z, dz * x * y]
            at_corner = torch.stack([c + side for c, side in zip(cell.unbind(1), corner, strict=True)], 1)
            row = layout.starts[level] + layout.lattice_rows(level, at_corner.long())
            parts.append(torch.stack(weights)[..., None] * table[row])
        out[:, :, level] = torch.stack(parts).sum(0)
    return out.flatten(2)


class _Encode(torch.autograd.Function):
    """The fast version for CPUs. Only the points are kept for the backward pass: indices are cheap to recompute."""

    @staticmethod
    def forward(ctx, table: Tensor, points: Tensor, layout: HashLayout, levels: int, slopes: bool) -> Tensor:
        ctx.save_for_backward(points)
        ctx.settings = (layout, levels, slopes, table.shape)
        out = table.new_zeros(4 if slopes else 1, len(points), layout.levels, layout.features)
        if not len(points):
            return out.flatten(2)
        for level in range(levels):
            rows = table.detach().narrow(0, layout.starts[level], layout.sizes[level])
            index, local = _corners(points, layout, level)
            for k, weights in enumerate(_weights(local, layout.cells[level], slopes)):
                out[k, :, level] = F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")
        return out.flatten(2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (points,) = ctx.saved_tensors
        layout, levels, slopes, shape = ctx.settings
        gradient = gradient.unflatten(2, (layout.levels, layout.features))
        out = gradient.new_zeros(shape)
        for level in range(levels if len(points) else 0):
            index, local = _corners(points, layout, level)
            size = layout.sizes[level]
            rows = out.narrow(0, layout.starts[level], size)
            kinds = zip(_weights(local, layout.cells[level], slopes), gradient[:, :, level], strict=True)
            for weights, of_values in kinds:
                rows += spread_rows(index, weights, of_values, size)
        return out, None, None, None, None


def _corners(points: Tensor, layout: HashLayout, level: int) -> tuple[Tensor, Tensor]:
    """Rows [N, 8] (int32, within the level) of the corners of each point's cell, and its place [3, N] in the cell."""
    n = layout.cells[level]
    at = points.T.contiguous().clamp_(0, 1).mul_(n)
    cell = at.to(torch.int32).clamp_(max=n - 1)
    local = at.sub_(cell)
    x, y, z = torch.stack((cell, cell + 1), 1)  # each [2, N]; points stay innermost, which keeps the loops long
    if layout.dense(level):
        index = (z[:, None] * (n + 1) + y)[:, :, None] * (n + 1) + x
    else:
        x, y, z = (side * prime for side, prime in zip((x, y, z), INT32_PRIMES, strict=True))
        index = ((z[:, None] ^ y)[:, :, None] ^ x).bitwise_and_(2**layout.log2_table - 1)
    return index.view(8, -1).T.contiguous(), local


def _weights(local: Tensor, cells: int, slopes: bool) -> list[Tensor]:
    """Weights [N, 8] of the corners, and with slopes those of the derivatives by x, y and z."""
    x, y, z = torch.stack((1 - local, local), 1)  # each [2, N]
    weights = [corner_products(x, y, z)]
    if slopes:
        rise = local.new_tensor([[-cells], [cells]])
        weights += [corner_products(rise, y, z), corner_products(x, rise, z), corner_products(x, y, rise)]
    return weights
