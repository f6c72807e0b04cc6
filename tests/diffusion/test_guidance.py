import dataclasses

import pytest
import torch

from distill3d.diffusion.guidance import APG, Guided, adaptive_projected, cfg, guided_prediction, perp_neg, rescale
from distill3d.diffusion.schedule import coefficients, from_eps
from distill3d.objectives import SDI, SDS


@pytest.fixture
def point(mixture, randn):
    return randn(3, 2, 2, 2), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize(("scale", "rows"), [(0, 3), (1, 3), (7.5, 6), (-7.5, 6)])
def test_one_call_with_the_needed_rows_only(mixture, counting, conditions, point, scale, rows):
    prior, (x, t) = counting(mixture), point
    conditioning = conditions(prior, ["left", "right", "odd"])
    eps, count = guided_prediction(prior, x, t, conditioning, scale)
    assert prior.calls == [rows] and count == rows
    e_c, e_u = (mixture.predict(x, t, c) for c in (conditioning.positive, conditioning.negative))
    torch.testing.assert_close(eps, cfg(e_u, e_c, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "rows"), [(0, 3), (1, 3 + 2 + 3), (7.5, 3 + 3 + 3)])
def test_perp_neg_evaluates_no_row_of_weight_zero(mixture, counting, conditions, point, scale, rows):
    prior, (x, t) = counting(mixture), point
    weights = torch.tensor([[-0.5, 0.0], [0.0, 0.0], [-1.0, -2.0]], dtype=torch.float64)
    texts = ["right", "odd", "left", "odd", "left", "right"]
    conditioning = conditions(prior, ["left", "right", "odd"], texts, weights)
    eps, count = guided_prediction(prior, x, t, conditioning, scale)
    assert prior.calls == [rows] and count == rows
    e_c, e_u = (mixture.predict(x, t, c) for c in (conditioning.positive, conditioning.negative))
    twice = (x.repeat_interleave(2, 0), t.repeat_interleave(2))
    e_n = mixture.predict(*twice, conditioning.perp).view(3, 2, *x.shape[1:])
    torch.testing.assert_close(eps, perp_neg(e_u, e_c, e_n, weights, scale), rtol=1e-12, atol=1e-12)


def test_perp_neg_batch_equals_its_samples(mixture, conditions, point):
    x, t = point
    weights = torch.tensor([[-0.5], [0.0], [-1.0]], dtype=torch.float64)
    conditioning = conditions(mixture, ["left", "right", "odd"], ["right", "odd", "left"], weights)
    together, _ = guided_prediction(mixture, x, t, conditioning, 7.5)
    for i in range(3):
        alone, _ = guided_prediction(mixture, x[[i]], t[[i]], conditioning[torch.tensor([i])], 7.5)
        torch.testing.assert_close(together[[i]], alone, rtol=1e-12, atol=1e-12)


def test_perp_neg_ignores_negatives_along_the_prompt(randn):
    e_u, e_c, other = randn(2, 3, 4), randn(2, 3, 4), randn(2, 3, 4)
    weights = torch.full((2, 1), -1.0, dtype=torch.float64)
    parallel = e_u + 3 * (e_c - e_u)
    torch.testing.assert_close(perp_neg(e_u, e_c, parallel[:, None], weights, 5.0), cfg(e_u, e_c, 5.0))
    pushed = perp_neg(e_u, e_c, other[:, None], weights, 5.0) - cfg(e_u, e_c, 5.0)
    along = (pushed * (e_c - e_u)).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-9)
    assert perp_neg(e_u, e_u, other[:, None], weights, 5.0).isfinite().all()


def test_rescale_restores_the_spread(randn):
    guided, conditional = 4 * randn(2, 3, 4, 4), randn(2, 3, 4, 4)
    out = rescale(guided, conditional)
    torch.testing.assert_close(out.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(rescale(guided, conditional, 0.0), guided)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1)], ids=["constant", "one value"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rescale_leaves_samples_without_variance_alone(randn, shape, fraction):
    guided = torch.full(shape, 3.0, dtype=torch.float64)
    torch.testing.assert_close(rescale(guided, randn(*shape), fraction), guided)


def test_guided_selects_conditions_by_rows_and_counts(mixture, conditions, point):
    x, t = point
    conditioning = conditions(mixture, ["left", "right", "odd"])
    model, rows = Guided(mixture, conditioning, 7.5), torch.tensor([0, 2])
    whole, _ = guided_prediction(mixture, x, t, conditioning, 7.5)
    torch.testing.assert_close(model[rows](x[rows], t[rows]), whole[rows])
    torch.testing.assert_close(model(x, t), whole)
    assert model.nfe == 4 + 6


def test_one_condition_per_sample(mixture, conditions, point):
    with pytest.raises(ValueError, match="2 conditions for 3 samples"):
        guided_prediction(mixture, *point, conditions(mixture, ["left", "odd"]), 1)


def test_apg_with_all_of_the_parallel_part_and_no_threshold_is_cfg(randn):
    x0_u, x0_c = randn(3, 2, 4), randn(3, 2, 4)
    torch.testing.assert_close(adaptive_projected(x0_u, x0_c, 7.5, APG()), cfg(x0_u, x0_c, 7.5))


def test_apg_splits_shortens_and_leaves_the_rest(randn):
    """Written out for one sample: what is added to x0_c is orthogonal to it, plus a weighted parallel part."""
    x0_u, x0_c = randn(1, 2, 4), randn(1, 2, 4)
    c, d = x0_c.flatten(), (x0_c - x0_u).flatten()
    added = (adaptive_projected(x0_u, x0_c, 3.0, APG(parallel=0.0)) - x0_c).flatten() / 2
    assert abs(float(added @ c)) < 1e-12 and float((d - added) @ added) == pytest.approx(0.0, abs=1e-12)
    part = (adaptive_projected(x0_u, x0_c, 3.0, APG(parallel=0.3)) - x0_c).flatten() / 2
    torch.testing.assert_close(part, added + 0.3 * (d - added))
    r = float(d.norm()) / 2
    short = (adaptive_projected(x0_u, x0_c, 3.0, APG(threshold=r)) - x0_c).flatten() / 2
    torch.testing.assert_close(short, d / 2)
    far = adaptive_projected(x0_u, x0_c, 3.0, APG(threshold=4 * r))
    torch.testing.assert_close(far, cfg(x0_u, x0_c, 3.0))


def test_apg_of_a_prior_is_apg_of_its_denoised_images(mixture, conditions, randn):
    """With Perp-Neg the pushed prompt takes the prompt's place; scales 0 and 1 have nothing to combine."""
    x_t, t, settings = randn(3, 2, 2, 2), torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64), APG(0.2, 0.5)
    weights = torch.tensor([[-0.5], [0.0], [-1.0]], dtype=torch.float64)
    plain = conditions(mixture, ["left", "right", "odd"])
    pushed = conditions(mixture, ["left", "right", "odd"], ["right", "odd", "left"], weights)
    levels = coefficients(mixture.schedule, t, x_t)
    for conditioning in (plain, pushed):
        e_u, e_c = (guided_prediction(mixture, x_t, t, conditioning, s)[0] for s in (0.0, 1.0))
        x0_u, x0_c = (from_eps("x0", e, x_t, *levels) for e in (e_u, e_c))
        found, nfe = guided_prediction(mixture, x_t, t, conditioning, 7.5, settings)
        expected = adaptive_projected(x0_u, x0_c, 7.5, settings)
        torch.testing.assert_close(from_eps("x0", found, x_t, *levels), expected)
        assert nfe == guided_prediction(mixture, x_t, t, conditioning, 7.5)[1]
        assert not torch.allclose(found, guided_prediction(mixture, x_t, t, conditioning, 7.5)[0])
    for settings in ({"parallel": -0.1}, {"threshold": -1.0}, {"threshold": float("nan")}):
        with pytest.raises(ValueError, match="parallel must lie in"):
            APG(**settings)


def test_apg_is_a_setting_of_methods(mixture, conditions, randn):
    x, conditioning = randn(2, 2, 2, 2), conditions(mixture, ["left", "right"])

    def prediction(method):
        objective = method.build(mixture, 10, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        return objective.guidance(x, mixture, conditioning, step=3, total=10, generator=generator)

    for method in (SDI(), SDS(7.5)):
        out, projected = prediction(method), prediction(dataclasses.replace(method, apg=APG(parallel=0.0)))
        assert torch.equal(out.noise, projected.noise)  # the inversion keeps its guidance
        e = guided_prediction(mixture, out.x_t, out.t, conditioning, 7.5, APG(parallel=0.0))[0]
        torch.testing.assert_close(projected.prediction, e)
        assert not torch.allclose(out.gradient, projected.gradient)
