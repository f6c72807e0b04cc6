"""A run's folder: its name, config.json, metrics.jsonl, checkpoints and artifacts, and the training loop over them."""

from __future__ import annotations

import dataclasses
import errno
import json
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

import distill3d
from distill3d.distill.divergence import PARAMETER, Diverged, first_not_finite
from distill3d.distill.loop import OnStep, Progress, Run, optimize
from distill3d.files import explain, replacing
from distill3d.runs.checkpoint import (
    Checkpointed,
    has_checkpoint,
    interrupts_between_steps,
    load_checkpoint,
    save_checkpoint,
)
from distill3d.runs.config import FORMAT, from_plain, to_plain

CHECKPOINT_SECONDS = 60.0
T = TypeVar("T")


class Trainable(Run, Checkpointed, Protocol):
    """A run that can be trained in a folder."""


@dataclass(frozen=True)
class Training:
    """How a training ended."""

    steps: int  # finished, all in all
    nfe: int
    seconds: float
    interrupted: bool = False


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
        except OSError as error:
            raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
        return RunFolder(path)

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
        with replacing(self.path / "config.json") as draft:
            draft.write_text(json.dumps(content, indent=2, allow_nan=False))

    def read_config(self, kind: str, config: type[T]) -> T:
        """The configuration of a run of this kind ("object", "image" or "comparison").

        Raises:
            ValueError: where the folder is no run, a run of another kind or of another format, or damaged.
        """
        path = self.path / "config.json"
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

    def _rescue(self, run: Trainable, done: int) -> str:
        """Saves a run whose folder cannot be written to elsewhere; says where it is."""
        if not done:
            return "nothing was computed yet"
        place = RunFolder(Path(tempfile.mkdtemp(prefix="distill3d-")))
        try:
            save_checkpoint(place.checkpoint, run, done)
            for path in self.path.iterdir():
                if path.is_file() and not path.name.startswith(self.checkpoint.name):
                    shutil.copy2(path, place.path / path.name)
        except OSError as error:
            shutil.rmtree(place.path, ignore_errors=True)
            return f"its last checkpoint is of an earlier step ({explain(error)})"
        return f"its {done} steps are kept in {place.path}: type  distill3d resume {place.path}"

    def check(self) -> None:
        """Raises OSError where the folder is no longer there: nobody would find what is written to it."""
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run folder was removed", str(self.path))

    def history(self) -> list[dict[str, Any]]:
        """The logged steps as dicts of `Progress`, up to the first line that was cut off."""
        steps: list[dict[str, Any]] = []
        for line in self.metrics.read_text().splitlines() if self.metrics.is_file() else []:
            try:
                steps.append(json.loads(line))
            except ValueError:
                break
        return steps

    @contextmanager
    def log(self, before: list[dict[str, Any]] | None = None) -> Iterator[OnStep]:
        """Opens the log, truncated to the steps `before`; yields a function that appends a line."""
        with replacing(self.metrics) as draft:
            draft.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in before or []))
        with self.metrics.open("a") as file:

            def append(progress: Progress) -> None:
                file.write(json.dumps(dataclasses.asdict(progress), allow_nan=False) + "\n")
                file.flush()

            yield append

    def train(self, run: Trainable, total: int, on_step: OnStep = lambda progress: None, retries: int = 0) -> Training:
        """Takes the steps of a run up to `total`, from the folder's checkpoint if there is one.

        Writes a checkpoint at the start, every minute and at the end. Ctrl-C ends the loop after the present step,
        with a checkpoint; a second Ctrl-C ends it at once.

        Args:
            retries: how often a run that diverges goes on from its last checkpoint, each time with the next seed; the
                log then counts them as `retry`.

        Raises:
            Diverged: at a step with numbers that are not finite. The checkpoint and the run's parameters are finite.
            ValueError: for a damaged checkpoint.
        """
        for retry in range(retries):
            try:
                return self._train(run, total, on_step, retry)
            except Diverged as error:
                warnings.warn(f"the run diverged {error}: retry {retry + 1} of {retries} follows", stacklevel=1)
        try:
            return self._train(run, total, on_step, retries)
        except Diverged:
            if first_not_finite(run.module.state_dict().items()):
                load_checkpoint(self.checkpoint, run)
            raise

    def _train(self, run: Trainable, total: int, on_step: OnStep, retry: int) -> Training:
        done, before, begun = 0, [], has_checkpoint(self.checkpoint)
        if begun:
            done = load_checkpoint(self.checkpoint, run)
            before = self.history()[:done]  # steps that were logged after the checkpoint are taken again
        nfe, spent = (before[-1]["nfe"], before[-1]["seconds"]) if before else (0, 0.0)
        earlier = before[-1].get("retry", 0) if before else 0
        if retry:  # retry r of a run draws from its seed + r
            run.generator.manual_seed(run.generator.initial_seed() + retry)
        retry += earlier
        began = saved = time.monotonic()
        consistent, interrupted, last = True, False, None

        def save() -> None:
            nonlocal saved
            if culprit := first_not_finite(_tensors(run)):  # what no loss has shown: a point out of sight, a moment
                raise Diverged(done - 1, culprit)
            self.check()
            try:
                save_checkpoint(self.checkpoint, run, done)
            except OSError as error:
                raise OSError(f"{explain(error)}; {self._rescue(run, done)}") from error
            saved = time.monotonic()

        if not begun:
            save()
        with self.log(before) as append, interrupts_between_steps() as check_interrupt:

            def after(progress: Progress) -> None:
                nonlocal done, consistent, last
                last = replace(progress, seconds=round(spent + time.monotonic() - began, 3), retry=retry)
                done, consistent = progress.step + 1, True
                append(last)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()
                on_step(last)
                check_interrupt()
                consistent = done == total

            try:
                consistent = done == total
                optimize(run, range(done, total), after, nfe)
            except KeyboardInterrupt:
                interrupted = True
        if consistent:
            save()
        nfe, seconds = (last.nfe, last.seconds) if last else (nfe, spent)
        return Training(done, nfe, seconds, interrupted)


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
