"""The hash encoding of `encoding.py` as Triton kernels for GPUs: the same signature and the same numbers.

One program handles one level of a block of points. triton is a dependency of torch for CUDA. With TRITON_INTERPRET=1
in the environment the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from distill3d.scenes.hashgrid.layout import HashLayout

BLOCK = tl.constexpr(256)  # points of a program


def encode_triton(table: Tensor, points: Tensor, layout: HashLayout, levels: int, slopes: bool) -> Tensor:
    """Same as `encoding.encode`, which checks the arguments."""
    return _Encode.apply(table, points.detach().contiguous(), layout, levels, slopes)  # type: ignore[return-value]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, points: Tensor, layout: HashLayout, levels: int, slopes: bool) -> Tensor:
        ctx.save_for_backward(points)
        ctx.settings = (layout, levels, slopes, table.shape)
        out = table.new_zeros(4 if slopes else 1, len(points), layout.channels)
        _launch(_forward, table.detach().contiguous(), points, out, layout, levels, slopes)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (points,) = ctx.saved_tensors
        layout, levels, slopes, shape = ctx.settings
        out = gradient.new_zeros(shape)
        _launch(_backward, out, points, gradient.contiguous(), layout, levels, slopes)
        return out, None, None, None, None


def _launch(
    kernel: Any, table: Tensor, points: Tensor, values: Tensor, layout: HashLayout, levels: int, slopes: bool
) -> None:
    if not len(points) or not levels:
        return
    cells, starts = torch.tensor([layout.cells, layout.starts], dtype=torch.int32, device=points.device)
    size, kinds = 2**layout.log2_table, 4 if slopes else 1
    grid = (triton.cdiv(len(points), BLOCK.value), levels)
    kernel[grid](table, points, values, cells, starts, len(points), layout.channels, layout.features, size, kinds)


@triton.jit
def _place(points, cells, starts, level, row, inside):
    """Lowest corner (int32) of the cells of a block of points, their place in it, cells a side and first row."""
    n = tl.load(cells + level)
    x = tl.minimum(tl.maximum(tl.load(points + row * 3, inside, 0.0), 0.0), 1.0) * n
    y = tl.minimum(tl.maximum(tl.load(points + row * 3 + 1, inside, 0.0), 0.0), 1.0) * n
    z = tl.minimum(tl.maximum(tl.load(points + row * 3 + 2, inside, 0.0), 0.0), 1.0) * n
    i = tl.minimum(x.to(tl.int32), n - 1)
    j = tl.minimum(y.to(tl.int32), n - 1)
    k = tl.minimum(z.to(tl.int32), n - 1)
    return i, j, k, x - i, y - j, z - k, n, tl.load(starts + level)


@triton.jit
def _row(i, j, k, n, size):
    """Row of a lattice point within its level: dense where (n + 1)^3 <= size, which needs 64 bits, else hashed."""
    side = (n + 1).to(tl.int64)
    dense = i + (n + 1) * (j + (n + 1) * k)
    # The product wraps at 32 bits; only lower bits are used.
    mixed = i.to(tl.uint32) ^ (j.to(tl.uint32) * 2654435761) ^ (k.to(tl.uint32) * 805459861)
    hashed = (mixed.to(tl.int64) & (size - 1)).to(tl.int32)
    return tl.where(side * side * side <= size, dense, hashed)


@triton.jit
def _forward(
    table, points, values, cells, starts, count, channels, features: constexpr, size: constexpr, kinds: constexpr
):
    """values [kinds, count, channels] from the table."""
    level = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    i, j, k, x, y, z, n, start = _place(points, cells, starts, level, row, inside)
    for f in tl.static_range(features):  # type: ignore[attr-defined]
        value = x * 0
        by_x = x * 0
        by_y = x * 0
        by_z = x * 0
        for corner in tl.static_range(8):  # type: ignore[attr-defined]
            a = corner & 1
            b = (corner >> 1) & 1
            c = (corner >> 2) & 1
            u = x * a + (1 - x) * (1 - a)
            v = y * b + (1 - y) * (1 - b)
            w = z * c + (1 - z) * (1 - c)
            at = start + _row(i + a, j + b, k + c, n, size)
            found = tl.load(table + at.to(tl.int64) * features + f, inside, 0.0)
            value += found * u * v * w
            if kinds == 4:
                by_x += found * (2 * a - 1) * v * w
                by_y += found * (2 * b - 1) * u * w
                by_z += found * (2 * c - 1) * u * v
        into = values + row.to(tl.int64) * channels + level * features + f
        step = tl.cast(count, tl.int64) * channels
        tl.store(into, value, inside)
        if kinds == 4:
            tl.store(into + step, by_x * n, inside)
            tl.store(into + 2 * step, by_y * n, inside)
            tl.store(into + 3 * step, by_z * n, inside)


@triton.jit
def _backward(
    table, points, values, cells, starts, count, channels, features: constexpr, size: constexpr, kinds: constexpr
):
    """Adds the gradient of the table from that of values [kinds, count, channels]."""
    level = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    i, j, k, x, y, z, n, start = _place(points, cells, starts, level, row, inside)
    for f in tl.static_range(features):  # type: ignore[attr-defined]
        of = values + row.to(tl.int64) * channels + level * features + f
        step = tl.cast(count, tl.int64) * channels
        value = tl.load(of, inside, 0.0)
        if kinds == 4:
            by_x = tl.load(of + step, inside, 0.0) * n
            by_y = tl.load(of + 2 * step, inside, 0.0) * n
            by_z = tl.load(of + 3 * step, inside, 0.0) * n
        for corner in tl.static_range(8):  # type: ignore[attr-defined]
            a = corner & 1
            b = (corner >> 1) & 1
            c = (corner >> 2) & 1
            u = x * a + (1 - x) * (1 - a)
            v = y * b + (1 - y) * (1 - b)
            w = z * c + (1 - z) * (1 - c)
            part = value * u * v * w
            if kinds == 4:
                part += by_x * (2 * a - 1) * v * w + by_y * (2 * b - 1) * u * w + by_z * (2 * c - 1) * u * v
            at = start + _row(i + a, j + b, k + c, n, size)
            tl.atomic_add(table + at.to(tl.int64) * features + f, part, inside)
