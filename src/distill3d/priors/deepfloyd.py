"""DeepFloyd IF, first stage: a UNet on pictures of 64 pixels, told a T5 encoder's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill3d.diffusion.schedule import Table
from distill3d.priors.base import FrozenPrior, prediction_kind
from distill3d.priors.components.autoencoder import Pixels
from distill3d.priors.components.text_encoders import T5
from distill3d.priors.options import Setup
from distill3d.types import Condition

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}
TOKENS = 77


class PixelPrior(FrozenPrior):
    """A pixel-space diffusion model behind the Prior protocol: x is the picture in [-1, 1]."""

    def ask(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The UNet's noise; the channels of its learned variance, which only a sampler would use, are dropped."""
        assert isinstance(self.schedule, Table), "a UNet counts its noise levels"
        inputs = x_t.contiguous(memory_format=torch.channels_last)
        out = self.network(inputs, self.schedule.timestep(t), condition.hidden, return_dict=False)[0]
        return out[:, : x_t.shape[1]]


@dataclass(frozen=True)
class OneT5:
    """A T5 encoder, told lower-case texts as IF was."""

    t5: T5

    def encode(self, text: str) -> Condition:
        """hidden [1, 77, C]."""
        return Condition(self.t5.states(text.lower().strip()))

    def modules(self) -> dict[str, nn.Module]:
        """The encoder."""
        return {"text_encoder": self.t5.encoder}


def build(setup: Setup) -> PixelPrior:
    """The prior of an IFPipeline folder; ValueError for another stage than the first, or an unfit text encoder."""
    parts, where = setup.parts, setup.where
    setup.refuse("--vae, --controlnet and --token", setup.options.vae, setup.options.controlnet, setup.options.token)
    unet, scheduler = setup.network("unet"), parts.config("scheduler")
    codec, u = Pixels(), unet.config
    if u.in_channels != codec.channels or u.out_channels not in (codec.channels, 2 * codec.channels):
        raise ValueError(f"the network maps {u.in_channels} channels to {u.out_channels}: only the first stage of IF, "
                         "from text to a picture, is supported")  # fmt: skip
    width, wanted = parts.config("text_encoder").get("d_model"), u.encoder_hid_dim or u.cross_attention_dim
    if width != wanted:
        raise ValueError(f"the text encoder gives {width} channels, the network expects {wanted}: "
                         "the parts belong to different models")  # fmt: skip

    def load() -> OneT5:
        tokenizer, encoder = parts.tokenizer("tokenizer"), parts.model("text_encoder")
        return OneT5(T5(tokenizer, encoder, TOKENS, where.device, where.dtype, masked=True))

    return PixelPrior(
        unet, codec, setup.texts(load), Table.from_config(scheduler), prediction_kind(scheduler),
        setup.size(u.sample_size, codec.factor, 2 ** (len(u.block_out_channels) - 1)), where, setup.name,
    )  # fmt: skip
