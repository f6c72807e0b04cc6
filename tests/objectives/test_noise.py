"""Every way to find kappa: what it solves, how far it gets, what it costs."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import Cosine, Flow, coefficients, stable_diffusion
from distill3d.objectives import Query, kappa_residual, noise, prediction, sdi, sdi_cached, sds, timesteps
from distill3d.priors.mixture import MixturePrior
from distill3d.types import Conditioning

F64 = torch.float64
TEXTS = ["left", "right", "odd"]
STD = 0.6

# Scale 1 but for the last two, tau 0: the equation is that of the query's own time.
SOLVERS = {
    "plain": noise.fixed_point(6, 1.0),
    "damped": noise.fixed_point(6, 1.0, 0.7),
    "anderson": noise.fixed_point(6, 1.0, 1.0, 3),
    "descent": noise.descent(6, 1.0),
    "inversion": noise.ddim_inversion(20, 1.0, 0.0, overshoot=0.0),
    "interval": noise.interval_inversion(),
    "corrected": noise.fixed_point(4, 1.0, 1.0, 2, noise.ddim_inversion(10, 1.0, 0.0, overshoot=0.0)),
    "sign": noise.sign_descent(6, 1.0),
    "continued": noise.continuation(6, 3.0, memory=1),
    "cfg++": noise.cfg_plus_plus(4, 0.4, memory=2),
}


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def query_of(prior, x, conditioning, t, generator=None):
    t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
    return Query(x, t, prior, conditioning, generator or seeds(len(x)), 0, 10)


@pytest.fixture
def gaussian(randn, conditions):
    """(query, the fixed point's closed form, rho, x - mean) for one Gaussian at t = 0.3, 0.5, 0.7."""
    prior = MixturePrior(randn(1, 1, 2, 2), STD, schedule=Cosine())
    x = randn(3, 1, 2, 2)
    query = query_of(prior, x, conditions(prior, [""] * 3), [0.3, 0.5, 0.7])
    alpha, sigma = coefficients(prior.schedule, query.t, x)
    rho = sigma / alpha
    return query, rho / STD**2 * (x - prior.means), rho, x - prior.means


def residual(query, kappa, scale=1.0):
    return kappa_residual(kappa, query.x, query.t, query.prior, query.conditioning, scale)[0]


def test_closed_form_of_the_fixed_point_has_no_residual(gaussian):
    query, exact, _, _ = gaussian
    assert residual(query, exact).max() < 1e-25
    # and the closed form of the residual elsewhere: eps is linear, of slope rho^2 / (std^2 + rho^2) in kappa
    off = exact + 1.0
    rho = gaussian[2]
    slope = rho**2 / (STD**2 + rho**2)
    torch.testing.assert_close(residual(query, off), ((1 - slope) ** 2).flatten())


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (noise.fixed_point(400, 1.0), 1e-9),
        (noise.fixed_point(800, 1.0, 0.5), 1e-9),
        (noise.fixed_point(4, 1.0, 1.0, 1), 1e-8),  # a linear equation with one slope
        (noise.descent(3000, 1.0, 1.0), 1e-8),
    ],
    ids=["plain", "damped", "anderson", "descent"],
)
def test_solvers_reach_the_closed_form_of_a_gaussian(gaussian, solver, tolerance):
    query, exact, _, _ = gaussian
    kappa, _ = solver(query)
    torch.testing.assert_close(kappa, exact, rtol=tolerance, atol=tolerance)


def test_plain_iteration_and_descent_converge_at_the_rate_of_their_slope(gaussian):
    query, exact, rho, _ = gaussian
    slope = rho**2 / (STD**2 + rho**2)
    for make, rate in (
        (lambda n: noise.fixed_point(n, 1.0), slope),
        (lambda n: noise.fixed_point(n, 1.0, 0.4), 1 - 0.4 * (1 - slope)),
        (lambda n: noise.descent(n, 1.0, 0.9), 1 - 0.9 * (1 - slope) ** 2),
    ):
        before, after = (make(n)(dataclasses.replace(query, generator=seeds(3)))[0] - exact for n in (3, 4))
        torch.testing.assert_close(after, rate * before)


def test_exact_inversion_does_not_solve_the_equation(gaussian):
    """It ends at (sqrt(1 + rho^2 / std^2) - 1) / rho (x - m), not at rho / std^2 (x - m)."""
    query, exact, rho, offset = gaussian
    inverted, _ = noise.ddim_inversion(2000, 1.0, 0.0, "heun", overshoot=0.0)(query)
    limit = ((1 + rho**2 / STD**2).sqrt() - 1) / rho * offset
    torch.testing.assert_close(inverted, limit, rtol=1e-3, atol=1e-3)  # inversion starts at the lowest level, not at 0
    gap = STD**2 / (STD**2 + rho**2) * (limit - exact)
    torch.testing.assert_close(residual(query, limit), gap.square().flatten(1).mean(1))
    assert (residual(query, limit) > 0.01 * offset.square().flatten(1).mean(1)).all()


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_noise_that_ddim_predicted_solves_the_equation(mixture, conditions, randn, scale):
    """On its way down from noise, DDIM's own eps at t is the kappa of its denoised image: eq. 8 by construction."""
    conditioning, start = conditions(mixture, TEXTS), randn(3, 2, 2, 2)
    model, t = Guided(mixture, conditioning, scale), torch.full((3,), 0.4, dtype=F64)
    x_t = ddim.sample(model, start, mixture.schedule, ddim.descending(20, 1.0, 0.4))
    kappa = model(x_t, t)
    alpha, sigma = coefficients(mixture.schedule, t, x_t)
    found, rows = kappa_residual(kappa, (x_t - sigma * kappa) / alpha, t, mixture, conditioning, scale)
    assert found.shape == (3,) and found.max() < 1e-20
    assert rows == (3 if scale == 1 else 6)


def test_order_of_the_residuals(mixture, conditions, randn):
    """On the mixture: random noise is far off, inversion nearer, solvers of the equation nearest."""
    x, conditioning = mixture.means[[0, 2, 3]] + 0.2 * randn(3, 2, 2, 2), conditions(mixture, TEXTS)
    query = query_of(mixture, x, conditioning, 0.4)
    found = {}
    for name, solver in {"random": noise.gaussian(), **SOLVERS}.items():
        kappa = solver(dataclasses.replace(query, generator=seeds(3)))[0]
        found[name] = residual(query, kappa).mean().item()
    assert found["random"] > 3 * found["inversion"] > 0
    for better, worse in (
        ("anderson", "plain"), ("plain", "damped"), ("damped", "random"), ("descent", "random"),
        ("corrected", "inversion"), ("anderson", "inversion"), ("sign", "random"),
    ):  # fmt: skip
        assert found[better] < found[worse], (better, worse, found)


@pytest.mark.parametrize("damping", [0.3, 1.0])
def test_a_step_of_anderson_leaves_the_best_mixture_along_its_damped_residual(damping):
    generator = torch.Generator().manual_seed(0)
    points, errors = (list(torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)) for _ in range(2))
    step = noise._anderson_step(points, errors, damping)
    for i in range(2):
        moves, turns = (torch.stack([v[1][i] - v[0][i], v[2][i] - v[1][i]], dim=1) for v in (points, errors))
        mix = torch.linalg.lstsq(turns, errors[-1][i][:, None]).solution[:, 0]
        point, error = points[-1][i] - moves @ mix, errors[-1][i] - turns @ mix
        torch.testing.assert_close(step[i], point + damping * error)


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_and_times_one_by_one(mixture, conditions, randn, solver):
    x, times = 0.5 * randn(3, 2, 2, 2), torch.tensor([0.9, 0.3, 0.04], dtype=F64)
    conditioning = conditions(mixture, TEXTS)
    together, rows = SOLVERS[solver](query_of(mixture, x, conditioning, times))[:2]
    alone = 0
    for i in range(3):
        one = torch.tensor([i])
        query = query_of(mixture, x[one], conditioning[one], times[one], seeds(3)[i : i + 1])
        kappa, count = SOLVERS[solver](query)[:2]
        alone += count
        torch.testing.assert_close(together[one], kappa, rtol=1e-7, atol=1e-7)
    assert rows == alone


# For two samples at t = 0.5 and scale 7.5, so that each evaluation is four rows.
ROWS = [
    (noise.gaussian(), 0),
    (noise.fixed_point(5), 24),  # the last iterate is evaluated too
    (noise.fixed_point(5, memory=2), 24),
    (noise.fixed_point(5, 1.0), 12),
    (noise.sign_descent(5), 24),
    (noise.descent(3), 16),
    (noise.continuation(10), 3 * 2 + 4 * 3 * 4),  # two steps at 1, 2, 3.5, 5 and 7.5
    (noise.continuation(3, 1.5), 2 * 2 + 2 * 4),  # one step at 1 and 1.5
    (noise.cfg_plus_plus(5, 0.4), 24 + 2),
    (noise.fixed_point(3, start=noise.ddim_inversion(10, 0.0, 0.0, overshoot=0.0)), 10 + 16),
    (noise.ddim_inversion(10, 7.5, overshoot=0.0), 20),
    (noise.ddim_inversion(10, 7.5, 0.0, "heun", overshoot=0.0), 40),
    (noise.interval_inversion(), 2 * 3),  # 0, 0.2, 0.4 = s, then t
]


@pytest.mark.parametrize("case", range(len(ROWS)))
def test_rows_are_counted(mixture, counting, conditions, randn, case):
    solver, expected = ROWS[case]
    prior = counting(mixture)
    rows = solver(query_of(prior, randn(2, 2, 2, 2), conditions(prior, TEXTS[:2]), 0.5))[1]
    assert rows == sum(prior.calls) == expected


def test_kappa_is_looked_for_at_the_level_that_made_x(gaussian):
    """The time of the step before; at the first step it is the start."""
    query, _, _, offset = gaussian
    find = noise.at_previous_level(noise.fixed_point(500, 1.0), timesteps.linear(0.9, 0.1), noise.given(offset))
    kappa, _ = find(dataclasses.replace(query, step=3, total=9))
    alpha, sigma = coefficients(query.prior.schedule, torch.full((3,), 0.7, dtype=F64), query.x)
    torch.testing.assert_close(kappa, sigma / alpha / STD**2 * offset, rtol=1e-8, atol=1e-8)
    assert torch.equal(find(dataclasses.replace(query, step=0, total=9))[0], offset)


def run(objective, prior, conditioning, x, steps, take=1.0):
    for step in range(*steps):
        guidance = objective.guidance(
            x, prior, conditioning, step=step, total=steps[-1], generator=torch.Generator().manual_seed(step)
        )
        x = x - take * guidance.gradient
    return x


def memoryless(find, scale, times, first):
    """SDI whose noise is found anew at each step, at the level before."""
    found = noise.at_previous_level(find, times, noise.given(first))
    return dataclasses.replace(sdi(scale), noise=found, timesteps=times)


@pytest.mark.parametrize("start", ["the first noise", "fresh noise", "zero"])
def test_equation_8_solved_at_the_level_before_is_the_ddim_sampler(mixture, conditions, randn, start):
    """At scale 1, where the solution is one: from any start, no noise being remembered."""
    times, conditioning, first = timesteps.linear(0.9, 0.05), conditions(mixture, TEXTS), randn(3, 2, 2, 2)
    begin = {
        "the first noise": noise.given(first), "fresh noise": noise.gaussian(), "zero": noise.given(0 * first)
    }[start]  # fmt: skip
    objective = memoryless(noise.fixed_point(40, 1.0, memory=8, start=begin), 1.0, times, first)
    cached = dataclasses.replace(sdi_cached(1.0, 0.9, 0.05, first))  # the sampler itself
    ends = [run(o, mixture, conditioning, torch.zeros_like(first), (0, 12)) for o in (objective, cached)]
    assert (ends[0] - ends[1]).square().mean().sqrt() < 1e-6


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_cfg_plus_plus_without_a_memory_is_its_own_sampler(mixture, conditions, randn, scale):
    """x0 = x_bar - rho e_s, x_bar' = x0 + rho' e_u, written out; components overlap, so that solutions are exact."""
    mixture = MixturePrior(0.4 * mixture.means, mixture.stds + 0.4, mixture.weights, mixture.conditions, Cosine())
    times, conditioning, first = timesteps.linear(0.9, 0.05), conditions(mixture, TEXTS), randn(3, 2, 2, 2)
    objective = memoryless(noise.cfg_plus_plus(60, scale, 0.5, 8, noise.given(first)), scale, times, first)
    end = run(objective, mixture, conditioning, torch.zeros_like(first), (0, 12))
    kappa = first
    x0 = torch.zeros_like(first)
    for step in range(12):
        t = times(step, 12, 3, None)
        alpha, sigma = coefficients(mixture.schedule, t, x0)
        x_t = alpha * x0 + sigma * kappa
        e_u, e_s = (Guided(mixture, conditioning, s)(x_t, t) for s in (0.0, scale))
        x0, kappa = (x_t - sigma * e_s) / alpha, e_u
    assert (end - x0).square().mean().sqrt() < 1e-6


@pytest.mark.parametrize(
    ("take", "ahead", "speed", "drawn"),
    [(1.0, 1.0, 1, False), (0.25, 4.0, 1, False), (0.25, 1.0, 0.25, False), (1.0, 2.0, 2, False), (0.5, 2.0, 1, True)],
)
def test_the_share_that_is_taken_times_tau_is_the_fall_of_t(take, ahead, speed, drawn):
    """h E[tau] = delta. On a Gaussian DDIM's x0 grows as 1 / sqrt(std^2 + rho^2), SDI's as its power h tau / delta."""
    steps, high, low = 200, 0.8, 0.1
    prior, times = MixturePrior(torch.zeros(1, 1, dtype=F64), STD, schedule=Cosine()), timesteps.linear(high, low)
    delta = (high - low) / (steps - 1)

    def above(step, total, batch, generator):  # of the step before: t + tau, tau = ahead * delta in the mean
        share = 2 * torch.rand(batch, generator=generator, dtype=F64) if drawn else 1.0
        return times(step + 1, total, batch, generator) + ahead * delta * share

    conditioning = Conditioning(prior.embed([""] * 8), prior.embed([""] * 8))
    x = torch.ones(8, 1, dtype=F64)
    found = noise.at_previous_level(noise.fixed_point(2, 1.0, memory=1), above, noise.gaussian())
    objective = dataclasses.replace(sdi(1.0), noise=found, timesteps=times)
    end = run(objective, prior, conditioning, x, (1, steps), take).mean()
    first, last = (STD**2 + math.tan(math.pi * t / 2) ** 2 for t in (high, low))
    assert math.log(end) == pytest.approx(speed * math.log(first / last) / 2, rel=0.03)  # tau is finite


ITERATIONS = {
    "plain": noise.fixed_point, "anderson": functools.partial(noise.fixed_point, memory=3),
    "sign": noise.sign_descent, "descent": functools.partial(noise.descent, rate=2.0),
}  # fmt: skip


@pytest.mark.parametrize("solver", ITERATIONS.values(), ids=ITERATIONS)
@pytest.mark.parametrize("scale", [1.0, 7.5, 30.0])
def test_no_solver_is_worse_than_its_start_or_than_fewer_steps(mixture, conditions, randn, solver, scale):
    """Of each sample, also where the iteration diverges."""
    start, conditioning = randn(3, 2, 2, 2), conditions(mixture, TEXTS)
    query = query_of(mixture, 0.5 * randn(3, 2, 2, 2), conditioning, 0.5)
    found = [residual(query, start, scale)]
    found += [residual(query, solver(n, scale, start=noise.given(start))(query)[0], scale) for n in (1, 2, 5, 10)]
    assert all((after <= before).all() for before, after in itertools.pairwise(found))
    assert torch.isfinite(found[-1]).all() and (scale > 1 or (found[-1] < 0.5 * found[0]).all())


def test_the_sign_step_reduces_the_residual_where_the_plain_iteration_diverges(randn):
    """In one of eight directions guidance makes the slope of eps -1.4, at t = 0.5 (rho = 1) and scale 7.5."""
    stds = torch.full((2, 1, 2, 4), 0.3, dtype=F64)
    stds[0, 0, 0, 0], stds[1, 0, 0, 0] = 0.5, 1.0  # slope 0.8 without the prompt, 0.5 with it
    prior = MixturePrior(torch.zeros_like(stds), stds, conditions={"no": [0], "yes": [1]}, schedule=Cosine())
    conditioning = Conditioning(prior.embed(["yes"] * 3), prior.embed(["no"] * 3))
    query, start = query_of(prior, randn(3, 1, 2, 4), conditioning, 0.5), randn(3, 1, 2, 4)
    plain, (alpha, sigma) = start, coefficients(prior.schedule, query.t, start)
    for _ in range(10):
        plain = Guided(prior, conditioning, 7.5)(alpha * query.x + sigma * plain, query.t)
    before = residual(query, start, 7.5)
    assert (residual(query, plain, 7.5) > 10 * before).all()
    signed = residual(query, noise.sign_descent(10, 7.5, noise.given(start))(query)[0], 7.5)
    assert (signed < before / 4).all()


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize(
    "schedule", [Cosine(), stable_diffusion(), Flow(), Flow(3.0)], ids=["cosine", "table", "flow", "shifted"]
)
def test_finite_at_both_ends_of_time(mixture, conditions, randn, t, schedule):
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)
    x, conditioning = randn(2, 2, 2, 2).float(), conditions(prior, TEXTS[:2])
    for solver in SOLVERS.values():
        objective = dataclasses.replace(sds(7.5), noise=solver, timesteps=timesteps.listed([t]))
        out = objective.guidance(x, prior, conditioning, step=0, total=1, generator=seeds(2))
        assert out.noise.isfinite().all() and out.gradient.isfinite().all() and out.noise.dtype == torch.float32
        assert not out.noise.requires_grad
        assert residual(query_of(prior, x, conditioning, t), out.noise).isfinite().all()


def test_mistakes_are_named(gaussian):
    for make in (noise.fixed_point, noise.descent, noise.sign_descent, noise.continuation, noise.ddim_inversion):
        for steps in (0, 2.5, -1):
            with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
                make(steps)
        with pytest.raises(ValueError, match="scale must be a finite number"):
            make(scale=float("nan"))
    with pytest.raises(ValueError, match=r"overshoot must lie in \[0, 1\]"):
        noise.ddim_inversion(overshoot=50)
    with pytest.raises(ValueError, match=r"scale must lie in \[0, 1\], got 7.5"):
        noise.cfg_plus_plus(scale=7.5)
    with pytest.raises(ValueError, match="damping must lie above 0"):
        noise.fixed_point(damping=0.0)
    with pytest.raises(ValueError, match="memory must be a whole number of at least 0"):
        noise.fixed_point(memory=-1)
    with pytest.raises(ValueError, match="rate must be above 0"):
        noise.descent(rate=0)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        noise.ddim_inversion(eta=1.5)
    with pytest.raises(ValueError, match="choose euler, ab2 or heun"):
        noise.ddim_inversion(eta=0.0, solver="rk4")
    with pytest.raises(ValueError, match="warmup must lie in"):
        noise.interval_inversion(warmup=1500)
    query, exact, _, _ = gaussian
    with pytest.raises(ValueError, match="scale must be a finite number"):
        kappa_residual(exact, query.x, query.t, query.prior, query.conditioning, "large")


@pytest.mark.parametrize("kind", ["default", "nominal", "released"])
def test_the_schedule_is_asked_as_often_for_ten_hops_as_for_two(mixture, conditions, randn, kind, monkeypatch):
    """All levels of an inversion come from one look-up; this prior asks for its own level at each of its calls."""
    schedule = stable_diffusion()
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)
    counts = {"log_snr": 0, "predict": 0}

    def count(owner, name):
        plain = getattr(owner, name)

        def counting(*arguments):
            counts[name] += 1
            return plain(*arguments)

        monkeypatch.setattr(owner, name, counting)

    count(type(schedule), "log_snr")
    count(MixturePrior, "predict")
    found = {}
    for steps in (2, 10):
        before = dict(counts)
        objective = sdi(inversion_steps=steps, start=0.9, stop=0.9, released=kind == "released")
        if kind == "nominal":
            objective = dataclasses.replace(objective, prediction=prediction.nominal(7.5, -7.5, steps))
        texts = conditions(prior, ["left"])
        objective.guidance(randn(1, 2, 2, 2), prior, texts, step=0, total=1, generator=seeds(1)[0])
        found[steps] = {name: counts[name] - before[name] for name in counts}
    assert found[10]["predict"] >= found[2]["predict"] + 7
    own = [each["log_snr"] - each["predict"] for each in found.values()]
    assert own[0] == own[1] <= 8
