"""Random pipelines of toy size for each family beyond Stable Diffusion, built and saved by diffusers itself."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill3d.priors import load_prior
from distill3d.priors.options import PriorOptions

SIZE = 8  # of a latent; images are twice as large


@dataclass(frozen=True)
class Toy:
    """A pipeline, the folder it was saved in, and how it is called."""

    pipeline: Any
    folder: Path
    size: int | None = None  # of its images, where the model has none of its own

    @property
    def name(self) -> str:
        return type(self.pipeline).__name__


def clip_tokenizer():
    from transformers import CLIPTokenizer

    words = [c + end for c in string.ascii_lowercase + "," for end in ("", "</w>")]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)


def clip(projected: bool, width: int = 16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    end = len(clip_tokenizer()) - 1
    config = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_factor=5.0,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_tokenizer():
    from transformers import T5Tokenizer

    letters = [(c, -3.0) for c in string.ascii_lowercase + ",.▁"]
    words = [(f"▁{w}", -2.0) for w in ("a", "red", "cube", "cat", "side", "view")]
    specials = [(t, 0.0) for t in ("<pad>", "</s>", "<unk>")]
    return T5Tokenizer(vocab=specials + letters + words, extra_ids=0, model_max_length=512)


def t5(width: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, initializer_factor=5.0)
    return T5EncoderModel(config)


def autoencoder(channels: int = 4, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


def unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": SIZE,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    )


def ddim(**options):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **{
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **options,
        }
    )


def build_sdxl():
    from diffusers import StableDiffusionXLPipeline

    network = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip(False),
        text_encoder_2=clip(True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=ddim(),
        add_watermarker=False,
    )


def build_zero_snr():
    """Stable Diffusion with v-prediction and a zero-terminal-SNR table, as its fine-tunings have it."""
    from diffusers import StableDiffusionPipeline

    scheduler = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip(False),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=16),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_if():
    from diffusers import IFPipeline

    network = unet(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=12,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_dim=32,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    scheduler = ddim(beta_schedule="squaredcos_cap_v2", steps_offset=0)
    scheduler.register_to_config(variance_type="fixed_small")  # what the pipeline asks of its DDPM scheduler
    return IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(12),
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def flow_scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def build_sd3(with_t5: bool = True):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(40) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def build_flux(guidance: bool):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True) if guidance else flow_scheduler(shift=1.0)
    return FluxPipeline(
        transformer=network,
        scheduler=scheduler,
        vae=autoencoder(scaling_factor=0.36, shift_factor=0.1),
        text_encoder=clip(False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(24),
        tokenizer_2=t5_tokenizer(),
    )


BUILDERS = {
    "zero-snr": build_zero_snr,
    "sdxl": build_sdxl,
    "if": build_if,
    "sd3": build_sd3,
    "sd3-without-t5": lambda: build_sd3(False),
    "flux-dev": lambda: build_flux(True),
    "flux-schnell": lambda: build_flux(False),
}


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """toys(name): the random model of a family, made once."""
    made: dict[str, Toy] = {}

    def make(name: str) -> Toy:
        if name not in made:
            torch.manual_seed(0)
            pipeline = BUILDERS[name]()
            pipeline.set_progress_bar_config(disable=True)
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()  # as from_pretrained leaves them: T5 has dropout
            folder = tmp_path_factory.mktemp(name) / "toy"
            pipeline.save_pretrained(folder)
            made[name] = Toy(pipeline, folder, 16 if "flux" in name else None)
        return made[name]

    return make


@pytest.fixture
def fails():
    """fails(name, match, **options): loading a prior raises a ValueError of one line that matches."""

    def check(name, match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            load_prior(name, options=PriorOptions(**options))
        assert "\n" not in str(caught.value)

    return check
