"""Rows with one x_t and one t: the layers before the text run once, and every row stays what it is alone."""

import pytest
import torch

from distill3d.priors.loading import load_prior


@pytest.fixture(scope="module", params=["model", "toybox"])
def prior(request, kl_folder):
    return load_prior(kl_folder if request.param == "model" else "toybox")


def rows_of(prior, x, t, texts):
    """The prediction, and how many rows the first convolution of the network and the last one computed."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        for module in (prior.network.conv_in, prior.network.conv_out)
    ]
    out = prior.predict(x, t, prior.embed(texts))
    for hook in hooks:
        hook.remove()
    return out, tuple(seen)


@pytest.mark.parametrize(
    ("samples", "texts", "first"),
    [([0, 0], ["a dog", ""], 1), ([0] * 4, ["a", "", "b", "c"], 1), ([0, 1, 0, 1], ["a", "b", "", ""], 2),
     ([0, 1], ["a dog", ""], 2), ([0, 0, 0], ["a", "", "b"], 3), ([0, 0, 1, 1], ["a", "b", "", ""], 4)],
)  # fmt: skip
def test_each_row_is_what_it_is_alone_and_equal_ones_are_computed_once(prior, randn, samples, texts, first):
    x, t = randn(2, *prior.sample_shape).float()[samples], torch.tensor([0.4, 0.8])[samples]
    with torch.no_grad():
        together, seen = rows_of(prior, x, t, texts)
        assert seen == (first, len(samples))
        alone = torch.cat(
            [prior.predict(x[i : i + 1], t[i : i + 1], prior.embed(texts[i : i + 1])) for i in range(len(x))]
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_equal_samples_at_unlike_times_share_only_what_knows_no_time(prior, randn):
    x, t = randn(1, *prior.sample_shape).float().repeat(2, 1, 1, 1), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        together, seen = rows_of(prior, x, t, ["a dog", "a dog"])
        assert seen == (1, 2)
        alone = torch.cat([prior.predict(x[:1], t[i : i + 1], prior.embed(["a dog"])) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_gradients_reach_each_row(prior, randn):
    """With gradients nothing is shared: two rows that are equal by chance have gradients of their own."""
    x = randn(1, *prior.sample_shape).float().repeat(2, 1, 1, 1).requires_grad_()
    with torch.enable_grad():
        out, seen = rows_of(prior, x, torch.full((2,), 0.5), ["a dog", "a dog"])
        out.square().sum().backward()
    assert seen == (2, 2)
    torch.testing.assert_close(x.grad[0], x.grad[1], rtol=1e-3, atol=1e-3)
