"""Objects that are made together: each is what it is alone, with fewer calls of the network."""

import dataclasses
import queue
from functools import partial

import pytest

from distill3d.distill.loop import ObjectRun, optimize
from distill3d.distill.recipes import DISTILL, LAPTOP, method_settings
from distill3d.objectives import SDI, SDS
from distill3d.priors.loading import load_prior
from distill3d.priors.shared_calls import SharedCalls, evaluate
from distill3d.prompts import ViewPrompts
from distill3d.runs.many import ROWS, objects_at_once, shares_calls
from distill3d.runs.objects import Config
from distill3d.workers.turns import Turns

PROMPTS = ("a red mushroom", "a blue car", "a yellow duck")
SMALL = dataclasses.replace(DISTILL, steps=3, views=1, scene=dataclasses.replace(DISTILL.scene, resolution=12))


@pytest.fixture(scope="module")
def prior():
    return load_prior("toybox")


def made(recipe, prior, serve):
    """The parameters of an object for each prompt, made in threads that take turns."""
    turns, ended = Turns(serve), queue.SimpleQueue()

    def make(prompt):
        run = ObjectRun(recipe, ViewPrompts(prompt), SharedCalls(turns, prior), seed=3)
        optimize(run, range(recipe.steps), lambda progress: None)
        ended.put((prompt, run.scene.raw.detach()))

    turns.start([partial(make, prompt) for prompt in PROMPTS])
    return dict(ended.get(timeout=300) for _ in PROMPTS)


@pytest.mark.parametrize("objective", [SDS(), SDI(inversion_steps=2)])
def test_objects_made_together_are_those_made_alone_with_fewer_calls(prior, objective):
    recipe, rows = dataclasses.replace(SMALL, objective=objective), {}

    def count(name, calls):
        rows.setdefault(name, []).append(sum(len(call.x_t) for call in calls))
        return evaluate(calls)

    together = made(recipe, prior, partial(count, "together"))
    alone = made(recipe, prior, lambda calls: [count("alone", [call])[0] for call in calls])
    assert sum(rows["together"]) == sum(rows["alone"]) and len(rows["alone"]) == 3 * len(rows["together"])
    for prompt in PROMPTS:
        # Adam turns the rounding of a gradient that is nearly zero into a part of a step: in the mean it is small.
        assert (together[prompt] - alone[prompt]).abs().mean() < 1e-5
        others = [together[other] for other in PROMPTS if other != prompt]
        assert all((together[prompt] - other).abs().mean() > 1e-3 for other in others)


def test_as_many_objects_as_fill_a_call_of_the_bundled_priors():
    assert objects_at_once(Config("a car", recipe=DISTILL)) == ROWS // (2 * DISTILL.views)
    assert objects_at_once(Config("a car", recipe=LAPTOP)) == 1
    assert objects_at_once(Config("a car", recipe=DISTILL, prior="sd21")) == 1
    student = dataclasses.replace(DISTILL, objective=method_settings("vsd", "distill"))
    assert not shares_calls(Config("a car", recipe=student)) and objects_at_once(Config("a car", recipe=student)) == 1
