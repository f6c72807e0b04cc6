"""Runs that share network calls: what each gets is what it would get alone."""

import queue
from functools import partial

import pytest
import torch

from distill3d.cameras import orbit
from distill3d.priors.loading import load_prior
from distill3d.priors.shared_calls import Call, SharedCalls, evaluate
from distill3d.types import Condition
from distill3d.workers.turns import Turns

TEXTS = ["a red car", "a blue car", "", ""]


@pytest.fixture(scope="module")
def prior():
    return load_prior("toybox")


def call(prior, seed, texts=TEXTS, views=1, dtype=torch.float32):
    """Arguments as guidance makes them: the samples once for the texts and once without."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(texts) // 2, *prior.sample_shape, generator=g, dtype=dtype).repeat(2, 1, 1, 1)
    t = torch.full((len(texts),), 0.2 + 0.1 * seed, dtype=dtype)
    condition = prior.embed(texts)
    if prior.camera_conditioned:
        around = [360 * i / views for i in range(views)] * (len(texts) // views)
        condition = Condition(condition.hidden, camera=orbit(around, 10.0, 2.85, 40.0).camera_to_world)
    return Call(prior, views, x, t, condition)


def rows_of_layers(network, function):
    """The result, and for each call of the network how many rows its first and its last convolution computed."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        for layer in (network.conv_in, network.conv_out)
    ]
    result = function()
    for hook in hooks:
        hook.remove()
    return result, list(zip(seen[::2], seen[1::2], strict=True))


@torch.no_grad()
def test_calls_become_one_and_each_result_is_that_of_the_call_alone(prior):
    calls = [call(prior, 0), call(prior, 1, TEXTS[1:3]), call(prior, 2)]
    together, seen = rows_of_layers(prior.network, lambda: evaluate(calls))
    assert seen == [(5, 10)], "one call, in which rows with equal samples still are computed once"
    for one, found in zip(calls, together, strict=True):
        torch.testing.assert_close(found, prior.predict(one.x_t, one.t, one.condition), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_call_that_cannot_be_halved_shares_too(prior):
    odd = call(prior, 0)
    odd = Call(prior, 1, odd.x_t[:3], odd.t[:3], odd.condition[:3])
    calls = [odd, call(prior, 1)]
    together, seen = rows_of_layers(prior.network, lambda: evaluate(calls))
    assert [last for _, last in seen] == [7]
    for one, found in zip(calls, together, strict=True):
        torch.testing.assert_close(found, prior.predict(one.x_t, one.t, one.condition), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unlike_calls_are_evaluated_apart(prior):
    other = call(prior, 3, dtype=torch.float64)
    calls = [call(prior, 0), other, call(prior, 1)]
    together, seen = rows_of_layers(prior.network, lambda: evaluate(calls))
    assert [last for _, last in seen] == [8, 4] and together[1].dtype == torch.float64
    torch.testing.assert_close(together[1], prior.predict(other.x_t, other.t, other.condition), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_views_are_joined_as_each_run_asked():
    prior = load_prior("toybox-mv")
    texts = ["a red car"] * 4 + [""] * 4
    shared = [SharedCalls(Turns(evaluate), prior) for _ in range(2)]
    found = []
    for views, one in zip((2, 4), shared, strict=True):
        one.join(views)
    for views, one in zip((2, 4), shared, strict=True):
        asked = call(prior, 0, texts, views)
        found.append(one.predict(asked.x_t, asked.t, asked.condition))
        prior.join(views)
        alone = prior.predict(asked.x_t, asked.t, asked.condition)
        torch.testing.assert_close(found[-1], alone, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.01
    calls = [call(prior, seed, texts, 2) for seed in (0, 1)]
    prior.join(2)
    for one, both in zip(calls, evaluate(calls), strict=True):
        torch.testing.assert_close(both, prior.predict(one.x_t, one.t, one.condition), rtol=1e-4, atol=1e-4)


def test_runs_in_threads_share_each_call_and_gradients_are_taken_alone(prior):
    turns, ended = Turns(evaluate), queue.SimpleQueue()

    def work(seed):
        shared, asked = SharedCalls(turns, prior), call(prior, seed)
        x = asked.x_t
        with torch.no_grad():
            for _ in range(2):
                x = x - 0.1 * shared.predict(x, asked.t, asked.condition)
        leaf = x.requires_grad_()
        shared.predict(leaf, asked.t, asked.condition).square().sum().backward()
        ended.put((seed, leaf.grad))

    def made():
        turns.start([partial(work, seed) for seed in (0, 1)])
        return dict(ended.get(timeout=60) for _ in range(2))

    gradients, seen = rows_of_layers(prior.network, made)
    assert [last for _, last in seen] == [8, 8, 4, 4]
    assert gradients[0].abs().sum() > 0 and not torch.equal(gradients[0], gradients[1])
