import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import Cosine, Flow, coefficients, stable_diffusion
from distill3d.objectives import (
    Objective,
    attach,
    noise,
    prediction,
    reference,
    sdi,
    sdi_cached,
    sds,
    timesteps,
    weighting,
)  # fmt: skip
from distill3d.priors.mixture import MixturePrior

F64 = torch.float64
TEXTS = ["left", "right", "odd"]


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "schedule", [Cosine(), stable_diffusion(), Flow(), Flow(3.0)], ids=["cosine", "table", "flow", "shifted"]
)
def test_theorem_cached_kappa_and_whole_targets_are_the_ddim_sampler(
    mixture, conditions, randn, scale, steps, batch, schedule
):
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)
    conditioning, first = conditions(prior, TEXTS[:batch]), randn(batch, 2, 2, 2)
    times = torch.linspace(0.98, 0.02, steps, dtype=F64) if steps > 1 else torch.tensor([0.98], dtype=F64)

    sampled, guided = [], Guided(prior, conditioning, scale)

    def watched(x, t):
        eps = guided(x, t)
        alpha, sigma = coefficients(schedule, t, x)
        sampled.append((x - sigma * eps) / alpha)
        return eps

    start = coefficients(schedule, times[:1].expand(batch), first)[1] * first
    grid = torch.cat([times, torch.zeros(1, dtype=F64)])
    ddim.sample(watched, start, schedule, grid)

    objective, x = sdi_cached(scale, 0.98, 0.02, first), torch.zeros_like(first)
    for step in range(steps):
        out = objective.guidance(x, prior, conditioning, step=step, total=steps, generator=torch.Generator())
        x = x - out.gradient  # the target taken whole
        torch.testing.assert_close(x, out.x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(x, sampled[step], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_sds_mean_gradient_is_the_closed_form_on_a_gaussian(randn, conditions, t):
    mean, std, n = randn(1, 1, 2, 2), 0.6, 40_000
    prior = MixturePrior(mean, std, schedule=Cosine())
    x = randn(1, 1, 2, 2)
    objective = sds(1.0, t, t)
    many = conditions(prior, [""] * n)
    g = objective.guidance(
        x.expand(n, -1, -1, -1), prior, many, step=0, total=1, generator=torch.Generator().manual_seed(0)
    ).gradient
    a, s = (c[0] for c in coefficients(prior.schedule, torch.tensor([t], dtype=F64), x))
    # E_kappa [sigma^2 (eps(a x + s kappa) - kappa)]: the noise averages out, the score is linear.
    exact = s**2 * s * a * (x - mean) / (a**2 * std**2 + s**2)
    error = (g.mean(0, keepdim=True) - exact).abs()
    assert (error < 5 * g.std(0) / n**0.5 + 1e-12).all()


def test_sdi_with_random_noise_is_x0_matching_sds(mixture, conditions, randn):
    x, conditioning = randn(3, 2, 2, 2), conditions(mixture, TEXTS)
    objective = Objective(
        noise.gaussian(),
        timesteps.uniform(),
        prediction.guided(7.5),
        reference.injected_noise,
        weighting.x0_matching,
    )
    out = objective.guidance(x, mixture, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(out.gradient, x - out.x0, rtol=1e-9, atol=1e-9)
    alpha, sigma = coefficients(mixture.schedule, out.t, x)
    torch.testing.assert_close(out.x_t, alpha * x + sigma * out.noise)
    torch.testing.assert_close(out.x0, (out.x_t - sigma * out.prediction) / alpha)


@pytest.mark.parametrize(
    "objective",
    [
        sds(),
        sdi(),
        sdi(eta=0.0, solver="ab2"),
        Objective(
            noise.ddim_inversion(), timesteps.listed([[0.97, 0.3, 0.04]]),
            prediction.guided(7.5), reference.zero, weighting.constant(2.0),
        ),
    ],
    ids=["sds", "sdi", "sdi-ab2", "per-sample-times"],
)  # fmt: skip
@pytest.mark.parametrize("perp", [False, True])
def test_a_batch_equals_its_samples(mixture, conditions, randn, objective, perp):
    x = 0.5 * randn(3, 2, 2, 2)
    weights = torch.tensor([[-0.5], [0.0], [-1.0]], dtype=F64)
    extra = (["right", "odd", "left"], weights) if perp else ()
    conditioning = conditions(mixture, TEXTS, *extra)
    together = objective.guidance(x, mixture, conditioning, step=2, total=9, generator=seeds(3))
    rows = 0
    for i in range(3):
        single, one = objective, torch.tensor([i])
        if len(set(together.t.tolist())) == 3 and objective.weight(mixture.schedule, together.t)[0] == 2:
            single = Objective(
                objective.noise, timesteps.listed(together.t[one]), objective.prediction,
                objective.reference, objective.weight,
            )  # fmt: skip
        alone = single.guidance(x[one], mixture, conditioning[one], step=2, total=9, generator=seeds(3)[i : i + 1])
        rows += alone.nfe
        for field in ("t", "noise", "prediction", "x0", "gradient"):
            torch.testing.assert_close(getattr(together, field)[one], getattr(alone, field), rtol=1e-8, atol=1e-8)
    assert together.nfe == rows


def test_nfe_counts_the_rows_the_network_saw(mixture, counting, conditions, randn):
    x, prior = 0.5 * randn(2, 2, 2, 2), counting(mixture)
    conditioning = conditions(prior, TEXTS[:2])
    for step, inversion_steps in ((0, 10), (99, 3)):  # t = 0.98 and 0.25, inverted to t + 0.01
        prior.calls.clear()
        out = sdi(overshoot=0.01).guidance(x, prior, conditioning, step=step, total=100, generator=torch.Generator())
        assert prior.calls == [4] * (inversion_steps + 1) and out.nfe == sum(prior.calls)
    prior.calls.clear()
    assert sds(1.0).guidance(x, prior, conditioning, step=0, total=1, generator=torch.Generator()).nfe == 2
    assert prior.calls == [2]


def test_sdi_finds_kappa_above_the_level_it_is_used_at(mixture, conditions, randn):
    """By hand for one step of inversion: x up to t + tau, kappa there, x_t = alpha x + sigma kappa, network at t."""
    x, conditioning = 0.5 * randn(1, 2, 2, 2), conditions(mixture, ["left"])
    objective = sdi(eta=0.0, start=0.04, stop=0.04, overshoot=0.05)
    out = objective.guidance(x, mixture, conditioning, step=0, total=1, generator=torch.Generator())
    low, t, high = (torch.tensor([v], dtype=F64) for v in (0.0, 0.04, 0.09))
    end = ddim.ddim_step(x, Guided(mixture, conditioning, -7.5)(x, low), mixture.schedule, low, high)
    a, s = coefficients(mixture.schedule, high, x)
    kappa = (end - a * x) / s
    a, s = coefficients(mixture.schedule, t, x)
    torch.testing.assert_close(out.noise, kappa)
    torch.testing.assert_close(out.x_t, a * x + s * kappa)
    torch.testing.assert_close(out.prediction, Guided(mixture, conditioning, 7.5)(out.x_t, t))


@pytest.mark.parametrize("solver", ["euler", "ab2", "heun"])
def test_inverted_kappa_approaches_the_closed_form_of_a_gaussian(randn, conditions, solver):
    """The ODE keeps (x_t - a m) / sqrt(a^2 std^2 + s^2), which fixes the end of the inversion."""
    std, prior = 0.5, MixturePrior(randn(1, 1, 2, 2), 0.5, schedule=Cosine())
    x, t = randn(1, 1, 2, 2), torch.tensor([0.6], dtype=F64)
    a, s = coefficients(prior.schedule, t, x)
    exact = ((a**2 * std**2 + s**2).sqrt() / std - a) / s * (x - prior.means)

    def error(steps):
        objective = Objective(
            noise.ddim_inversion(steps, 0.0, 0.0, solver, overshoot=0.0), timesteps.listed(t),
            prediction.guided(0.0), reference.injected_noise, weighting.x0_matching,
        )  # fmt: skip
        out = objective.guidance(x, prior, conditions(prior, [""]), step=0, total=1, generator=torch.Generator())
        return (out.noise - exact).abs().max().item()

    assert error(320) < 0.05 and error(320) < 0.3 * error(80)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "schedule", [Cosine(), stable_diffusion(), Flow(), Flow(3.0)], ids=["cosine", "table", "flow", "shifted"]
)
def test_finite_at_both_ends_of_time(mixture, conditions, randn, t, dtype, schedule):
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)
    x, conditioning = randn(2, 2, 2, 2).to(dtype), conditions(prior, TEXTS[:2])
    for objective in (sds(7.5, t, t), sdi(start=t, stop=t)):
        out = objective.guidance(x, prior, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(0))
        for field in ("x_t", "noise", "prediction", "x0", "gradient"):
            value = getattr(out, field)
            assert value.isfinite().all() and value.dtype == dtype and value.shape == x.shape


def test_annealing_runs_from_start_to_stop_and_stays():
    schedule, g = timesteps.linear(0.98, 0.25), torch.Generator()
    t = [schedule(step, 101, 2, g)[1].item() for step in (0, 50, 100, 200)]
    assert t == pytest.approx([0.98, 0.615, 0.25, 0.25])


def test_fractions_of_a_run_are_whole_steps():
    assert [timesteps.steps_of(0.3, total) for total in range(1, 500)] == [3 * total // 10 for total in range(1, 500)]
    assert timesteps.steps_of(0.29, 100) == 29  # which is 28.999999999999996 in floating point


def test_listed_times_stay_at_the_last_one():
    times = timesteps.listed([0.9, 0.5, 0.1])
    assert [times(step, 3, 2, torch.Generator())[1].item() for step in (0, 1, 2, 3, 7)] == [0.9, 0.5, 0.1, 0.1, 0.1]
    ragged = timesteps.listed([[0.9, 0.8], [0.2, 0.1]])
    assert ragged(9, 3, 2, torch.Generator()).tolist() == [0.2, 0.1]


def test_loss_is_attach_of_the_gradient(mixture, conditions, randn):
    x, conditioning = randn(2, 2, 2, 2).requires_grad_(), conditions(mixture, TEXTS[:2])
    when = dict(step=3, total=9)
    sdi().loss(x, mixture, conditioning, **when, generator=torch.Generator().manual_seed(1)).backward()
    out = sdi().guidance(x, mixture, conditioning, **when, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x.grad, out.gradient / x.numel())


def test_attach_gives_x_exactly_the_gradient(randn):
    x, g = randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4)
    attach(x, g).backward()
    torch.testing.assert_close(x.grad, g / x.numel())


def test_no_graph_is_kept_and_x_is_not_touched(mixture, conditions, randn):
    x = randn(1, 2, 2, 2).requires_grad_()
    out = sdi().guidance(x, mixture, conditions(mixture, ["left"]), step=0, total=1, generator=torch.Generator())
    assert not out.gradient.requires_grad and not out.x0.requires_grad


def test_mistakes_are_named(mixture, conditions, randn):
    conditioning = conditions(mixture, TEXTS)
    with pytest.raises(ValueError, match="one condition per sample"):
        sds().guidance(randn(2, 2, 2, 2), mixture, conditioning, step=0, total=1, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"needs \[B, 2, 2, 2\]"):
        sds().guidance(randn(3, 2, 4, 4), mixture, conditioning, step=0, total=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        sds().guidance(randn(3, 2, 2, 2), mixture, conditioning, step=0, total=1, generator=seeds(2))
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        sdi(inversion_steps=0)
    with pytest.raises(ValueError, match="needs eta = 0"):
        sdi(solver="heun")
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        sdi(start=980)
    with pytest.raises(ValueError, match="swap them"):
        sds(low=0.9, high=0.1)
    with pytest.raises(ValueError, match="must have the shape"):
        attach(randn(2, 3), randn(3))
