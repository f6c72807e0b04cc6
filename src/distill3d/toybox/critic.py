"""Trains the critic: does an image look like a toy of this world, or like a failed object?

It sees true renders, half of them slightly soft as renders of fitted fields are, and bad ones: corrupted renders (see
`corruptions`), and views of objects that distillation spoiled (`benchmarks/toybox_critic.py collect` writes them). What
is done to an image after that is the same for all, so that it gives nothing away.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.cameras import BACKGROUND
from distill3d.toybox.corruptions import blur, corrupt, smooth_noise, uniform
from distill3d.toybox.fitting import Fit, initialize, mixed_precision, train
from distill3d.toybox.groups import Groups, load_groups, render_all_groups

BUNDLED = Path(__file__).parents[1] / "assets" / "toybox"
SIZE = 64  # of the images
FILE = "model.safetensors"
CHANNELS = (24, 48, 96, 96)  # of the network's levels, from half the resolution down
BATCH = 32
FAILED = 0.5  # fraction of the bad images that are views of failed objects
DECODED = 4  # images of a batch that pass through the autoencoder
GRAYS = (0.5, 1.0)
HELD_OUT = 0.1  # fraction of the toys, the last ones, for calibration
CALIBRATED = 128  # of these toys, with all their views
ACCEPTED = 0.98  # fraction of held-out true renders above the threshold


class CriticNetwork(nn.Module):
    """A convolutional classifier of 0.43 M parameters from images in [0, 1] to logits, positive for true renders."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in CHANNELS:
            layers += [nn.Conv2d(inputs, width, 4, 2, padding=1), nn.GroupNorm(8, width), nn.SiLU(inplace=True)]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(inplace=True)]
            inputs = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * inputs, 1)

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, " b"]:
        """Logits."""
        features = self.body(2 * images - 1)
        return self.head(torch.cat((features.mean((2, 3)), features.amax((2, 3))), dim=1))[:, 0]


def _layers(cutouts: np.ndarray) -> Float[Tensor, "b 4 h w"]:
    return torch.from_numpy(cutouts).movedim(-1, 1).float().div_(255)


def load_failures(folder: Path) -> np.ndarray:
    """Views of failed objects, uint8 [N, 64, 64, 4] of premultiplied color and coverage: `folder`/*.npz, `cutouts`.

    Raises:
        ValueError: where the folder holds none.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise ValueError(
            f"{folder} holds no views of failed objects; make them with benchmarks/toybox_critic.py collect"
        )
    return np.concatenate([np.load(path)["cutouts"] for path in files])


def soften(layers: Float[Tensor, "b 4 h w"], generator: torch.Generator) -> Float[Tensor, "b 4 h w"]:
    """What fitted fields do to half of the images: soft edges and slightly uneven colors."""
    blurred = blur(layers, uniform(0.5, 0.8, generator).item())
    noise = 0.015 * smooth_noise(layers, 3, 16, generator) + 0.01 * torch.randn(
        layers[:, :3].shape, generator=generator
    )
    blurred = torch.cat((blurred[:, :3] + noise * blurred[:, 3:], blurred[:, 3:]), dim=1)
    return torch.where(uniform(0, 1, generator, len(layers)) < 0.5, blurred, layers)


@torch.no_grad()
def through(autoencoder: Any, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Encodes and decodes images in [0, 1]."""
    with mixed_precision():
        latents = autoencoder.encode(2 * images - 1).latents
        return (autoencoder.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def draw_critic_batch(
    groups: Groups, failures: np.ndarray, generator: torch.Generator, autoencoder: Any
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, " b"]]:
    """Images over gray backgrounds and their labels: the first half are true renders, the rest are bad."""
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    toys, views = rng.integers(len(groups.cutouts), size=BATCH), rng.integers(groups.cutouts.shape[1], size=BATCH)
    layers, half = _layers(groups.cutouts[toys, views]), BATCH // 2
    # Another view of the same toy, at times a view of another toy.
    turned = (views[half:] + rng.integers(1, groups.cutouts.shape[1], size=half)) % groups.cutouts.shape[1]
    others = _layers(groups.cutouts[np.where(rng.random(half) < 0.5, toys[:half], toys[half:]), turned])
    bad = corrupt(layers[half:], others, generator)
    failed = round(FAILED * half)
    bad[:failed] = _layers(failures[rng.integers(len(failures), size=failed)])
    layers = torch.cat((layers[:half], bad))
    layers = soften(layers, generator)
    layers = torch.where(uniform(0, 1, generator, BATCH) < 0.5, layers.flip(-1), layers)
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    layers = layers.roll(shift, (2, 3))
    gray = torch.where(uniform(0, 1, generator, BATCH) < 0.3, BACKGROUND, uniform(*GRAYS, generator, BATCH))
    images = (layers[:, :3] + (1 - layers[:, 3:]) * gray).clamp(0, 1)
    decoded = torch.randperm(BATCH, generator=generator)[:DECODED]
    images[decoded] = through(autoencoder, images[decoded])
    return images, (torch.arange(BATCH) < half).float()


def split(groups: Groups) -> tuple[Groups, Groups]:
    """The toys for training and those for calibration."""
    count = round((1 - HELD_OUT) * len(groups.cutouts))
    names = ("cutouts", "attributes", "cameras", "layouts")
    return Groups(*(getattr(groups, n)[:count] for n in names)), Groups(*(getattr(groups, n)[count:] for n in names))


def train_critic(folder: Path, fit: Fit, groups: Groups, failures: np.ndarray, autoencoder: Any) -> CriticNetwork:
    """Trains the network with a binary cross-entropy; resumes from `folder`/critic.pt if it exists.

    Args:
        failures: views of failed objects, as from `load_failures`.
        autoencoder: the frozen AutoencoderTiny.
    """
    network: Any = CriticNetwork()
    network.to(memory_format=torch.channels_last)
    initialize(network, seed=77)
    nn.init.zeros_(network.head.weight)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        images, labels = draw_critic_batch(groups, failures, generator, autoencoder)
        with mixed_precision():
            logits = network(images.contiguous(memory_format=torch.channels_last))
        return F.binary_cross_entropy_with_logits(logits.float(), labels)

    train("critic", network, fit, loss_of, folder)
    return network


@torch.no_grad()
def calibrate(network: CriticNetwork, groups: Groups, autoencoder: Any) -> float:
    """The logit that `ACCEPTED` of the groups' true renders reach, both as they are and through the autoencoder."""
    plain, decoded = [], []
    for cutouts in torch.from_numpy(groups.cutouts[:CALIBRATED]).flatten(0, 1).split(256):
        layers = cutouts.movedim(-1, 1).float() / 255
        images = layers[:, :3] + (1 - layers[:, 3:]) * BACKGROUND
        plain.append(network(images))
        decoded.append(network(through(autoencoder, images)))
    return min(torch.cat(logits).quantile(1 - ACCEPTED).item() for logits in (plain, decoded))


def pack_critic(folder: Path, network: CriticNetwork, held_out: Groups, autoencoder: Any) -> Path:
    """Writes `folder`/evaluator_critic: the weights in half precision and the threshold of these weights."""
    from safetensors.torch import save_file

    target = folder / "evaluator_critic"
    target.mkdir(parents=True, exist_ok=True)
    network = network.half().float()
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, target / FILE)
    threshold = calibrate(network, held_out, autoencoder)
    (target / "config.json").write_text(json.dumps({"threshold": round(threshold, 3)}, allow_nan=False) + "\n")
    return target


def run(folder: Path, fit: Fit, processes: int) -> Path:
    """Renders the groups, trains, calibrates and packs, and returns the folder of the weights; resumable.

    Raises:
        ValueError: where `folder`/failures holds no views of failed objects.
    """
    from diffusers import AutoencoderTiny

    autoencoder = AutoencoderTiny.from_pretrained(BUNDLED / "vae", local_files_only=True).float().eval()
    failures = load_failures(folder / "failures")
    render_all_groups(folder / "groups", processes)
    seen, held_out = split(load_groups(folder / "groups"))
    return pack_critic(folder, train_critic(folder, fit, seen, failures, autoencoder), held_out, autoencoder)
