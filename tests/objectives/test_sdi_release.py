"""Where sdi(released=True) and the default sdi() part, and by how much: one test for each defect of the release."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided, guided_prediction
from distill3d.diffusion.schedule import coefficients, stable_diffusion
from distill3d.objectives import Query, noise, sdi, sdi_release, sds, timesteps
from distill3d.priors.mixture import MixturePrior

F64 = torch.float64
SCHEDULE = stable_diffusion()
TEXTS = ["left", "right", "odd"]


@pytest.fixture(scope="module")
def prior(mixture):
    """The mixture under the noise levels that the release is written for."""
    return MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, SCHEDULE)


@pytest.fixture(scope="module")
def unit():
    """One standard normal in 4096 dimensions: at every level the sample keeps a variance of 1."""
    return MixturePrior(torch.zeros(1, 1, 64, 64, dtype=F64), 1.0, schedule=SCHEDULE)


class Clock:
    """A prior that remembers the times of its calls."""

    def __init__(self, prior):
        self._prior, self.times = prior, []

    def __getattr__(self, name):
        return getattr(self._prior, name)

    def predict(self, x_t, t, text):
        self.times.append(round(t[0].item(), 9))
        return self._prior.predict(x_t, t, text)


def levels(*times):
    """alpha and sigma, each shaped to multiply samples, at one time after the other."""
    like = torch.zeros(1, 1, 1, 1, dtype=F64)
    return [value for t in times for value in coefficients(SCHEDULE, torch.tensor([t], dtype=F64), like)]


def test_1_the_sample_stands_above_the_level_that_the_network_is_told(prior, conditions, randn):
    """Released, x_t is the end of the inversion to t + d; by default it has the kappa found there, at level t."""
    x, conditioning = 0.5 * randn(1, 2, 2, 2), conditions(prior, ["left"])
    objective = sdi(eta=0.0, start=0.6, stop=0.6, released=True)
    theirs = dataclasses.replace(objective, noise=sdi_release.inversion(eta=0.0, random=0.8))
    clock = Clock(prior)
    out = theirs.guidance(x, clock, conditioning, step=0, total=1, generator=torch.Generator())
    times = torch.tensor([0.0, *(k / 1000 for k in range(1, 600, 100)), 0.68], dtype=F64)
    model = Guided(prior, conditioning, -6.5)
    # Below its first entry the table holds its level: the time of the first step is 0 for a mixture.
    end = ddim.invert(model, x, SCHEDULE, times)
    torch.testing.assert_close(out.x_t, end, rtol=1e-9, atol=1e-9)
    assert clock.times[-1] == 0.6
    a_t, s_t, a_high, s_high = levels(0.6, 0.68)
    kappa = (end - a_high * x) / s_high
    assert ((out.x_t - (a_t * x + s_t * kappa)).abs().max() / kappa.abs().max()) > 0.02

    ours = sdi(eta=0.0, start=0.6, stop=0.6, overshoot=0.08)
    clock = Clock(prior)
    out = ours.guidance(x, clock, conditioning, step=0, total=1, generator=torch.Generator())
    end = ddim.invert(
        Guided(prior, conditioning, -7.5), x, SCHEDULE, ddim.ascending(torch.tensor([0.68], dtype=F64), 10)
    )
    kappa = (end - a_high * x) / s_high
    torch.testing.assert_close(out.x_t, a_t * x + s_t * kappa, rtol=1e-9, atol=1e-9)
    assert clock.times[-1] == 0.6


def test_2_the_first_hop_asks_below_the_table(prior, conditions, randn):
    x, conditioning = 0.5 * randn(1, 2, 2, 2), conditions(prior, ["left"])
    theirs = dataclasses.replace(sdi(released=True), noise=sdi_release.inversion(random=0.0))
    first = {}
    for name, objective in {"released": theirs, "default": sdi(overshoot=0.0)}.items():
        clock = Clock(prior)
        objective.guidance(x, clock, conditioning, step=0, total=1, generator=torch.Generator())
        first[name] = clock.times[:3]
        assert len(clock.times) == {"released": 12, "default": 11}[name]
    assert first == {"released": [-0.099, 0.001, 0.101], "default": [0.0, 0.1, 0.2]}
    assert sdi_release.grid(500, 5, 0.0) == [-199, 1, 201, 401, 500]
    assert sdi_release.grid(980, 10, 0.375)[-1] == 999 and sdi_release.grid(1, 10, 0.5) == [-99, 51]
    assert SCHEDULE.timestep(torch.tensor([-0.099, 0.25])).tolist() == [-99, 250]
    assert SCHEDULE.position(torch.tensor([-0.099])).item() == 0


def test_3_eta_keeps_the_variance_by_default_only(unit, conditions, randn):
    """At eta = 1 the sample of a standard normal stays one; released, every step adds to it."""
    x, conditioning = randn(1, 1, 64, 64), conditions(unit, [""])
    variance = {}
    for eta in (0.0, 1.0):
        for late in (False, True):
            start = dict(start=0.5, stop=0.5, eta=eta, scale=0.0, inversion_scale=0.0, released=late)
            chosen = sdi_release.inversion(eta=eta, scale=0.0, random=0.0) if late else None
            objective = sdi(**start, **({} if late else {"overshoot": 0.0}))
            objective = objective if chosen is None else dataclasses.replace(objective, noise=chosen)
            out = objective.guidance(x, unit, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(0))
            variance[eta, late] = (out.x_t.var() / x.var()).item()
    error = 4 * (2 / 4096) ** 0.5
    assert abs(variance[1.0, False] - 1) < error + abs(variance[0.0, False] - 1)
    assert variance[1.0, True] > variance[0.0, True] + 0.5


def test_4_the_release_takes_one_view_the_default_any_batch_and_any_time(prior, conditions, randn):
    x, conditioning = 0.5 * randn(3, 2, 2, 2), conditions(prior, TEXTS)
    with pytest.raises(ValueError, match="one view at a time, got 3"):
        sdi(released=True).guidance(x, prior, conditioning, step=0, total=1, generator=torch.Generator())

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    times = torch.tensor([[0.9, 0.43, 0.07]], dtype=F64)
    for at in (times, times[:, :1].expand(1, 3)):
        objective = dataclasses.replace(sdi(), timesteps=timesteps.listed(at))
        together = objective.guidance(x, prior, conditioning, step=0, total=1, generator=generators())
        for i in range(3):
            one = torch.tensor([i])
            single = dataclasses.replace(sdi(), timesteps=timesteps.listed(at[:, one]))
            alone = single.guidance(
                x[one], prior, conditioning[one], step=0, total=1, generator=generators()[i : i + 1]
            )
            torch.testing.assert_close(together.gradient[one], alone.gradient, rtol=1e-9, atol=1e-9)


def test_5_without_perp_neg_a_scale_acts_as_one_more(prior, conditions, randn):
    x, t, g = randn(1, 2, 2, 2), torch.tensor([0.5], dtype=F64), torch.Generator()
    for scale in (7.5, -7.5, 0.0):
        conditioning = conditions(prior, ["left"])
        theirs, rows = sdi_release.guided(scale)(Query(x, t, prior, conditioning, g, 0, 1), x)
        ours, _ = guided_prediction(prior, x, t, conditioning, scale)
        conditional, _ = guided_prediction(prior, x, t, conditioning, 1.0)
        empty, _ = guided_prediction(prior, x, t, conditioning, 0.0)
        torch.testing.assert_close(theirs - ours, conditional - empty, rtol=1e-9, atol=1e-9)
        assert rows == 2 and (conditional - empty).abs().max() > 0.01

        conditioning = conditions(prior, ["left"], ["right", "odd"], torch.tensor([[-0.5, -1.0]], dtype=F64))
        theirs, rows = sdi_release.guided(scale)(Query(x, t, prior, conditioning, g, 0, 1), x)
        torch.testing.assert_close(theirs, guided_prediction(prior, x, t, conditioning, scale)[0], rtol=1e-9, atol=1e-9)
        assert rows == 4


def test_6_negatives_of_a_batch_meet_other_samples(prior, conditions, randn):
    x, t = randn(2, 2, 2, 2), torch.tensor([0.5, 0.5], dtype=F64)
    weights = torch.tensor([[-0.5, -1.0], [-0.7, -0.2]], dtype=F64)
    conditioning = conditions(prior, ["left", "odd"], ["right", "odd", "right", "left"], weights)
    theirs, _ = sdi_release.guided(7.5)(Query(x, t, prior, conditioning, torch.Generator(), 0, 1), x)
    ours, _ = guided_prediction(prior, x, t, conditioning, 7.5)
    for i in range(2):
        one = torch.tensor([i])
        alone, _ = guided_prediction(prior, x[one], t[one], conditioning[one], 7.5)
        torch.testing.assert_close(ours[one], alone, rtol=1e-9, atol=1e-9)
    assert (theirs - ours).abs().max() > 0.1


def test_7_annealing_is_in_whole_timesteps_and_falls_on():
    g = torch.Generator()

    def times(objective, *steps):
        return [objective.timesteps(step, 10000, 1, g).item() for step in steps]

    assert times(sdi(released=True), 0, 1, 8000, 10000, 12000) == [0.98, 0.979, 0.395, 0.25, 0.104]
    assert times(sdi(), 0, 9999, 12000) == [0.98, 0.25, 0.25]
    assert times(sdi(), 1)[0] == pytest.approx(0.98 - 0.73 / 9999)


def test_draws_come_from_the_generator(prior, conditions, randn):
    x, conditioning = 0.5 * randn(1, 2, 2, 2), conditions(prior, ["left"])

    def x_t(seed, **given):
        objective = sdi(released=True)
        objective = dataclasses.replace(objective, noise=sdi_release.inversion(**given)) if given else objective
        return objective.guidance(
            x, prior, conditioning, step=5, total=10, generator=torch.Generator().manual_seed(seed)
        ).x_t

    assert x_t(0).equal(x_t(0)) and not x_t(0).equal(x_t(1))
    fresh = torch.zeros(11, 1, 2, 2, 2, dtype=F64)
    still = x_t(0, random=0.5, fresh=fresh)
    assert still.equal(x_t(1, random=0.5, fresh=fresh)) and still.equal(x_t(1, random=0.5, eta=0.0))
    assert x_t(0, eta=0.0).isfinite().all() and not x_t(0, random=0.5).equal(still)


def test_mistakes_are_named(mixture, prior, conditions, randn):
    x = randn(1, 2, 2, 2)
    with pytest.raises(ValueError, match="1000 noise levels, unlike mixture"):
        sdi(released=True).guidance(
            x, mixture, conditions(mixture, ["left"]), step=0, total=1, generator=torch.Generator()
        )
    for bad in ({"steps": 0}, {"steps": 1001}, {"eta": -0.1}, {"eta": float("nan")}, {"random": 1.0}):
        with pytest.raises(ValueError, match="steps must lie in 1 to 1000"):
            sdi_release.inversion(**bad)
    for bad in ({"solver": "heun", "eta": 0.0}, {"overshoot": 0.1}):
        with pytest.raises(ValueError, match="leave them out"):
            sdi(released=True, **bad)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        sdi(released=True, start=980)
    # What works on any noise level still does: a given noise under the released guidance.
    objective = dataclasses.replace(sds(), prediction=sdi_release.guided(1.0), noise=noise.given(x))
    conditioning = conditions(mixture, ["left"])
    assert (
        objective.guidance(x, mixture, conditioning, step=0, total=1, generator=torch.Generator())
        .gradient.isfinite()
        .all()
    )
