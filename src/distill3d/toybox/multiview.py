"""Fine-tunes the bundled UNet to a multi-view prior: `python -m distill3d.toybox.train multiview --folder DIR`.

The UNet gets a camera embedding and joint self-attention (see `priors/stable_diffusion.py`). Each batch mixes groups of
four views, a group of eight and single images: without single images the network forgets how to draw them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from distill3d.cameras import FOV, orbit
from distill3d.priors.components.matting import MattingNetwork, save_matting
from distill3d.priors.stable_diffusion import (
    CAMERA_DROPOUT_KEY,
    CAMERA_SIZE,
    VIEWS_KEY,
    JointAttention,
    camera_embedding_input,
)
from distill3d.toybox import networks
from distill3d.toybox.captions import random_claim, sentence
from distill3d.toybox.fitting import Fit, mixed_precision, train
from distill3d.toybox.groups import LAYOUTS, VIEWS, Groups, load_groups, render_all_groups
from distill3d.toybox.matting import train_matting

BUNDLED = Path(__file__).parents[1] / "assets" / "toybox"
GRAYS = (0.5, 1.0)  # range of the backgrounds; the autoencoder was not trained on darker ones
SEPARATE_GRAYS = 0.6  # fraction of groups in which each view has its own gray
ORTHOGONAL = 0.6  # fraction of groups of four views on rings in which they are 90 degrees apart
CAMERA_DROPOUT = 0.5  # fraction of single images without a camera
PROMPT_DROPOUT = 0.1  # fraction of single images without a caption, and of groups without caption and cameras
# Weights of the squared error of the clean latents: the signal-to-noise ratio, clamped. The upper limit is min-SNR's
# (arXiv 2303.09556). The lower limit is for the highest noise levels, at which the network decides on the view.
SNR_RANGE = (0.1, 5.0)
SHARED_COMPONENTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "vae")


@dataclass(frozen=True)
class Composition:
    """How many groups of how many views are in a batch: ((groups, views), ...)."""

    parts: tuple[tuple[int, int], ...] = ((4, 4), (1, 8), (8, 1))

    @property
    def sizes(self) -> list[int]:
        """Views of each group, in order."""
        return [views for groups, views in self.parts for _ in range(groups)]


@dataclass(frozen=True)
class Batch:
    """B images in G groups, whose sizes are those of a `Composition`, one group after another."""

    images: Float[Tensor, "b 3 64 64"]  # in [-1, 1]
    cameras: Float[Tensor, "b 16"]  # input of the camera embedding; zeros for no camera
    texts: list[str]  # one per group


class MixedAttention:
    """An attention processor: joint self-attention in a batch with groups of several sizes.

    `inner` is the processor that computes the attention.
    """

    def __init__(self, composition: Composition, inner: Callable[..., Tensor]):
        self.rows = [groups * views for groups, views in composition.parts]
        self.processors = [JointAttention(views, inner) for _, views in composition.parts]

    def __call__(
        self, attn: nn.Module, hidden_states: Float[Tensor, "b l c"], *args: object, **options: object
    ) -> Float[Tensor, "b l c"]:
        """Self-attention within each group."""
        parts = zip(self.processors, hidden_states.split(self.rows), strict=True)
        return torch.cat([processor(attn, part, *args, **options) for processor, part in parts])


def make_multiview_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of a UNet with a camera embedding, which is initialized if `unet` has none.

    Its initial weights are small, so that the copy predicts almost the same as `unet`.
    """
    generator = torch.Generator().manual_seed(55)
    config = dict(unet.config) | dict(class_embed_type="projection", projection_class_embeddings_input_dim=CAMERA_SIZE)
    copy: Any = UNet2DConditionModel.from_config(config)
    missing, unexpected = copy.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected
    if missing:
        layers = copy.class_embedding.linear_1, copy.class_embedding.linear_2
        for layer, gain in zip(layers, (1.0, 0.1), strict=True):
            nn.init.normal_(layer.weight, std=gain * (3 * layer.in_features) ** -0.5, generator=generator)
            nn.init.zeros_(layer.bias)
    return copy


def mix_views(unet: Any, composition: Composition) -> None:
    """Makes the self-attention of a UNet joint within the groups of a composition, in place."""
    processors = {
        name: MixedAttention(composition, processor) if name.endswith("attn1.processor") else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)


def pick_views(layout: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices [size] of the views of a toy that form a group.

    A fraction `ORTHOGONAL` of the groups of four on rings has views 90 degrees apart. Half of the rest has neighbors
    in the order of the views, which are 45 degrees apart on a single ring. All other groups are random.
    """
    if size == 4 and LAYOUTS[layout] != "scattered":
        if rng.random() < ORTHOGONAL:
            return np.arange(0, VIEWS, 2) + rng.integers(2)
        if rng.random() < 0.5:
            return (np.arange(4) + rng.integers(VIEWS)) % VIEWS
    return rng.permutation(VIEWS)[:size]


def composite(cutouts: np.ndarray, grays: np.ndarray) -> Float[Tensor, "n 3 h w"]:
    """Composites cutouts [N, H, W, 4] uint8 over gray levels [N] in [0, 1]; the images are in [-1, 1]."""
    layers = torch.from_numpy(cutouts).movedim(-1, 1).float().div_(255)
    background = torch.from_numpy(grays.astype(np.float32)).view(-1, 1, 1, 1)
    return 2 * (layers[:, :3] + (1 - layers[:, 3:]) * background) - 1


def draw_batch(groups: Groups, composition: Composition, rng: np.random.Generator) -> Batch:
    """Draws toys, views, backgrounds and captions.

    Captions of groups have no view words: only the camera determines the view. A group without a caption has no
    cameras either, so that classifier-free guidance strengthens both. Captions of single images have view words, and a
    fraction `CAMERA_DROPOUT` of these images has no camera.
    """
    cutouts, grays, angles, has_camera, texts = [], [], [], [], []
    for size in composition.sizes:
        toy = int(rng.integers(len(groups.cutouts)))
        views = pick_views(int(groups.layouts[toy]), size, rng)
        cutouts.append(groups.cutouts[toy, views])
        angles.append(groups.cameras[toy, views])
        grays.append(rng.uniform(*GRAYS, size) if rng.random() < SEPARATE_GRAYS else np.full(size, rng.uniform(*GRAYS)))
        dropped = rng.random() < PROMPT_DROPOUT
        has_camera += [not dropped if size > 1 else rng.random() >= CAMERA_DROPOUT] * size
        word = groups.view_word(toy, int(views[0])) if size == 1 else -1
        kind, color, accent = groups.attributes[toy].tolist()
        claim = random_claim(kind, color, accent, word, rng)
        texts.append("" if dropped else sentence(claim, rng))
    azimuth, elevation, distance = torch.from_numpy(np.concatenate(angles)).unbind(1)
    cameras = camera_embedding_input(orbit(azimuth, elevation, distance, FOV).camera_to_world)
    images = composite(np.concatenate(cutouts), np.concatenate(grays))
    return Batch(images, cameras * torch.tensor(has_camera).float()[:, None], texts)


def train_multiview(
    folder: Path,
    fit: Fit,
    groups: Groups,
    parts: dict[str, Any],
    composition: Composition = Composition(),
    compile_unet: bool = False,
) -> UNet2DConditionModel:
    """Trains a UNet on groups of views; resumes from `folder`/multiview.pt if it exists.

    Args:
        parts: the initial "unet", and the frozen "clip" and "autoencoder", as from `networks.read_parts`.
        compile_unet: faster steps after minutes of compilation.
    """
    tokenizer = networks.make_tokenizer(folder / "tokenizer")
    unet: Any = make_multiview_unet(parts["unet"])
    unet.to(memory_format=torch.channels_last)
    mix_views(unet, composition)
    call = torch.compile(unet) if compile_unet else unet
    sizes = torch.tensor(composition.sizes)
    alphas = networks.make_scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = snr.clamp(*SNR_RANGE) / snr

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        batch = draw_batch(groups, composition, rng)
        tokens = tokenizer(batch.texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        # One timestep per group, stratified over the schedule.
        strata = torch.randperm(len(sizes), generator=generator) + torch.rand(len(sizes), generator=generator)
        t = (1000 * strata / len(sizes)).long().repeat_interleave(sizes)
        a = alphas[t].view(-1, 1, 1, 1)
        with torch.no_grad():
            hidden = parts["clip"].text_model(input_ids=tokens).last_hidden_state.repeat_interleave(sizes, 0)
            with mixed_precision():
                images = batch.images.contiguous(memory_format=torch.channels_last)
                latents = parts["autoencoder"].encode(images).latents.float()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = (a.sqrt() * latents + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with mixed_precision():
            output = call(noisy, t, encoder_hidden_states=hidden, class_labels=batch.cameras).sample
        return (weight[t] * (output.float() - noise).square().mean((1, 2, 3))).mean()

    train("multiview", unet, fit, loss_of, folder)
    return unet


def pack_multiview(folder: Path, unet: UNet2DConditionModel, matting: MattingNetwork, views: int = 4) -> Path:
    """Writes `folder`/toybox-mv: both networks in half precision, with the number of views in the configuration.

    The other components are copies of the bundled ones, so that `load_prior` can load the folder.
    """
    target = folder / "toybox-mv"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SHARED_COMPONENTS:
        source = BUNDLED / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    packed: Any = UNet2DConditionModel.from_config(unet.config)
    packed.load_state_dict(unet.state_dict())
    packed.half().save_pretrained(target / "unet")
    save_matting(matting, target / "matting")
    file = target / "unet" / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
    file.write_text(json.dumps(config | {VIEWS_KEY: views, CAMERA_DROPOUT_KEY: True}, indent=2, allow_nan=False))
    return target


def read_unet(weights: Path) -> UNet2DConditionModel:
    """The UNet of a folder like that of the bundled weights, in float32, with or without a camera embedding."""
    config = json.loads((weights / "unet" / "config.json").read_text())
    marks = (VIEWS_KEY, CAMERA_DROPOUT_KEY)
    unet: Any = UNet2DConditionModel.from_config({k: v for k, v in config.items() if k not in marks})
    unet.load_state_dict(load_file(weights / "unet" / "diffusion_pytorch_model.safetensors"))
    return unet.float().eval()


def run(folder: Path, fit: Fit, matting: Fit, start: Path | None, processes: int, compile_unet: bool) -> Path:
    """Renders the groups, trains and packs, and returns the folder of the weights; each stage is resumable.

    Args:
        fit, matting: how the UNet and the matting network are trained.
        start: folder of the initial UNet, by default the bundled one; it may be a multi-view one.
    """
    parts = networks.read_parts(BUNDLED)
    if start is not None:
        parts["unet"] = read_unet(start)
    render_all_groups(folder / "groups", processes)
    groups = load_groups(folder / "groups")
    network = train_matting(folder, matting, groups, parts["autoencoder"])
    return pack_multiview(folder, train_multiview(folder, fit, groups, parts, compile_unet=compile_unet), network)
