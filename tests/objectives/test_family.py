"""Each method of the family against closed forms, and against its relatives."""

import dataclasses

import pytest
import torch

from distill3d.diffusion.ddim import ddim_step
from distill3d.diffusion.guidance import guided_prediction
from distill3d.diffusion.schedule import Cosine, Flow, coefficients, from_eps, stable_diffusion
from distill3d.objectives import (
    Objective,
    csd,
    esd,
    hifa,
    ism,
    nfsd,
    noise,
    prediction,
    rfds,
    sds,
    sds_bridge,
    sjc,
    timesteps,
    vsd,
    weighting,
)  # fmt: skip
from distill3d.objectives.weighting import noise_variance
from distill3d.priors.mixture import MixturePrior
from distill3d.types import Conditioning

F64 = torch.float64
TEXTS = ["left", "right", "odd"]
GUIDANCE = ("t", "noise", "prediction", "x0", "gradient")


class Exact:
    """A student that needs no training: another text of the prior, or two: with and without its camera."""

    def __init__(self, prior, posed="odd", free="right"):
        self.prior, self.texts, self.learned = prior, (free, posed), []

    def predict(self, x_t, t, conditioning, with_camera):
        assert len(x_t) == len(t) == len(conditioning) == len(with_camera)
        return self.prior.predict(x_t, t, self.prior.embed([self.texts[int(p)] for p in with_camera]))

    def learn(self, x, conditioning, generator):
        self.learned.append(x)
        return len(x)


def family(prior):
    """Every method under the names of the mixture's texts."""
    return {
        "sds": sds(7.5), "sjc": sjc(7.5), "sjc-none": sjc(7.5, variance_reduced=False), "hifa": hifa(7.5),
        "nfsd": nfsd(negative_prompt="odd"), "csd": csd(), "csd-negative": csd(2.0, "odd", 0.7, "refine"),
        "bridge": sds_bridge(first=0.0), "bridge-first": sds_bridge(),
        "ism": ism(), "ism-zero": ism(wide=0.0, narrow=0.0),
        "vsd": vsd(Exact(prior)), "esd": esd(Exact(prior), entropy=0.3),
    }  # fmt: skip


METHODS = list(family(None))


def at(objective, times):
    return dataclasses.replace(objective, timesteps=timesteps.listed([times]))


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


# Under one component the prior is a Gaussian: E eps(alpha x + sigma kappa) = sigma alpha (x - m) / v with
# v = alpha^2 std^2 + sigma^2. What each method averages to, in terms of these:
CLOSED = {
    "sds": (lambda o: sds(3.0), lambda e, t: 3 * e["a"] - 2 * e["b"], "sigma^2"),
    "sjc": (lambda o: sjc(3.0), lambda e, t: 3 * e["a"] - 2 * e["b"], "1"),
    "sjc-none": (lambda o: sjc(3.0, variance_reduced=False), lambda e, t: 3 * e["a"] - 2 * e["b"], "1"),
    "hifa": (lambda o: hifa(3.0), lambda e, t: 3 * e["a"] - 2 * e["b"], "sigma^2"),
    "nfsd": (
        lambda o: nfsd(3.0, "c"), lambda e, t: 3 * (e["a"] - e["b"]) + e["b"] - (e["c"] if t >= 0.2 else 0), "sigma^2"
    ),
    "csd": (lambda o: csd(3.0), lambda e, t: 3 * (e["a"] - e["b"]), "sigma^2"),
    "csd-form": (  # at the sixth of eleven steps, half of the run
        lambda o: csd(3.0, "c", 0.8), lambda e, t: 3 * (e["a"] - e["b"]) + 0.8 * (e["b"] - e["c"]), "sigma^2"
    ),
    "csd-refine": (
        lambda o: csd(3.0, "c", 0.8, "refine"), lambda e, t: 3 * (e["a"] - e["b"]) + 0.6 * (e["b"] - e["c"]), "sigma^2"
    ),
    "bridge": (lambda o: sds_bridge(3.0, first=0.4), lambda e, t: 3 * (e["a"] - e["c"]), "sigma^2"),
    "bridge-first": (lambda o: sds_bridge(3.0, first=0.6), lambda e, t: 3 * e["a"] - 2 * e["b"], "sigma^2"),
    "vsd": (lambda o: vsd(Exact(o, "c", "b"), 3.0), lambda e, t: 3 * e["a"] - 2 * e["b"] - e["c"], "sigma^2"),
    "esd": (
        lambda o: esd(Exact(o, "c", "b"), 3.0, 0.3),
        lambda e, t: 3 * e["a"] - 2 * e["b"] - 0.7 * e["c"] - 0.3 * e["b"], "sigma^2",
    ),
    "rfds": (lambda o: rfds(3.0), lambda e, t: 3 * e["a"] - 2 * e["b"], "1/alpha"),
}  # fmt: skip


@pytest.mark.parametrize("method", CLOSED)
@pytest.mark.parametrize("t", [0.1, 0.6])
def test_mean_gradient_is_the_closed_form(randn, always_conditional, method, t):
    build, closed, weight = CLOSED[method]
    means, stds = randn(3, 1, 2, 2), torch.tensor([0.4, 0.6, 0.9], dtype=F64)
    schedule, n = Flow() if method == "rfds" else Cosine(), 4000
    prior = always_conditional(means, stds, conditions={"a": [0], "b": [1], "c": [2]}, schedule=schedule)
    x = randn(1, 1, 2, 2)
    source = "c" if "bridge" in method else "b"  # its negative text describes the source
    many = Conditioning(prior.embed(["a"] * n), prior.embed([source] * n))
    objective = at(build(prior), t)
    g = objective.guidance(
        x.expand(n, -1, -1, -1), prior, many, step=5, total=11, generator=torch.Generator().manual_seed(0)
    ).gradient
    a, s = (c.item() for c in coefficients(schedule, torch.tensor([t], dtype=F64), x))
    e = {name: s * a * (x - means[k]) / (a**2 * stds[k] ** 2 + s**2) for k, name in enumerate("abc")}
    exact = {"sigma^2": s**2, "1": 1.0, "1/alpha": 1 / a}[weight] * closed(e, t)
    error = (g.mean(0, keepdim=True) - exact).abs()
    assert (error < 5 * g.std(0) / n**0.5 + 1e-12).all()
    assert exact.abs().max() > 0.01


@pytest.fixture
def evaluated(mixture, conditions, randn):
    """evaluated(objective, t): its Guidance for one x, the same noise each time."""
    x, conditioning = 0.5 * randn(3, 2, 2, 2), conditions(mixture, TEXTS)

    def run(objective, t=(0.7, 0.4, 0.1), prior=mixture):
        return at(objective, t).guidance(x, prior, conditioning, step=0, total=11, generator=seeds(3))

    run.x, run.conditioning = x, conditioning
    return run


def test_sjc_is_sds_up_to_its_weight_and_pulls_towards_the_denoised(evaluated, mixture):
    a, b = evaluated(sjc(7.5)), evaluated(sds(7.5))
    alpha, sigma = coefficients(mixture.schedule, a.t, evaluated.x)
    torch.testing.assert_close(sigma**2 * a.gradient, b.gradient)
    torch.testing.assert_close(a.gradient, (evaluated.x - a.x0) * alpha / sigma)
    plain = evaluated(sjc(7.5, variance_reduced=False))
    torch.testing.assert_close(plain.gradient, a.gradient + a.noise)


def test_csd_is_sds_without_its_generative_part(evaluated):
    generative = evaluated(sds(0.0)).gradient  # sigma^2 (e_u - kappa)
    torch.testing.assert_close(evaluated(sds(7.5)).gradient, evaluated(csd(7.5)).gradient + generative)


def test_hifa_is_sds_at_other_times(evaluated):
    torch.testing.assert_close(evaluated(hifa(7.5)).gradient, evaluated(sds(7.5)).gradient)


def test_nfsd_at_low_times_is_sds_without_the_noise(evaluated, mixture):
    a, b = evaluated(nfsd(7.5, "odd"), (0.1, 0.19, 0.05)), evaluated(sds(7.5), (0.1, 0.19, 0.05))
    sigma = coefficients(mixture.schedule, a.t, evaluated.x)[1]
    torch.testing.assert_close(a.gradient, b.gradient + sigma**2 * b.noise)


def test_bridge_between_prompt_and_nothing_is_csd(evaluated):
    torch.testing.assert_close(evaluated(sds_bridge(5.0, first=0.0)).gradient, evaluated(csd(5.0)).gradient)


def test_bridge_begins_as_sds_and_turns_once(mixture, conditions, randn):
    x, conditioning = randn(3, 2, 2, 2), conditions(mixture, TEXTS)
    described = dataclasses.replace(conditioning, negative=mixture.embed(["odd", "left", "right"]))

    def gradient(objective, step, texts=described):
        return at(objective, 0.4).guidance(x, mixture, texts, step=step, total=10, generator=seeds(3)).gradient

    for step in (0, 3):  # the empty text, not that of the source
        torch.testing.assert_close(gradient(sds_bridge(5.0, first=0.4), step), gradient(sds(5.0), step, conditioning))
    for step in (4, 9):
        whole = gradient(sds_bridge(5.0, first=0.0), step)
        torch.testing.assert_close(gradient(sds_bridge(5.0, first=0.4), step), whole)


@pytest.mark.parametrize("perp", [False, True], ids=["plain", "perp-neg"])
def test_negative_words_reach_what_the_sources_show_them_to(mixture, conditions, randn, perp):
    """NFSD's and CSD's e_u never sees the words; of ISM only the guided prediction sees them."""
    extra = (["right", "odd", "left"], torch.tensor([[-0.5], [0.0], [-1.0]], dtype=F64)) if perp else ()
    x, empty = 0.5 * randn(3, 2, 2, 2), conditions(mixture, TEXTS, *extra)
    worded = dataclasses.replace(empty, negative=mixture.embed(["odd", "left", "right"]))

    def both(objective):
        return [
            at(objective, 0.6).guidance(x, mixture, texts, step=0, total=11, generator=seeds(3))
            for texts in (empty, worded)
        ]

    for objective in (nfsd(7.5, "odd"), csd(), csd(2.0, "odd", 0.7, "refine")):
        assert torch.equal(*(out.gradient for out in both(objective)))
    a, b = both(ism())
    assert torch.equal(a.noise, b.noise) and not torch.allclose(a.prediction, b.prediction)
    alpha, sigma = coefficients(mixture.schedule, a.t, x)
    torch.testing.assert_close(a.gradient - b.gradient, 0.1 * sigma / alpha * (a.prediction - b.prediction))
    a, b = both(sds(7.5))
    assert not torch.allclose(a.gradient, b.gradient)


def test_ism_with_no_interval_is_csd_at_the_inverted_sample(evaluated, mixture):
    out = evaluated(ism(3.0, wide=0.0, narrow=0.0))
    same = dataclasses.replace(csd(3.0), noise=noise.given(out.noise), weight=weighting.x0_matching)
    torch.testing.assert_close(out.gradient, 0.1 * evaluated(same).gradient, rtol=1e-9, atol=1e-9)
    # and that sample is the plain unconditional inversion
    inverted = noise.ddim_inversion(5, 0.0, 0.0, overshoot=0.0)
    torch.testing.assert_close(evaluated(dataclasses.replace(sds(), noise=inverted)).x_t, out.x_t)


def test_ism_by_hand(evaluated, mixture, counting):
    prior = counting(mixture)
    out = evaluated(ism(3.0), (0.5, 0.5, 0.5), prior)
    x, t, s = evaluated.x, torch.full((3,), 0.5, dtype=F64), torch.full((3,), 0.4, dtype=F64)
    empty, here = mixture.embed([""] * 3), x
    for low, high in ((0.0, 0.2), (0.2, 0.4), (0.4, 0.5)):
        level = torch.full((3,), low, dtype=F64)
        (a, b), (c, d) = (coefficients(mixture.schedule, torch.full((3,), v, dtype=F64), x) for v in (low, high))
        e_u = mixture.predict(here, level, empty)
        here = c * (here - b * e_u) / a + d * e_u
    torch.testing.assert_close(out.x_t, here)
    e_s = e_0 = mixture.predict(here, t, empty)
    e_s = e_0 + 3.0 * (mixture.predict(here, t, evaluated.conditioning.positive) - e_0)
    alpha, sigma = coefficients(mixture.schedule, t, x)
    torch.testing.assert_close(out.gradient, 0.1 * sigma / alpha * (e_s - e_u))
    assert prior.calls == [3, 3, 3, 6] and out.nfe == 15 and s[0] == 0.4


def test_the_interval_shrinks_by_step(evaluated, mixture):
    """From 0.1 to 0.08 in 1500 of 5000 steps: seen in where the last step of the inversion starts."""
    for step, gap in ((0, 0.1), (750, 0.09), (1500, 0.08), (4900, 0.08)):
        watch = Watch(mixture)
        at(ism(), 0.5).guidance(evaluated.x, watch, evaluated.conditioning, step=step, total=5000, generator=seeds(3))
        assert [t[0].item() for t in watch.times[-2:]] == pytest.approx([0.5 - gap, 0.5])


def test_vsd_of_a_student_that_is_the_prior_is_csd_with_its_weight(evaluated, mixture):
    """Where the student already draws what the prior does without a prompt, only the classifier part is left."""
    empty = Exact(mixture, posed="", free="")
    torch.testing.assert_close(evaluated(vsd(empty, 7.5)).gradient, evaluated(csd(7.5)).gradient)
    (lesson,) = empty.learned
    assert torch.equal(lesson, evaluated.x)  # it learns on clean samples, not on noised ones


@pytest.mark.parametrize("entropy", [0.0, 0.4, 1.0])
def test_esd_mixes_the_student_with_and_without_camera(evaluated, mixture, entropy):
    a, b = (evaluated(vsd(Exact(mixture), 7.5, camera)).gradient for camera in (1.0, 0.0))
    out = evaluated(esd(Exact(mixture), 7.5, entropy))
    torch.testing.assert_close(out.gradient, (1 - entropy) * a + entropy * b)
    rows = 3 if entropy in (0.0, 1.0) else 6
    assert out.nfe == 6 + rows + 3  # prior, student, the student's lesson


def test_rfds_is_the_difference_of_velocities(mixture, conditions, randn):
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, Flow())
    x, conditioning = randn(3, 2, 2, 2), conditions(prior, TEXTS)
    out = at(rfds(20.0), (0.9, 0.5, 0.02)).guidance(x, prior, conditioning, step=0, total=1, generator=seeds(3))
    alpha, sigma = coefficients(prior.schedule, out.t, x)
    v_u, v_c = (
        from_eps("velocity", prior.predict(out.x_t, out.t, text), out.x_t, alpha, sigma)
        for text in (conditioning.negative, conditioning.positive)
    )
    torch.testing.assert_close(out.gradient, v_u + 20.0 * (v_c - v_u) - (out.noise - x), rtol=1e-9, atol=1e-9)


def test_on_a_flow_the_ddim_step_is_eulers(randn):
    """So that DDIM inversion is Euler's method run backwards: SDI for flow models is the same code."""
    x, eps, (t, s) = randn(2, 3), randn(2, 3), torch.tensor([[0.7, 0.2], [0.4, 0.9]], dtype=F64)
    v = from_eps("velocity", eps, x, *coefficients(Flow(), t, x))
    torch.testing.assert_close(ddim_step(x, eps, Flow(), t, s), x + (s - t)[:, None] * v)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("perp", [False, True], ids=["plain", "perp-neg"])
def test_batch_and_times_one_by_one(mixture, conditions, randn, method, perp):
    """A batch of three with three times equals three evaluations, in values and in rows."""
    x, times = 0.5 * randn(3, 2, 2, 2), (0.93, 0.31, 0.12)
    extra = (["right", "odd", "left"], torch.tensor([[-0.5], [0.0], [-1.0]], dtype=F64)) if perp else ()
    conditioning = conditions(mixture, TEXTS, *extra)
    together = at(family(mixture)[method], times).guidance(
        x, mixture, conditioning, step=2, total=9, generator=seeds(3)
    )
    rows = 0
    for i in range(3):
        one = torch.tensor([i])
        alone = at(family(mixture)[method], times[i : i + 1])
        out = alone.guidance(x[one], mixture, conditioning[one], step=2, total=9, generator=seeds(3)[i : i + 1])
        rows += out.nfe
        for field in GUIDANCE:
            torch.testing.assert_close(getattr(together, field)[one], getattr(out, field), rtol=1e-8, atol=1e-8)
    assert together.nfe == rows


# Rows of one network call at x_t for three samples, and all rows; the student is not the prior.
CALLS = {
    "sds": ([6], 6), "nfsd": ([9], 9), "csd": ([6], 6), "csd-negative": ([9], 9), "bridge": ([6], 6),
    "bridge-first": ([6], 6),
    "vsd": ([6], 6 + 3 + 3), "esd": ([6], 6 + 6 + 3),
}  # fmt: skip


@pytest.mark.parametrize("method", CALLS)
def test_one_call_for_prediction_and_reference(evaluated, mixture, counting, method):
    prior = counting(mixture)
    out = evaluated(family(mixture)[method], (0.9, 0.5, 0.3), prior)
    assert (prior.calls, out.nfe) == CALLS[method]


def test_a_text_that_counts_nothing_is_not_shown(evaluated, mixture, counting):
    prior = counting(mixture)
    out = evaluated(nfsd(7.5, "odd"), (0.9, 0.2, 0.1), prior)  # the third is below 0.2
    assert prior.calls == [8] and out.nfe == 8


def test_perp_neg_enters_a_linear_combination_as_it_enters_guidance(mixture, conditions, randn):
    x, weights = randn(3, 2, 2, 2), torch.tensor([[-0.5], [0.0], [-1.0]], dtype=F64)
    conditioning = conditions(mixture, TEXTS, ["right", "odd", "left"], weights)
    text, empty = prediction.positive, prediction.negative
    a = dataclasses.replace(sds(), prediction=prediction.guided(7.5))
    b = dataclasses.replace(sds(), prediction=prediction.linear_combination({text: 7.5, empty: -6.5}, {empty: 1.0}))
    out = [
        at(o, (0.8, 0.5, 0.2)).guidance(x, mixture, conditioning, step=0, total=1, generator=seeds(3)) for o in (a, b)
    ]
    torch.testing.assert_close(out[0].prediction, out[1].prediction)


def dds(source, condition, scale=7.5):
    """Delta denoising score (Hertz et al. 2023): the prediction at x against the one at a source image."""

    def reference(query, x_t, kappa):
        alpha, sigma = coefficients(query.prior.schedule, query.t, query.x)
        return guided_prediction(query.prior, alpha * source + sigma * kappa, query.t, condition, scale)

    return Objective(noise.gaussian(), timesteps.uniform(), prediction.guided(scale), reference, noise_variance)


def test_an_objective_of_ones_own_is_seven_lines(evaluated, mixture, conditions):
    same = dds(evaluated.x, evaluated.conditioning)
    assert evaluated(same).gradient.abs().max() == 0  # nothing to edit
    other = conditions(mixture, ["odd", "odd", "left"])
    out, sources = evaluated(dds(evaluated.x, other)), evaluated(sds(7.5))
    edited = at(sds(7.5), (0.7, 0.4, 0.1)).guidance(evaluated.x, mixture, other, step=0, total=11, generator=seeds(3))
    torch.testing.assert_close(out.gradient, sources.gradient - edited.gradient)  # the noise cancels
    assert out.nfe == 6 + 6


def test_axes_of_different_methods_combine(evaluated):
    """A prediction or noise that finds a reference may be used with another one."""
    combined = dataclasses.replace(sds(7.5), prediction=csd(7.5).prediction)
    torch.testing.assert_close(evaluated(combined).gradient, evaluated(sds(7.5)).gradient)
    inverted = dataclasses.replace(sds(7.5), noise=ism().noise)
    out = evaluated(inverted)
    assert torch.equal(out.noise, evaluated(ism()).noise) and out.gradient.isfinite().all()
    both = dataclasses.replace(csd(7.5), noise=ism().noise)  # two references: that of the prediction counts
    again = dataclasses.replace(csd(7.5), noise=noise.given(out.noise))
    torch.testing.assert_close(evaluated(both).gradient, evaluated(again).gradient)


class Watch:
    """Passes everything on to a prior and remembers times and conditions of each call."""

    def __init__(self, prior):
        self.prior, self.times, self.conditions = prior, [], []

    def __getattr__(self, name):
        return getattr(self.prior, name)

    def predict(self, x_t, t, text):
        self.times.append(t)
        self.conditions.append(text)
        return self.prior.predict(x_t, t, text)


@pytest.mark.parametrize("method", ["nfsd", "csd-negative", "bridge"])
def test_a_fixed_text_keeps_camera_and_control_image_of_its_sample(evaluated, mixture, randn, method):
    control, camera = randn(3, 3, 4, 4), randn(3, 4, 4)
    conditioning = evaluated.conditioning.with_control(control).with_camera(camera)
    watch = Watch(mixture)
    at(family(mixture)[method], 0.6).guidance(evaluated.x, watch, conditioning, step=0, total=11, generator=seeds(3))
    (seen,) = watch.conditions
    assert len(seen) in (6, 9)
    assert torch.equal(seen.control, control.repeat(len(seen) // 3, 1, 1, 1))
    assert torch.equal(seen.camera, camera.repeat(len(seen) // 3, 1, 1))


def test_the_interval_of_ism_ends_at_time_zero(evaluated, mixture):
    """Where t is below the gap the network is used at 0, the lowest level it knows, and never before it."""
    watch = Watch(mixture)
    evaluated(ism(), (0.05, 0.02, 0.08), watch)
    assert torch.cat(watch.times).min() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [Cosine(), stable_diffusion(), Flow()], ids=["cosine", "table", "flow"])
def test_finite_at_both_ends_of_time(mixture, conditions, randn, method, t, schedule):
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)
    x, conditioning = randn(2, 2, 2, 2).float(), conditions(prior, TEXTS[:2])
    out = at(family(prior)[method], t).guidance(
        x, prior, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(0)
    )
    for field in ("x_t", *GUIDANCE):
        value = getattr(out, field)
        assert value.isfinite().all() and value.dtype == torch.float32


def test_times_of_the_methods():
    g = torch.Generator().manual_seed(0)
    root = [hifa().timesteps(step, 101, 1, g).item() for step in (0, 25, 100, 500)]
    assert root == pytest.approx([0.98, 0.64, 0.3, 0.3])
    student = Exact(None)
    for objective, step, total, top in (
        (vsd(student), 5000, 25000, 0.98),
        (vsd(student), 5001, 25000, 0.5),
        (vsd(student), 40, 200, 0.98),
        (vsd(student), 41, 200, 0.5),
        (ism(), 0, 5000, 0.98),
        (ism(), 750, 5000, 0.74),
        (ism(), 1500, 5000, 0.5),
        (ism(), 15, 100, 0.74),
    ):
        t = objective.timesteps(step, total, 4000, g)
        assert 0.02 <= t.min() < 0.03 and top - 0.01 < t.max() <= top


def test_mistakes_are_named(evaluated, mixture):
    for factory in (sds, sjc, hifa, nfsd, csd, sds_bridge, ism, rfds):
        for scale in (float("nan"), "7.5", float("inf"), True):
            with pytest.raises(ValueError, match="scale must be a finite number"):
                factory(scale)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        ism(steps=0)
    with pytest.raises(ValueError, match=r"wide must lie in \[0, 1\]"):
        ism(wide=100)
    with pytest.raises(ValueError, match=r"entropy must lie in \[0, 1\]"):
        esd(Exact(mixture), entropy=2.0)
    with pytest.raises(ValueError, match=r"times must lie in \[0, 1\]"):
        hifa(start=980)
    with pytest.raises(ValueError, match="must not exceed high and settled"):
        timesteps.narrowing(0.6, 0.9, 0.5)
    with pytest.raises(ValueError, match="flow-matching prior"):
        evaluated(rfds())
    with pytest.raises(ValueError, match="unknown condition"):
        evaluated(nfsd())
    with pytest.raises(ValueError, match="neither noise nor prediction return a reference"):
        evaluated(dataclasses.replace(sds(), reference=None))
