"""Threads that take turns: one runs at a time, and what they wait for is served together."""

import queue
from functools import partial

import pytest

from distill3d.workers.turns import Turns


def course(counts, serve=None, fails=()):
    """What happens when threads ask as often as `counts` says for the square of their number; the last asks fail."""
    events, ended = [], queue.SimpleQueue()

    def square(items):
        events.append(f"serve {items}")
        return [item**2 for item in items]

    turns = Turns(serve or square)

    def work(thread):
        try:
            for ask in range(counts[thread]):
                events.append(f"{thread} asks {ask}")
                result = turns.meet(10 * thread + ask)
                events.append(f"{thread} has {result}")
        except ArithmeticError as error:
            events.append(f"{thread} failed: {error}")
        ended.put(thread)

    turns.start([partial(work, thread) for thread in range(len(counts))])
    order = [ended.get(timeout=20) for _ in counts]
    return events, order


def test_items_are_served_when_all_threads_wait_and_the_order_is_always_the_same():
    expected = ["0 asks 0", "1 asks 0", "serve [0, 10]", "0 has 0", "0 asks 1", "1 has 100", "1 asks 1"]
    expected += ["serve [1, 11]", "0 has 1", "1 has 121"]
    for _ in range(20):
        assert course([2, 2]) == (expected, [0, 1])


def test_threads_that_have_ended_are_not_waited_for():
    events, order = course([1, 3, 0])
    assert [event for event in events if "serve" in event] == ["serve [0, 10]", "serve [11]", "serve [12]"]
    assert order == [2, 0, 1]


def test_an_error_reaches_every_thread_that_waits():
    def serve(items):
        raise ArithmeticError("no result")

    events, order = course([2, 1], serve)
    assert [event for event in events if "failed" in event] == ["0 failed: no result", "1 failed: no result"]
    assert order == [0, 1]


def test_outside_of_the_threads_an_item_is_served_alone():
    served = []
    turns = Turns(lambda items: served.append(items) or [len(items)])
    assert turns.meet("a") == 1 and served == [["a"]]
    with pytest.raises(ZeroDivisionError):
        Turns(lambda items: [1 / item for item in items]).meet(0)
