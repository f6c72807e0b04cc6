"""Joint score distillation on the mixture: its energy by autograd, and which of two objects it leads to."""

import dataclasses

import pytest
import torch

from distill3d.cameras import orbit
from distill3d.diffusion.schedule import Cosine, Flow, coefficients, from_eps
from distill3d.objectives import jsd, sds, timesteps, weighting
from distill3d.priors import load_prior
from distill3d.priors.mixture import MixturePrior
from distill3d.types import Conditioning

F64 = torch.float64
TEXTS = ["left", "left", "right", "right"]


def at(objective, t):
    return dataclasses.replace(objective, timesteps=timesteps.listed([[t]]))


def seed(value=0):
    return torch.Generator().manual_seed(value)


@pytest.fixture
def point(mixture, randn):
    """(a guide that knows one sample and denoises everything to it, that sample); it reads the mixture's texts."""
    y = randn(2, 2, 2)
    means = y.expand(4, *y.shape)
    return MixturePrior(means, 1e-9, conditions={"left": [0, 1], "right": [2]}, schedule=Flow()), y


@pytest.mark.parametrize("t", [0.2, 0.6, 0.9])
def test_the_guided_noise_is_the_gradient_of_the_energy(mixture, conditions, randn, point, t):
    guide, y = point
    x, conditioning = 0.5 * randn(4, 2, 2, 2), conditions(mixture, TEXTS)
    out = at(jsd(guide, 7.5, weight=1.7), t).guidance(x, mixture, conditioning, step=5, total=10, generator=seed())
    plain = at(sds(7.5), t).guidance(x, mixture, conditioning, step=5, total=10, generator=seed())
    alpha, sigma = coefficients(mixture.schedule, out.t, x)
    x_t = out.x_t.clone().requires_grad_()
    e_u = mixture.predict(out.x_t, out.t, conditioning.negative)  # held fixed
    energy = 0.5 * (from_eps("x0", e_u, x_t, alpha, sigma) - y).square().sum()
    (slope,) = torch.autograd.grad(energy, x_t)
    torch.testing.assert_close(out.prediction, plain.prediction + sigma * 1.7 * slope)
    torch.testing.assert_close(out.gradient, sigma**2 * (out.prediction - out.noise))
    assert plain.nfe == 8 and out.nfe == 16


def test_without_weight_and_before_its_start_it_is_sds(mixture, conditions, randn, point):
    x, conditioning = 0.5 * randn(4, 2, 2, 2), conditions(mixture, TEXTS)
    wanted = dataclasses.replace(at(sds(31.0), 0.6), weight=weighting.noise_variance)
    for objective, step in ((jsd(point[0], weight=0.0), 9), (jsd(point[0]), 1)):
        got, plain = (
            o.guidance(x, mixture, conditioning, step=step, total=10, generator=seed())
            for o in (at(objective, 0.6), wanted)
        )
        torch.testing.assert_close(got.gradient, plain.gradient)


def test_a_batch_is_its_samples_one_by_one(mixture, conditions, randn, point):
    x, conditioning = 0.5 * randn(4, 2, 2, 2), conditions(mixture, TEXTS)
    objective = at(jsd(mixture, 7.5, guide_scale=3.0), 0.5)

    def gradient(rows):
        generators = [seed(int(i)) for i in rows]
        args = (x[rows], mixture, conditioning[rows])
        return objective.guidance(*args, step=5, total=10, generator=generators).gradient

    alone = torch.cat([gradient(torch.tensor([i])) for i in range(4)])
    torch.testing.assert_close(gradient(torch.arange(4)), alone)


def test_of_two_objects_that_the_prior_likes_the_guide_chooses(conditions):
    """The prior has two modes and no preference; from the middle, all samples go to the one that the guide knows."""
    modes = torch.tensor([-1.0, 1.0], dtype=F64)[:, None, None, None].expand(2, 1, 2, 2)
    prior = MixturePrior(modes, 0.1, conditions={"a cat": [0, 1]}, schedule=Cosine())
    guide = MixturePrior(modes[1:].expand(2, 1, 2, 2), 0.1, conditions={"a cat": [0, 1]}, schedule=Cosine())
    conditioning = conditions(prior, ["a cat"] * 16)

    def ends(objective):
        x, g = torch.zeros(16, 1, 2, 2, dtype=F64), seed(1)
        for step in range(100):
            x = x - 0.1 * objective.guidance(x, prior, conditioning, step=step, total=100, generator=g).gradient
        return x.mean((1, 2, 3))

    joint, alone = ends(jsd(guide, scale=1.0, start=0.0)), ends(jsd(guide, scale=1.0, weight=0.0, start=0.0))
    assert (joint > 0.8).all() and (alone < -0.5).any()


def test_a_multi_view_guide_joins_the_views_of_a_group(kl_folder, views_folder):
    prior, guide = load_prior(kl_folder), load_prior(views_folder)
    cameras = orbit(torch.arange(8) * 90.0, 20.0, 2.5, 40.0).camera_to_world
    conditioning = Conditioning(prior.embed(["a cat"] * 8), prior.embed([""] * 8)).with_camera(cameras)
    x = torch.randn(8, 4, 8, 8, generator=seed())
    changed = x.clone()
    changed[5] += 1

    def gradient(objective, x):
        return objective.guidance(x, prior, conditioning, step=5, total=10, generator=seed()).gradient

    for objective, moved in ((at(jsd(guide), 0.5), [4, 5, 6, 7]), (at(sds(7.5), 0.5), [5])):
        difference = (gradient(objective, changed) - gradient(objective, x)).abs().amax((1, 2, 3))
        assert (difference > 1e-4).nonzero().flatten().tolist() == moved


def test_mistakes_are_named(mixture, conditions, randn):
    other = MixturePrior(torch.zeros(4, 2, 3, 3, dtype=F64))
    x, conditioning = randn(4, 2, 2, 2), conditions(mixture, TEXTS)
    with pytest.raises(
        ValueError, match=r"has samples \[2, 3, 3\], mixture \[2, 2, 2\]: load both with one image size"
    ):
        at(jsd(other), 0.5).guidance(x, mixture, conditioning, step=5, total=10, generator=seed())
    with pytest.raises(ValueError, match="start must lie in"):
        jsd(other, start=2.0)
    with pytest.raises(ValueError, match="weight must be a finite number"):
        jsd(other, weight=float("nan"))
