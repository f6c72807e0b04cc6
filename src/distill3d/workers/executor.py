"""Run these tasks, each once, and yield the results as they come: the interface, retries, and the present process."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3  # of a task whose worker fails
STOP_SECONDS = 60.0  # for the present step and a checkpoint, when a worker has to stop
WAIT_SECONDS = 120.0  # for a worker of a killed driver to notice that, and to finish its step
TELL_SECONDS = 0.5  # between two reports of a worker about its task

Tell = Callable[[Any], None]  # reports progress from within a task
Make = Callable[[T, Tell], R]  # makes one task
OnProgress = Callable[[int, Any], None]  # the index of a task, and what it reported


# Prepares a worker, once: loads what all tasks share. It is sent to workers, so it must be picklable.
Setup = Callable[[], Callable[[T, Tell], R]]


@dataclass(frozen=True)
class Done(Generic[R]):
    """A finished task: its index among those that were passed in, and its result."""

    index: int
    result: R


class Executor(Protocol):
    """Runs tasks on workers."""

    def run(
        self, setup: Setup[T, R], tasks: Sequence[T], on_progress: OnProgress = lambda index, report: None
    ) -> Generator[Done[R], None, None]:
        """Yields each finished task, in any order. Close it (`contextlib.closing`) if you do not exhaust it.

        ValueError and ImportError are final: settings are wrong, or a package is missing, on every worker. After any
        other error, and after the end of a worker, the task is made again elsewhere.

        Raises:
            ValueError, ImportError: as a task raised them.
            GivenUp: at the end, for tasks whose worker failed `ATTEMPTS` times. All others were yielded before.
            KeyboardInterrupt: after the workers were asked to stop.
        """
        ...


class GivenUp(ValueError):
    """Tasks that could not be made: their workers failed each time."""


@dataclass(frozen=True)
class Here:
    """Makes tasks one after the other in this process."""

    def run(
        self, setup: Setup[T, R], tasks: Sequence[T], on_progress: OnProgress = lambda index, report: None
    ) -> Generator[Done[R], None, None]:
        """See `Executor`. Errors of a task are raised at once: there is no other worker."""
        make = setup() if tasks else None
        for index, task in enumerate(tasks):
            assert make is not None
            yield Done(index, make(task, lambda report, index=index: on_progress(index, report)))


HERE = Here()


@dataclass
class Queue:
    """Which tasks wait, how often each was begun, and which were given up."""

    size: int
    waiting: deque[int] = field(init=False)
    failures: dict[int, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = deque(range(self.size))

    def failed(self, index: int, reason: str) -> None:
        """A worker failed on a task: it waits again, first in line, unless it was begun often enough."""
        reasons = self.failures.setdefault(index, [])
        reasons.append(reason)
        if len(reasons) < ATTEMPTS:
            self.waiting.appendleft(index)

    def check(self) -> None:
        """Raises `GivenUp` if there are tasks that failed too often; call it when nothing waits or runs."""
        lost = {index: reasons for index, reasons in self.failures.items() if len(reasons) >= ATTEMPTS}
        if lost:
            reason = next(iter(lost.values()))[-1]
            raise GivenUp(
                f"{len(lost)} of {self.size} tasks failed {ATTEMPTS} times, the last with: {reason}; "
                "the others are finished, and the same command tries again"
            )


class Throttled:
    """A `Tell` that passes on at most one report in `TELL_SECONDS`."""

    def __init__(self, tell: Tell):
        """`tell` gets the reports that are passed on."""
        self._tell, self._last = tell, -math.inf

    def __call__(self, report: object) -> None:
        """Passes a report on, unless there was one just now."""
        if time.monotonic() - self._last >= TELL_SECONDS:
            self._last = time.monotonic()
            self._tell(report)


@dataclass(frozen=True)
class Answer:
    """What a worker says about a task: "done" with the result, "raised" with a final error, "failed" with a reason."""

    kind: str
    content: Any
    warnings: tuple[str, ...] = ()

    def result(self, queue: Queue, index: int) -> bool:
        """Whether the content is a result. Warns of what the worker warned of, raises final errors, notes failures."""
        for text in self.warnings:
            warnings.warn(text, stacklevel=2)
        if self.kind == "raised":
            raise self.content
        if self.kind == "failed":
            queue.failed(index, self.content)
        return self.kind == "done"


def attempt(make: Callable[[], Any]) -> Answer:
    """Calls a function in a worker. Warnings of this package are collected; those of libraries are left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("always", module=r"distill3d\.")
        try:
            kind, content = "done", make()
        except ImportError as error:
            kind, content = "raised", ImportError(str(error))
        except ValueError as error:
            kind, content = "raised", ValueError("; ".join((str(error), *getattr(error, "__notes__", ()))))
        except KeyboardInterrupt:  # by somebody else than the driver, or the driver does not listen any more
            kind, content = "failed", "it was stopped"
        except Exception as error:
            kind, content = "failed", one_line(error)
    return Answer(kind, content, tuple(dict.fromkeys(str(one.message) for one in caught)))


def one_line(error: BaseException) -> str:
    """An error in one line, with its type if the message alone does not say much."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def use_threads(threads: int) -> None:
    """Limits torch to so many threads in this process, whether it is loaded already or not."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
