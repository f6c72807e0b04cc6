"""Parameters that change their size while an optimizer holds them."""

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
    """Puts `new` where an optimizer holds `old`.

    `change` makes new moments [like new] out of the old ones; without it they start anew.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, {})
    if change is not None and state:
        optimizer.state[new] = {k: change(v) if v.shape == old.shape else v for k, v in state.items()}
