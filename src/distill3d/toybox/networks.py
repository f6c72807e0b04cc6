"""The networks of the bundled prior: diffusers and transformers classes at toy size, and the tokenizer."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.toybox.captions import vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, DDIMScheduler
    from transformers import CLIPModel, CLIPTokenizer

TOKENS = 20  # length of a padded prompt
TEXT_WIDTH = 128
IMAGE_SIZE = 64
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Builds the byte-pair tokenizer in which each word of the world is one token, and saves it.

    Unknown words are split into letters, so that any text can be encoded.
    """
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    merges = byte_pairs([word for word in vocabulary() if not any(c.isdigit() for c in word)])
    tokens = [*letters, *(c + WORD_END for c in letters), *(a + b for a, b in merges), START, END]
    build: Any = CLIPTokenizer  # its annotations are incomplete
    tokenizer = build(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """The merges that make each word one token: the most frequent pair first, ties in alphabetical order.

    The order must be the same in every process, because permuted tokens are permuted prompts. The trainers of
    libraries break ties by the order of a hash table.
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while any(len(parts) > 1 for parts in spelled):
        count = Counter(pair for parts in spelled for pair in itertools.pairwise(parts))
        best = min(count, key=lambda pair: (-count[pair], pair))
        merges.append(best)
        spelled = [_merge(parts, best) for parts in spelled]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A text-image contrastive model, 64 px, patch 8."""
    from transformers import CLIPConfig, CLIPModel

    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=128,
    )
    vision = dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_autoencoder() -> Any:
    """64 px to 16x16x4: a small encoder, because its gradient is computed in every 3D step, and a larger decoder.

    There is no residual block at full resolution, where it would cost most and help least.
    """
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 2, 3),
        num_decoder_blocks=(4, 3, 0),
        latent_channels=4,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
        act_fn="relu",
        upsample_fn="nearest",
    )


def make_unet() -> Any:
    """Epsilon-prediction UNet on 16x16 latents; attention at 8x8 only.

    `attention_head_dim` of this class is the number of heads; many small heads are slow on CPUs.
    """
    from diffusers import UNet2DConditionModel

    build: Any = UNet2DConditionModel
    return build(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 160),
        layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
        use_linear_projection=True,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 2.1-base."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def read_parts(weights: Path) -> dict[str, Any]:
    """Reads the networks "clip", "autoencoder", "unet" and "judge" of a folder like the bundled one, in float32."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPModel

    def read(model_class: Any, component: str) -> Any:
        return model_class.from_pretrained(weights / component, local_files_only=True).float().eval()

    return {
        "clip": read(CLIPModel, "evaluator_clip"),
        "autoencoder": read(AutoencoderTiny, "vae"),
        "unet": read(UNet2DConditionModel, "unet"),
        "judge": read(CLIPModel, "evaluator_judge"),
    }


@torch.no_grad()
def normalize_latents(
    autoencoder: AutoencoderTiny, latents: Float[Tensor, "n c h w"]
) -> tuple[Float[Tensor, "c c"], Float[Tensor, " c"]]:
    """Folds a whitening of the latents into the encoder's last convolution, and its inverse into the decoder.

    Afterwards the encoder's output has zero mean, unit variance and no correlation between channels, as noise
    schedules assume. The decoder compresses its input before its first convolution, so its inverse is not exact: it
    has to be trained further.

    Returns:
        the whitening matrix and the mean.
    """
    flat = latents.movedim(1, -1).reshape(-1, latents.shape[1]).double()
    mean = flat.mean(0)
    eigenvalues, basis = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    whiten = (basis / eigenvalues.sqrt()) @ basis.T  # symmetric: the channels keep their meaning
    last: Any = [m for m in autoencoder.encoder.modules() if isinstance(m, nn.Conv2d)][-1]
    weight, bias = last.weight.double(), last.bias.double()
    last.weight.copy_(torch.einsum("ab,bikl->aikl", whiten, weight))
    last.bias.copy_(whiten @ (bias - mean))
    first: Any = next(m for m in autoencoder.decoder.modules() if isinstance(m, nn.Conv2d))
    weight = first.weight.double()
    first.bias.add_(torch.einsum("oikl,i->o", weight, mean))
    first.weight.copy_(torch.einsum("oikl,ij->ojkl", weight, torch.linalg.inv(whiten)))
    return whiten, mean
