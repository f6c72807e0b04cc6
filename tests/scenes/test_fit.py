"""Fitting a scene to images of itself."""

import pytest
import torch

from distill3d.cameras import turntable
from distill3d.render.volume import Sampling
from distill3d.scenes.fit import Fitting, fit, psnr
from distill3d.scenes.gaussians import GaussianOptions, Gaussians
from distill3d.scenes.voxels import VoxelOptions

CAMERAS, WHITE = turntable(6, 0, 2.8, 40), torch.ones(3)


@pytest.fixture(scope="module")
def images():
    """A ball that is red above and blue below."""
    axis = torch.arange(16) - 7.5
    disc = (axis.square() + axis[:, None].square() < 25).expand(6, 3, 16, 16)
    red, blue = torch.tensor([[1.0, 0, 0], [0, 0, 1]])[:, :, None, None]
    color = torch.where(axis[:, None] < 0, red, blue)
    return torch.where(disc, color, 1.0)


@pytest.mark.parametrize("options", [VoxelOptions(resolution=16, sampling=Sampling(32)), GaussianOptions(count=300)])
def test_any_scene_comes_to_look_like_the_images(options, images):
    scene, seen = options.build(), []
    before = psnr(scene.eval(), CAMERAS, images, WHITE)
    rate = 0.1 if isinstance(options, VoxelOptions) else 0.05
    fitting = Fitting(steps=40, views=2, learning_rate=rate)
    fit(scene, CAMERAS, images, WHITE, fitting, on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(40)) and not scene.training
    assert psnr(scene, CAMERAS, images, WHITE) > max(16, before + 4)


def test_the_same_seed_gives_the_same_scene(images):
    states = []
    for seed in (0, 0, 1):
        scene = Gaussians(GaussianOptions(count=30))
        fit(scene, CAMERAS, images, WHITE, Fitting(steps=4, views=2, seed=seed))
        states.append(scene.means.detach())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_psnr_is_its_formula():
    scene = Gaussians(GaussianOptions(count=1))
    with torch.no_grad():
        scene.opacities.fill_(-20.0)
    assert psnr(scene, CAMERAS, torch.full((6, 3, 8, 8), 0.9), WHITE) == pytest.approx(20, abs=1e-4)


def test_mistakes_are_value_errors(images):
    scene = Gaussians(GaussianOptions(count=3))
    with pytest.raises(ValueError, match="6 cameras"):
        fit(scene, CAMERAS, images[:5], WHITE)
    with pytest.raises(ValueError, match="no penalty smooth_density"):
        fit(scene, CAMERAS, images, WHITE, penalties={"smooth_density": 1.0})
    with pytest.raises(ValueError, match="steps and views must be at least 1"):
        Fitting(steps=0)
