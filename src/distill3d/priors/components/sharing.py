"""What the rows of a call have in common is computed once.

Guidance evaluates a sample under several texts at once: rows with one x_t and one t. Up to its first cross-attention a
UNet has not seen the text, so these rows are equal there, and one of them stands for all. Of Stable Diffusion 2.1 this
is 8 % of a row's arithmetic, most of it the self-attention at the highest resolution.

Whether rows are equal is seen by comparing them, which is free on a CPU; elsewhere the host would wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def share_equal_rows(unet: Any) -> None:
    """Makes the layers of a UNet of diffusers before its first cross-attention compute equal rows once, in place.

    It does so on a CPU and without gradients, for rows that are all equal or whose second half repeats the first. The
    layers must treat rows separately, which those of multi-view models do not.
    """
    for module in _before_text(unet):
        shared = _Shared()
        module.register_forward_pre_hook(shared.before, with_kwargs=True)
        module.register_forward_hook(shared.after)


def _before_text(unet: Any) -> Iterator[nn.Module]:
    """The layers that run before the first cross-attention."""
    yield unet.conv_in
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", None)
        if attentions:
            yield block.resnets[0]
            first = getattr(attentions[0], "transformer_blocks", None)
            if first and first[0].attn1 is not None and not first[0].only_cross_attention:
                yield first[0].attn1
            return
        yield from block.resnets
        yield from block.downsamplers or ()


class _Shared:
    """Takes equal rows away before a layer and puts them back after it."""

    def __init__(self) -> None:
        self.repeats = 1

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.repeats = _repeats(tensors)
        if self.repeats == 1:
            return None
        rows = len(tensors[0]) // self.repeats

        def some(value: Any) -> Any:
            return value[:rows] if isinstance(value, Tensor) else value

        return tuple(map(some, args)), {name: some(value) for name, value in kwargs.items()}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return output.repeat(self.repeats, *[1] * (output.ndim - 1)) if self.repeats > 1 else None


def _repeats(tensors: list[Tensor]) -> int:
    """How often the first rows are repeated, in all of the tensors [N, ...]: N, 2 or 1 times."""
    rows = {len(x) for x in tensors}
    plain = all(type(x) is Tensor and x.device.type == "cpu" for x in tensors)  # not while a run is only planned
    if len(rows) != 1 or not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 1
    (n,) = rows
    if n % 2 or not all(torch.equal(x[: n // 2], x[n // 2 :]) for x in tensors):
        return 1
    return n if all(torch.equal(x[1:], x[:1].expand_as(x[1:])) for x in tensors) else 2
