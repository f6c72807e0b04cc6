import pytest
import torch

from distill3d.diffusion.schedule import Cosine, Flow, coefficients, stable_diffusion
from distill3d.objectives import sds
from distill3d.priors import MixturePrior
from distill3d.prompts import ViewPrompts
from distill3d.types import Condition, Prior

F64 = torch.float64


@pytest.mark.parametrize(
    "schedule", [Cosine(), Flow(), Flow(3.0), stable_diffusion()], ids=["cosine", "flow", "shifted", "table"]
)
@pytest.mark.parametrize("diagonal", [False, True], ids=["isotropic", "diagonal"])
def test_eps_is_the_score_of_the_diffused_density(schedule, diagonal, randn):
    means = randn(3, 1, 2, 2)
    stds = 0.2 + randn(3, 1, 2, 2).abs() if diagonal else torch.tensor([0.3, 0.5, 0.9], dtype=F64)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    spreads = stds if diagonal else stds.view(3, 1, 1, 1)
    prior = MixturePrior(means, stds, weights, {"some": [0, 2]}, schedule)
    x, t = randn(4, 1, 2, 2).requires_grad_(), torch.tensor([0.05, 0.4, 0.8, 0.99], dtype=F64)
    alpha, sigma = coefficients(schedule, t, x)
    for text, parts in (("", [0, 1, 2]), ("some", [0, 2])):
        log_p = []
        for k in parts:  # by brute force, with the library's own normal density
            spread = (alpha**2 * spreads[k] ** 2 + sigma**2).sqrt().expand_as(x)
            normal = torch.distributions.Normal((alpha * means[k]).expand_as(x), spread)
            log_p.append(normal.log_prob(x).flatten(1).sum(1) + weights[k].log())
        (score,) = torch.autograd.grad(torch.logsumexp(torch.stack(log_p), 0).sum(), x)
        eps = prior.predict(x.detach(), t, prior.embed([text] * 4))
        torch.testing.assert_close(eps, -sigma * score, rtol=1e-8, atol=1e-8)


def test_any_dimension_dtype_and_end_of_time(randn):
    for shape in ((1,), (3, 8, 8), (5,)):
        prior = MixturePrior(randn(2, *shape), 0.01)
        for dtype in (torch.float32, F64):
            t = torch.tensor([0.0, 1.0], dtype=dtype)
            eps = prior.predict(100 * randn(2, *shape).to(dtype), t, prior.embed(["", ""]))
            assert eps.shape == (2, *shape) and eps.dtype == dtype and eps.isfinite().all()
        assert prior.sample_shape == shape and prior.image_size == shape[-1]


def test_a_condition_stands_for_its_view_texts_too(randn):
    prior = MixturePrior(randn(3, 2), conditions={"a cat": [0, 1], "a cat, back view": [2]})
    plain, side, back = prior.embed(["a cat", "a cat, side view", "a cat, back view"]).hidden
    assert torch.equal(side, plain) and torch.equal(back[0], torch.tensor([0.0, 0.0, 1.0], dtype=F64))
    prompts = ViewPrompts("a cat", perp_neg=True)
    prior.prepare(prompts.texts)
    conditioning = prompts.conditioning(torch.tensor([10.0, 170.0]), torch.tensor([0.0, 80.0]), prior.embed)
    assert conditioning.positive.hidden.isfinite().all()
    for text in ("a cat, top view", "a dog, side view"):
        with pytest.raises(ValueError, match=f"unknown condition '{text}'"):
            prior.embed([text])


def test_a_prior_of_ones_own_needs_only_what_has_no_default():
    class Zero(Prior):
        name, image_size, sample_shape, device = "zero", 8, (3, 8, 8), torch.device("cpu")
        schedule = Cosine()

        def encode(self, images):
            return images

        def decode(self, x):
            return x

        def embed(self, texts):
            return Condition(torch.zeros(len(texts), 1, 1))

        def predict(self, x_t, t, condition):
            return 0 * x_t

    prior = Zero()
    prior.prepare(["a cat"])
    assert prior.views == 1 and prior.control is None and not prior.camera_conditioned
    conditioning = ViewPrompts("a cat").conditioning(torch.zeros(2), torch.zeros(2), prior.embed)
    out = sds().guidance(
        torch.ones(2, 3, 8, 8), prior, conditioning, step=0, total=1, generator=torch.Generator().manual_seed(0)
    )
    assert (out.prediction == 0).all()

    class Incomplete(Zero):
        predict = Prior.predict

    with pytest.raises(TypeError, match=r"abstract method '?predict"):
        Incomplete()


def test_mistakes_are_named(randn):
    means = randn(2, 3)
    with pytest.raises(ValueError, match=r"\[K, ...\]"):
        MixturePrior(randn(3))
    with pytest.raises(ValueError, match="stds must be positive"):
        MixturePrior(means, 0.0)
    with pytest.raises(ValueError, match="2 positive numbers"):
        MixturePrior(means, weights=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="components from 0 to 1"):
        MixturePrior(means, conditions={"a": [2]})
    with pytest.raises(ValueError, match="knows 'a' and the empty text"):
        MixturePrior(means, conditions={"a": [1]}).embed(["b"])
