"""How much of a run's time the viewer may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.07  # of the elapsed time; what viser's own thread does comes on top
MOST = 0.5  # seconds that can be saved up


class Budget:
    """Seconds that may be spent: a share of the elapsed time, of which at most `most` are kept for later.

    Until the time t after its making at most share t + most is spent, and as much as the last job exceeds what was
    expected of it: what it takes too long is paid back before the next one.
    """

    def __init__(self, share: float = SHARE, most: float = MOST, clock: Callable[[], float] = time.monotonic):
        self.share, self.most, self.clock = share, most, clock
        self._left, self._then = 0.0, clock()

    def allows(self, seconds: float) -> bool:
        """Whether a job of so many seconds may begin."""
        return self.allowance() >= min(seconds, self.most)

    def allowance(self) -> float:
        """Seconds that may be spent now; below 0 after a job that took longer than expected."""
        now = self.clock()
        self._left, self._then = min(self.most, self._left + self.share * (now - self._then)), now
        return self._left

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Counts the time of a job."""
        self.allowance()  # idle time before the job is saved up to `most`, and not beyond
        began = self.clock()
        try:
            yield
        finally:
            self._left -= self.clock() - began
