"""SDI by inversion climbs to a mode of p_W ~ p(x | prompt)^W p(x)^(1 - W), W = (w - c g) / (1 - c): on 1D Gaussians.

There every gradient is linear in x as long as nothing is drawn, so two evaluations give the rest point exactly.
"""

import dataclasses

import pytest
import torch

from distill3d.diffusion.schedule import Cosine, Flow, stable_diffusion
from distill3d.objectives import (
    SDI,
    Objective,
    cfd,
    effective_guidance,
    noise,
    prediction,
    prediction_scale,
    reference,
    sdi,
    timesteps,
    weighting,
)
from distill3d.objectives.prediction import inversion_factor
from distill3d.priors.mixture import MixturePrior
from distill3d.types import Conditioning

F64 = torch.float64
MEAN, STD, EMPTY_STD = 0.3, 0.57, 0.6  # the prompt's Gaussian; the empty text's has mean 0
LOW = 0.02  # where the noise is small: rho = 0.03


@pytest.fixture
def setting():
    """setting(schedule, n): the prior and the conditioning of n samples."""

    def build(schedule, n):
        means, stds = torch.tensor([[0.0], [MEAN]], dtype=F64), torch.tensor([EMPTY_STD, STD], dtype=F64)
        prior = MixturePrior(means, stds, conditions={"empty": [0], "prompt": [1]}, schedule=schedule)
        return prior, Conditioning(prior.embed(["prompt"] * n), prior.embed(["empty"] * n))

    return build


def mode(guidance):
    """Of p_W: the mean of a Gaussian whose precision is W / STD^2 + (1 - W) / EMPTY_STD^2."""
    prompt, empty = guidance / STD**2, (1 - guidance) / EMPTY_STD**2
    return prompt * MEAN / (prompt + empty)


def gradients(setting, scale, find, t=LOW):
    """At x = 0 and at x = 1."""
    prior, conditioning = setting(Cosine(), 2)
    objective = Objective(
        find, timesteps.listed([t]), prediction.guided(scale), reference.injected_noise, weighting.x0_matching
    )
    x = torch.tensor([[0.0], [1.0]], dtype=F64)
    return objective.guidance(x, prior, conditioning, step=0, total=1, generator=torch.Generator()).gradient.flatten()


def rest_point(setting, scale, find, t=LOW):
    """Where the gradient is zero, and its slope."""
    at_zero, at_one = gradients(setting, scale, find, t).tolist()
    return at_zero / (at_zero - at_one), at_one - at_zero


def exact_inversion(scale):
    return noise.ddim_inversion(1000, scale, 0.0, "heun", overshoot=0.0)


@pytest.mark.parametrize(
    ("scale", "inversion_scale"), [(5.0, -5.0), (5.0, 0.0), (5.0, 1.0), (5.0, 5.0), (0.0, -5.0), (2.5, 0.0), (3.0, 1.0)]
)
def test_exact_inversion_rests_at_the_mode_of_twice_the_guidance_less_that_of_the_inversion(
    setting, scale, inversion_scale
):
    rest, slope = rest_point(setting, scale, exact_inversion(inversion_scale))
    assert rest == pytest.approx(mode(2 * scale - inversion_scale), rel=2e-3)
    assert rest == pytest.approx(mode(effective_guidance(scale, inversion_scale)), rel=2e-3)
    assert 0 < slope < 2  # x <- x - g converges to it


@pytest.mark.parametrize("inversion_scale", [-5.0, 0.0, 1.0, 5.0])
def test_the_prediction_scale_gives_the_nominal_guidance(setting, inversion_scale):
    rest, _ = rest_point(setting, prediction_scale(5.0, inversion_scale, 0.5), exact_inversion(inversion_scale))
    assert rest == pytest.approx(mode(5.0), rel=2e-3)


@pytest.mark.parametrize("c", [0.2, 0.5, 0.8])
def test_a_solver_that_gets_as_far_as_c_rests_at_the_mode_of_its_guidance(setting, c):
    """One damped step from kappa = 0 is the fraction c of the solution, where the noise is small."""
    solver = noise.fixed_point(1, 1.0, c, start=noise.given(torch.zeros(2, 1, dtype=F64)))
    rest, _ = rest_point(setting, 5.0, solver, t=0.01)
    assert rest == pytest.approx(mode(effective_guidance(5.0, 1.0, c)), rel=2e-3)


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_an_inversion_of_few_hops_finds_less(setting, hops):
    """c = (n - 1) / (2 n) for n equal hops: the first one begins where the noise is zero, and alone changes nothing."""
    rest, _ = rest_point(setting, 5.0, noise.ddim_inversion(round(hops / LOW), -5.0, 0.0, overshoot=0.0))
    assert rest == pytest.approx(mode(effective_guidance(5.0, -5.0, (hops - 1) / (2 * hops))), rel=1e-2)


@pytest.mark.parametrize("hops", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("inversion_scale", [-5.0, 0.0, 1.0])
def test_nominal_sdi_rests_at_the_mode_of_its_scale_for_any_number_of_hops(setting, hops, inversion_scale):
    """Its tau is drawn: the gradient is a mean over 4,000 draws. The scale for c = 1/2 is further off."""
    n, steps = 4000, round(hops / LOW)
    prior, conditioning = setting(Cosine(), 2 * n)
    x = torch.tensor([[0.0], [1.0]], dtype=F64).repeat_interleave(n, 0)

    def error(settings):
        objective = settings.build(prior, 1, torch.Generator())
        out = objective.guidance(x, prior, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(0))
        at_zero, at_one = out.gradient.unflatten(0, (2, n)).mean(1).flatten().tolist()
        return abs(at_zero / (at_zero - at_one) / mode(5.0) - 1)

    inverted = {"inversion_scale": inversion_scale, "inversion_steps": steps, "eta": 0.0, "start": LOW, "stop": LOW}
    own = error(SDI(5.0, **inverted, nominal=True))
    assert own < 0.01
    assert own < 0.5 * error(SDI(prediction_scale(5.0, inversion_scale, 0.5), **inverted))


@pytest.mark.parametrize("schedule", [Cosine(), stable_diffusion(), Flow()], ids=["cosine", "table", "flow"])
def test_the_factor_of_an_inversion_is_that_of_its_hops(schedule):
    """(n - 1) / (2 n) where the hops are equal, 1/2 in the limit; each sample has that of its own time."""
    low, high = torch.tensor([LOW], dtype=F64), torch.tensor([0.6], dtype=F64)
    assert inversion_factor(schedule, high, 5000).item() == pytest.approx(0.5, abs=2e-3)
    both = inversion_factor(schedule, torch.cat([low, high]), 10)
    each = torch.cat([inversion_factor(schedule, t, 10) for t in (low, high)])
    torch.testing.assert_close(both, each, rtol=1e-12, atol=0)
    if isinstance(schedule, Cosine):  # rho is proportional to t; with tau in (0, 1/steps) there are n to n + 1 hops
        for n in (2, 5, 20):
            found = inversion_factor(schedule, low, round(n / LOW)).item()
            assert (n - 1) / (2 * n) < found < 0.5


def test_a_whole_solution_has_no_effective_guidance(setting):
    """c = 1: at another scale x rests where the two scores agree (W -> infinity), at the same scale anywhere."""

    def solver(scale):
        start = noise.given(torch.zeros(2, 1, dtype=F64))
        return noise.fixed_point(30, scale, memory=1, start=start)

    assert rest_point(setting, 5.0, solver(1.0))[0] == pytest.approx(mode(1e9), rel=1e-6)
    assert gradients(setting, 5.0, solver(5.0)).abs().max() < 1e-12


def test_a_solution_at_the_previous_level_moves_away_from_the_mode(setting):
    """c = rho(t + tau) / rho(t) > 1, at one scale: DDIM's denoised image expands to the width of the data."""
    solver = noise.fixed_point(30, 5.0, memory=1, start=noise.given(torch.zeros(2, 1, dtype=F64)))
    rest, slope = rest_point(setting, 5.0, lambda query: solver(dataclasses.replace(query, t=query.t + 0.01)))
    assert effective_guidance(5.0, 5.0, 1.5) == 5.0
    assert rest == pytest.approx(mode(5.0), rel=5e-3) and slope < 0


def end(objective, prior, conditioning, first):
    x, generator = first, torch.Generator().manual_seed(1)
    for step in range(40):
        x = x - objective.guidance(x, prior, conditioning, step=step, total=40, generator=generator).gradient
    return x


# Mean of SDI's end points over that of DDIM's, at scale 5 with ten hops: what an independent implementation found.
@pytest.mark.parametrize(("inversion_scale", "expected"), [(-5.0, 1.20), (0.0, 1.08), (1.0, 1.06), (5.0, 0.94)])
def test_runs_end_beyond_ddim_the_lower_the_scale_of_the_inversion(setting, inversion_scale, expected):
    prior, conditioning = setting(stable_diffusion(), 4)
    first = torch.tensor([[-1.0], [-0.3], [0.3], [1.0]], dtype=F64)  # DDIM is linear here: this gives its exact mean
    ddim = end(cfd(5.0, first=first), prior, conditioning, torch.zeros_like(first))
    inverted = end(sdi(5.0, inversion_scale, 10, 0.0, stop=0.02), prior, conditioning, first)
    assert (inverted.mean() / ddim.mean()).item() == pytest.approx(expected, abs=0.02)
    assert inverted.std() < 0.1 * ddim.std()  # a mode, not samples


@pytest.mark.parametrize("inversion_scale", [0.0, 1.0])
def test_the_nominal_setting_takes_the_overshoot_away(setting, inversion_scale):
    """A whole run with inversions of 20 hops ends near the mode of p_5, not near that of p_10 or p_9."""
    prior, conditioning = setting(Cosine(), 2)
    first = torch.tensor([[-0.5], [1.0]], dtype=F64)

    def overshoot(nominal):
        settings = SDI(5.0, inversion_scale, 20, 0.0, stop=0.02, nominal=nominal)
        x = end(settings.build(prior, 40, torch.Generator()), prior, conditioning, first)
        return (x.mean() / mode(5.0)).item() - 1

    assert overshoot(False) > 0.3 and abs(overshoot(True)) < 0.15
