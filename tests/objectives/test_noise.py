"""Every way to find kappa: what it solves, how far it gets, what it costs."""

import dataclasses

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import Cosine, Flow, coefficients, stable_diffusion
from distill3d.objectives import Query, kappa_residual, noise, sds, timesteps
from distill3d.priors.mixture import MixturePrior

F64 = torch.float64
TEXTS = ["left", "right", "odd"]
STD = 0.6

# Scale 1, tau 0: the equation is that of the query's own time.
SOLVERS = {
    "plain": noise.fixed_point(6, 1.0, overshoot=0.0),
    "damped": noise.fixed_point(6, 1.0, 0.7, overshoot=0.0),
    "anderson": noise.fixed_point(6, 1.0, 1.0, 3, overshoot=0.0),
    "descent": noise.descent(6, 1.0, overshoot=0.0),
    "inversion": noise.ddim_inversion(20, 1.0, 0.0, overshoot=0.0),
    "interval": noise.interval_inversion(),
    "corrected": noise.fixed_point(4, 1.0, 1.0, 2, 0.0, noise.ddim_inversion(10, 1.0, 0.0, overshoot=0.0)),
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
        (noise.fixed_point(400, 1.0, overshoot=0.0), 1e-9),
        (noise.fixed_point(800, 1.0, 0.5, overshoot=0.0), 1e-9),
        (noise.fixed_point(4, 1.0, 1.0, 1, overshoot=0.0), 1e-8),  # a linear equation with one slope
        (noise.descent(3000, 1.0, 1.0, overshoot=0.0), 1e-8),
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
        (lambda n: noise.fixed_point(n, 1.0, overshoot=0.0), slope),
        (lambda n: noise.fixed_point(n, 1.0, 0.4, overshoot=0.0), 1 - 0.4 * (1 - slope)),
        (lambda n: noise.descent(n, 1.0, 0.9, overshoot=0.0), 1 - 0.9 * (1 - slope) ** 2),
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
        ("corrected", "inversion"), ("anderson", "inversion"),
    ):  # fmt: skip
        assert found[better] < found[worse], (better, worse, found)


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
    (noise.fixed_point(5), 20),
    (noise.fixed_point(5, memory=2), 20),
    (noise.fixed_point(5, 1.0), 10),
    (noise.descent(3), 12),
    (noise.fixed_point(3, start=noise.ddim_inversion(10, 0.0, 0.0, overshoot=0.0), overshoot=0.0), 10 + 12),
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


def test_kappa_is_looked_for_above_the_time_it_is_used_at(gaussian):
    query, _, _, offset = gaussian
    kappa, _ = noise.fixed_point(500, 1.0, overshoot=0.05)(query)
    alpha, sigma = coefficients(query.prior.schedule, query.t + 0.05, query.x)
    torch.testing.assert_close(kappa, sigma / alpha / STD**2 * offset, rtol=1e-8, atol=1e-8)
    # drawn: between t and t + 0.1
    drawn, _ = noise.fixed_point(500, 1.0)(query)
    low, high = (
        s / a / STD**2 * offset.abs()
        for a, s in (coefficients(query.prior.schedule, query.t + tau, query.x) for tau in (0.0, 0.1))
    )
    assert (low <= drawn.abs()).all() and (drawn.abs() <= high).all()


def test_tau_is_drawn_from_one_step_of_ten_unless_it_is_given(gaussian, conditions):
    """For solvers that have no inversion steps: U[0, 0.1), as with the ten steps of the SDI release."""
    prior, n, seen = gaussian[0].prior, 2000, []

    def spy(query):
        seen.append(query.t)
        return torch.zeros_like(query.x), 0

    x = torch.zeros(n, *prior.sample_shape, dtype=F64)
    query = query_of(prior, x, conditions(prior, [""] * n), 0.4, torch.Generator().manual_seed(0))
    for solver in (noise.fixed_point(1, start=spy), noise.descent(1, start=spy)):
        solver(query)
        tau = seen.pop() - 0.4
        assert 0 <= tau.min() < 1e-3 and 0.099 < tau.max() <= 0.1
        torch.testing.assert_close(tau.mean(), torch.tensor(0.05, dtype=F64), rtol=0, atol=0.003)


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
    for make in (noise.fixed_point, noise.descent, noise.ddim_inversion):
        for steps in (0, 2.5, -1):
            with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
                make(steps)
        with pytest.raises(ValueError, match="scale must be a finite number"):
            make(scale=float("nan"))
        with pytest.raises(ValueError, match=r"overshoot must lie in \[0, 1\]"):
            make(overshoot=50)
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
