"""The loop itself, with a picture as the scene and a random model of toy size."""

import dataclasses

import pytest
import torch

from distill3d.distill.loop import ObjectRun, distill, sized
from distill3d.distill.recipes import LAPTOP, SPLATS
from distill3d.distill.regularizers import WeightSchedule
from distill3d.objectives import sds
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.runs.images import text_conditioning
from distill3d.types import Rendering


def one_step(prior, picture_weight):
    """The picture before and after one step of plain gradient descent of rate 1, and what was reported."""
    size = prior.image_size
    start = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    picture = start.clone().requires_grad_()
    empty = torch.zeros(2, 1, size, size)
    conditioning = text_conditioning(prior, ["a cat", "a dog"])
    reports = []
    distill(
        lambda step: (Rendering(picture, empty, empty, empty), conditioning), prior, sds(7.5),
        lambda step: torch.optim.SGD([picture], lr=1.0), lambda step, rendering: {}, range(1), 1,
        torch.Generator().manual_seed(0), reports.append, nfe=100, picture_weight=picture_weight,
    )  # fmt: skip
    return start, picture.detach(), reports[0]


def test_the_pull_on_pictures_is_added_to_the_pull_on_x(kl_folder):
    prior = load_prior(kl_folder)
    start, plain, before = one_step(prior, 0.0)
    _, pulled, after = one_step(prior, 3.0)
    guidance = sds(7.5).guidance(
        prior.encode(start),
        prior,
        text_conditioning(prior, ["a cat", "a dog"]),
        step=0,
        total=1,
        generator=torch.Generator().manual_seed(0),
    )
    difference = start - prior.decode(guidance.x0).detach()
    torch.testing.assert_close(pulled - plain, -3.0 * difference / difference.numel(), atol=1e-7, rtol=1e-4)
    assert after.loss - before.loss == pytest.approx(1.5 * float(difference.square().mean()), rel=1e-4)
    assert before.nfe == after.nfe == 100 + guidance.nfe


def test_a_scene_rendered_small_is_enlarged_to_what_the_prior_sees(kl_folder):
    prior = load_prior(kl_folder)
    recipe = dataclasses.replace(
        LAPTOP, steps=2, views=1, render_size=8, scene=dataclasses.replace(LAPTOP.scene, resolution=12)
    )
    run = ObjectRun(recipe, "sds", ViewPrompts("a cat"), prior, seed=3)
    prior.prepare(ViewPrompts("a cat").texts)
    seen, _ = run.views(0)
    assert {value.shape[-1] for value in (seen.rgb, seen.opacity, seen.depth)} == {prior.image_size} == {16}
    # The same chance at the same cameras, seen at 8 pixels.
    again = ObjectRun(recipe, "sds", ViewPrompts("a cat"), prior, seed=3)
    cameras = again.recipe.cameras.sample(1, again.generator)
    small = again.scene.render(cameras, 8, again.background(cameras, 8, again.generator), generator=again.generator)
    wanted = torch.nn.functional.interpolate(small.rgb, (16, 16), mode="bilinear")
    torch.testing.assert_close(seen.rgb, wanted)
    assert sized(small, 8) is small
    run.distill(range(2), lambda progress: None)  # gradients reach the scene through it
    assert any(not torch.equal(a, b) for a, b in zip(run.scene.parameters(), again.scene.parameters(), strict=True))
    with pytest.raises(ValueError, match="8 pixels or more"):
        dataclasses.replace(LAPTOP, render_size=4)


def test_an_enlarged_depth_is_that_of_what_is_seen():
    """Pixels beside the object have no depth, which is 0: it must not be mixed into the rim's."""
    opacity = torch.zeros(1, 1, 8, 8)
    opacity[..., 2:6, 2:6] = 1
    small = Rendering(opacity.expand(1, 3, 8, 8), opacity, 2.5 * opacity, 0.1 * opacity)
    large = sized(small, 64)
    seen = large.opacity > 1e-3
    assert seen.any() and not seen.all()
    torch.testing.assert_close(large.depth[seen], torch.full_like(large.depth[seen], 2.5))
    torch.testing.assert_close(large.depth_variance[seen], torch.full_like(large.depth[seen], 0.1))
    assert not large.depth[large.opacity == 0].any()


def test_penalties_that_a_scene_cannot_have_are_refused_before_the_first_step(kl_folder):
    penalties = dataclasses.replace(SPLATS.penalties, orientation=WeightSchedule(0.1, 0.1))
    recipe = dataclasses.replace(SPLATS, penalties=penalties)
    with pytest.raises(ValueError, match="has no penalty orientation: set its weight to 0"):
        ObjectRun(recipe, "sds", ViewPrompts("a cat"), load_prior(str(kl_folder)))
