"""A prior made to fit or to run faster: its precision, layers sent to the device when needed, the network compiled."""

from __future__ import annotations

from typing import Any

import torch

from distill3d.priors.base import FrozenPrior


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device computes it in hardware, which is about twice as fast, else float32.

    Weights and gradients of a scene stay float32; what a prior says of them changes by less than it changes from
    one seed to the next.
    """
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:  # what torch knows of a CPU is not part of its interface, so it may be gone one day
        asked = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        fast = torch.device(device).type == "cpu" and any(f() for f in asked)
    return torch.bfloat16 if fast else torch.float32


def offloaded(prior: FrozenPrior) -> None:
    """Sends each layer of the denoising network, which lies in main memory, to the prior's device for its turn.

    Raises ValueError where there is no other device than the main memory's.
    """
    if prior.device.type == "cpu":
        raise ValueError("--offload sends layers from main memory to a GPU: choose one with --device, or leave it away")
    network: Any = prior.network
    network.enable_group_offload(prior.device, torch.device("cpu"), offload_type="leaf_level")


def compiled(prior: FrozenPrior) -> None:
    """Compiles the denoising network, in place, at its first call; the VSD student needs it as it was."""
    prior.network.compile()
