"""A run's folder: its name, config.json, metrics.jsonl, checkpoints and artifacts, and the training loop over them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

import distill3d
from distill3d.distill.divergence import PARAMETER, Diverged, first_not_finite
from distill3d.distill.loop import OnStep, Progress, Run, optimize
from distill3d.distill.observer import nobody
from distill3d.files import checksum, explain, locked, remove_partial, replacing, sync
from distill3d.interrupts import interrupts_between_steps, signal_of
from distill3d.runs.checkpoint import Checkpointed, State, has_checkpoint, load_checkpoint, save_checkpoint, tidy
from distill3d.runs.config import FORMAT, from_plain, to_plain
from distill3d.runs.watching import Watching

CHECKPOINT_SECONDS = 60.0
CONFIG = "config.json"
T = TypeVar("T")


class Trainable(Run, Checkpointed, Protocol):
    """A run that can be trained in a folder."""


@dataclass(frozen=True)
class Training:
    """How a training ended."""

    steps: int  # finished, all in all
    nfe: int
    seconds: float
    interrupted: int = 0  # the number of the signal that ended it early


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @staticmethod
    def create(out: str | Path, name: str) -> RunFolder:
        """Makes `out`/<slug of the name>-<random id>. The slug holds letters, digits and dashes only.

        Raises:
            ValueError: where the folder cannot be made.
        """
        path = Path(out) / f"{slug(name)[:48].strip('-') or 'run'}-{secrets.token_hex(3)}"
        try:
            path.mkdir(parents=True)
            sync(path.parent)
        except OSError as error:
            raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
        return RunFolder(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes off the folder, and removes what a killed one left unfinished; see `files.locked`."""
        with locked(self.path):
            self.tidy()
            yield

    def tidy(self) -> None:
        """Removes what a killed process left unfinished."""
        tidy(self.checkpoint)
        remove_partial(self.path)

    @property
    def checkpoint(self) -> Path:
        """The folder of the last checkpoint."""
        return self.path / "checkpoint"

    @property
    def metrics(self) -> Path:
        """The log, one line of JSON per step."""
        return self.path / "metrics.jsonl"

    def write_config(self, kind: str, config: object) -> None:
        """Writes config.json: what kind of run this is, its configuration, and the versions it ran with."""
        versions = {
            "distill3d": distill3d.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": sys.platform,
        }
        content = {"format": FORMAT, "kind": kind, **to_plain(config), "versions": versions}
        with replacing(self.path / CONFIG) as draft:
            draft.write_text(json.dumps(content, indent=2, allow_nan=False))

    def read_config(self, kind: str, config: type[T]) -> T:
        """The configuration of a run of this kind ("object", "image" or "comparison").

        Raises:
            ValueError: where the folder is not a run, or a run of another kind or of another format, or damaged.
        """
        path = self.path / CONFIG
        if not path.is_file():
            raise ValueError(f"{self.path} is not a run folder: it has no config.json")
        try:
            content = json.loads(path.read_text())
            found, written = content.pop("kind"), content.pop("format")
            content.pop("versions", None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {type(error).__name__} {error}") from error
        if found != kind:
            raise ValueError(f"{self.path} is a run of kind {found!r}; this needs one of kind {kind!r}")
        if written != FORMAT:
            raise ValueError(f"{path} has format {written}; this version of distill3d reads format {FORMAT}")
        try:
            return from_plain(config, content)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def check(self) -> None:
        """Raises OSError where the folder is no longer there: nobody would find what is written to it."""
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run folder was removed", str(self.path))

    def history(self) -> list[dict[str, Any]]:
        """The logged steps as dicts of `Progress`, up to the first line that was cut off or damaged."""
        lines = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        return [step for step in itertools.takewhile(bool, map(_parse_step, lines)) if step]

    @property
    def taken(self) -> int | None:
        """How many steps the log has; None without a log."""
        return len(self.history()) if self.metrics.is_file() else None

    @contextmanager
    def log(self, before: Sequence[dict[str, Any]] = ()) -> Iterator[OnStep]:
        """Opens the log, truncated to the steps `before`; yields a function that appends a line."""
        with replacing(self.metrics) as draft:
            draft.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in before))
        with self.metrics.open("ab", buffering=0) as file:

            def append(progress: Progress) -> None:
                line = (json.dumps(dataclasses.asdict(progress), allow_nan=False) + "\n").encode()
                try:
                    whole = file.write(line) == len(line)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.metrics)) from error
                if not whole:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics))

            yield append

    def intact(self, state: State) -> bool:
        """Whether the log up to a checkpoint is the one that the checkpoint was made with."""
        return hashlib.sha256(b"".join(self._lines(state))).hexdigest() == state.around.get(self.metrics.name)

    def train(
        self,
        run: Trainable,
        total: int,
        on_step: OnStep = lambda progress: None,
        retries: int = 0,
        watching: Watching | None = None,
    ) -> Training:
        """Takes the steps of a run up to `total`, from the folder's checkpoint if there is one.

        Writes a checkpoint at the start, every minute and at the end. Ctrl-C ends the loop after the present step,
        with a checkpoint; a second Ctrl-C ends it at once. So do the other signals of `interrupts`. Warns where the log
        or config.json are not those of the checkpoint.

        Args:
            retries: how often a run that diverges goes on from its last checkpoint, each time with the next seed; the
                log then counts them as `retry`.
            watching: the observers of the run; time that they pause it for does not count.

        Raises:
            Diverged: at a step with numbers that are not finite. The checkpoint and the run's parameters are finite.
            OSError: where the folder cannot be written; the message says where the run is kept.
            ValueError: for a damaged checkpoint.
        """
        for retry in range(retries):
            try:
                return self._train(run, total, on_step, retry, watching)
            except Diverged as error:
                warnings.warn(f"the run diverged {error}: retry {retry + 1} of {retries} follows", stacklevel=1)
        try:
            return self._train(run, total, on_step, retries, watching)
        except Diverged:
            if first_not_finite(run.module.state_dict().items()):
                load_checkpoint(self.checkpoint, run)
            raise

    def _train(
        self, run: Trainable, total: int, on_step: OnStep, retry: int, watching: Watching | None = None
    ) -> Training:
        now, kept, before = Training(0, 0, 0.0), -1, []
        if has_checkpoint(self.checkpoint):
            state = load_checkpoint(self.checkpoint, run)
            now, kept, before = Training(state.step, state.nfe, state.seconds), state.step, self._verified(state)
        if retry:  # retry r of a run draws from its seed + r
            run.generator.manual_seed(run.generator.initial_seed() + retry)
        retry += before[-1].get("retry", 0) if before else 0
        if watching is not None:
            watching.start(now.steps)
        spent, began, saved = now.seconds, time.monotonic(), time.monotonic()
        consistent, interrupted, last = True, 0, None

        def save() -> None:
            nonlocal kept, saved, consistent
            if kept == now.steps:
                return
            if culprit := first_not_finite(_tensors(run)):  # what no loss has shown: a point out of sight, a moment
                raise Diverged(now.steps - 1, culprit)
            self.check()
            try:
                self._save(run, now)
            except OSError as error:
                consistent = False
                raise OSError(f"{explain(error)}; {self._rescue(run, now, last)}") from error
            kept, saved = now.steps, time.monotonic()

        with self.log(before) as append, interrupts_between_steps() as check_interrupt:

            def after(progress: Progress) -> None:
                nonlocal now, consistent, last, began
                last = replace(progress, seconds=round(spent + time.monotonic() - began, 3), retry=retry)
                now, consistent = Training(last.step + 1, last.nfe, last.seconds), True
                append(last)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()
                on_step(last)
                asked = time.monotonic()
                while watching is not None and watching.after(last):
                    check_interrupt()
                    began, asked = began + time.monotonic() - asked, time.monotonic()
                check_interrupt()  # after the observers: they see every step that the log has
                consistent = now.steps == total

            try:
                save()
                consistent = now.steps == total
                watch = nobody if watching is None else watching.watch
                optimize(run, range(now.steps, total), after, now.nfe, watch)
                save()
                check_interrupt()
            except KeyboardInterrupt as error:
                interrupted = signal_of(error)
                if consistent:
                    save()
            except Exception:  # the log or `on_step` failed
                if consistent:
                    save()
                raise
        return replace(now, interrupted=interrupted)

    def _save(self, run: Trainable, now: Training) -> None:
        """Writes a checkpoint; the lines of its steps are on the disk before it."""
        sync(self.metrics)
        lines = self.metrics.read_bytes().rpartition(b"\n")
        log = b"".join(lines[:2])  # without a line that a full disk cut off
        config = self.path / CONFIG
        around = {self.metrics.name: hashlib.sha256(log).hexdigest()}
        around |= {CONFIG: checksum(config)} if config.is_file() else {}  # a bench writes it at the end of a cell
        save_checkpoint(self.checkpoint, run, now.steps, now.nfe, now.seconds, around, log.count(b"\n"))

    def _rescue(self, run: Trainable, now: Training, last: Progress | None) -> str:
        """Saves a run whose folder cannot be written to elsewhere; says where it is."""
        if not now.steps:
            return "nothing was computed yet"
        if not (self.path / CONFIG).is_file():  # part of a larger job, which knows how to go on
            return "its last checkpoint is kept"
        place = RunFolder(Path(tempfile.mkdtemp(prefix="distill3d-")))
        try:
            for path in self.path.iterdir():
                if path.is_file() and not path.name.startswith((".", self.checkpoint.name)):
                    shutil.copy2(path, place.path / path.name)
            steps = [step for step in self.history() if last is None or step["step"] < last.step]
            with place.log(steps if last is None else [*steps, dataclasses.asdict(last)]):
                place._save(run, now)
        except OSError as error:
            shutil.rmtree(place.path, ignore_errors=True)
            return f"its last checkpoint is of an earlier step ({explain(error)})"
        return f"its {now.steps} steps are kept in {place.path}: type  distill3d resume {place.path}"

    def _lines(self, state: State) -> list[bytes]:
        return self.metrics.read_bytes().splitlines(keepends=True)[: state.lines] if self.metrics.is_file() else []

    def _verified(self, state: State) -> list[dict[str, Any]]:
        """The logged steps up to a checkpoint; warns where log or configuration are not those it was made with."""
        steps = [step for line in self._lines(state) if (step := _parse_step(line)) and step["step"] < state.step]
        if not self.intact(state):
            warnings.warn(
                f"{self.metrics} is damaged: {len(steps)} of its {state.lines} lines up to the checkpoint can be read "
                "and are kept; the run itself is whole and goes on",
                stacklevel=1,
            )
        self.warn_of_changes(state)
        return steps

    def warn_of_changes(self, state: State) -> None:
        """Warns where the configuration is not the one that a checkpoint was made with."""
        config = self.path / CONFIG
        if CONFIG in state.around and checksum(config) != state.around[CONFIG]:
            warnings.warn(f"{config} was changed since the checkpoint; it is used as it is", stacklevel=1)


def _parse_step(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None where it is damaged."""
    try:
        step = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(step, dict) and all(type(value) in (int, float) for value in step.values())
    known = numbers and {"step", "loss", "nfe", "seconds"} <= step.keys() <= Progress.__dataclass_fields__.keys()
    return step if known else None


def _tensors(run: Trainable) -> Iterator[tuple[str, Tensor]]:
    """Everything of a run that a checkpoint holds, by name."""
    for name, value in run.module.state_dict().items():
        yield f"{PARAMETER} {name}", value
    for name, parameter in run.module.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            yield f"the optimizer's {key} of {name}", value
    if run.state is not None:
        for name, value in run.state.state_dict().items():
            yield f"the objective's {name}", value


def slug(text: str) -> str:
    """A text as letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
