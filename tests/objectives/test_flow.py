"""The family on flow models, whose scores are exact here: Euler's method for the velocity, written out on its own,
and predictions of every kind through networks that are closed forms."""

import dataclasses
import itertools

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import Flow, Table, coefficients, from_eps, to_eps
from distill3d.objectives import sdi, sdi_cached, timesteps
from distill3d.priors.mixture import MixturePrior

F64 = torch.float64
TEXTS = ["left", "right"]


@pytest.fixture(params=[1.0, 3.0], ids=["straight", "shifted"])
def prior(request, mixture):
    return MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, Flow(request.param))


def velocity(prior, x, t, conditioning, scale):
    """E[eps - x0 | x_t] of the guided mixture, from posterior means alone: no schedule algebra of ours."""
    sigma = prior.schedule.sigma(t)[:, None, None, None]

    def predict(text):
        m, s = prior.means[None], prior.stds[None]  # [1, K, ...]
        variance = ((1 - sigma)[:, None] * s) ** 2 + sigma[:, None] ** 2
        distance = x[:, None] - (1 - sigma)[:, None] * m
        log = -0.5 * (distance**2 / variance + variance.log()).flatten(2).sum(-1) + text.hidden[:, 0].log()
        posterior = torch.softmax(log, 1)[..., None, None, None]
        gain = s**2 * (1 - sigma)[:, None] / variance
        x0 = (posterior * (m + gain * distance)).sum(1)
        eps = (posterior * sigma[:, None] * distance / variance).sum(1)
        return eps - x0

    u, c = predict(conditioning.negative), predict(conditioning.positive)
    return u + scale * (c - u)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_cached_sdi_is_eulers_sampler_of_the_flow(prior, conditions, randn, scale):
    """x is, at each step, the end x_t - sigma v of the straight line from Euler's sample."""
    conditioning, first, steps = conditions(prior, TEXTS), randn(2, 2, 2, 2), 12
    times = torch.linspace(0.98, 0.02, steps, dtype=F64)
    sigma = prior.schedule.sigma(times)
    x_t, x = sigma[0] * first, torch.zeros_like(first)
    objective = sdi_cached(scale, 0.98, 0.02, first)
    for step in range(steps):
        v = velocity(prior, x_t, times[step].expand(2), conditioning, scale)
        out = objective.guidance(x, prior, conditioning, step=step, total=steps, generator=torch.Generator())
        x = x - out.gradient
        torch.testing.assert_close(out.x_t, x_t, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x, x_t - sigma[step] * v, rtol=1e-9, atol=1e-9)
        if step + 1 < steps:
            x_t = x_t + (sigma[step + 1] - sigma[step]) * v


def test_inversion_is_euler_run_backwards(prior, conditions, randn):
    conditioning, x = conditions(prior, TEXTS), randn(2, 2, 2, 2)
    times = torch.linspace(0.01, 0.9, 8, dtype=F64)
    ours = ddim.invert(Guided(prior, conditioning, 1.0), x, prior.schedule, times)
    for t, s in itertools.pairwise(times):
        v = velocity(prior, x, t.expand(2), conditioning, 1.0)
        x = x + (prior.schedule.sigma(s) - prior.schedule.sigma(t)) * v
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_higher_order_inversion_of_a_flow(prior, conditions, randn, solver, order):
    """The way up and down again: halving the steps divides the error by 2^order."""
    conditioning, x = conditions(prior, TEXTS), 0.3 * randn(2, 2, 2, 2)
    model = Guided(prior, conditioning, 1.0)

    def end(steps, solver=solver):
        times = torch.linspace(0.2, 0.8, steps + 1, dtype=F64)
        return ddim.invert(model, x, prior.schedule, times, solver)

    exact = end(2000, "heun")
    errors = [(end(n) - exact).norm() for n in (40, 80)]
    assert errors[0] / errors[1] > 0.8 * 2**order


def test_the_target_of_sdi_follows_from_the_velocity(prior, conditions, randn):
    """x - g = x_t - sigma v: a step of -g goes to the end of the straight line."""
    conditioning, x = conditions(prior, TEXTS), randn(2, 2, 2, 2)
    objective = sdi(4.0, start=0.7, stop=0.7)
    out = objective.guidance(x, prior, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(0))
    sigma = prior.schedule.sigma(out.t)[:, None, None, None]
    v = velocity(prior, out.x_t, out.t, conditioning, 4.0)
    torch.testing.assert_close(out.x_t, (1 - sigma) * x + sigma * out.noise)
    torch.testing.assert_close(x - out.gradient, out.x_t - sigma * v, rtol=1e-9, atol=1e-9)


class Network:
    """A mixture as a network that predicts `kind`, and is read back through the conversion under test."""

    def __init__(self, prior, kind, dtype):
        self.__dict__.update(vars(prior))
        self.mixture, self.kind, self.dtype = prior, kind, dtype
        self.sample_shape = prior.sample_shape

    def predict(self, x_t, t, text):
        exact = self.mixture.predict(x_t.double(), t.double(), text)
        wide = coefficients(self.schedule, t.double(), x_t.double())
        said = from_eps(self.kind, exact, x_t.double(), *wide).to(self.dtype)
        return to_eps(self.kind, said, x_t, *coefficients(self.schedule, t, x_t))


ZERO_SNR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("zero_snr", [False, True], ids=["table", "zero-snr"])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_every_kind_of_prediction_gives_the_closed_forms_x0(mixture, conditions, randn, zero_snr, kind, dtype):
    """x0 = E[x0 | x_t] to the level where noise is all there is, whatever the network says."""
    schedule = Table.from_config({**ZERO_SNR, "rescale_betas_zero_snr": zero_snr})
    prior = MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)
    t = torch.tensor([1.0, 0.98, 0.5, 0.02], dtype=dtype)
    x, conditioning = randn(4, 2, 2, 2).to(dtype), conditions(prior, ["left"] * 4)
    objective = sdi(1.0, start=1.0, stop=1.0)
    objective = dataclasses.replace(objective, timesteps=timesteps.listed([t.tolist()]))
    network = Network(prior, kind, dtype)
    out = objective.guidance(x, network, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (c.double() for c in coefficients(schedule, out.t, out.x_t))
    eps = prior.predict(out.x_t.double(), out.t.double(), conditioning.positive)
    wanted = (out.x_t.double() - sigma * eps) / alpha
    if zero_snr:
        assert alpha[0] < 3e-4  # and still finite: the table ends just above nothing
    # x0 = (x_t - sigma eps) / alpha loses digits as alpha falls; the last levels keep three of seven.
    rounding = torch.finfo(dtype).eps / alpha
    assert ((out.x0.double() - wanted).abs() <= 40 * rounding).all()
