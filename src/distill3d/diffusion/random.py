"""Random draws: always from a generator that the caller owns.

A generator may be one for the whole batch, or a sequence of one per sample. With one per sample a batch
of n draws exactly what n batches of one would, whatever the number of draws each sample needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


def normal(like: Tensor, generator: Generators, rows: Tensor | None = None) -> Tensor:
    """N(0, 1) noise shaped like `like` [N, ...]; rows [N] says which samples these are."""
    return _draw(torch.randn, tuple(like.shape), generator, rows).to(like)


def uniform(count: int, generator: Generators) -> Tensor:
    """Numbers in [0, 1), float64 [count], one per sample."""
    return _draw(torch.rand, (count,), generator, None, dtype=torch.float64)


def leaders(generator: Generators, views: int) -> Generators:
    """The generators of the first of each group of `views` samples, for draws that a group shares."""
    return generator if isinstance(generator, torch.Generator) else generator[::views]


def _draw(function, shape: tuple[int, ...], generator: Generators, rows: Tensor | None, **options):
    if isinstance(generator, torch.Generator):
        return function(shape, generator=generator, device=generator.device, **options)
    owners = range(shape[0]) if rows is None else rows.tolist()
    if len(generator) <= max(owners, default=-1) or (rows is None and len(generator) != shape[0]):
        raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}: pass one, or one per sample")
    parts = [function(shape[1:], generator=(g := generator[i]), device=g.device, **options) for i in owners]
    return torch.stack(parts)
