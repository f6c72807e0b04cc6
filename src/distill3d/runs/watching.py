"""The observers of a run in a folder: they are called between steps, and what they change is kept in changes.jsonl."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from distill3d.distill.changes import Change, changeable
from distill3d.distill.loop import ObjectRun, Progress
from distill3d.distill.observer import Observer, See, Steering, StepViews
from distill3d.files import sync
from distill3d.interrupts import Stopped
from distill3d.runs.config import from_plain

CHANGES = "changes.jsonl"  # settings changed while the run was under way, one `Change` a line
T = TypeVar("T")


def read_changes(folder: Path) -> tuple[Change, ...]:
    """The changes that a run's folder records, in the order in which they were made; ValueError for a damaged line."""
    path = folder / CHANGES
    lines = path.read_text().splitlines() if path.is_file() else []
    changes = []
    for number, line in enumerate(lines, 1):
        try:
            changes.append(from_plain(Change, json.loads(line)))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} cannot be read: {error}") from error
    return tuple(changes)


def check_changes(changes: Sequence[Change], run: ObjectRun) -> None:
    """Raises ValueError for a setting that the run does not have."""
    allowed = changeable(run.written, run.known_penalties)
    for change in changes:
        if change.setting not in allowed:
            raise ValueError(f"this run has no setting {change.setting!r} that can change; it has {', '.join(allowed)}")


class Watching:
    """The observers of one run. None can end it by an error: one that raises an exception is dropped with a warning."""

    def __init__(self, run: ObjectRun, folder: Path, observers: Sequence[Observer] = ()) -> None:
        """Reads the changes that the folder records; ValueError where they cannot be read."""
        self.run, self.folder, self.observers = run, folder, list(observers)
        changes = read_changes(folder)
        try:
            check_changes(changes, run)
            run.follow(changes)
        except ValueError as error:
            raise ValueError(f"{folder / CHANGES} does not fit this run: {error}") from error

    def start(self, step: int) -> None:
        """Before the first step."""
        for one in list(self.observers):
            self._ask(one, lambda one=one: one.start(self.run, self.folder, step), None)

    def watch(self, step: int) -> See | None:
        """See `observer.Watch`."""
        curious = [one for one in self.observers if self._ask(one, partial(one.wants, step), False)]
        return partial(self._see, step, curious) if curious else None

    def after(self, progress: Progress) -> bool:
        """After each step; returns whether to call it again before the next one.

        Raises:
            Stopped: where an observer ends the run.
        """
        again = stop = False
        for one in list(self.observers):
            steering = self._ask(one, partial(one.after, progress), None) or Steering()
            again |= steering.again
            if steering.settings:
                self._change(progress.step + 1, steering)
            stop |= steering.stop
        if stop:
            raise Stopped
        return again

    def end(self) -> None:
        """When the files are written."""
        for one in list(self.observers):
            self._ask(one, one.end, None)

    def _see(self, step: int, curious: Sequence[Observer], views: StepViews) -> None:
        for one in curious:
            self._ask(one, partial(one.see, step, views), None)

    def _change(self, step: int, steering: Steering) -> None:
        """Records and applies new settings; those that the run does not have are left out, with a warning."""
        for setting, value in (steering.settings or {}).items():
            try:
                change = Change(step, setting, value)
                check_changes([change], self.run)
                self.run.follow([*self.run.changes, change])
            except ValueError as error:
                warnings.warn(f"{setting} was not changed: {error}", stacklevel=1)
                continue
            with (self.folder / CHANGES).open("a") as file:
                file.write(json.dumps(dataclasses.asdict(change), allow_nan=False) + "\n")
        if (self.folder / CHANGES).is_file():
            sync(self.folder / CHANGES)

    def _ask(self, observer: Observer, question: Callable[[], T], otherwise: T) -> T:
        try:
            return question()
        except Exception as error:
            self.observers = [one for one in self.observers if one is not observer]
            warnings.warn(
                f"{type(observer).__name__} failed and is switched off, the run goes on: {error}", stacklevel=1
            )
            return otherwise
