"""Convolutions that reorder their weights once and not at every call, on the CPU and without gradients.

oneDNN computes with weights in a layout of its own and brings them into it at each call. Where images are small and
channels are many, as in the middle of Stable Diffusion's UNet, that takes longer than the convolution itself. With the
few channels of the bundled priors nothing is gained. docs/performance.md has the measurement.

The reordered weights are a copy. Where the weights are mapped from their file, the copy is made from the file: nothing
reads the mapped ones any more, so they take no memory, and both together take as much as the plain ones alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.priors.components.mapped import Mappings

TYPES = (torch.float32, torch.bfloat16)
LARGE = 2**19  # values of a weight from which packing pays: 320 x 320 channels at 3 x 3


def pack_convolutions(network: nn.Module) -> None:
    """Lets the plain convolutions of a network on the CPU keep a reordered copy of their weights, in place.

    The copy takes the memory of the weights once more. It is made at the first call without gradients, and again
    whenever the weights have changed. Where this torch has no oneDNN, nothing changes.
    """
    if _works():
        for module in _plain_convolutions(network):
            module.__class__ = PackedConv2d


def pack_mapped_convolutions(network: nn.Module) -> None:
    """As `pack_convolutions`, for large convolutions whose weights are mapped from their file: costs no memory.

    The weights must be as they were loaded.
    """
    found = [module for module in _plain_convolutions(network) if module.weight.numel() >= LARGE]
    mappings = Mappings.of_this_process()
    for module in found if _works() else ():
        stored = mappings.read(module.weight) if module.weight.dtype in TYPES else None
        if stored is not None:
            packed: Any = module
            packed.__class__ = PackedConv2d
            packed._packed = packed._key(), _reordered(module, stored)


def _plain_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [m for m in network.modules() if type(m) is nn.Conv2d and m.padding_mode == "zeros"]


class PackedConv2d(nn.Conv2d):
    """A convolution whose weights are reordered once. With a gradient, or off the CPU, it is the plain one."""

    _packed: tuple[tuple[int, int], Tensor] | None = None  # pointer and version of the weights, and the copy

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv2d`."""
        if not self._can_pack(input):
            return super().forward(input)
        if self._packed is None or self._packed[0] != self._key():
            self._packed = self._key(), _reordered(self, self.weight)
        places = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(input, self._packed[1], self.bias, *places, "none", [], "")

    def _key(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.weight._version

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
def _reordered(module: nn.Conv2d, weight: Tensor) -> Tensor:
    """Weights in oneDNN's layout. It does not depend on the size of an input, so neither does any value."""
    places = (module.padding, module.stride, module.dilation, module.groups)
    return torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *places, None)


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
