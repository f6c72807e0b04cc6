"""Parameters that change their size during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def replace_parameter(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    change: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replaces `old` by `new` in an optimizer.

    Args:
        change: maps the moments of the old parameter to those of the new one; by default they start from zero.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, {})
    if change is not None and state:
        optimizer.state[new] = {k: change(v) if v.shape == old.shape else v for k, v in state.items()}
