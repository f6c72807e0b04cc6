"""Corruptions of images: each changes what it says and nothing else."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from distill3d.evaluation.critic import ToyCritic
from distill3d.toybox import critic
from distill3d.toybox.corruptions import CORRUPTIONS, blur, corrupt
from distill3d.toybox.fitting import Fit
from distill3d.toybox.groups import Groups
from distill3d.toybox.world import View, build, cutout

KINDS = ("chair", "duck", "mug", "rocket")


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def groups() -> Groups:
    """Four toys, two views each."""
    toys = [build(kind, "red", "blue", 3) for kind in KINDS]
    images = np.stack([[cutout(toy, View(a, 15.0)) for a in (30.0, 150.0)] for toy in toys])
    cutouts = np.round(255 * images).astype(np.uint8)
    return Groups(cutouts, np.zeros((4, 3)), np.zeros((4, 2, 3)), np.zeros(4))


@pytest.fixture(scope="module")
def views(groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views [4, 4, 64, 64] of each toy."""
    layers = torch.from_numpy(groups.cutouts).movedim(-1, 2).float() / 255
    return layers[:, 0], layers[:, 1]


def test_blur_is_a_gaussian():
    """It keeps constants, an impulse gets variance sigma squared, and variances add."""
    assert torch.allclose(blur(torch.full((1, 1, 20, 30), 0.7), 3.0), torch.tensor(0.7))
    impulse = torch.zeros(1, 1, 41, 41)
    impulse[..., 20, 20] = 1
    at = torch.arange(41.0) - 20
    spread = blur(impulse, 2.0)
    assert (spread.sum((0, 1, 2)) * at.square()).sum().item() == pytest.approx(4, rel=1e-3)
    assert torch.allclose(blur(spread, 1.5), blur(impulse, 2.5), atol=1e-4)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_layers_are_layers_and_follow_the_generator(name, views):
    """Premultiplied colors do not exceed coverage, and the same generator gives the same images."""
    one, two, other = (CORRUPTIONS[name](*views, chance(seed)) for seed in (1, 1, 2))
    assert one.shape == views[0].shape and torch.equal(one, two) and not torch.equal(one, other)
    # Premultiplied color: resampling keeps it below the coverage, up to rounding.
    assert one.min() > -1e-4 and (one[:, :3] - one[:, 3:]).max() < 0.01 and one.max() < 1.0001


def test_mottle_keeps_the_silhouette_and_a_veil_the_colors(views):
    layers, others = views
    assert torch.equal(CORRUPTIONS["mottle"](layers, others, chance())[:, 3], layers[:, 3])
    veiled, solid = CORRUPTIONS["veil"](layers, others, chance()), layers[:, 3] > 0.99
    color = (veiled[:, :3] / veiled[:, 3:].clamp_min(1e-3) - layers[:, :3]).abs().amax(1)
    assert color[solid].max() < 0.01 and veiled[:, 3][solid].mean() < 0.9


def test_no_corrupted_image_is_a_true_one(views):
    """A toy glued to itself is no bad object: images that change too little become lumps."""
    layers = views[0].repeat(8, 1, 1, 1)
    bad = corrupt(layers, layers, chance())
    change = (bad - layers).abs().mean(1).sum((1, 2)) / layers[:, 3].sum((1, 2))
    assert change.min() > 0.09


def test_training_resumes_and_packs_what_the_critic_reads(groups, tmp_path):
    autoencoder = AutoencoderTiny.from_pretrained(critic.BUNDLED / "vae").float().eval()
    fit = Fit(2, 1e-3, warmup=1, save_every=1)
    failures = groups.cutouts[:, 0]
    whole = critic.train_critic(tmp_path, fit, groups, failures, autoencoder)
    folder = critic.pack_critic(tmp_path, whole, groups, autoencoder)
    layers = torch.from_numpy(groups.cutouts).flatten(0, 1).movedim(-1, 1).float() / 255
    images = layers[:, :3] + 0.9 * (1 - layers[:, 3:])
    read = ToyCritic(folder)
    assert read.threshold == json.loads((folder / "config.json").read_text())["threshold"]
    assert torch.allclose(read.score(images), torch.sigmoid(whole(images) - read.threshold), atol=1e-5)
    assert read.accepts(images).float().mean() >= 0.5
    with pytest.raises(ValueError, match="holds no critic"):
        ToyCritic(tmp_path)


def test_half_of_the_bad_images_are_views_of_failed_objects(groups, tmp_path):
    """Where all failures are empty, and only then, images without an object are among the bad ones."""
    autoencoder = AutoencoderTiny.from_pretrained(critic.BUNDLED / "vae").float().eval()
    empty = np.zeros((3, 64, 64, 4), dtype=np.uint8)
    images, labels = critic.draw_critic_batch(groups, empty, chance(), autoencoder)
    blank = images.flatten(2).std(2).amax(1) < 0.05  # the background is one gray, up to noise and the autoencoder
    assert int(blank.sum()) == round(critic.FAILED * critic.BATCH / 2) and not labels[blank].any()
    assert int(labels.sum()) == critic.BATCH // 2
    with pytest.raises(ValueError, match="no views of failed objects"):
        critic.load_failures(tmp_path)
    np.savez(tmp_path / "one.npz", cutouts=empty)
    assert np.array_equal(critic.load_failures(tmp_path), empty)
