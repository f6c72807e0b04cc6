"""Random draws: always from a generator that the caller owns.

A generator may be one for the whole batch, or a sequence of one per sample. With one per sample a batch
of n draws exactly what n batches of one would, however many draws each sample needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


def normal(
    like: Float[Tensor, "n *shape"], generator: Generators, rows: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n *shape"]:
    """N(0, 1) noise with the shape, dtype and device of `like`; rows are the indices of its samples in the batch.

    Raises ValueError if there is more than one generator, but not one per sample.
    """
    return standard_normal(tuple(like.shape), generator, None if rows is None else rows.tolist()).to(like)


def standard_normal(
    shape: tuple[int, ...], generator: Generators, rows: Sequence[int] | None = None
) -> Float[Tensor, "n *shape"]:
    """`normal` where the generator is, float32; rows as numbers."""
    return _draw(torch.randn, shape, generator, rows)


def uniform(count: int, generator: Generators) -> Float[Tensor, " count"]:
    """Numbers in [0, 1), float64, one per sample; ValueError as in `normal`."""
    return _draw(torch.rand, (count,), generator, None, torch.float64)


def per_group(generator: Generators, views: int) -> Generators:
    """One generator per group of `views` samples, that of the first, for draws that a group shares."""
    return generator if isinstance(generator, torch.Generator) else generator[::views]


def _draw(
    function: Callable[..., Tensor],
    shape: tuple[int, ...],
    generator: Generators,
    rows: Sequence[int] | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if isinstance(generator, torch.Generator):
        return function(shape, generator=generator, device=generator.device, dtype=dtype)
    owners = range(shape[0]) if rows is None else rows
    if len(generator) <= max(owners, default=-1) or (rows is None and len(generator) != shape[0]):
        raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}: pass one, or one per sample")
    parts = [function(shape[1:], generator=(g := generator[i]), device=g.device, dtype=dtype) for i in owners]
    return torch.stack(parts)
