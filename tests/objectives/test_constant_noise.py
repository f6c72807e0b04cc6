"""Constant noise with steps of 1 - rho' / rho of the target: DDIM's own samples, on scores that are exact."""

import dataclasses
import math

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion import random as draw
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import Cosine, Flow, Linear, coefficients, from_eps, stable_diffusion
from distill3d.objectives import CFD, cfd, sds, starting_at, weighting
from distill3d.priors.mixture import MixturePrior

F64 = torch.float64
TEXTS = ["left", "right", "odd"]
SCHEDULES = {
    "cosine": Cosine(), "linear": Linear(), "table": stable_diffusion(), "flow": Flow(), "shifted": Flow(3.0)
}  # fmt: skip


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def with_schedule(mixture, schedule):
    return MixturePrior(mixture.means, mixture.stds, mixture.weights, mixture.conditions, schedule)


def distilled(objective, prior, conditioning, total, generator, x=None):
    """Every evaluation of a run from x = 0, and where it ends."""
    x, outs = torch.zeros(len(conditioning), *prior.sample_shape, dtype=F64) if x is None else x, []
    for step in range(total):
        outs.append(objective.guidance(x, prior, conditioning, step=step, total=total, generator=generator))
        x = x - outs[-1].gradient
    return outs, x


def sampled(prior, conditioning, scale, times, kappa):
    """The samples of ddim.sample at the times, and its denoised image at the last of them."""
    seen, guided = [], Guided(prior, conditioning, scale)

    def watched(x, t):
        seen.append((x, guided(x, t), t))
        return seen[-1][1]

    start = coefficients(prior.schedule, times[:1].expand(len(kappa)), kappa)[1] * kappa
    end = ddim.sample(watched, start, prior.schedule, times)
    assert len(seen) == len(times) - 1  # the last time is not evaluated
    denoised = from_eps("x0", watched(end, times[-1:].expand(len(end))), end, *coefficients(
        prior.schedule, times[-1:].expand(len(end)), end))  # fmt: skip
    return [x for x, _, _ in seen], denoised


def close(value, expected):
    assert (value - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 7.5])
def test_theorem_constant_noise_is_the_ddim_sampler(mixture, conditions, randn, schedule, steps, scale):
    prior = with_schedule(mixture, schedule)
    conditioning, kappa = conditions(prior, TEXTS), randn(3, 2, 2, 2)
    samples, denoised = sampled(prior, conditioning, scale, torch.linspace(0.98, 0.02, steps, dtype=F64), kappa)
    outs, x = distilled(cfd(scale, first=kappa), prior, conditioning, steps, torch.Generator())
    for out, x_t in zip(outs, samples, strict=True):
        close(out.x_t, x_t)
    close(x, denoised)
    assert sum(out.nfe for out in outs) == steps * 3 * (1 if scale in (0, 1) else 2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_on_flows_it_is_eulers_sampler(mixture, conditions, randn, shift):
    """Along dx / d sigma = v, written out."""
    prior = with_schedule(mixture, Flow(shift))
    conditioning, kappa, steps = conditions(prior, TEXTS), randn(3, 2, 2, 2), 12
    times = torch.linspace(0.98, 0.02, steps, dtype=F64)
    sigma, model = prior.schedule.sigma(times), Guided(prior, conditioning, 4.0)
    x_t = sigma[0] * kappa  # plus (1 - sigma) times x = 0
    outs, x = distilled(cfd(4.0, first=kappa), prior, conditioning, steps, torch.Generator())
    for step, out in enumerate(outs):
        close(out.x_t, x_t)
        eps = model(x_t, times[step].expand(3))
        v = (eps - x_t) / (1 - sigma[step])
        end = x_t - sigma[step] * v
        if step + 1 < steps:
            x_t = x_t + (sigma[step + 1] - sigma[step]) * v
    close(x, end)


def test_a_batch_equals_its_samples_one_by_one(mixture, conditions):
    conditioning = conditions(mixture, TEXTS)
    _, together = distilled(cfd(5.0), mixture, conditioning, 10, seeds(3))
    for i in range(3):
        _, alone = distilled(cfd(5.0), mixture, conditioning[torch.tensor([i])], 10, seeds(3)[i : i + 1])
        close(together[i : i + 1], alone)


def test_all_randomness_is_one_draw_at_the_first_step(mixture, conditions):
    outs, _ = distilled(cfd(), mixture, conditions(mixture, TEXTS), 5, torch.Generator().manual_seed(3))
    assert all(torch.equal(out.noise, outs[0].noise) for out in outs)
    drawn = draw.normal(outs[0].noise, torch.Generator().manual_seed(3))
    assert torch.equal(outs[0].noise, drawn)


def test_with_scaled_times_it_is_the_sampler_of_those_times(mixture, conditions, randn):
    """The step size looks at the times that the run really has."""
    conditioning, kappa = conditions(mixture, TEXTS), randn(3, 2, 2, 2)
    objective = starting_at(CFD(5.0), 0.6).build(mixture, 8, torch.Generator())
    objective.state.load_state_dict({"kappa": kappa})
    times = 0.6 * torch.linspace(0.98, 0.02, 8, dtype=F64)
    samples, denoised = sampled(mixture, conditioning, 5.0, times, kappa)
    outs, x = distilled(objective, mixture, conditioning, 8, torch.Generator())
    for out, x_t in zip(outs, samples, strict=True):
        close(out.x_t, x_t)
    close(x, denoised)


def test_a_small_error_of_the_scene_stays_small(mixture, conditions, randn):
    """A scene that cannot follow exactly: x is 0.01 off after each step, in 40 steps."""
    conditioning, kappa = conditions(mixture, TEXTS), randn(3, 2, 2, 2)
    _, exact = distilled(cfd(1.0, first=kappa), mixture, conditioning, 40, torch.Generator())
    objective, x = cfd(1.0, first=kappa), torch.zeros_like(kappa)
    for step in range(40):
        out = objective.guidance(x, mixture, conditioning, step=step, total=40, generator=torch.Generator())
        x = x - out.gradient + 0.01 * randn(3, 2, 2, 2)
    assert (x - exact).square().mean().sqrt() < 0.05


def test_the_step_size_leaves_the_weight_alone(mixture, conditions, randn):
    """g = step size times weight times (prediction - reference); at the last step, and without one, it is whole."""
    x, conditioning = randn(2, 2, 2, 2), conditions(mixture, TEXTS[:2])
    objective = cfd(3.0, 0.8, 0.2, randn(2, 2, 2, 2))
    whole = dataclasses.replace(objective, step_size=None)
    for step, t, following in ((0, 0.8, 0.6), (2, 0.4, 0.2), (3, 0.2, None)):
        out, all_of_it = (
            o.guidance(x, mixture, conditioning, step=step, total=4, generator=torch.Generator())
            for o in (objective, whole)
        )
        torch.testing.assert_close(all_of_it.gradient, x - all_of_it.x0, rtol=1e-9, atol=1e-9)
        fraction = 1.0
        if following:  # rho = tan(pi t / 2) in the cosine schedule
            fraction = 1 - math.tan(math.pi * following / 2) / math.tan(math.pi * t / 2)
        torch.testing.assert_close(out.gradient, fraction * all_of_it.gradient, rtol=1e-9, atol=1e-9)


def test_times_must_fall(mixture, conditions, randn):
    x, conditioning = randn(1, 2, 2, 2), conditions(mixture, ["left"])
    rising = cfd(start=0.2, stop=0.9)
    drawn = dataclasses.replace(sds(), step_size=weighting.ddim_step_size)
    for objective, generator in ((rising, torch.Generator()), (drawn, torch.Generator().manual_seed(2))):
        with pytest.raises(ValueError, match="times must fall from step to step"):
            for step in range(9):
                objective.guidance(x, mixture, conditioning, step=step, total=9, generator=generator)
