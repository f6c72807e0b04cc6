"""Laws that every executor keeps: each task once, retries in a fresh worker, final errors at once, progress."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill3d.workers.executor import ATTEMPTS, GivenUp, Here
from distill3d.workers.processes import Processes


@dataclass(frozen=True)
class Toy:
    """Tasks are words that say what happens to their worker at the first try, or at each ("!")."""

    folder: Path

    def __call__(self):
        with (self.folder / "setups").open("a") as file:
            file.write("x")

        def make(task, tell):
            tried = self.folder / task
            first = not tried.exists()
            with tried.open("a") as file:
                file.write("x")
            tell(f"at {task}")
            if "killed" in task and (first or "!" in task):
                os.kill(os.getpid(), signal.SIGKILL)
            if "disk" in task and (first or "!" in task):
                raise OSError("the disk is full\nand more")
            if "wrong" in task:
                raise ValueError("it cannot be")
            return task.upper(), os.getpid()

        return make


def run(executor, folder, tasks):
    """Results by task, and the reports of progress."""
    reports = []
    with contextlib.closing(
        executor.run(Toy(folder), tasks, lambda index, said: reports.append((index, said)))
    ) as every:
        return {tasks[done.index]: done.result for done in every}, reports


def tries(folder, task):
    return len((folder / task).read_text())


def test_here_makes_each_task_once_in_order_and_loads_nothing_for_nothing(tmp_path):
    results, reports = run(Here(), tmp_path, ["b", "a"])
    assert list(results) == ["b", "a"] and results["b"] == ("B", os.getpid())
    assert reports == [(0, "at b"), (1, "at a")] and tries(tmp_path, "setups") == 1
    assert run(Here(), tmp_path / "missing", []) == ({}, [])


def test_a_dead_process_costs_its_task_one_attempt_and_nothing_else(tmp_path):
    tasks = ["a", "killed", "disk", "killed!", "b"]
    made = {}
    with pytest.raises(GivenUp, match=r"1 of 5 tasks failed 3 times.*ended by signal 9"):
        for done in Processes(2).run(Toy(tmp_path), tasks):
            made[tasks[done.index]] = done.result
    assert {task: word for task, (word, _) in made.items()} == {"a": "A", "killed": "KILLED", "disk": "DISK", "b": "B"}
    assert os.getpid() not in {process for _, process in made.values()}
    assert [tries(tmp_path, task) for task in tasks] == [1, 2, 2, ATTEMPTS, 1]
    assert 3 <= tries(tmp_path, "setups") <= 2 + 5  # two workers, and a fresh one after each failure


def test_settings_that_are_wrong_are_not_tried_again(tmp_path):
    with pytest.raises(ValueError, match="it cannot be"):
        list(Processes(1).run(Toy(tmp_path), ["wrong", "a"]))
    assert tries(tmp_path, "wrong") == 1 and not (tmp_path / "a").exists()
