"""Stable Diffusion 1.x and 2.x: a UNet on latents, told one CLIP encoder's tokens. The base of SDXL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distill3d.diffusion.schedule import Table
from distill3d.priors.base import FrozenPrior, prediction_kind
from distill3d.priors.components.autoencoder import Autoencoder
from distill3d.priors.components.text_encoders import Clip
from distill3d.priors.options import Setup
from distill3d.types import Condition

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
TINY = "madebyollin/taesd"
UNetPrior = TypeVar("UNetPrior", bound="LatentPrior")


class LatentPrior(FrozenPrior):
    """A latent diffusion model with a UNet behind the Prior protocol; `controlnet` may be attached to it."""

    controlnet: Any = None

    def ask(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The UNet's prediction, with the ControlNet's residuals where there is one."""
        assert isinstance(self.schedule, Table), "a UNet counts its noise levels"
        inputs = x_t.contiguous(memory_format=torch.channels_last)
        steps, told = self.schedule.timestep(t), self.told(condition)
        more = told | self._residuals(inputs, steps, condition, told)
        return self.network(inputs, steps, condition.hidden, return_dict=False, **more)[0]

    def told(self, condition: Condition) -> dict[str, Any]:
        """What the network is told beside time and tokens."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        """The networks in memory by part."""
        return super().modules() | ({} if self.controlnet is None else {"controlnet": self.controlnet})

    def _residuals(self, x_t: Tensor, steps: Tensor, condition: Condition, told: dict[str, Any]) -> dict[str, Any]:
        if self.controlnet is None:
            return {}
        if condition.control is None:
            raise ValueError(f"{self.name} is steered by a ControlNet, and these conditions carry no picture for it")
        size = (self.image_size, self.image_size)
        picture = nn.functional.interpolate(condition.control, size, mode="bilinear", antialias=True)
        down, middle = self.controlnet(x_t, steps, condition.hidden, controlnet_cond=picture, return_dict=False, **told)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


@dataclass(frozen=True)
class OneClip:
    """The last layer of a CLIP text encoder."""

    clip: Clip

    def encode(self, text: str) -> Condition:
        """hidden [1, windows L, C]."""
        return Condition(self.clip.states(text)[-1])

    def modules(self) -> dict[str, nn.Module]:
        """The encoder."""
        return {"text_encoder": self.clip.encoder}


def build(setup: Setup) -> LatentPrior:
    """The prior of a StableDiffusionPipeline folder; ValueError where its parts do not fit."""
    return build_kind(LatentPrior, setup)


def build_kind(kind: type[UNetPrior], setup: Setup, classes: str | None = None) -> UNetPrior:
    """The same as a prior of a class of its own, whose network has the class_embed_type `classes`."""
    parts, where = setup.parts, setup.where
    unet, codec = setup.network("unet"), setup.autoencoder(TINY)
    check_unet(unet, codec.channels)
    if unet.config.addition_embed_type is not None or unet.config.class_embed_type != classes:
        raise ValueError(
            "the network wants more than text (unCLIP, a camera): use a text-to-image model, or mark one of several "
            "views as docs/priors.md says"
        )
    width = parts.config("text_encoder").get("hidden_size")
    if width != unet.config.cross_attention_dim:
        raise ValueError(
            f"the text encoder gives {width} channels, the network expects {unet.config.cross_attention_dim}: "
            "the parts belong to different models"
        )

    def load() -> OneClip:
        clip = Clip(parts.tokenizer("tokenizer"), parts.model("text_encoder"), where.device, where.dtype)
        setup.teach({"": clip})
        return OneClip(clip)

    return assemble(kind, setup, unet, codec, load)


def assemble(kind: type[UNetPrior], setup: Setup, unet: Any, codec: Autoencoder, load: Callable[[], Any]) -> UNetPrior:
    """A prior of this class from its parts, steered by a ControlNet if one is wanted; `load` gives the encoders."""
    scheduler = setup.parts.config("scheduler")
    size = setup.size(unet.config.sample_size, codec.factor, 2 ** (len(unet.config.block_out_channels) - 1))
    prior = kind(
        unet, codec, setup.texts(load), Table.from_config(scheduler), prediction_kind(scheduler), size, setup.where,
        setup.name,
    )  # fmt: skip
    setup.steer(prior)
    return prior


def check_unet(unet: Any, channels: int) -> None:
    """Raises ValueError unless the UNet maps the autoencoder's latents to latents."""
    u = unet.config
    if not u.in_channels == u.out_channels == channels:
        raise ValueError(
            f"the network maps {u.in_channels} channels to {u.out_channels}, the autoencoder has {channels}: "
            "inpainting, depth and upscaling models are not supported, use a text-to-image model"
        )
