"""Stable Diffusion XL: a UNet told two CLIP encoders' tokens, the second one's summary, and picture sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill3d.priors import stable_diffusion as latent
from distill3d.priors.components.text_encoders import Clip
from distill3d.priors.options import Setup
from distill3d.priors.stable_diffusion import LatentPrior, assemble, check_unet
from distill3d.types import Condition

PARTS = {
    **latent.PARTS,
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": latent.PARTS["tokenizer"],
}
TINY = "madebyollin/taesdxl"


class SDXLPrior(LatentPrior):
    """Stable Diffusion XL behind the Prior protocol."""

    def told(self, condition: Condition) -> dict[str, Any]:
        """The pooled text, and that pictures are whole and as large as they look (section 2.2 of the report)."""
        s = self.image_size
        sizes = torch.tensor([s, s, 0, 0, s, s], device=condition.hidden.device, dtype=condition.hidden.dtype)
        return {"added_cond_kwargs": {"text_embeds": condition.pooled, "time_ids": sizes.expand(len(condition), -1)}}


@dataclass(frozen=True)
class TwoClips:
    """The layers before the last of two CLIP text encoders, side by side, and the second one's summary."""

    first: Clip
    second: Clip
    zero_if_empty: bool  # SDXL learned the missing prompt as zeros, not as an empty text

    def encode(self, text: str) -> Condition:
        """hidden [1, windows L, C1 + C2], pooled [1, P]."""
        hidden = torch.cat([clip.states(text)[-2] for clip in (self.first, self.second)], dim=-1)
        embedding = Condition(hidden, self.second.pooled(text))
        if text == "" and self.zero_if_empty:
            return Condition(torch.zeros_like(hidden), torch.zeros_like(self.second.pooled(text)))
        return embedding

    def modules(self) -> dict[str, nn.Module]:
        """Both encoders."""
        return {"text_encoder": self.first.encoder, "text_encoder_2": self.second.encoder}


def build(setup: Setup) -> SDXLPrior:
    """The prior of a StableDiffusionXLPipeline folder; ValueError where its parts do not fit."""
    parts, where = setup.parts, setup.where
    unet, codec = setup.network("unet"), setup.autoencoder(TINY)
    check_unet(unet, codec.channels)
    widths: list[Any] = [parts.config(part).get("hidden_size") for part in ("text_encoder", "text_encoder_2")]
    if None in widths or sum(widths) != unet.config.cross_attention_dim:
        raise ValueError(f"the text encoders give {widths} channels, the network expects "
                         f"{unet.config.cross_attention_dim}: the parts belong to different models")  # fmt: skip

    def load() -> TwoClips:
        first, second = (
            Clip(parts.tokenizer(f"tokenizer{n}"), parts.model(f"text_encoder{n}"), where.device, where.dtype)
            for n in ("", "_2")
        )
        setup.teach({"clip_l": first, "clip_g": second})
        return TwoClips(first, second, bool(parts.index.get("force_zeros_for_empty_prompt", True)))

    return assemble(SDXLPrior, setup, unet, codec, load)
