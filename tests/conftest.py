"""Oracles that several test folders share: an analytic prior, an observer that counts network rows, and a random
Stable Diffusion of toy size, saved as diffusers saves the real one."""

from __future__ import annotations

import json
import os
import shutil
import string
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
import shape_check

shape_check.install()  # before the first import of the package

import pytest
import torch

from distill3d.diffusion.schedule import Cosine
from distill3d.priors.mixture import MixturePrior
from distill3d.types import Conditioning


class CountingPrior:
    """Passes everything on to a prior and remembers the rows of each predict call."""

    def __init__(self, prior):
        self._prior = prior
        self.calls: list[int] = []

    def __getattr__(self, name):
        return getattr(self._prior, name)

    def predict(self, x_t, t, text):
        assert len(x_t) == len(t) == len(text)
        self.calls.append(len(x_t))
        return self._prior.predict(x_t, t, text)


@pytest.fixture
def counting():
    return CountingPrior


class AlwaysConditional(MixturePrior):
    """A mixture whose empty text stands for one component too, "b"."""

    def _components(self, text):
        return super()._components(text or "b")


@pytest.fixture
def always_conditional():
    return AlwaysConditional


@pytest.fixture(scope="session")
def mixture():
    """Four components in 2 x 2 x 2 dimensions, float64, two texts."""
    g = torch.Generator().manual_seed(1)
    return MixturePrior(
        means=torch.randn(4, 2, 2, 2, generator=g, dtype=torch.float64),
        stds=torch.tensor([0.3, 0.5, 0.4, 0.6], dtype=torch.float64),
        weights=torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float64),
        conditions={"left": [0, 1], "right": [2], "odd": [1, 3]},
        schedule=Cosine(),
    )


@pytest.fixture(scope="session")
def conditions():
    """conditions(prior, texts): text against the empty text; with perp texts and weights for Perp-Neg."""

    def build(prior, texts, perp=None, weights=None):
        negative = prior.embed([""] * len(texts))
        embedded = None if perp is None else prior.embed(perp)
        return Conditioning(prior.embed(texts), negative, embedded, weights)

    return build


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Text embeddings that tests keep on disk are kept away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL3D_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def randn():
    """Seeded float64 noise: randn(*shape)."""
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def build_pipeline(tiny_vae: bool = False, kind: str = "epsilon"):
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = [c + end for c in string.ascii_lowercase + "," for end in ("", "</w>")]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words + specials)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            initializer_factor=5.0,
            bos_token_id=vocabulary[specials[0]],
            eos_token_id=vocabulary[specials[1]],
            pad_token_id=vocabulary[specials[1]],
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    if tiny_vae:
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            scaling_factor=1.3,
        )
    else:
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=kind,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session", params=["kl", "tiny", "kl-v"])
def toy(request, tmp_path_factory):
    """(pipeline, folder) for either autoencoder and either prediction type."""
    pipeline = build_pipeline(request.param == "tiny", "v_prediction" if request.param == "kl-v" else "epsilon")
    folder = tmp_path_factory.mktemp(request.param) / "toy"
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory):
    """The folder of one such model, to be copied and broken."""
    folder = tmp_path_factory.mktemp("whole") / "toy"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def controlnet(kl_folder, tmp_path_factory):
    """A random ControlNet for that model, its zero convolutions random too, so that it has an effect."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_pretrained(kl_folder, subfolder="unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for part in (network.controlnet_down_blocks, network.controlnet_mid_block, network.controlnet_cond_embedding):
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("control") / "net"
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def views_folder(kl_folder, tmp_path_factory):
    """That model with a random network that is conditioned on cameras, marked as a multi-view one."""
    from diffusers import UNet2DConditionModel

    copy = tmp_path_factory.mktemp("views") / "toy"
    shutil.copytree(kl_folder, copy)
    torch.manual_seed(0)
    camera = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
    UNet2DConditionModel.from_config(dict(UNet2DConditionModel.load_config(copy / "unet")) | camera).save_pretrained(
        copy / "unet"
    )
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"views": 4}))
    return copy
