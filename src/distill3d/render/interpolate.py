"""Weighted sums of a table's rows: what every interpolation in a lattice, a texture or a hash grid is.

On the CPU the product with a sparse matrix [P, N] with K entries a row, whose gradient is the transposed product;
elsewhere, and as the slow readable reference, indexing.
"""

from __future__ import annotations

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights[p, k] table[indices[p, k]] as [P, C], differentiable in the table and in the weights.

    Args:
        table: [N, C].
        indices: [P, K], integers below N.
        weights: [P, K].
    """
    if table.device.type != "cpu" or not len(indices):
        return reference(table, indices, weights)
    return _WeightedRows.apply(table, indices.to(torch.int32), weights)


def reference(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The same by indexing."""
    return (table[indices.long()] * weights[..., None]).sum(1)


def spread_rows(indices: Tensor, weights: Tensor, values: Tensor, rows: int) -> Tensor:
    """The transposed product on the CPU: [rows, C], to which row indices[p, k] weights[p, k] values[p] was added.

    Args:
        indices: [P, K], int32 and below `rows`.
        weights: [P, K].
        values: [P, C].
    """
    ends = torch.arange(0, indices.numel() + 1, indices.shape[1], dtype=torch.int32)
    # torch scatters row by row here; scipy's loop over a column matrix is 20 times faster.
    matrix = scipy.sparse.csc_matrix(
        (weights.reshape(-1).numpy(), indices.reshape(-1).numpy(), ends.numpy()), shape=(rows, len(indices))
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
