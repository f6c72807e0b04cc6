"""The training of the multi-view prior: its data, its batches, its resumable loop, its packed weights."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from distill3d.cameras import FOV, orbit
from distill3d.priors.components.matting import MattingNetwork, border_matte
from distill3d.priors.loading import load_prior
from distill3d.priors.stable_diffusion import camera_embedding_input, join_views
from distill3d.render.raster import rasterize
from distill3d.toybox import networks
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, held_out_pairs
from distill3d.toybox.fitting import Fit
from distill3d.toybox.groups import LAYOUTS, VIEWS, load_groups, random_cameras, render_groups
from distill3d.toybox.multiview import (
    BUNDLED,
    CAMERA_DROPOUT,
    Composition,
    composite,
    draw_batch,
    make_multiview_unet,
    mix_views,
    pack_multiview,
    pick_views,
    read_unet,
    train_multiview,
)
from distill3d.toybox.world import View, build, cutout, draw

SMALL = Composition(((2, 4), (1, 8), (3, 1)))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Twelve toys in two shards."""
    folder = tmp_path_factory.mktemp("groups")
    for i in range(2):
        render_groups(folder / f"groups-{i:03d}.npz", seed=i, toys=6)
    return load_groups(folder)


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=networks.TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def test_the_renders_fit_the_cameras_that_condition_the_network():
    """Vertices in the frame of `cameras.orbit`, whose pose is the condition, cover the pixels of the cutouts."""
    _, angles = random_cameras(np.random.default_rng(3))
    toy = build("boat", "red", seed=4)
    pose = orbit(*torch.from_numpy(angles).unbind(1), FOV).camera_to_world
    for view, angle in zip(pose, angles.tolist(), strict=True):
        points = (torch.from_numpy(toy.vertices).float() - view[:3, 3]) @ view[:3, :3]
        face, _ = rasterize(points, torch.from_numpy(toy.faces.copy()), np.radians(FOV), 128, 128)
        covered = (face >= 0).float().view(64, 2, 64, 2).mean((1, 3))
        different = (covered - torch.from_numpy(cutout(toy, View(*angle))[..., 3])).abs() > 0.3
        assert different.float().mean() < 2e-3  # rounding may move a sample across an edge


def test_a_cutout_over_gray_equals_the_image():
    toy, view = build("chair", "green", seed=1), View(30, 20)
    layers = np.round(cutout(toy, view) * 255).astype(np.uint8)[None]
    image = (composite(layers, np.array([0.7]))[0].movedim(0, -1).numpy() + 1) / 2
    np.testing.assert_allclose(image, draw(toy, view, background=0.7), atol=1 / 255)  # two roundings to 8 bits


def test_no_held_out_pair_is_rendered_and_shards_are_reproducible(groups, tmp_path):
    rendered = {(KIND_NAMES[k], COLOR_NAMES[c]) for k, c, _ in groups.attributes.tolist()}
    assert not rendered & held_out_pairs()
    render_groups(tmp_path / "again.npz", seed=1, toys=6)
    again = np.load(tmp_path / "again.npz")
    assert (again["cutouts"] == groups.cutouts[6:]).all() and (again["cameras"] == groups.cameras[6:]).all()


def test_layouts_contain_orthogonal_groups():
    rng = np.random.default_rng(0)
    for _ in range(50):
        layout, cameras = random_cameras(rng)
        if LAYOUTS[layout] == "scattered":
            continue
        for first in (0, 1):
            azimuth, elevation, distance = cameras[first::2].T
            np.testing.assert_allclose(np.diff(azimuth) % 360, 90, atol=1e-3)
            assert np.ptp(elevation) == 0 and np.ptp(distance) == 0
        if LAYOUTS[layout] == "ring":
            np.testing.assert_allclose(np.diff(cameras[:, 0]) % 360, 45, atol=1e-3)
    assert all(len(set(pick_views(0, 4, rng).tolist())) == 4 for _ in range(50))
    assert sorted(pick_views(2, 8, rng).tolist()) == list(range(VIEWS))


def test_groups_have_cameras_and_only_single_images_have_view_words(groups):
    batches = [draw_batch(groups, SMALL, np.random.default_rng(i)) for i in range(40)]
    texts = [batch.texts for batch in batches]
    multi = list(itertools.chain(*[t[:3] for t in texts]))
    single = list(itertools.chain(*[t[3:] for t in texts]))
    assert not any(f"{word} view" in text for text in multi for word in VIEW_WORDS)
    assert sum(any(f"{word} view" in text for word in VIEW_WORDS) for text in single) > 0.5 * len(single)
    assert 0 < sum(text == "" for text in multi) < 0.3 * len(multi)
    has_camera = torch.stack([batch.cameras.abs().sum(1) > 0 for batch in batches])
    written = torch.tensor([[text != "" for text in batch.texts[:3]] for batch in batches])
    assert torch.equal(has_camera[:, :16], written.repeat_interleave(torch.tensor(SMALL.sizes[:3]), 1))
    assert abs(has_camera[:, 16:].float().mean() - (1 - CAMERA_DROPOUT)) < 0.2
    position = torch.cat([batch.cameras.view(-1, 4, 4)[:16, :3, 3] for batch in batches])[has_camera[:, :16].flatten()]
    torch.testing.assert_close(position.norm(dim=1), torch.ones(len(position)))


@torch.no_grad()
def test_groups_in_a_mixed_batch_are_predicted_as_if_alone():
    unet = make_multiview_unet(tiny_unet()).eval()
    generator = torch.Generator().manual_seed(1)
    b = sum(SMALL.sizes)
    x, hidden = (torch.randn(b, *s, generator=generator) for s in ((4, 16, 16), (20, networks.TEXT_WIDTH)))
    camera, t = torch.randn(b, 16, generator=generator), torch.full((b,), 400)

    def predict(rows):
        return unet(x[rows], t[rows], encoder_hidden_states=hidden[rows], class_labels=camera[rows]).sample

    plain = unet.attn_processors
    mix_views(unet, SMALL)
    together = predict(slice(None))
    for size, rows in zip((4, 8, 1), torch.arange(b).split([8, 8, 3]), strict=True):
        unet.set_attn_processor(dict(plain))
        join_views(unet, size)
        torch.testing.assert_close(together[rows], predict(rows), rtol=1e-4, atol=1e-5)


def test_a_resumed_training_equals_an_uninterrupted_one(groups, tmp_path):
    torch.manual_seed(1)
    frozen = {"clip": networks.make_clip(networks.make_tokenizer(tmp_path)), "autoencoder": networks.make_autoencoder()}
    fit = Fit(6, 1e-3, warmup=2, decay=0, save_every=2)  # without decay a shorter run has the same learning rates

    def run(name, steps):
        (tmp_path / name / "tokenizer").mkdir(parents=True, exist_ok=True)
        parts = frozen | {"unet": tiny_unet()}
        return train_multiview(tmp_path / name, replace(fit, steps=steps), groups, parts, SMALL)

    whole = run("whole", 6)
    run("parts", 4)
    resumed = run("parts", 6)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_packed_weights_load_as_a_prior_and_predict_the_same(tmp_path):
    unet = make_multiview_unet(read_unet(BUNDLED)).eval()
    torch.nn.init.normal_(unet.class_embedding.linear_2.bias, generator=torch.Generator().manual_seed(0))
    prior = load_prior(pack_multiview(tmp_path, unet, MattingNetwork()), dtype="float32")
    assert prior.views == 4 and prior.camera_guidance and prior.matte(torch.rand(1, 3, 64, 64)).shape == (1, 1, 64, 64)
    x = torch.randn(4, *prior.sample_shape, generator=torch.Generator().manual_seed(1))
    pose = orbit([0, 90, 180, 270], 15.0, 2.8, FOV).camera_to_world
    condition = replace(prior.embed(["a red car"] * 4), camera=pose)
    join_views(unet, 4)
    labels = camera_embedding_input(pose)
    expected = unet(x, torch.tensor(500), encoder_hidden_states=condition.hidden, class_labels=labels).sample
    # The packed weights are in half precision.
    torch.testing.assert_close(prior.predict(x, torch.full((4,), 0.5), condition), expected, rtol=0.01, atol=0.01)


def test_multi_view_weights_can_be_trained_further(tmp_path):
    unet = make_multiview_unet(read_unet(BUNDLED))
    packed = pack_multiview(tmp_path, unet, MattingNetwork())
    again = make_multiview_unet(read_unet(packed))
    for name, value in again.state_dict().items():
        assert torch.equal(value, unet.state_dict()[name].half().float()), name


@pytest.fixture(scope="module")
def bundled():
    return load_prior("toybox-mv")


@torch.no_grad()
def test_the_bundled_prior_has_the_shared_parts_of_the_other_one_and_guides_cameras(bundled):
    assert bundled.views == 4 and bundled.camera_guidance
    folders = BUNDLED, BUNDLED.with_name("toybox-mv")
    for part in (
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        assert (folders[0] / part).read_bytes() == (folders[1] / part).read_bytes()
    size = sum(f.stat().st_size for f in folders[1].rglob("*") if f.is_file())
    assert size < 20_000_000


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "color", "gray"), [("boat", "pink", 0.75), ("car", "white", 0.9), ("table", "black", 0.5)]
)
def test_the_bundled_matting_finds_toys_of_the_backgrounds_color(bundled, kind, color, gray):
    toy, views = build(kind, color, seed=904), [View(a, 15.0, 2.85) for a in range(0, 360, 90)]
    images = torch.from_numpy(np.stack([draw(toy, view, gray) for view in views])).movedim(-1, 1).float()
    true = torch.from_numpy(np.stack([cutout(toy, view)[..., 3:] for view in views])).movedim(-1, 1).float()
    decoded = bundled.decode(bundled.encode(images)).clamp(0, 1)
    error, plain = ((matte - true).abs().mean() for matte in (bundled.matte(decoded), border_matte(decoded)))
    assert error < 0.03 and (color == "black" or error < 0.7 * plain)
