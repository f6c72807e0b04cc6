"""The loop itself, with an image as the scene and a random model of toy size."""

import dataclasses

import pytest
import torch
from torch import nn

from distill3d.diffusion.schedule import coefficients
from distill3d.distill.loop import ObjectRun, optimize, resized
from distill3d.distill.objects import distill
from distill3d.distill.recipes import DISTILL, SPLATS, Penalties, Recipe
from distill3d.distill.regularizers import WeightSchedule
from distill3d.objectives import CSD, METHODS, SDS, HiFA, hifa, sds
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.scenes.background import ConstantBackground
from distill3d.types import Rendering, Scene


class Flat(nn.Module, Scene):
    """A scene that shows the same image from everywhere."""

    def __init__(self, size):
        super().__init__()
        self.image = nn.Parameter(torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)))

    def render(self, cameras, size, background, *, generator=None, normals=False, lighting=None):
        empty = torch.zeros(len(cameras), 1, size, size)
        return Rendering(self.image.expand(len(cameras), -1, -1, -1), empty, empty, empty)


def loss_and_gradient(prior, image_weight, objective=SDS(7.5)):
    """The loss of the first step on a `Flat` scene, its gradient, and the scene."""
    recipe = Recipe(objective=objective, views=1, image_weight=image_weight, background=ConstantBackground(1.0))
    scene = Flat(prior.image_size)
    run = ObjectRun(recipe, ViewPrompts("a cat"), prior, scene=scene)
    loss, progress = run.loss(0)
    (gradient,) = torch.autograd.grad(loss, scene.image)
    return progress, gradient, scene


def test_the_loss_on_images_is_added_to_the_loss_on_x(kl_folder):
    prior = load_prior(kl_folder)
    before, plain, scene = loss_and_gradient(prior, 0.0)
    after, pulled, _ = loss_and_gradient(prior, 3.0)
    # The same draws again: cameras, then the noise and the time of the objective.
    generator = torch.Generator().manual_seed(0)
    cameras = Recipe().cameras.sample(1, generator)
    conditioning = ViewPrompts("a cat").conditioning(cameras.azimuth, cameras.elevation, prior.embed)
    guidance = sds(7.5).guidance(prior.encode(scene.image), prior, conditioning, step=0, total=200, generator=generator)
    difference = scene.image.detach() - prior.decode(guidance.x0).detach()
    torch.testing.assert_close(pulled - plain, 3.0 * difference / difference.numel(), atol=1e-7, rtol=1e-4)
    assert after.loss - before.loss == pytest.approx(1.5 * float(difference.square().mean()), rel=1e-4)
    assert before.nfe == after.nfe == guidance.nfe


def test_a_recipes_pull_is_taken_by_methods_that_match_x0_and_by_those_that_set_it(kl_folder):
    prior = load_prior(kl_folder)

    def gradients(method, *weights):
        return [loss_and_gradient(prior, weight, method)[1] for weight in weights]

    plain, pulled = gradients(CSD(7.5), 0.0, 3.0)
    assert torch.equal(plain, pulled)
    (own,) = gradients(CSD(7.5, pull=0.5), 3.0)
    whole, half = gradients(SDS(7.5), 3.0, 1.5)
    (again,) = gradients(SDS(7.5, pull=0.5), 3.0)
    assert torch.equal(again, half) and not torch.equal(half, whole) and not torch.equal(own, plain)


def test_hifas_own_term_on_images_is_its_pull_on_x_there(kl_folder):
    """g = alpha sigma (x - x0_hat), and 0.48 alpha sigma (image - decode(x0_hat)), whatever the recipe's weight."""
    prior = load_prior(kl_folder)
    _, plain, scene = loss_and_gradient(prior, 0.0, HiFA(7.5, image_weight=0.0))
    for weight in (0.0, 30.0):
        progress, pulled, _ = loss_and_gradient(prior, weight, HiFA(7.5))
        generator = torch.Generator().manual_seed(0)
        cameras = Recipe().cameras.sample(1, generator)
        conditioning = ViewPrompts("a cat").conditioning(cameras.azimuth, cameras.elevation, prior.embed)
        guidance = hifa(7.5).guidance(
            prior.encode(scene.image), prior, conditioning, step=0, total=200, generator=generator
        )
        alpha, sigma = coefficients(prior.schedule, guidance.t, scene.image)
        difference = (scene.image - prior.decode(guidance.x0)).detach()
        expected = 0.48 * alpha * sigma * difference / difference.numel()
        torch.testing.assert_close(pulled - plain, expected, atol=1e-9, rtol=1e-3)
        assert progress.t == pytest.approx(0.98)


def test_network_evaluations_are_summed_over_steps(kl_folder, counting):
    prior = counting(load_prior(kl_folder))
    run = ObjectRun(Recipe(objective=SDS(7.5), views=2), ViewPrompts("a cat"), prior, scene=Flat(prior.image_size))
    seen = []
    optimize(run, range(3), seen.append, nfe=100)
    assert [p.nfe for p in seen] == [104, 108, 112] and sum(prior.calls) == 12
    assert [p.step for p in seen] == [0, 1, 2]


def test_distill_takes_a_scene_of_ones_own(kl_folder):
    prior = load_prior(kl_folder)
    scene, seen = Flat(prior.image_size), []
    before = scene.image.detach().clone()
    distill(scene, prior, sds(7.5), "a cat", steps=3, on_step=seen.append)
    assert len(seen) == 3 and not torch.equal(scene.image, before)
    again = Flat(prior.image_size)
    distill(again, prior, SDS(7.5), ViewPrompts("a cat"), steps=3)
    assert torch.equal(scene.image, again.image)  # settings are their objective, and a text its prompts


def test_a_scene_rendered_small_is_resized_to_what_the_prior_sees(kl_folder):
    prior = load_prior(kl_folder)
    recipe = dataclasses.replace(
        DISTILL,
        steps=2,
        views=1,
        render_size=8,
        objective=METHODS["sds"],
        scene=dataclasses.replace(DISTILL.scene, resolution=12),
    )
    run, again = (ObjectRun(recipe, ViewPrompts("a cat"), prior, seed=3) for _ in range(2))
    cameras = recipe.cameras.sample(1, run.generator)
    rendering = run.render(0, cameras)
    maps = (rendering.rgb, rendering.opacity, rendering.depth)
    assert {value.shape[-1] for value in maps} == {prior.image_size} == {16}
    # The same draws and the same cameras, at 8 pixels.
    cameras = recipe.cameras.sample(1, again.generator)
    small = again.scene.render(cameras, 8, again.background(cameras, 8, again.generator), generator=again.generator)
    torch.testing.assert_close(rendering.rgb, torch.nn.functional.interpolate(small.rgb, (16, 16), mode="bilinear"))
    assert resized(small, 8) is small
    optimize(run, range(2), lambda progress: None)  # gradients reach the scene through it
    assert any(not torch.equal(a, b) for a, b in zip(run.scene.parameters(), again.scene.parameters(), strict=True))
    with pytest.raises(ValueError, match="must be 8 to 4096 pixels"):
        dataclasses.replace(DISTILL, render_size=4)


def test_an_enlarged_depth_is_that_of_what_is_hit():
    """Pixels beside the object have depth 0, which must not be mixed into the rim's."""
    opacity = torch.zeros(1, 1, 8, 8)
    opacity[..., 2:6, 2:6] = 1
    small = Rendering(opacity.expand(1, 3, 8, 8), opacity, 2.5 * opacity, 0.1 * opacity)
    large = resized(small, 64)
    hit = large.opacity > 1e-3
    assert hit.any() and not hit.all()
    torch.testing.assert_close(large.depth[hit], torch.full_like(large.depth[hit], 2.5))
    torch.testing.assert_close(large.depth_variance[hit], torch.full_like(large.depth[hit], 0.1))
    assert not large.depth[large.opacity == 0].any()


def test_penalties_that_a_scene_does_not_have_are_refused_before_the_first_step(kl_folder):
    prior = load_prior(str(kl_folder))
    for recipe, name in (
        (dataclasses.replace(SPLATS, penalties=Penalties(orientation=WeightSchedule(0.1, 0.1))), "orientation"),
        (dataclasses.replace(SPLATS, penalties=Penalties(smooth_density=WeightSchedule(0.1, 0.1))), "smooth_density"),
    ):
        with pytest.raises(ValueError, match=f"does not support the penalty {name}: set its weight to 0"):
            ObjectRun(recipe, ViewPrompts("a cat"), prior)
