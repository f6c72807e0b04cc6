"""What several commands share: common flags, and the progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distill3d.priors.options import PriorOptions
from distill3d.prompts import DIRECTIONS

Device = Literal["cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class Machine:
    """Where and how to compute."""

    device: Device = "cpu"
    """Where to compute."""
    dtype: Dtype = "auto"
    """Precision of the prior's network; auto is bfloat16 where the device computes it in hardware, else float32."""

    @property
    def precision(self) -> str:
        """The name of the precision that `dtype` means on this device."""
        return precision(self.dtype, self.device)


@dataclass(kw_only=True)
class Run(Machine):
    """What every command takes that makes something of a sentence in a run folder."""

    seed: int = 0
    """Seed of all randomness: same seed, same machine, same result."""
    out: Path = Path("runs")
    """Folder in which the run's folder is made."""
    negative: str = ""
    """What must not come out (the unconditional text)."""
    force: bool = False
    """Run even if the bundled prior knows nothing named in the prompt."""
    prior_options: Annotated[PriorOptions, tyro.conf.arg(name="")] = field(default_factory=PriorOptions)


@dataclass(kw_only=True)
class ViewTexts:
    """Texts for the sides of an object, in place of the prompt with its view word."""

    front: str | None = None
    """A text of its own for views from the front; default: the prompt and "front view". So for the other three."""
    side: str | None = None
    """A text of its own for views from the side."""
    back: str | None = None
    """A text of its own for views from behind."""
    overhead: str | None = None
    """A text of its own for views from above."""

    @property
    def views(self) -> dict[str, str]:
        """Those that are given, by direction."""
        return {name: text for name in DIRECTIONS if (text := getattr(self, name))}


def precision(dtype: Dtype, device: Device) -> str:
    """The name of the precision that a flag means; auto is what is fast on the device."""
    from distill3d.priors.base import resolve_dtype

    return str(resolve_dtype(dtype, device)).removeprefix("torch.")


@contextlib.contextmanager
def progress_bar(
    total: int, name: str = "distilling", status: Callable[[Any], str] = lambda progress: ""
) -> Iterator[Callable[[Any], None]]:
    """A progress bar: step, time left and a short status. Yields the function to call after each step."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[status]}"),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("", total=total, status="")

    def on_step(progress: Any) -> None:
        bar.start()  # only now: what is refused before the first step is refused in one line
        told = f"t {progress.t:.2f}  loss {progress.loss:.3f}  {status(progress)}"
        bar.update(task, completed=progress.step + 1, status=told)

    try:
        yield on_step
    finally:
        if bar.live.is_started:  # stopping ends a line even where none was begun
            bar.stop()
