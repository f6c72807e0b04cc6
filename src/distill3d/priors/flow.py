"""Flow-matching transformers: Stable Diffusion 3 and 3.5, and FLUX.1.

x_t = (1 - sigma) x0 + sigma eps, and the network predicts the velocity eps - x0. The timestep shift of a model is part
of its schedule, so that even steps in t are the steps of its own sampler (`diffusion.schedule.Flow`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill3d.diffusion.schedule import Flow
from distill3d.priors.base import FrozenPrior, Network
from distill3d.priors.components.text_encoders import TextEncoders
from distill3d.priors.options import PriorBuilder
from distill3d.types import Condition

CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZER = ("T5Tokenizer", "T5TokenizerFast")
VAE = ("AutoencoderKL", "AutoencoderTiny")

SD3_COMPONENTS = {
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
TAESD3, SD3_TOKENS = "madebyollin/taesd3", 256

FLUX_COMPONENTS = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": VAE,
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": CLIP_TOKENIZER,
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer_2": T5_TOKENIZER,
}
TAEF1, FLUX_TOKENS = "madebyollin/taef1", 512
FLUX_SIZE = 128  # height and width of the latents at 1024 pixels: the transformer itself has no fixed size


class SD3Prior(FrozenPrior):
    """Stable Diffusion 3 and 3.5 behind the Prior protocol."""

    def model_output(self, network: Network, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity [N, *sample_shape]."""
        return network(
            x_t,
            encoder_hidden_states=condition.hidden,
            pooled_projections=condition.pooled,
            timestep=1000 * self.schedule.sigma(t),
            return_dict=False,
        )[0]


class FluxPrior(FrozenPrior):
    """FLUX.1 behind the Prior protocol.

    FLUX.1 [dev] was distilled from a guided model: it is conditioned on the guidance scale (`distilled_guidance`) and
    needs one evaluation. The guidance scale of an objective, between the prompt and the negative prompt, comes on top
    of it; at scale 1 one evaluation is enough.
    """

    distilled_guidance: float = 3.5

    def model_output(self, network: Network, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The velocity [N, *sample_shape]; the tokens of the transformer are patches of 2 x 2 latents."""
        n, c, h, w = x_t.shape
        tokens = x_t.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
        rows, columns = torch.meshgrid(*(torch.arange(n // 2, device=x_t.device) for n in (h, w)), indexing="ij")
        positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x_t)
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((n,), self.distilled_guidance, device=x_t.device, dtype=torch.float32)
        out = network(
            tokens,
            timestep=self.schedule.sigma(t),
            guidance=guidance,
            pooled_projections=condition.pooled,
            encoder_hidden_states=condition.hidden,
            txt_ids=positions.new_zeros(condition.hidden.shape[1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]
        return out.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


def build_sd3(builder: PriorBuilder) -> SD3Prior:
    """The prior of a StableDiffusion3Pipeline folder; ValueError if components do not fit together."""
    builder.reject_options("--controlnet and --token", builder.options.controlnet, builder.options.token)
    network, autoencoder = builder.network("transformer"), builder.autoencoder(TAESD3)
    config: Any = network.config
    _check_channels(config.in_channels, autoencoder.channels)
    size = builder.sample_size(config.sample_size, autoencoder.factor, config.patch_size)
    largest = config.pos_embed_max_size * config.patch_size
    if size > largest:
        raise ValueError(
            f"the image size of {builder.name} can be at most {largest * autoencoder.factor}, "
            f"got {size * autoencoder.factor}"
        )

    def load() -> TextEncoders:
        first, second = builder.clip(""), builder.clip("_2")
        modules = {"text_encoder": first.encoder, "text_encoder_2": second.encoder}
        t5 = builder.t5("_3", SD3_TOKENS) if builder.folder.has("text_encoder_3") else None
        if t5 is not None:
            modules["text_encoder_3"] = t5.encoder

        def encode(text: str) -> Condition:
            """Both CLIPs' tokens side by side, then T5's tokens: zeros if the model comes without T5."""
            side = [first.states(text, 1)[-2], second.states(text, 1, warn=False)[-2]]
            clips = torch.cat(side, dim=-1)
            clips = nn.functional.pad(clips, (0, config.joint_attention_dim - clips.shape[-1]))
            t5_tokens = clips.new_zeros(1, SD3_TOKENS, clips.shape[-1]) if t5 is None else t5.states(text)
            pooled = torch.cat([first.pooled(text), second.pooled(text)], dim=-1)
            return Condition(torch.cat([clips, t5_tokens], dim=1), pooled)

        return TextEncoders(encode, modules)

    schedule = Flow.from_config(builder.folder.config("scheduler"), (size // config.patch_size) ** 2)
    return builder.assemble(SD3Prior, network, autoencoder, load, schedule, "velocity", size)


def build_flux(builder: PriorBuilder) -> FluxPrior:
    """The prior of a FluxPipeline folder; ValueError if components do not fit together."""
    builder.reject_options("--controlnet and --token", builder.options.controlnet, builder.options.token)
    network, autoencoder = builder.network("transformer"), builder.autoencoder(TAEF1)
    _check_channels(network.config.in_channels, 4 * autoencoder.channels)
    size = builder.sample_size(FLUX_SIZE, autoencoder.factor, 2)

    def load() -> TextEncoders:
        clip, t5 = builder.clip(""), builder.t5("_2", FLUX_TOKENS)
        return TextEncoders(
            lambda text: Condition(t5.states(text), clip.pooled(text)),
            {"text_encoder": clip.encoder, "text_encoder_2": t5.encoder},
        )

    schedule = Flow.from_config(builder.folder.config("scheduler"), (size // 2) ** 2)
    prior = builder.assemble(FluxPrior, network, autoencoder, load, schedule, "velocity", size)
    prior.distilled_guidance = builder.options.distilled_guidance
    return prior


def _check_channels(network: int, autoencoder: int) -> None:
    if network != autoencoder:
        raise ValueError(
            f"the network takes {network} channels, the autoencoder gives {autoencoder}: the components belong to "
            "different models, or this is not a text-to-image model"
        )
