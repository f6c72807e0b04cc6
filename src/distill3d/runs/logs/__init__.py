"""Logs that other programs show: the numbers of each step and the images of some, for TensorBoard and Weights & Biases.

They lie in the run's folder beside metrics.jsonl. Each program has one file here, which imports it when a run begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from distill3d.distill.loop import Progress
from distill3d.distill.observer import Observer, StepViews
from distill3d.export.video import contact_sheet

if TYPE_CHECKING:
    from PIL import Image

    from distill3d.distill.loop import ObjectRun

LOGS = ("tensorboard", "wandb")  # the packages, and the files here
TIMES = 20  # how often a run logs images by default


class Writer(Protocol):
    """What a program's file here opens."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers of a step."""
        ...

    def images(self, step: int, values: Mapping[str, Image.Image]) -> None:
        """Logs the images of a step."""
        ...

    def close(self) -> None:
        """Brings everything to the disk."""
        ...


class StepLog(Observer):
    """Writes the log of a run for one program. See `open_logs`."""

    def __init__(self, name: str, every: int):
        """`name` is one of `LOGS`; images are logged every `every` steps."""
        self.name, self.every = name, every
        self._writer: Writer | None = None
        self._folder, self._step = Path(), 0

    def begin(self, folder: Path, step: int) -> None:
        """Opens the log of a run in its folder; `step` is the first one, above 0 for a run that goes on."""
        self.close()
        module = import_module(f"{__name__}.{self.name}")
        self._writer, self._folder, self._step = module.open_writer(folder, step), folder, step

    def start(self, run: ObjectRun, folder: Path, step: int) -> None:
        """See `Observer`."""
        self.begin(folder, step)

    def wants(self, step: int) -> bool:
        """See `Observer`."""
        return step % self.every == 0

    def see(self, step: int, views: StepViews) -> None:
        """See `Observer`: the training views, what they are pulled to, the denoised estimates, and each regularizer."""
        images = {"views": views.images, "targets": views.target_images()}
        if views.x0_images is not None:
            images["x0"] = views.x0_images()
        self.show(step, images)
        assert self._writer is not None
        self._writer.scalars(step, {f"penalties/{name}": float(term) for name, term in views.penalties.items()})

    def show(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Logs images [B, 3, H, W] in [0, 1] by name, the B of one name side by side."""
        assert self._writer is not None
        self._writer.images(step, {name: contact_sheet(value, len(value)) for name, value in images.items()})

    def after(self, progress: Progress) -> None:
        """See `Observer`."""
        assert self._writer is not None
        self._step = progress.step
        self._writer.scalars(progress.step, {n: float(v) for n, v in asdict(progress).items() if n != "step"})

    def end(self) -> None:
        """See `Observer`: logs the preview of the finished object, too."""
        from PIL import Image

        preview = self._folder / "preview.png"
        if self._writer is not None and preview.is_file():
            with Image.open(preview) as image:
                self._writer.images(self._step, {"preview": image.convert("RGB")})
        self.close()

    def close(self) -> None:
        """Brings everything to the disk."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


@contextmanager
def logging(logs: Sequence[StepLog], folder: Path) -> Iterator[None]:
    """Opens the logs of a run without observers in its folder, and closes them."""
    try:
        for log in logs:
            log.begin(folder, 0)
        yield
    finally:
        for log in logs:
            log.close()


def open_logs(names: Sequence[str], steps: int, every: int | None = None) -> tuple[StepLog, ...]:
    """The logs of a run, to pass as its observers.

    Args:
        names: of `LOGS`; each counts once.
        steps: of the run.
        every: steps between images; default: so that there are about `TIMES` in the run.

    Raises:
        ValueError: for another name, or `every` below 1.
        ImportError: for a package that is missing, with what to type.
    """
    every = max(steps // TIMES, 1) if every is None else every
    if every < 1:
        raise ValueError(f"images are logged every 1 or more steps, got {every}")
    for name in names:
        if name not in LOGS:
            raise ValueError(f"unknown log {name!r}; allowed: {', '.join(LOGS)}")
        if find_spec(name) is None:
            raise ImportError(f'--log {name} needs {name}: type  pip install "distill3d[log]"')
    return tuple(StepLog(name, every) for name in dict.fromkeys(names))
