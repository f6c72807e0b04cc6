"""MVDream's objective in closed forms, and what groups of views share."""

import dataclasses

import pytest
import torch

from distill3d.diffusion.schedule import Cosine, Flow, coefficients, stable_diffusion
from distill3d.objectives import Objective, mvdream, noise, prediction, reference, sdi, sds, timesteps, weighting
from distill3d.priors.mixture import MixturePrior

F64 = torch.float64
TEXTS = ["left", "left", "right", "right"]


def at(objective, *times):
    return dataclasses.replace(objective, timesteps=timesteps.listed([times]))


def seed(value=0):
    return torch.Generator().manual_seed(value)


@pytest.fixture
def evaluated(mixture, conditions, randn):
    x, conditioning = 0.5 * randn(4, 2, 2, 2), conditions(mixture, TEXTS)

    def run(objective, step=0):
        return objective.guidance(x, mixture, conditioning, step=step, total=11, generator=seed())

    run.x = x
    return run


def test_without_rescaling_it_is_sds_that_matches_x0(evaluated):
    plain = dataclasses.replace(sds(7.5), weight=weighting.x0_matching)
    a, b = evaluated(at(mvdream(7.5, rescale=0.0, views=1), 0.6)), evaluated(at(plain, 0.6))
    torch.testing.assert_close(a.gradient, b.gradient)
    assert a.nfe == b.nfe


@pytest.mark.parametrize("views", [1, 2, 4])
def test_rescaled_whole_the_deviation_of_a_group_is_the_conditional_one(evaluated, views):
    conditional, full = (evaluated(at(mvdream(s, rescale=1.0, views=views), 0.6)) for s in (1.0, 50.0))
    deviations = [out.x0.unflatten(0, (-1, views)).flatten(1).std(1) for out in (conditional, full)]
    torch.testing.assert_close(*deviations)
    assert (full.x0 - conditional.x0).abs().max() > 0.01


def test_half_of_the_rescaling_is_half_way(evaluated):
    none, half, whole = (evaluated(at(mvdream(50.0, fraction, views=2), 0.6)).x0 for fraction in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + whole) / 2)


def test_the_gradient_is_the_way_to_x0(evaluated):
    out = evaluated(mvdream(views=2), step=3)
    torch.testing.assert_close(out.gradient, evaluated.x - out.x0, rtol=1e-8, atol=1e-8)


def test_times_widen_from_above():
    draw = timesteps.moving((0.98, 0.98), (0.02, 0.5), over=0.8)
    for step, low, high in ((0, 0.98, 0.98), (400, 0.5, 0.74), (800, 0.02, 0.5), (5000, 0.02, 0.5)):
        t = draw(step, 1000, 2000, seed())
        assert t.min() >= low - 1e-12 and t.max() <= high + 1e-12
        torch.testing.assert_close(t.mean(), torch.tensor((low + high) / 2, dtype=F64), rtol=0, atol=0.02)
        assert t.max() - t.min() >= 0.95 * (high - low)


@pytest.mark.parametrize("objective", [sds(), sdi(), mvdream()], ids=["sds", "sdi", "mvdream"])
def test_a_group_has_one_time_and_groups_have_their_own(mixture, conditions, randn, objective):
    x, conditioning = randn(8, 2, 2, 2), conditions(mixture, 2 * TEXTS)
    drawn = dataclasses.replace(objective, views=4, timesteps=timesteps.uniform())
    t = drawn.guidance(x, mixture, conditioning, step=5, total=11, generator=seed()).t.view(2, 4)
    assert (t == t[:, :1]).all() and t[0, 0] != t[1, 0]


def test_one_view_a_group_is_no_group(mixture, conditions, randn):
    """Draws included: the field changes nothing where it is 1."""
    x, conditioning = randn(4, 2, 2, 2), conditions(mixture, TEXTS)
    plain = Objective(noise.ddim_inversion(4), timesteps.uniform(), prediction.guided(7.5), reference.injected_noise,
                      weighting.x0_matching)  # fmt: skip
    outs = [
        o.guidance(x, mixture, conditioning, step=0, total=5, generator=seed())
        for o in (plain, dataclasses.replace(plain, views=1))
    ]
    assert torch.equal(outs[0].gradient, outs[1].gradient)
    generators = [seed(i) for i in range(4)]
    shared = noise.gaussian(shared=True)
    own = (
        dataclasses.replace(sds(), noise=shared)
        .guidance(x, mixture, conditioning, step=0, total=5, generator=generators)
        .noise
    )
    again = sds().guidance(x, mixture, conditioning, step=0, total=5, generator=[seed(i) for i in range(4)]).noise
    assert torch.equal(own, again)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [Cosine(), stable_diffusion(), Flow()], ids=["cosine", "table", "flow"])
def test_finite_at_both_ends_of_time(mixture, conditions, randn, t, schedule):
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)
    x, conditioning = randn(4, 2, 2, 2).float(), conditions(prior, TEXTS)
    out = at(mvdream(), t).guidance(x, prior, conditioning, step=0, total=1, generator=seed())
    assert out.gradient.isfinite().all() and out.x0.isfinite().all()


def test_levels_of_the_estimate_agree(evaluated, mixture):
    """The prediction is the noise behind the rescaled x0: both say the same of x_t."""
    out = evaluated(at(mvdream(views=4), 0.4))
    alpha, sigma = coefficients(mixture.schedule, out.t, out.x_t)
    torch.testing.assert_close(alpha * out.x0 + sigma * out.prediction, out.x_t)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: mvdream(rescale=1.5), "rescale must lie in"),
        (lambda: mvdream(views=0), "views must be a whole number of at least 1"),
        (lambda: mvdream(float("inf")), "scale must be a finite number"),
        (lambda: timesteps.moving((0.3, 0.1), (0.1, 0.5), 0.1), "low must not exceed high"),
        (lambda: timesteps.moving((0.9, 0.9), (0.1, 0.5), 800), "over must lie in"),
    ],
)
def test_settings_out_of_range_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
