"""Interpolation in tables and lattices. Every interpolation here is a weighted sum of a few rows of a table.

With channels last, one point reads a few short rows: on the CPU an interpolation with a gradient is a product with a
sparse matrix [P, N] with K entries per row, and its gradient is the transposed product. That is 7 times faster than
`grid_sample` for 150,000 points. Without a gradient, and on other devices, indexing and `grid_sample` do it, which are
also the readable references.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def weighted_rows(
    table: Float[Tensor, "n c"], indices: Int[Tensor, "p k"], weights: Float[Tensor, "p k"]
) -> Float[Tensor, "p c"]:
    """sum_k weights[p, k] table[indices[p, k]], differentiable in the table and in the weights."""
    if table.device.type != "cpu" or not len(indices):
        return weighted_rows_reference(table, indices, weights)
    return _WeightedRows.apply(table, indices.to(torch.int32), weights)  # type: ignore[return-value]


def weighted_rows_reference(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`weighted_rows` by indexing."""
    return (table[indices.long()] * weights[..., None]).sum(1)


def spread_rows(
    indices: Int[Tensor, "p k"], weights: Float[Tensor, "p k"], values: Float[Tensor, "p c"], rows: int
) -> Float[Tensor, "rows c"]:
    """The transposed product, without gradients: weights[p, k] values[p] added to row indices[p, k] of a zero table."""
    if values.device.type != "cpu":
        weighted = (weights[..., None] * values[:, None]).flatten(0, 1)
        return values.new_zeros(rows, values.shape[1]).index_add_(0, indices.reshape(-1), weighted)
    import scipy.sparse

    ends = torch.arange(0, indices.numel() + 1, indices.shape[1], dtype=torch.int32)
    # torch scatters row by row here; scipy's loop over a column matrix is 20 times faster.
    matrix = scipy.sparse.csc_matrix(
        (weights.reshape(-1).numpy(), indices.to(torch.int32).reshape(-1).numpy(), ends.numpy()),
        shape=(rows, len(indices)),
    )
    return torch.from_numpy(matrix @ values.contiguous().numpy())


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(indices, weights, table if ctx.needs_input_grad[2] else None)
        ctx.rows = len(table)
        return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        indices, weights, table = ctx.saved_tensors
        of_table = of_weights = None
        if ctx.needs_input_grad[0]:
            of_table = spread_rows(indices, weights, gradient, ctx.rows)
        if table is not None:
            of_weights = torch.einsum("pc,pkc->pk", gradient, table[indices.long()])
        return of_table, None, of_weights


def corner_products(
    x: Float[Tensor, "2 #n"], y: Float[Tensor, "2 #n"], z: Float[Tensor, "2 #n"]
) -> Float[Tensor, "m 8"]:
    """Products over the 8 corners of cells, x fastest, of a factor for the low and the high side of each axis.

    With the factors (1 - u, u) these are the trilinear weights. A factor may be [2, 1].
    """
    return ((z[:, None] * y)[:, :, None] * x).view(8, -1).T.contiguous()


def corner_offsets(width: int, height: int, device: torch.device | None = None) -> Int[Tensor, " 8"]:
    """Distances (int64) of the corners of a cell from its lowest one in a flat lattice, x fastest."""
    step = torch.arange(2, device=device)
    return ((step[:, None, None] * height + step[:, None]) * width + step).reshape(-1)


def trilinear(lattice: Float[Tensor, "z y x c"], points: Float[Tensor, "n 3"]) -> Float[Tensor, "n c"]:
    """Values of a lattice over [-1, 1]^3 at points (x, y, z); the outermost lattice points lie on the cube's faces.

    A point outside takes the nearest value inside. Differentiable in the lattice, not in the points.
    """
    points = points.detach()
    if lattice.device.type != "cpu" or not len(points) or not (lattice.requires_grad and torch.is_grad_enabled()):
        return trilinear_reference(lattice, points)
    depth, height, width, channels = lattice.shape
    last = points.new_tensor([[width], [height], [depth]]) - 1
    at = points.T.contiguous().add_(1).mul_(0.5 * last).clamp_min_(0).minimum(last)
    cell = torch.minimum(at.to(torch.int32), last.to(torch.int32) - 1)
    first = cell[2].mul(height).add_(cell[1]).mul_(width).add_(cell[0])
    local = at.sub_(cell)  # [3, N]
    weights = corner_products(*torch.stack((1 - local, local)).unbind(1))
    offsets = corner_offsets(width, height).int()
    return weighted_rows(lattice.reshape(-1, channels), first[:, None] + offsets, weights)


def trilinear_reference(lattice: Tensor, points: Tensor) -> Tensor:
    """`trilinear` by `grid_sample`."""
    at = points.view(1, 1, 1, -1, 3)
    values = F.grid_sample(lattice.permute(3, 0, 1, 2)[None], at, padding_mode="border", align_corners=True)
    return values[0, :, 0, 0].T
