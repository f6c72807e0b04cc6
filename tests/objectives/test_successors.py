"""The methods published after SDI, against closed forms, by hand and against their relatives."""

import dataclasses
import itertools

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided, guided_prediction
from distill3d.diffusion.schedule import Cosine, Flow, coefficients, from_eps, stable_diffusion
from distill3d.objectives import asd, bsd, csd, dsd, flowdreamer, noise, rfds, sctd, timesteps
from distill3d.priors.mixture import MixturePrior
from distill3d.types import Conditioning

F64 = torch.float64
TEXTS = ["left", "right", "odd"]
FAMILY = {"dsd": dsd, "asd": asd, "sctd": sctd, "bsd": bsd, "flowdreamer": lambda: flowdreamer(warmup=0.0)}


def at(objective, times):
    return dataclasses.replace(objective, timesteps=timesteps.listed([times]))


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def with_schedule(mixture, schedule):
    return MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)


class Watch:
    """Passes everything on to a prior and remembers what it was shown."""

    def __init__(self, prior):
        self.prior, self.seen = prior, []

    def __getattr__(self, name):
        return getattr(self.prior, name)

    def predict(self, x_t, t, text):
        self.seen.append((x_t, t))
        return self.prior.predict(x_t, t, text)


@pytest.fixture
def evaluated(mixture, conditions, randn):
    """evaluated(objective, t): its Guidance for one x, the same random numbers each time."""
    x, conditioning = 0.5 * randn(3, 2, 2, 2), conditions(mixture, TEXTS)

    def run(objective, t=(0.7, 0.5, 0.4), prior=mixture, x=x, conditioning=conditioning, step=5):
        return at(objective, t).guidance(x, prior, conditioning, step=step, total=11, generator=seeds(3))

    run.x, run.conditioning = x, conditioning
    return run


def test_dsds_noise_is_that_of_a_ddim_sampler_and_does_not_see_x(evaluated, mixture, randn):
    first, t = randn(3, 2, 2, 2), torch.tensor([0.7, 0.5, 0.392], dtype=F64)  # the last is one of the sampler's times
    out = evaluated(dsd(gap=0.0, first=first), t.tolist())
    model = Guided(mixture, evaluated.conditioning, 7.5)
    times = 0.98 * (1 - torch.arange(10, dtype=F64)[:, None] / 10)
    times = torch.cat([torch.maximum(times, t), t[None]])  # [11, 3], each down to its t
    start = coefficients(mixture.schedule, times[0], first)[1] * first
    kappa = model(ddim.sample(model, start, mixture.schedule, times), t)
    torch.testing.assert_close(out.noise, kappa, rtol=1e-10, atol=1e-10)
    other = evaluated(dsd(first=first), x=randn(3, 2, 2, 2))
    assert torch.equal(other.noise, evaluated(dsd(first=first)).noise)


def test_dsd_with_no_gap_is_csd_at_its_noise(evaluated):
    out = evaluated(dsd(7.5, gap=0.0))
    same = evaluated(dataclasses.replace(csd(6.5), noise=noise.given(out.noise)))
    torch.testing.assert_close(out.gradient, same.gradient, rtol=1e-8, atol=1e-8)


def test_dsd_by_hand_between_its_two_times(evaluated, mixture):
    """Its reference is e_c at t+ on x with the same kappa, and t+ lies in [t, t + gap (t - stop)]."""
    watch, t = Watch(mixture), torch.tensor([0.7, 0.5, 0.4], dtype=F64)
    out = evaluated(dsd(gap=0.5), prior=watch)
    x_plus, t_plus = watch.seen[-2]
    assert ((t_plus >= t) & (t_plus <= t + 0.5 * (t - 0.32))).all() and (t_plus - t).max() > 0.01
    alpha, sigma = coefficients(mixture.schedule, t_plus, x_plus)
    torch.testing.assert_close(x_plus, alpha * evaluated.x + sigma * out.noise)
    e_c = mixture.predict(x_plus, t_plus, evaluated.conditioning.positive)
    weight = coefficients(mixture.schedule, t, x_plus)[1] ** 2
    torch.testing.assert_close(out.gradient, weight * (out.prediction - e_c))


def test_dsd_simulates_each_text_once(mixture, counting, conditions, randn):
    """20 rows for each text of a run in 3D, where views share the noise, and 5 for each view."""
    prior, objective, camera = counting(mixture), dsd(), torch.eye(4, dtype=F64).expand(3, 4, 4)

    def rows(texts, **perp):
        conditioning = conditions(prior, texts, **perp).with_camera(camera[: len(texts)])
        x = randn(len(texts), 2, 2, 2)
        out = objective.guidance(x, prior, conditioning, step=0, total=9, generator=torch.Generator().manual_seed(0))
        assert sum(prior.calls) == out.nfe
        prior.calls.clear()
        return out.nfe

    assert rows(["left", "right", "left"]) == 2 * 20 + 3 * 5
    assert rows(["right", "left"]) == 2 * 5
    assert rows(["odd"]) == 20 + 5
    pushed = {"perp": ["right"], "weights": torch.tensor([[-0.5]], dtype=F64)}
    assert rows(["left"], **pushed) == rows(["left"], **pushed) == 30 + 3 + 3 + 3  # nothing to store


def test_asd_with_no_gap_is_csd(evaluated):
    torch.testing.assert_close(evaluated(asd(7.5, 0.0)).gradient, evaluated(csd(6.5)).gradient)


def test_asd_by_hand(evaluated, mixture):
    """At the sixth of eleven steps the times are U[low, ...] with low = 0.5 - 0.48 5 / 11."""
    watch, t = Watch(mixture), torch.tensor([0.7, 0.5, 0.4], dtype=F64)
    out = evaluated(asd(gap=0.5), prior=watch)
    (_, _), (x_plus, t_plus) = watch.seen
    assert ((t_plus > t) & (t_plus <= t + 0.5 * (t - (0.5 - 0.48 * 5 / 11)))).all()
    alpha, sigma = coefficients(mixture.schedule, t_plus, x_plus)
    torch.testing.assert_close(x_plus, alpha * evaluated.x + sigma * out.noise)
    e_c = mixture.predict(x_plus, t_plus, evaluated.conditioning.positive)
    torch.testing.assert_close(out.gradient, coefficients(mixture.schedule, t, x_plus)[1] ** 2 * (out.prediction - e_c))
    assert out.nfe == 6 + 3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flowdreamers_noise_is_the_end_of_eulers_method(evaluated, mixture, shift):
    """Three equal steps of sigma along dx / d sigma = v, written out; x_t and g are then those of RFDS."""
    prior = with_schedule(mixture, Flow(shift))
    watch, x = Watch(prior), evaluated.x
    out = evaluated(flowdreamer(20.0, warmup=0.0), prior=watch)
    times = [t for _, t in watch.seen[:3]] + [torch.ones(3, dtype=F64)]
    for k, t in enumerate(times):
        assert float(prior.schedule.sigma(t)[0]) == pytest.approx(k / 3, abs=3e-3)
    for t, s in itertools.pairwise(times):
        e = prior.predict(x, t, evaluated.conditioning.positive)
        alpha, sigma = coefficients(prior.schedule, t, x)
        x = x + (prior.schedule.sigma(s) - prior.schedule.sigma(t))[:, None, None, None] * from_eps(
            "velocity", e, x, alpha, sigma
        )
    alpha, sigma = coefficients(prior.schedule, times[-1], x)
    torch.testing.assert_close(out.noise, (x - alpha * evaluated.x) / sigma, rtol=1e-8, atol=1e-8)
    same = dataclasses.replace(rfds(20.0), noise=noise.given(out.noise))
    torch.testing.assert_close(out.gradient, evaluated(same, prior=prior).gradient)
    assert out.nfe == 3 * 3 + 6


def test_flowdreamer_begins_with_random_noise(evaluated, mixture):
    prior = with_schedule(mixture, Flow())
    early, late = (evaluated(flowdreamer(20.0, warmup=0.4), prior=prior, step=step) for step in (3, 4))
    assert torch.equal(early.gradient, evaluated(rfds(20.0), prior=prior).gradient)
    assert torch.equal(late.noise, evaluated(flowdreamer(20.0, warmup=0.0), prior=prior).noise)


@pytest.mark.parametrize("t", [0.12, 0.4])
def test_sctd_on_gaussians_is_its_closed_form(randn, always_conditional, t):
    """Every hop is linear there; below t = 0.15 there is one hop up, above two."""
    means, stds, schedule = randn(2, 1, 2, 2), {"a": 0.4, "b": 0.7}, Cosine()
    prior = Watch(
        always_conditional(means, torch.tensor(list(stds.values()), dtype=F64), None, {"a": [0], "b": [1]}, schedule)
    )
    x, first, w = randn(1, 1, 2, 2), randn(1, 1, 2, 2), 5.0
    conditioning = Conditioning(prior.embed(["a"]), prior.embed([""]))
    out = at(sctd(w, segments=1, first=first), t).guidance(x, prior, conditioning, step=9, total=9, generator=seeds(1))

    def level(u):
        a, s = schedule.alpha(torch.tensor(u, dtype=F64)), schedule.sigma(torch.tensor(u, dtype=F64))
        return float(a), float(s)

    def eps(z, u, text):
        (a, s), mean = level(u), means["ab".index(text)]
        return s * (z - a * mean) / (a**2 * stds[text] ** 2 + s**2)

    def guided(z, u):
        return eps(z, u, "b") + w * (eps(z, u, "a") - eps(z, u, "b"))

    def hop(z, e, u, v):
        (a, s), (b, r) = level(u), level(v)
        return b * (z - s * e) / a + r * e

    edge, s = 0.02, float(prior.seen[-1][1][0])
    assert edge + 0.01 <= s <= t - 0.01 and len(prior.seen) == (3 if t < 0.15 else 4)
    alpha, sigma = level(edge)
    x_e = alpha * x + sigma * first
    x_t = x_e
    for u, v in [(edge, t)] if t < 0.15 else [(edge, s), (s, t)]:
        x_t = hop(x_t, eps(x_t, u, "b"), u, v)
    torch.testing.assert_close(out.x_t, x_t)
    x_s = hop(x_t, guided(x_t, t), t, s)
    grad = hop(x_s, eps(x_s, s, "b"), s, edge) - x_e + (w + 1) * (x_e - hop(x_t, guided(x_t, t), t, edge))
    alpha, sigma = level(t)
    torch.testing.assert_close(out.gradient, sigma / alpha * grad)


def test_sctds_times_keep_their_distance_from_the_edges():
    draw, edges = sctd().timesteps, torch.linspace(0.02, 0.5, 6, dtype=F64)
    for step, low, high in ((0, 0.5, 0.98), (15, 0.26, 0.74), (30, 0.02, 0.5), (99, 0.02, 0.5)):
        t = draw(step, 100, 4000, torch.Generator().manual_seed(step))
        assert t.min() >= low and t.max() <= high + 0.08 and t.max() > high - 0.01
        below = torch.stack([edges[edges <= u + 1e-9][-1] for u in t])
        assert (t - below >= 0.08 - 1e-9).all()


def test_bsd_takes_the_shortest_vector_between_its_two_directions(evaluated, mixture):
    out = evaluated(bsd(), (0.7, 0.4, 0.1))
    e_u, e_c = (guided_prediction(mixture, out.x_t, out.t, evaluated.conditioning, s)[0] for s in (0.0, 1.0))
    c, d = (e_c - e_u).flatten(1), 1.25 * (e_u - out.noise).flatten(1)
    weight = 2.56 * mixture.schedule.sigma(out.t)[:, None] * (d / 1.25).square().mean(1, keepdim=True).sqrt()
    shortest = out.gradient.flatten(1) / weight
    mixes = torch.linspace(0, 1, 2001, dtype=F64)[:, None, None]
    mixes = mixes * c + (1 - mixes) * d  # all convex ones
    norms = mixes.norm(dim=2)
    assert (shortest.norm(dim=1) <= norms.min(0).values + 1e-9).all()
    nearest = (mixes - shortest).norm(dim=2).min(0).values
    assert (nearest < 1e-3 * (c - d).norm(dim=1)).all()  # it is one of them
    assert ((shortest * c).sum(1) > -1e-9).all() and ((shortest * d).sum(1) > -1e-9).all()  # and does harm to neither
    assert out.nfe == 6


def prior_for(method, mixture, schedule=None):
    return with_schedule(mixture, Flow()) if method == "flowdreamer" else with_schedule(mixture, schedule or Cosine())


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("perp", [False, True], ids=["plain", "perp-neg"])
def test_batch_and_times_one_by_one(mixture, conditions, randn, method, perp):
    """A batch of three with three times equals three evaluations, in values and in rows."""
    prior, x, times = prior_for(method, mixture), 0.5 * randn(3, 2, 2, 2), (0.93, 0.31, 0.12)
    extra = (["right", "odd", "left"], torch.tensor([[-0.5], [0.0], [-1.0]], dtype=F64)) if perp else ()
    conditioning = conditions(prior, TEXTS, *extra)
    together = at(FAMILY[method](), times).guidance(x, prior, conditioning, step=2, total=9, generator=seeds(3))
    rows = 0
    for i in range(3):
        one = torch.tensor([i])
        alone = at(FAMILY[method](), times[i : i + 1])
        out = alone.guidance(x[one], prior, conditioning[one], step=2, total=9, generator=seeds(3)[i : i + 1])
        rows += out.nfe
        for field in ("t", "noise", "prediction", "x0", "gradient"):
            torch.testing.assert_close(getattr(together, field)[one], getattr(out, field), rtol=1e-8, atol=1e-8)
    assert together.nfe == rows


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [Cosine(), stable_diffusion()], ids=["cosine", "table"])
def test_finite_at_both_ends_of_time(mixture, conditions, randn, method, t, schedule):
    prior = prior_for(method, mixture, schedule)
    x, conditioning = randn(2, 2, 2, 2).float(), conditions(prior, TEXTS[:2])
    out = at(FAMILY[method](), t).guidance(x, prior, conditioning, step=0, total=1, generator=seeds(2))
    for field in ("x_t", "t", "noise", "prediction", "x0", "gradient"):
        value = getattr(out, field)
        assert value.isfinite().all() and value.dtype == torch.float32


@pytest.mark.parametrize("method", [dsd, sctd])
def test_the_noise_of_a_run_is_the_state_of_its_objective(mixture, conditions, randn, method):
    """A run that is cut in two is the run in one, also with cameras, where all views of DSD share their noise."""
    x, camera = randn(2, 2, 2, 2), torch.eye(4, dtype=F64).expand(2, 4, 4)
    conditioning = conditions(mixture, TEXTS[:2]).with_camera(camera)

    def gradient(objective, step):
        generator = torch.Generator().manual_seed(step)
        return objective.guidance(x, mixture, conditioning, step=step, total=6, generator=generator).gradient

    whole, first, second, other = (method() for _ in range(4))
    assert first.state.state_dict() == {}
    gradient(whole, 0)
    gradient(first, 0)
    second.state.load_state_dict(first.state.state_dict())
    for step in (3, 4):
        expected = gradient(whole, step)
        assert torch.equal(gradient(second, step), expected) and not torch.equal(gradient(other, step), expected)


def test_mistakes_are_named():
    for make, match in (
        (lambda: dsd(steps=0), "steps must be a whole number"),
        (lambda: dsd(start=98), r"times must lie in \[0, 1\]"),
        (lambda: asd(gap=2.0), r"gap must lie in \[0, 1\]"),
        (lambda: flowdreamer(inversion_steps=0), "inversion_steps must be a whole number"),
        (lambda: flowdreamer(warmup=1800), r"warmup must lie in \[0, 1\]"),
        (lambda: sctd(segments=0), "segments must be a whole number"),
        (lambda: sctd(scale=float("nan")), "scale must be a finite number"),
        (lambda: bsd(denoising=float("inf")), "denoising must be a finite number"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
