"""Runs for a shared address (s3://...): made in a folder of the worker's machine, then published, once.

Checkpoints are published as well, so that another worker can go on with them.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import distill3d
from distill3d.distill.loop import OnStep, Progress
from distill3d.priors.components.text_cache import cache_folder
from distill3d.runs.checkpoint import DamagedCheckpoint, has_checkpoint, read_state
from distill3d.runs.folder import RunFolder
from distill3d.workers.store import Place, Store

R = TypeVar("R")
# make(scratch, on_step): makes the run in the folder work/NAME of scratch, or continues it there. It returns the
# finished folder and its result.
MakeIn = Callable[[Path, OnStep], tuple[Path, R]]


def make_published(store: Store, name: str, target: str, marker: str, make: MakeIn[R], on_step: OnStep) -> R | None:
    """Makes a run in a folder of this machine and publishes it as `target`, with the file `marker` last.

    It continues from the checkpoint that was published last, as work/NAME.zip. New checkpoints are published after the
    step that wrote them, and at an interrupt. Returns None where another worker has published the run already.

    Raises:
        OSError: where another worker has taken over the run.
    """
    if store.read(f"{target}/{marker}") is not None:
        return None
    claim = store.claim(name)
    with tempfile.TemporaryDirectory(prefix="distill3d-") as text:
        scratch = Path(text)
        work = RunFolder(scratch / "work" / name)
        store.load(f"work/{name}", work.path)
        published = _steps(work)

        def publish_checkpoint() -> None:
            nonlocal published
            if _steps(work) > published and claim.holds:
                published = _steps(work)
                store.save(work.path, f"work/{name}")

        def after(progress: Progress) -> None:
            publish_checkpoint()
            on_step(progress)

        try:
            folder, result = make(scratch, after)
        except BaseException:
            publish_checkpoint()
            raise
        if not claim.holds:
            raise OSError(f"another worker has taken over {name}")
        store.publish(folder, target, marker)
    store.remove(f"work/{name}.zip")
    claim.release()
    return result


def _steps(folder: RunFolder) -> int:
    """The finished steps of the checkpoint in a folder, 0 without one."""
    try:
        return read_state(folder.checkpoint).step if has_checkpoint(folder.checkpoint) else 0
    except DamagedCheckpoint:
        return 0


def kept_copy(address: str) -> Path:
    """The folder of this machine that holds a copy of a shared one: in the cache folder (DISTILL3D_CACHE)."""
    return cache_folder().parent / "shared" / hashlib.sha256(address.encode()).hexdigest()[:16]


def check_worker(version: str, place: Place, name: str = "") -> None:
    """Checks in a worker that it can work for the process in charge.

    Raises:
        ValueError: where its distill3d is another version, or where it does not see the file `name` in a local folder.
    """
    if version != distill3d.__version__:
        raise ValueError(
            f"{platform.node()} has distill3d {distill3d.__version__}, the command was started by {version}: install "
            "the same version on all machines"
        )
    if isinstance(place, Path) and not (place / name).exists():
        raise ValueError(
            f"{platform.node()} does not see {place / name}: --out must be a folder that all machines mount, or an "
            "address such as s3://bucket/folder"
        )
