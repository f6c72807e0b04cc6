"""What several commands share: the types of common flags, and the progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

Device = Literal["cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def precision(dtype: Dtype, device: Device) -> str:
    """The name of the precision that a flag means; auto is what is fast on the device."""
    if dtype != "auto":
        return dtype
    from distill3d.priors.speed import fast_dtype

    return str(fast_dtype(device)).removeprefix("torch.")


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
