"""Tasks that one process makes at the same time: each once, results as they come, and one error or signal ends all."""

import contextlib
import os
import signal
import threading

import pytest

from distill3d import interrupts
from distill3d.interrupts import Interrupted
from distill3d.workers.together import Together
from distill3d.workers.turns import Turns


class Steps:
    """Tasks are numbers of steps, of which each waits for all the others; `within` is called in each step."""

    def __init__(self, within=lambda task, step: None):
        self.served, self.saved, self.within = [], [], within
        self.turns = Turns(self.serve)

    def serve(self, items):
        self.served.append(len(items))
        return items

    def __call__(self):
        def make(task, tell):
            step = 0
            try:
                for step in range(task):
                    self.turns.meet(task)
                    self.within(task, step)
                    tell(step)
                return f"{task} steps"
            except Interrupted:
                self.saved.append((task, step + 1))
                raise

        return make

    def run(self, count, tasks):
        reports = []
        executor = Together(self.turns, count)
        with contextlib.closing(executor.run(self, tasks, lambda index, step: reports.append((index, step)))) as every:
            return [(done.index, done.result) for done in every], reports


def test_each_task_is_made_once_and_so_many_at_a_time():
    steps = Steps()
    results, reports = steps.run(2, [3, 1, 2, 2])
    assert sorted(results) == [(0, "3 steps"), (1, "1 steps"), (2, "2 steps"), (3, "2 steps")]
    assert sorted(reports) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert steps.served == [2, 2, 2, 1, 1], "the last task waits for nobody"
    assert Steps().run(3, []) == ([], [])
    with pytest.raises(ValueError, match="--at-once must be at least 1, got 0"):
        Together(steps.turns, 0)


def test_an_error_ends_the_others_after_their_present_step():
    def within(task, step):
        if (task, step) == (5, 1):
            raise OSError("the disk is full")

    steps = Steps(within)
    with pytest.raises(OSError, match="the disk is full"):
        steps.run(3, [4, 5, 6, 7])
    assert steps.saved == [(6, 2), (4, 3)], "the fourth task was not begun"


def test_no_task_is_begun_after_an_error():
    begun, turns = [], Turns(lambda items: items)

    def make(task, tell):
        begun.append(task)
        turns.meet(task)
        if task == "fails":
            raise OSError("the disk is full")
        return turns.meet(task)

    with pytest.raises(OSError, match="the disk is full"):
        list(Together(turns, 2).run(lambda: make, ["fails", "a", "b"]))
    assert begun == ["fails", "a"]


@pytest.fixture
def handlers():
    """The signals as a process of the command line has them, given back afterwards."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.raise_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_ends_all_after_their_present_step(handlers):
    def within(task, step):
        if (task, step) == (4, 1):
            os.kill(os.getpid(), signal.SIGTERM)
            received.wait(20)

    received = threading.Event()
    steps = Steps(within)
    # Python runs handlers in the main thread, which waits for results meanwhile: this one lets the step go on.
    signal.signal(signal.SIGUSR1, lambda number, frame: received.set())
    with pytest.raises(Interrupted) as caught:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        steps.run(2, [4, 5, 6])
    assert caught.value.number == signal.SIGTERM and steps.saved == [(4, 2), (5, 2)]


def test_a_caller_that_wants_no_more_lets_the_others_save():
    steps = Steps()
    every = Together(steps.turns, 2).run(steps, [1, 50_000])
    assert next(every).result == "1 steps"
    every.close()
    assert [task for task, _ in steps.saved] == [50_000]
