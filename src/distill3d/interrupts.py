"""Signals that end a run early: Ctrl-C, SIGTERM (`docker stop`, batch systems) and SIGHUP (a closed terminal).

All three are a KeyboardInterrupt, so that there is one way to end early. The exit status is 128 plus the signal's
number.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """An interrupt by a signal of this number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Stopped(Interrupted):
    """The end of a run that was asked for between two steps: no interruption, so its number is 0."""

    def __init__(self) -> None:
        super().__init__(0)


def signal_of(error: KeyboardInterrupt) -> int:
    """The number of the signal; that of Ctrl-C if it is not known."""
    return error.number if isinstance(error, Interrupted) else int(signal.SIGINT)


def raise_on_signals() -> None:
    """Makes SIGTERM and SIGHUP raise `Interrupted`, unless they are ignored (as under nohup) or handled already."""
    for number in SIGNALS[1:]:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise)


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Delays signals to the end of a step, since half a step cannot be continued.

    Yields the function to call after each step, which raises `Interrupted` if there was a signal. A second Ctrl-C
    raises at once, and the state then is not one to continue from. Signals that do not raise KeyboardInterrupt are left
    alone.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        _leave_terminal(number)
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS if main}
    handlers = {number: was for number, was in handlers.items() if was in (signal.default_int_handler, _raise)}
    for number in handlers:
        signal.signal(number, handle)
    try:
        yield check
    finally:
        for number, was in handlers.items():
            signal.signal(number, was)


def _raise(number: int, frame: object) -> None:
    _leave_terminal(number)
    raise Interrupted(number)


def _leave_terminal(number: int) -> None:
    """After SIGHUP: a terminal that is gone answers every output with an error, which must not end the run."""
    if number == signal.SIGHUP:
        for stream in (1, 2):
            with suppress(OSError):  # closed
                if stat.S_ISCHR(os.fstat(stream).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
