"""What scenes do with their parameters: resize them during training, and store colors as logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
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


def color_logits(colors: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    """Logits of colors that are clamped to [0.02, 0.98]: logits beyond would hardly move."""
    return torch.logit(colors.clamp(0.02, 0.98))
