"""Trains the matting network of the multi-view prior: which pixels of a decoded image show the toy.

A sampled toy may have the color of its background, a white sail before light gray for example, so the color of a pixel
alone does not tell. The network sees what sampling yields: images through the autoencoder, with errors in the latents,
uneven backgrounds and stains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill3d.priors.components.matting import MattingNetwork
from distill3d.toybox.fitting import Fit, initialize, mixed_precision, train
from distill3d.toybox.groups import Groups

BATCH = 32
GRAYS = (0.45, 1.0)
LATENT_ERROR = 0.25  # largest standard deviation of the errors in the latents


def draw_matting_batch(
    groups: Groups, rng: np.random.Generator, generator: torch.Generator
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
    """Toys over uneven gray backgrounds, half of them with a colored stain, and their coverage."""
    toys, views = rng.integers(len(groups.cutouts), size=BATCH), rng.integers(groups.cutouts.shape[1], size=BATCH)
    layers = torch.from_numpy(groups.cutouts[toys, views]).movedim(-1, 1).float().div_(255)
    low, high = GRAYS
    background = low + (high - low) * torch.rand(BATCH, 1, 1, 1, generator=generator)
    background = background + 0.05 * _smooth_noise(4, generator)
    stain = (4 * _smooth_noise(5, generator) - 5).clamp(0, 1)
    stain = stain * (torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5)
    background = torch.lerp(background.expand(-1, 3, -1, -1), torch.rand(BATCH, 3, 1, 1, generator=generator), stain)
    return (layers[:, :3] + (1 - layers[:, 3:]) * background).clamp(0, 1), layers[:, 3:]


def _smooth_noise(cells: int, generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    noise = torch.randn(BATCH, 1, cells, cells, generator=generator)
    return F.interpolate(noise, size=(64, 64), mode="bicubic")


def train_matting(folder: Path, fit: Fit, groups: Groups, autoencoder: Any) -> MattingNetwork:
    """Trains the network with a binary cross-entropy; resumes from `folder`/matting.pt if it exists.

    Args:
        autoencoder: the frozen AutoencoderTiny, as from `networks.read_parts`.
    """
    network: Any = MattingNetwork()
    network.to(memory_format=torch.channels_last)
    initialize(network, seed=66)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        images, coverage = draw_matting_batch(groups, rng, generator)
        with torch.no_grad(), mixed_precision():
            latents = autoencoder.encode(2 * images - 1).latents.float()
            error = LATENT_ERROR * torch.rand(BATCH, 1, 1, 1, generator=generator)
            latents = latents + error * torch.randn(latents.shape, generator=generator)
            images = (autoencoder.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        with mixed_precision():
            logits = network.logits(images.contiguous(memory_format=torch.channels_last))
        return F.binary_cross_entropy_with_logits(logits.float(), coverage)

    train("matting", network, fit, loss_of, folder)
    return network
