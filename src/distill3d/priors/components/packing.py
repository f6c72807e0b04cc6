"""Convolutions that reorder their weights once and not at every call, on the CPU and without gradients.

oneDNN computes with weights in a layout of its own and brings them into it at each call. Where images are small and
channels are many, as in the middle of Stable Diffusion's UNet, that takes longer than the convolution itself. With the
few channels of the bundled priors nothing is gained. docs/performance.md has the measurement.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

TYPES = (torch.float32, torch.bfloat16)


def pack_convolutions(network: nn.Module) -> None:
    """Lets the plain convolutions of a network on the CPU keep a reordered copy of their weights, in place.

    The copy takes the memory of the weights once more. It is made at the first call without gradients, and again
    whenever the weights have changed. Where this torch has no oneDNN, nothing changes.
    """
    found = [module for module in network.modules() if type(module) is nn.Conv2d and module.padding_mode == "zeros"]
    if _works():
        for module in found:
            module.__class__ = PackedConv2d


class PackedConv2d(nn.Conv2d):
    """A convolution whose weights are reordered once. With a gradient, or off the CPU, it is the plain one."""

    _packed: tuple[tuple[int, int], Tensor] | None = None  # pointer and version of the weights, and the copy

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv2d`."""
        if not self._can_pack(input):
            return super().forward(input)
        key = (self.weight.data_ptr(), self.weight._version)
        if self._packed is None or self._packed[0] != key:
            self._packed = key, _reordered(self)
        places = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(input, self._packed[1], self.bias, *places, "none", [], "")

    def _can_pack(self, input: Tensor) -> bool:
        plain = type(input) is Tensor and input.device.type == self.weight.device.type == "cpu"
        plain = plain and not isinstance(self.padding, str) and not torch.compiler.is_compiling()
        graph = torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in self.parameters()))
        matching = input.ndim == 4 and input.dtype == self.weight.dtype and input.dtype in TYPES
        return plain and matching and not graph and input.numel() > 0 and not torch.is_autocast_enabled("cpu")

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module makes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


@torch.no_grad()
def _reordered(module: nn.Conv2d) -> Tensor:
    """The weights in oneDNN's layout. It does not depend on the size of an input, so neither does any value."""
    places = (module.padding, module.stride, module.dilation, module.groups)
    return torch.ops.mkldnn._reorder_convolution_weight(module.weight.detach(), *places, None)


@functools.cache
def _works() -> bool:
    """Whether this torch has the two operators, which are not part of its public interface, and they compute this."""
    generator = torch.Generator().manual_seed(0)
    convolution: Any = nn.utils.skip_init(nn.Conv2d, 4, 4, 3, padding=1, bias=False)  # draws no weights
    convolution.requires_grad_(False).weight.copy_(torch.randn(4, 4, 3, 3, generator=generator))
    x = torch.randn(2, 4, 8, 8, generator=generator)
    expected = convolution(x)
    convolution.__class__ = PackedConv2d
    try:
        return torch.allclose(convolution(x), expected, atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False
