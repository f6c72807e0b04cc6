"""Priors of true size with random weights: what a step costs does not depend on what the weights know.

Nothing is downloaded. The configurations are those of the published models; texts are random embeddings of the
right shape, because text encoders are gone before the first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distill3d.diffusion.schedule import Flow, stable_diffusion
from distill3d.planning.models import SD21_UNET, SD35_MEDIUM, SDXL_UNET, VAE
from distill3d.priors.base import DeviceConfig, FrozenPrior
from distill3d.priors.components.autoencoder import Autoencoder
from distill3d.priors.components.text_cache import TextCache
from distill3d.priors.components.text_encoders import TextEncoders
from distill3d.priors.flow import SD3Prior
from distill3d.priors.stable_diffusion import LatentPrior, SDXLPrior
from distill3d.types import Condition

MODELS = ("sd21", "sdxl", "sd35")


def random_embeddings(hidden: tuple[int, int], pooled: int | None) -> TextEncoders:
    """Random embeddings of the right shape: hidden [1, L, C] and, for some models, pooled [1, P]."""
    generator = torch.Generator().manual_seed(1)

    def encode(text: str) -> Condition:
        summary = None if pooled is None else torch.randn(1, pooled, generator=generator)
        return Condition(torch.randn(1, *hidden, generator=generator), summary)

    return TextEncoders(encode, {})


def build(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False
) -> FrozenPrior:
    """The prior of a model's size; ValueError for a name that is not in MODELS."""
    import diffusers

    config = DeviceConfig(torch.device(device), dtype)
    generator = torch.Generator(device).manual_seed(0)

    def autoencoder(**changes: Any) -> Autoencoder:
        vae = random_weights(diffusers.AutoencoderKL, {**VAE, **changes}, config, torch.float32, generator)
        return Autoencoder(vae, config.device, dtype, checkpointing=checkpointing)

    def texts(hidden: tuple[int, int], pooled: int | None = None) -> TextCache:
        return TextCache(lambda: random_embeddings(hidden, pooled), config.device)

    match name:
        case "sd21":
            unet = random_weights(diffusers.UNet2DConditionModel, SD21_UNET, config, dtype, generator)
            return LatentPrior(unet, autoencoder(), texts((77, 1024)), stable_diffusion(), "eps", 64, config, name)
        case "sdxl":
            unet = random_weights(diffusers.UNet2DConditionModel, SDXL_UNET, config, dtype, generator)
            text_cache = texts((77, 2048), 1280)
            return SDXLPrior(unet, autoencoder(), text_cache, stable_diffusion(), "eps", 128, config, name)
        case "sd35":
            network = random_weights(diffusers.SD3Transformer2DModel, SD35_MEDIUM, config, dtype, generator)
            codec = autoencoder(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
            return SD3Prior(network, codec, texts((333, 4096), 2048), Flow(3.0), "velocity", 128, config, name)
    raise ValueError(f"no model of true size is called {name!r}: use {', '.join(MODELS)}")


def random_weights(
    network_class: Any, settings: dict[str, Any], config: DeviceConfig, dtype: torch.dtype, generator: torch.Generator
) -> Any:
    """A network of this configuration, made in its final precision: never twice in memory, never as float32."""
    with torch.device("meta"):
        network = network_class(**settings)
    network = nn.Module.to(network, dtype=dtype).to_empty(device=config.device)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.02, generator=generator)
    return network
