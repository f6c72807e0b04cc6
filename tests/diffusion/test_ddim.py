import itertools
import math

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.schedule import Cosine, Flow, coefficients, stable_diffusion
from distill3d.priors.mixture import MixturePrior

F64 = torch.float64


def model(prior, batch, text=""):
    embedding = prior.embed([text] * batch)
    return lambda x, t: prior.predict(x, t, embedding)


class Indexed:
    """A model of samples with conditions of their own; remembers which of them it evaluated."""

    def __init__(self, prior, texts, seen):
        self.prior, self.texts, self.seen = prior, texts, seen

    def __getitem__(self, rows):
        return Indexed(self.prior, [self.texts[i] for i in rows], self.seen)

    def __call__(self, x, t):
        self.seen.append(self.texts)
        return self.prior.predict(x, t, self.prior.embed(self.texts))


def slopes(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize(
    "schedule", [Cosine(), Flow(), Flow(3.0), stable_diffusion()], ids=["cosine", "flow", "shifted", "table"]
)
def test_exact_scores_of_one_gaussian_give_the_closed_form(schedule, randn):
    mean, std = randn(1, 3), 0.7
    prior = MixturePrior(mean, std, schedule=schedule)
    x, start, stop = randn(4, 3), 0.9, 0.1

    def spread(t):
        a, s = coefficients(schedule, torch.full((4,), t, dtype=F64), x)
        return a * mean, (a**2 * std**2 + s**2).sqrt()

    (m_t, s_t), (m_s, s_s) = spread(start), spread(stop)
    exact = m_s + s_s / s_t * (x - m_t)  # the ODE keeps the standardized sample
    errors = []
    for steps in (20, 40, 80):
        out = ddim.sample(model(prior, 4), x, schedule, ddim.descending(steps, start, stop))
        errors.append((out - exact).abs().max().item())
    assert errors[-1] < 0.03
    assert all(0.85 < p < 1.15 for p in slopes(errors))


@pytest.fixture
def wide():
    """Components that overlap: between sharp ones trajectories part, and rates show late."""
    means = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    return MixturePrior(means, torch.tensor([0.6, 0.8, 1.0], dtype=F64), schedule=Cosine())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("heun", 2)])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_measured_order_of_the_solvers(wide, randn, solver, order, up):
    x = 0.5 * randn(3, 2, 2)
    eps, solve = model(wide, 3), ddim.invert if up else ddim.sample

    def run(steps, how):
        times = ddim.descending(steps, 0.9, 0.1)
        return solve(eps, x, wide.schedule, times.flip(0) if up else times, how)

    exact = run(1500, "heun")
    errors = [(run(n, solver) - exact).abs().max().item() for n in (40, 80, 160)]
    assert all(order - 0.2 < p < order + 0.5 for p in slopes(errors)), slopes(errors)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("heun", 2)])
def test_inversion_then_sampling_returns(wide, randn, solver, order):
    x, eps = 0.5 * randn(3, 2, 2), model(wide, 3)
    errors = []
    for steps in (40, 80, 160):
        down = ddim.descending(steps, 0.9, 0.1)
        noise = ddim.invert(eps, x, wide.schedule, down.flip(0), solver)
        errors.append((ddim.sample(eps, noise, wide.schedule, down, solver) - x).abs().max().item())
    # Heun's errors up and down cancel to leading order: it returns better than it converges.
    assert all(p > order - 0.25 for p in slopes(errors)), slopes(errors)


@pytest.mark.parametrize(("t", "s"), [(0.8, 0.3), (0.3, 0.8)], ids=["down", "up"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_preserves_the_variance(t, s, eta):
    g = torch.Generator().manual_seed(0)
    x0, eps, noise = torch.zeros(1, 1), *(torch.randn(200_000, 1, generator=g, dtype=F64) for _ in range(2))
    schedule = Cosine()
    t, s = (torch.full((200_000,), v, dtype=F64) for v in (t, s))
    alpha, sigma = coefficients(schedule, t, eps)
    out = ddim.ddim_step(alpha * x0 + sigma * eps, eps, schedule, t, s, eta, noise)
    assert out.std().item() == pytest.approx(schedule.sigma(s[:1]).item(), rel=0.01)


def test_eta_one_upwards_is_the_forward_process(randn):
    x, eps, noise = randn(2, 3), randn(2, 3), randn(2, 3)
    t, s = torch.tensor([0.1, 0.4], dtype=F64), torch.tensor([0.5, 0.9], dtype=F64)
    (a_t, s_t), (a_s, s_s) = (coefficients(Cosine(), v, x) for v in (t, s))
    forward = a_s / a_t * x + (s_s**2 - (a_s / a_t * s_t) ** 2).sqrt() * noise
    torch.testing.assert_close(ddim.ddim_step(x, eps, Cosine(), t, s, 1.0, noise), forward)


def test_a_step_of_no_length_changes_nothing(randn):
    x, t = randn(2, 3), torch.tensor([0.0, 1.0], dtype=F64)
    torch.testing.assert_close(ddim.ddim_step(x, randn(2, 3), Cosine(), t, t, 0.5, randn(2, 3)), x)


@pytest.mark.parametrize("solver", ["euler", "ab2", "heun"])
def test_ragged_grids_equal_sample_by_sample(mixture, randn, solver):
    x, t = 0.5 * randn(4, 2, 2, 2), torch.tensor([0.95, 0.0, 0.31, 0.1], dtype=F64)
    texts, seen = ["left", "right", "odd", ""], []
    together = ddim.invert(Indexed(mixture, texts, seen), x, mixture.schedule, ddim.ascending(t, 10), solver)
    per_step = 2 if solver == "heun" else 1
    assert seen[::per_step] == [["left", "odd", ""]] + [["left", "odd"]] * 3 + [["left"]] * 6
    for i in range(4):
        one = model(mixture, 1, texts[i])
        alone = ddim.invert(one, x[[i]], mixture.schedule, ddim.ascending(t[[i]], 10), solver)
        torch.testing.assert_close(together[[i]], alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="pass a model that can be indexed"):
        ddim.invert(model(mixture, 4), x, mixture.schedule, ddim.ascending(t, 10), solver)


def test_generators_per_sample_equal_given_noise(mixture, randn):
    x, times = randn(2, 2, 2, 2), ddim.descending(4, 0.9, 0.1)
    eps = model(mixture, 2)
    owners = [torch.Generator().manual_seed(i) for i in (5, 6)]
    drawn = ddim.sample(eps, x, mixture.schedule, times, eta=0.7, generator=owners)
    noise = torch.empty(4, *x.shape, dtype=F64)
    for i, seed in enumerate((5, 6)):
        g = torch.Generator().manual_seed(seed)
        for k in range(4):
            noise[k, i] = torch.randn(x.shape[1:], generator=g)
    torch.testing.assert_close(ddim.sample(eps, x, mixture.schedule, times, eta=0.7, noise=noise), drawn)


@pytest.mark.parametrize("solver", ["euler", "ab2", "heun"])
def test_times_that_share_the_highest_level_do_no_harm(randn, solver):
    prior = MixturePrior(randn(2, 3), 0.5, schedule=stable_diffusion())
    times, x = torch.tensor([1.0, 0.9995, 0.999, 0.7, 0.3, 0.0], dtype=F64), randn(4, 3)
    out = ddim.sample(model(prior, 4), x, prior.schedule, times, solver)
    torch.testing.assert_close(out, ddim.sample(model(prior, 4), x, prior.schedule, times[2:], solver))


def test_mistakes_are_named(mixture, randn):
    x, times, eps = randn(1, 2, 2, 2), ddim.descending(3), model(mixture, 1)
    with pytest.raises(ValueError, match="invert needs times that rise"):
        ddim.invert(eps, x, mixture.schedule, times)
    with pytest.raises(ValueError, match="choose euler, ab2 or heun"):
        ddim.sample(eps, x, mixture.schedule, times, "rk4")
    with pytest.raises(ValueError, match="use eta = 0 or solver 'euler'"):
        ddim.sample(eps, x, mixture.schedule, times, "ab2", 0.5)
    with pytest.raises(ValueError, match="pass a generator"):
        ddim.sample(eps, x, mixture.schedule, times, eta=0.5)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        ddim.sample(eps, x, mixture.schedule, times, eta=1.5, generator=torch.Generator())
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        ddim.descending(0)
