"""Several tasks at a time in this process, which share what they wait for."""

from __future__ import annotations

import queue
import signal
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from distill3d.interrupts import Interrupted, interrupts_between_steps
from distill3d.workers.executor import Done, OnProgress, R, Setup, T
from distill3d.workers.turns import Turns


@dataclass(frozen=True)
class Together:
    """Makes `count` tasks at a time, in threads that take turns."""

    turns: Turns
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--at-once must be at least 1, got {self.count}")

    def run(
        self, setup: Setup[T, R], tasks: Sequence[T], on_progress: OnProgress = lambda index, report: None
    ) -> Generator[Done[R], None, None]:
        """See `Executor`. The error of a task ends the others, after their present step, and is then raised."""
        make = setup() if tasks else None
        waiting, errors = deque(enumerate(tasks)), list[BaseException]()
        said: queue.SimpleQueue[Done[R] | None] = queue.SimpleQueue()  # None: a thread has ended
        with interrupts_between_steps() as check_interrupt:

            def work() -> None:
                assert make is not None
                try:
                    while waiting and not errors:
                        check_interrupt()
                        index, task = waiting.popleft()
                        said.put(Done(index, make(task, lambda report, index=index: tell(index, report))))
                except BaseException as error:
                    errors.append(error)
                said.put(None)

            def tell(index: int, report: object) -> None:
                on_progress(index, report)
                check_interrupt()
                if errors:
                    raise Interrupted(signal.SIGTERM)

            at_work = min(self.count, len(tasks))
            self.turns.start([work] * at_work)
            try:
                while at_work:
                    if (done := said.get()) is None:
                        at_work -= 1
                    else:
                        yield done
            except GeneratorExit:  # nobody wants the rest
                errors.append(Interrupted(signal.SIGTERM))
                with suppress(KeyboardInterrupt):
                    while at_work:
                        at_work -= said.get() is None
                raise
        if errors:
            raise errors[0]
