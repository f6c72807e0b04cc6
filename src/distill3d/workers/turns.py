"""Threads that take turns, so that what all of them wait for is computed at once.

One thread runs at a time. It runs until it needs a result; then it leaves its item, and the next thread runs. When all
have left one, the items are served together, and the threads go on in the same order. So the course of the program
does not depend on time, and no thread needs a lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, NoReturn, TypeVar

THREADS = "distill3d turns"  # the name of the threads
Item = TypeVar("Item")
Result = TypeVar("Result")


class Turns(Generic[Item, Result]):
    """Threads whose calls of `meet` are served together."""

    def __init__(self, serve: Callable[[Sequence[Item]], Sequence[Result]]):
        """`serve` returns the results of some items, in their order."""
        self._serve = serve
        self._ready: deque[_Thread[Item, Result]] = deque()
        self._waiting: list[_Thread[Item, Result]] = []
        self._present = threading.local()

    def start(self, works: Sequence[Callable[[], None]]) -> None:
        """Runs functions in threads of their own, which take turns. They must not raise. Call it from another thread.

        The threads end with the program.
        """
        threads = [_Thread[Item, Result]() for _ in works]
        self._ready.extend(threads)
        for thread, work in zip(threads, works, strict=True):
            threading.Thread(target=self._run, args=(thread, work), name=THREADS, daemon=True).start()
        self._pass_on()

    def meet(self, item: Item) -> Result:
        """The result for an item, served with those of all other threads. Outside of the threads it is served alone.

        Raises:
            what `serve` raises, in all threads.
        """
        thread: _Thread[Item, Result] | None = getattr(self._present, "thread", None)
        if thread is None:
            return self._serve([item])[0]
        thread.item = item
        self._waiting.append(thread)
        self._pass_on()
        thread.turn.acquire()
        return thread.outcome()

    def _run(self, thread: _Thread[Item, Result], work: Callable[[], None]) -> None:
        thread.turn.acquire()
        self._present.thread = thread
        try:
            work()
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Gives the turn to the next thread; if all wait, they are served first."""
        if not self._ready and self._waiting:
            served, self._waiting = self._waiting, []
            try:
                results = [lambda result=result: result for result in self._serve([one.item for one in served])]
            except Exception as error:
                results = [_raising(error)] * len(served)
            for thread, result in zip(served, results, strict=True):
                thread.outcome = result
            self._ready.extend(served)
        if self._ready:
            self._ready.popleft().turn.release()


class _Thread(Generic[Item, Result]):
    """What a thread waits with and for."""

    item: Item
    outcome: Callable[[], Result]  # returns or raises

    def __init__(self) -> None:
        self.turn = threading.Semaphore(0)


def _raising(error: Exception) -> Callable[[], NoReturn]:
    def outcome() -> NoReturn:
        raise error

    return outcome
