"""Flow-matching transformers: Stable Diffusion 3 and 3.5, and FLUX.1.

x_t = (1 - sigma) x0 + sigma eps, and the network says the velocity eps - x0. The shift of a model is part of its
schedule, so that even steps in t are the steps of its own sampler (`diffusion.schedule.Flow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.diffusion.schedule import Flow
from distill3d.priors.base import FrozenPrior
from distill3d.priors.components.text_encoders import T5, Clip
from distill3d.priors.options import Setup
from distill3d.types import Condition

CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZER = ("T5Tokenizer", "T5TokenizerFast")
VAE = ("AutoencoderKL", "AutoencoderTiny")

SD3_PARTS = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": VAE,
    "text_encoder": ("CLIPTextModelWithProjection",),
    "tokenizer": CLIP_TOKENIZER,
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": CLIP_TOKENIZER,
    "text_encoder_3": ("T5EncoderModel",),
    "tokenizer_3": T5_TOKENIZER,
}
SD3_OPTIONAL = ("text_encoder_3", "tokenizer_3")
SD3_TINY, SD3_TOKENS = "madebyollin/taesd3", 256

FLUX_PARTS = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": VAE,
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": CLIP_TOKENIZER,
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer_2": T5_TOKENIZER,
}
FLUX_TINY, FLUX_TOKENS = "madebyollin/taef1", 512
FLUX_SIZE = 128  # latents a side for pictures of 1024 pixels: its transformer has no size of its own


class SD3Prior(FrozenPrior):
    """Stable Diffusion 3 and 3.5 behind the Prior protocol."""

    def ask(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity."""
        return self.network(
            x_t,
            encoder_hidden_states=condition.hidden,
            pooled_projections=condition.pooled,
            timestep=1000 * self.schedule.sigma(t),
            return_dict=False,
        )[0]


class FluxPrior(FrozenPrior):
    """FLUX.1 behind the Prior protocol.

    FLUX.1 [dev] was distilled from a guided model: it is told the guidance it should act as (`strength`) and
    obeys in one evaluation. The guidance scale of an objective comes on top of that, between the prompt and the
    negative one; at scale 1 one evaluation is all it takes.
    """

    strength: float = 3.5

    def ask(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity, patches of 2 x 2 latents being its tokens."""
        n, c, h, w = x_t.shape
        tokens = x_t.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x_t)
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((n,), self.strength, device=x_t.device, dtype=torch.float32)
        out = self.network(
            tokens,
            timestep=self.schedule.sigma(t),
            guidance=guidance,
            pooled_projections=condition.pooled,
            encoder_hidden_states=condition.hidden,
            txt_ids=places.new_zeros(condition.hidden.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return out.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


@dataclass(frozen=True)
class TwoClipsAndT5:
    """SD 3: two CLIP encoders side by side, then T5's tokens; zeros where T5 was left away."""

    first: Clip
    second: Clip
    t5: T5 | None
    width: int  # of a token

    def encode(self, text: str) -> Condition:
        """hidden [1, 77 + 256, width], pooled [1, P1 + P2]."""
        clips = (self.first, self.second)
        side = torch.cat([clip.states(text, 1, warn=clip is self.first)[-2] for clip in clips], dim=-1)
        side = nn.functional.pad(side, (0, self.width - side.shape[-1]))
        t5 = side.new_zeros(1, SD3_TOKENS, self.width) if self.t5 is None else self.t5.states(text)
        pooled = torch.cat([clip.pooled(text) for clip in clips], dim=-1)
        return Condition(torch.cat([side, t5], dim=1), pooled)

    def modules(self) -> dict[str, nn.Module]:
        """The encoders."""
        found = {"text_encoder": self.first.encoder, "text_encoder_2": self.second.encoder}
        return found | ({} if self.t5 is None else {"text_encoder_3": self.t5.encoder})


@dataclass(frozen=True)
class ClipAndT5:
    """FLUX: T5's tokens, and CLIP's summary of a text."""

    clip: Clip
    t5: T5

    def encode(self, text: str) -> Condition:
        """hidden [1, 512, C], pooled [1, P]."""
        return Condition(self.t5.states(text), self.clip.pooled(text))

    def modules(self) -> dict[str, nn.Module]:
        """The encoders."""
        return {"text_encoder": self.clip.encoder, "text_encoder_2": self.t5.encoder}


def build_sd3(setup: Setup) -> SD3Prior:
    """The prior of a StableDiffusion3Pipeline folder; ValueError where its parts do not fit."""
    parts, where = setup.parts, setup.where
    setup.refuse("--controlnet and --token", setup.options.controlnet, setup.options.token)
    network, codec = setup.network("transformer"), setup.autoencoder(SD3_TINY)
    config: Any = network.config
    _check_channels(config.in_channels, codec.channels)
    size = setup.size(config.sample_size, codec.factor, config.patch_size)
    largest = config.pos_embed_max_size * config.patch_size
    if size > largest:
        raise ValueError(f"the picture size can be {largest * codec.factor} at most for {setup.name}, "
                         f"got {size * codec.factor}")  # fmt: skip

    def load() -> TwoClipsAndT5:
        first, second = (
            Clip(parts.tokenizer(f"tokenizer{n}"), parts.model(f"text_encoder{n}"), where.device, where.dtype)
            for n in ("", "_2")
        )
        t5 = None
        if parts.has("text_encoder_3"):
            tokenizer, encoder = parts.tokenizer("tokenizer_3"), parts.model("text_encoder_3")
            t5 = T5(tokenizer, encoder, SD3_TOKENS, where.device, where.dtype)
        return TwoClipsAndT5(first, second, t5, config.joint_attention_dim)

    schedule = Flow.from_config(parts.config("scheduler"), (size // config.patch_size) ** 2)
    return SD3Prior(network, codec, setup.texts(load), schedule, "velocity", size, where, setup.name)


def build_flux(setup: Setup) -> FluxPrior:
    """The prior of a FluxPipeline folder; ValueError where its parts do not fit."""
    parts, where = setup.parts, setup.where
    setup.refuse("--controlnet and --token", setup.options.controlnet, setup.options.token)
    network, codec = setup.network("transformer"), setup.autoencoder(FLUX_TINY)
    config: Any = network.config
    _check_channels(config.in_channels, 4 * codec.channels)
    size = setup.size(FLUX_SIZE, codec.factor, 2)

    def load() -> ClipAndT5:
        clip = Clip(parts.tokenizer("tokenizer"), parts.model("text_encoder"), where.device, where.dtype)
        tokenizer, encoder = parts.tokenizer("tokenizer_2"), parts.model("text_encoder_2")
        return ClipAndT5(clip, T5(tokenizer, encoder, FLUX_TOKENS, where.device, where.dtype))

    schedule = Flow.from_config(parts.config("scheduler"), (size // 2) ** 2)
    prior = FluxPrior(network, codec, setup.texts(load), schedule, "velocity", size, where, setup.name)
    prior.strength = setup.options.distilled_guidance
    return prior


def _check_channels(network: int, autoencoder: int) -> None:
    if network != autoencoder:
        raise ValueError(f"the network takes {network} channels, the autoencoder gives {autoencoder}: "
                         "the parts belong to different models, or this is no text-to-image model")  # fmt: skip
