"""The cells of a bench on workers: in this process, in others, or on a cluster, over a folder or a shared address.

In a folder that all workers see, a cell is made where it belongs. For an address (s3://...) a worker makes it in a
folder of its own machine, with its checkpoints published as they are written, and publishes it when it is whole. The
process in charge keeps a copy of the shared folder and makes tables and report from that.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import distill3d
from distill3d.bench.cells import Outcome, make_cell, read_outcome, reopen_cell
from distill3d.bench.protocol import Protocol, Task, check_folder, open_folder
from distill3d.distill.loop import OnStep
from distill3d.files import locked
from distill3d.priors.loading import load_prior
from distill3d.runs.shared_work import check_worker, kept_copy, make_published
from distill3d.types import Prior
from distill3d.workers.executor import WAIT_SECONDS, Executor, Here, Make, OnProgress, Tell
from distill3d.workers.store import Place, Store

MARKER = "cell.json"  # the file of a cell that is written last


@dataclass(frozen=True)
class CellSetup:
    """Makes cells in a worker. It loads the prior once, unless it has it."""

    out: Place
    protocol: Protocol
    prior: Prior | None = None  # of this process; it does not travel
    version: str = distill3d.__version__

    def __call__(self) -> Make[Task, None]:
        """See `workers.executor.Setup`.

        Raises:
            ValueError: where this machine has another version, or does not see the folder.
        """
        check_worker(self.version, self.out, "bench.json")
        place = self.protocol
        prior = self.prior or load_prior(place.prior, place.device, place.dtype, place.prior_options)
        return lambda task, tell: self.make(task, prior, tell)

    def make(self, task: Task, prior: Prior, tell: Tell) -> None:
        """Makes a cell unless it is there. Waits for the worker of a killed process to leave it."""
        name, protocol = task.folder, self.protocol
        if isinstance(self.out, Path):
            with locked(self.out / "work" / ".locks" / name, wait=WAIT_SECONDS):
                if read_outcome(self.out / "cells" / name) is None:
                    make_cell(self.out, protocol, task, prior, tell)
            return

        def make(scratch: Path, on_step: OnStep) -> tuple[Path, Outcome]:
            outcome = make_cell(scratch, protocol, task, prior, on_step)
            return scratch / "cells" / name, outcome

        make_published(Store(self.out), name, f"cells/{name}", MARKER, make, tell)


class Sweep:
    """The folder of a bench, open: which cells are there, and making those that are not."""

    def __init__(self, out: Place, protocol: Protocol):
        """`folder` holds the bench, or for a shared address the copy of it; see `opened`."""
        self.out, self.protocol = out, protocol
        self.store = None if isinstance(out, Path) else Store(out)
        self.folder = out if isinstance(out, Path) else kept_copy(out)

    def read(self, task: Task) -> Outcome | None:
        """The outcome of a task; None if it has to be made."""
        return read_outcome(self.folder / "cells" / task.folder)

    def make(
        self, tasks: Sequence[Task], prior: Prior, executor: Executor, on_progress: OnProgress
    ) -> Iterator[tuple[Task, Outcome]]:
        """Makes cells on an executor's workers; yields them as they are finished."""
        setup = CellSetup(self.out, self.protocol, prior if isinstance(executor, Here) else None)
        with contextlib.closing(executor.run(setup, tasks, on_progress)) as finished:
            for done in finished:
                task = tasks[done.index]
                if self.store is not None:
                    self.store.fetch(f"cells/{task.folder}", self.folder / "cells" / task.folder)
                outcome = self.read(task)
                assert outcome is not None, task.folder
                yield task, outcome

    def reopen(self, task: Task) -> None:
        """Makes a finished cell one in progress again, at its checkpoint."""
        reopen_cell(self.folder, task)
        if self.store is not None:
            self.store.save(self.folder / "work" / task.folder, f"work/{task.folder}")
            self.store.remove(f"cells/{task.folder}/{MARKER}")
            self.store.remove(f"cells/{task.folder}")

    def clean(self) -> None:
        """Removes what is left of work in progress, after the last cell."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        if self.store is not None:
            self.store.remove("work")

    def upload(self) -> None:
        """Writes tables, report and scores to the shared address, if there is one."""
        if self.store is not None:
            upload(self.store.address, self.folder)
            for path in self.folder.glob("cells/*/scores.json"):
                self.store.write(path.relative_to(self.folder).as_posix(), path.read_bytes())


@contextlib.contextmanager
def opened(out: Place, protocol: Protocol) -> Iterator[Sweep]:
    """Makes a place the folder of this bench, or checks that it is, and keeps other processes off it.

    Raises:
        ValueError: as `open_folder`, and where another process is at work there.
    """
    sweep = Sweep(out, protocol)
    with contextlib.ExitStack() as stack:
        if sweep.store is not None:
            sweep.store.check()
            stack.enter_context(sweep.store.leased())
            _pull(sweep.store, sweep.folder)
        check_folder(sweep.folder)  # before there is a lock file in it
        stack.enter_context(locked(sweep.folder))
        open_folder(sweep.folder, protocol)
        (sweep.folder / "cells").mkdir(exist_ok=True)
        if sweep.store is not None:
            sweep.store.write("bench.json", (sweep.folder / "bench.json").read_bytes())
        yield sweep


def upload(address: str, folder: Path) -> None:
    """Writes the files of a folder, without its subfolders, to a shared address."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            Store(address).write(path.name, path.read_bytes())


def _pull(store: Store, folder: Path) -> None:
    """Brings the copy of a shared bench up to date. What is not there any more goes, here as well."""
    begun = store.read("bench.json")
    if begun is None:
        if store.names("cells") or set(store.names()) - {"driver.json", "work"}:
            raise ValueError(f"{store.address} is not empty and is not a bench folder: choose another place with --out")
        shutil.rmtree(folder, ignore_errors=True)
        return
    cells = folder / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_bytes(begun)
    there = store.read_all([f"cells/{name}/{MARKER}" for name in store.names("cells")])
    kept = {f"cells/{path.name}/{MARKER}": path for path in cells.iterdir()}
    for marker, path in kept.items():
        if marker not in there or not _same(path / MARKER, there[marker]):
            shutil.rmtree(path)
    for marker in there:
        name = marker.split("/")[1]
        if not (cells / name / MARKER).is_file():
            store.fetch(f"cells/{name}", cells / name)
        try:
            read_outcome(cells / name)
        except ValueError as error:  # two workers wrote to it, or an upload was cut off: neither can be used
            warnings.warn(f"{error}; it is removed from {store.address} and made again", stacklevel=1)
            store.remove(f"cells/{name}")
            shutil.rmtree(cells / name)


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
