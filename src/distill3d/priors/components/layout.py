"""The memory format of convolutions, chosen by measurement: docs/performance.md has the table and its command.

Accelerators have their fast kernels for channels_last. On a CPU, oneDNN brings the weights of each call into a layout
of its own anyway, and the plain format is faster in a UNet, whose attention and group norms work on it. Converting a
network also copies its convolutions, which the plain format leaves mapped in their file.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
# An autoencoder of so few parameters (the bundled ones have 0.3 million) is fast in channels_last on a CPU too.
SMALL = 10_000_000


def network_format(device: torch.device) -> torch.memory_format:
    """The memory format of a denoising network on this device."""
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def autoencoder_format(vae: nn.Module, device: torch.device) -> torch.memory_format:
    """The memory format of an autoencoder on this device."""
    small = sum(parameter.numel() for parameter in vae.parameters()) < SMALL
    return torch.channels_last if small else network_format(device)


def in_format(network: M, memory_format: torch.memory_format) -> M:
    """The network with its weights in this format, in place; nothing is copied in the plain one."""
    if memory_format != torch.contiguous_format:
        network.to(memory_format=memory_format)  # type: ignore[call-overload]  # in torch's stubs only with a device
    return network
