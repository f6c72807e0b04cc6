"""Few waits for an accelerator: every copy to or from it, and every size that the host asks for, is one.

docs/gpu.md counts them. On the CPU nothing here changes a value.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def at_once(device: torch.device | str, *tensors: Tensor) -> list[Tensor]:
    """Tensors on a device, without gradients. Those of the host go there in one copy, and `on_host` still knows them.

    They must not be changed in place. They are packed as bytes, the widest types first, so that all are aligned.
    """
    device = torch.device(device)
    order = [i for i, x in enumerate(tensors) if x.device.type == "cpu" and x.device != device]
    moved = [x if i in order else x.to(device) for i, x in enumerate(tensors)]
    if order:
        order.sort(key=lambda i: -tensors[i].element_size())
        parts = [tensors[i].detach().contiguous().reshape(-1).view(torch.uint8) for i in order]
        ends = accumulate((len(part) for part in parts), initial=0)
        packed = torch.cat(parts).to(device)
        for i, (begin, end) in zip(order, pairwise(ends), strict=True):
            moved[i] = packed[begin:end].view(tensors[i].dtype).view(tensors[i].shape)
            vars(moved[i])["came_from"] = tensors[i]
    return moved


def on_host(x: Tensor) -> Tensor:
    """The values of x on the host, for what is decided there: known if `at_once` brought x to its device."""
    return vars(x).get("came_from", x).cpu()


def marked(mask: Bool[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """The indices where `mask` is true, of which the host knows that there are `count`: nothing waits."""
    if mask.device.type == "cpu":
        return mask.nonzero()[:, 0]
    place = torch.where(mask, mask.cumsum(0) - 1, count)  # those that are not marked share a place at the end
    index = torch.arange(len(mask), device=mask.device)
    return index.new_empty(count + 1).scatter_(0, place, index)[:count]


def as_floats(*scalars: Tensor) -> list[float]:
    """Tensors without dimensions as numbers, in one copy."""
    return torch.stack([x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in scalars]).tolist()
