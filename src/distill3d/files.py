"""Files that appear whole or not at all, what is written to them, and folders that one process writes at a time."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial-"  # folders of unfinished files: .partial-<machine>-<process>-<random>
DAY = 86_400.0  # seconds
_open: set[Path] = set()  # those of this process


def explain(error: OSError) -> str:
    """One line about what could not be read or written, and why."""
    if error.strerror is None:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def nan_as_null(value: object) -> object:
    """A value with None for every float that is not finite: JSON has no name for them."""
    if isinstance(value, dict):
        return {key: nan_as_null(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [nan_as_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk and survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot for folders
            raise
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`, with its suffix, and renames it to `path` on success.

    A reader sees the old file or the new one, never a part, also after a power cut; after an error nothing is left
    behind, and what killed processes left beside it is removed. Missing parent folders are made.

    Raises:
        OSError: "cannot write PATH: ..." where that fails.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(path.parent)
        with tempfile.TemporaryDirectory(prefix=f"{PARTIAL}{platform.node()}-{os.getpid()}-", dir=path.parent) as name:
            folder = Path(name)
            _open.add(folder)
            try:
                yield folder / path.name
                sync(folder / path.name)
                (folder / path.name).replace(path)
            finally:
                _open.discard(folder)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or explain(error)}") from error


def remove_partial(folder: Path) -> None:
    """Removes the unfinished files in a folder whose process has ended; those of another machine after a day."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError, ValueError):  # it has just ended; or it has another name
            machine, process, _ = path.name.removeprefix(PARTIAL).rsplit("-", 2)
            ended = (
                not is_running(int(process)) if machine == platform.node() else time.time() - path.stat().st_mtime > DAY
            )
            if ended and path not in _open:
                shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether another process of this number is running. Our own number is that of an earlier one, in a container."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextmanager
def locked(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Keeps other processes off a folder, made if needed; the lock is released when the process ends.

    Raises:
        ValueError: where another process holds it, and does so after `wait` seconds.
        OSError: where the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=wait)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is at work in {folder}: wait until it has ended, or choose another folder"
        ) from None
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or explain(error)}") from error
    try:
        yield
    finally:
        lock.release()
