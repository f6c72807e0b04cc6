"""Views that are sampled, on a multi-view model of toy size: sampling without a scene is DDIM, and runs resume."""

from dataclasses import replace

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import coefficients
from distill3d.distill.divergence import Diverged
from distill3d.distill.loop import optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import LAPTOP, ViewSampling
from distill3d.distill.supervision import condition_views
from distill3d.distill.view_sampling import Regrouped, SamplingRun, disc
from distill3d.objectives import CFD, SDI
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.runs.checkpoint import load_checkpoint, save_checkpoint
from distill3d.scenes import VoxelOptions

RINGS = ((4, 10.0, 0.0), (4, 30.0, 45.0))
SMALL = replace(
    LAPTOP,
    steps=8,
    scene=VoxelOptions(resolution=12),
    objective=CFD(scale=3.0),
    # The images of a random model show no object, and so no hull.
    sampling=ViewSampling(RINGS, group=8, joint_levels=3, levels=2, first=0.5, hull=False),
)


@pytest.fixture(scope="module")
def prior(views_folder):
    return load_prior(views_folder)


def run_of(prior, recipe=SMALL, seed=1):
    return SamplingRun(recipe, ViewPrompts("a cat"), prior, seed)


@torch.no_grad()
def test_without_a_scene_the_views_take_the_steps_of_the_ddim_sampler(prior):
    """In x_t rather than x: outside of the disc the sample is the noised background at every level."""
    run, views = run_of(prior), 8
    blank = run._background(views)
    conditioning = condition_views(run.prompts, prior, blank, run.cameras)
    run._sample_without_scene(0)

    kappa = torch.randn(views, *prior.sample_shape, generator=torch.Generator().manual_seed(1))
    inside, ground = disc(*prior.sample_shape[1:]), prior.encode(blank.rgb)
    assert inside.any() and not inside.all()
    prior.join(views)
    model = Guided(prior, conditioning, 3.0)
    times = torch.linspace(0.98, 0.02, 3, dtype=torch.float64)[:, None].expand(-1, views)
    x = coefficients(prior.schedule, times[0], kappa)[1] * kappa
    for step, t in enumerate(times):
        alpha, sigma = coefficients(prior.schedule, t, x)
        x = torch.where(inside, x, alpha * ground + sigma * kappa)
        eps = model(x, t)
        x0 = (x - sigma * eps) / alpha
        if step + 1 < len(times):
            x = ddim.ddim_step(x, eps, prior.schedule, t, times[step + 1])
    prior.join(4)
    expected = prior.decode(torch.where(inside, x0, ground)).clamp(0, 1)
    cutouts = run.targets.cutouts
    composite = cutouts[:, :3] + (1 - cutouts[:, 3:]) * run.settings.background
    covered = cutouts[:, 3:].expand(-1, 3, -1, -1) > 0.999
    assert covered.any()
    torch.testing.assert_close(composite[covered], expected[covered], atol=2e-4, rtol=1e-3)


def test_every_level_has_its_share_of_the_steps(prior):
    run = run_of(prior, replace(SMALL, steps=100, sampling=replace(SMALL.sampling, levels=6, first=0.4)))
    levels = [run.level_at(step) for step in range(100)]
    assert levels == sorted(levels) and [levels.count(level) for level in range(7)] == [40, *[10] * 6]
    straight = run_of(prior, replace(SMALL, sampling=replace(SMALL.sampling, joint_levels=0)))
    assert [straight.level_at(step) for step in range(8)] == [1] * 4 + [2] * 4


def test_a_resumed_run_equals_an_uninterrupted_one(prior, tmp_path):
    whole, first, second = run_of(prior), run_of(prior), run_of(prior, seed=7)
    progress = []
    optimize(whole, range(8), progress.append)
    optimize(first, range(5), lambda _: None)
    save_checkpoint(tmp_path / "checkpoint", first, 5)
    assert load_checkpoint(tmp_path / "checkpoint", second).step == 5
    optimize(second, range(5, 8), lambda _: None)
    for a, b in zip(whole.scene.parameters(), second.scene.parameters(), strict=True):
        assert torch.equal(a, b)
    # Three levels without a scene and two with one, each with two rows for each of eight views.
    assert progress[-1].nfe == 5 * 2 * 8
    times = [p.t for p in progress]
    assert times == sorted(times[:4]) + sorted(times[4:], reverse=True) and times[4] == pytest.approx(0.98 * 0.6)


@pytest.mark.parametrize(("level", "step"), [(0, 0), (1, 4)])
def test_samples_that_are_not_finite_end_a_run_before_the_scene_sees_them(level, step, prior, monkeypatch):
    hull = replace(SMALL, sampling=replace(SMALL.sampling, hull=True))
    run, predict = run_of(prior, hull), prior.predict
    monkeypatch.setattr(
        prior, "predict", lambda x_t, *rest: predict(x_t, *rest) * (torch.nan if run.targets.level == level - 1 else 1)
    )
    states = [{name: value.clone() for name, value in run.module.state_dict().items()}]

    def keep(progress):
        states.append({name: value.clone() for name, value in run.module.state_dict().items()})

    with pytest.raises(Diverged, match=f"in step {step} the prediction of the network"):
        optimize(run, range(8), keep)
    assert len(states) == step + 1
    assert all(torch.equal(value, states[-1][name]) for name, value in run.module.state_dict().items())


def test_groups_are_predicted_as_if_alone_in_any_order(prior):
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(8, generator=generator)
    x = torch.randn(16, *prior.sample_shape, generator=generator)
    conditioning = condition_views(run_of(prior).prompts, prior, run_of(prior)._background(8), run_of(prior).cameras)
    condition = type(conditioning.positive).cat([conditioning.negative, conditioning.positive])
    t = torch.full((16,), 0.4)
    together = Regrouped(prior, order).predict(x, t, condition)
    for batch in (0, 8):
        for group in order.split(4):
            rows = batch + group
            torch.testing.assert_close(together[rows], prior.predict(x[rows], t[rows], condition[rows]))


def test_small_groups_change_from_level_to_level(prior):
    run = run_of(prior, replace(SMALL, sampling=replace(SMALL.sampling, group=4)))
    optimize(run, range(8), lambda _: None)
    assert run.targets.level == 2 and prior.views == 4


def test_any_objective_and_a_prior_of_single_views_can_be_sampled(kl_folder):
    single = load_prior(kl_folder)
    sampling = replace(SMALL.sampling, joint_levels=0)
    recipe = replace(SMALL, objective=SDI(scale=3.0, inversion_steps=2), sampling=sampling, steps=4)
    run = object_run(recipe, ViewPrompts("a cat"), single)
    before = [p.detach().clone() for p in run.scene.parameters()]
    optimize(run, range(4), lambda _: None)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.scene.parameters(), strict=True))


def test_the_negative_prompt_has_a_camera_unless_guidance_strengthens_it(prior):
    run = run_of(prior)
    for guided in (False, True):
        prior.camera_guidance = guided
        conditioning = condition_views(run.prompts, prior, run._background(8), run.cameras)
        assert torch.equal(conditioning.positive.camera, run.cameras.camera_to_world)
        expected = torch.zeros(8, 4, 4) if guided else run.cameras.camera_to_world
        assert torch.equal(conditioning.negative.camera, expected)
    prior.camera_guidance = False


def test_settings_that_do_not_go_together_are_refused(prior):
    for wrong, message in (
        (dict(group=3), "group must divide the number of views, 8, got 3"),
        (dict(rings=()), "rings must be"),
        (dict(levels=0, joint_levels=0), "sampling needs levels"),
        (dict(hull=True, joint_levels=0), "a hull needs views"),
        (dict(start=0.0), "start in"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL.sampling, **wrong)
    with pytest.raises(ValueError, match="no second objective, shading or render size"):
        run_of(prior, replace(SMALL, render_size=32))
