"""Public configurations of the models behind the short names: all that a plan needs of them.

Each model is a folder in diffusers format without weights: `model_index.json` and the configuration of each component.
Numbers are those of the files that their authors publish; the tests compare the numbers of parameters.
"""

from __future__ import annotations

from typing import Any

from distill3d.priors.components import hub

Settings = dict[str, Any]

CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip
CLIP_H = CLIP_L | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512,
}  # fmt: skip
CLIP_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}  # fmt: skip
VAE_16 = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SD15_UNET = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
SD21_UNET = SD15_UNET | {
    "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True
}  # fmt: skip
SDXL_UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
IF_UNET = {
    "sample_size": 64, "in_channels": 3, "out_channels": 6, "block_out_channels": (704, 1408, 2112, 2816),
    "layers_per_block": 3, "attention_head_dim": 64, "cross_attention_dim": 2816, "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text", "addition_embed_type_num_heads": 64,
    "act_fn": "gelu", "cross_attention_norm": "group_norm", "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
}  # fmt: skip
SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}  # fmt: skip
FLUX_TRANSFORMER = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
CAMERA = {"views": 4, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16, "sample_size": 32}


def folder(pipeline: str, scheduler: tuple[str, Settings], **components: tuple[str, Settings]) -> dict[str, Settings]:
    """The JSON files of a model by the names of its components; "" is model_index.json."""
    libraries = {name: "transformers" if name.startswith("text_encoder") else "diffusers" for name in components}
    index: Settings = {name: [libraries[name], kind] for name, (kind, _) in components.items()}
    for name in components:
        if name.startswith("text_encoder"):
            kind = "CLIPTokenizer" if components[name][0].startswith("CLIP") else "T5TokenizerFast"
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", kind]
    index |= {"_class_name": pipeline, "scheduler": ["diffusers", scheduler[0]]}
    return {"": index, "scheduler": scheduler[1], **{name: settings for name, (_, settings) in components.items()}}


def _stable_diffusion(unet: Settings, text: Settings, **scheduler: object) -> dict[str, Settings]:
    return folder(
        "StableDiffusionPipeline",
        ("DDIMScheduler", {**BETAS, **scheduler}),
        unet=("UNet2DConditionModel", unet),
        vae=("AutoencoderKL", VAE),
        text_encoder=("CLIPTextModel", text),
    )


def _sd35(transformer: Settings) -> dict[str, Settings]:
    return folder(
        "StableDiffusion3Pipeline",
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        transformer=("SD3Transformer2DModel", transformer),
        vae=("AutoencoderKL", VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        text_encoder=("CLIPTextModelWithProjection", CLIP_L),
        text_encoder_2=("CLIPTextModelWithProjection", CLIP_G),
        text_encoder_3=("T5EncoderModel", T5_XXL),
    )


MODELS: dict[str, dict[str, Settings]] = {
    "sd15": _stable_diffusion(SD15_UNET, CLIP_L),
    "sd21": _stable_diffusion(SD21_UNET, CLIP_H),
    "sd21-v": _stable_diffusion(SD21_UNET | {"sample_size": 96}, CLIP_H, prediction_type="v_prediction"),
    "mvdream": _stable_diffusion(SD21_UNET | CAMERA, CLIP_H),
    "mvdream15": _stable_diffusion(SD15_UNET | CAMERA, CLIP_L),
    "sdxl": folder(
        "StableDiffusionXLPipeline",
        ("EulerDiscreteScheduler", BETAS),
        unet=("UNet2DConditionModel", SDXL_UNET),
        vae=("AutoencoderKL", VAE | {"scaling_factor": 0.13025}),
        text_encoder=("CLIPTextModel", CLIP_L),
        text_encoder_2=("CLIPTextModelWithProjection", CLIP_G),
    ),
    "if": folder(
        "IFPipeline",
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        unet=("UNet2DConditionModel", IF_UNET),
        text_encoder=("T5EncoderModel", T5_XXL),
    ),
    "sd35": _sd35(SD35_MEDIUM),
    "sd35-large": _sd35(SD35_LARGE),
    "flux": folder(
        "FluxPipeline",
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        transformer=("FluxTransformer2DModel", FLUX_TRANSFORMER),
        vae=("AutoencoderKL", VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        text_encoder=("CLIPTextModel", CLIP_L),
        text_encoder_2=("T5EncoderModel", T5_XXL),
    ),
}
HUB_IDS = {
    **{hub_id: name for name, hub_id in hub.SHORT_NAMES.items()},
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
}


def configurations(name: str) -> dict[str, Settings] | None:
    """The configurations of a model by its short name or hub id; None for another model."""
    return MODELS.get(HUB_IDS.get(name, name))
