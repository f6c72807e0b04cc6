"""A prior made to fit or to run faster: layers sent to the device when needed, the network compiled."""

from __future__ import annotations

from typing import Any

import torch

from distill3d.priors.frozen import FrozenPrior


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
