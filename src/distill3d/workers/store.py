"""Storage that all machines share, by the paths of fsspec: s3://bucket/folder, gs://..., memory://...

A folder is published file by file, and a marker last: a reader that sees the marker sees all. Work in progress is one
object, which object stores replace as a whole. Whoever starts to work on a folder claims it; of two, the later one owns
it, and the other one finds so before it publishes.
"""

from __future__ import annotations

import io
import json
import os
import platform
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from distill3d.files import PARTIAL, is_running

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
LEASE_SECONDS = 120.0  # after which a driver that has not renewed its lease counts as dead
RENEW_SECONDS = 20.0
Place = Path | str  # a folder of this machine, or the address of a shared one


def is_shared(place: Place) -> bool:
    """Whether a place is an address rather than a folder of this machine."""
    return isinstance(place, str)


def place_of(text: str) -> Place:
    """What a command line names: an address as it is (without a slash at its end), anything else as a path."""
    if "://" not in text:
        return Path(text)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else text.rstrip("/")


@dataclass(frozen=True)
class Store:
    """A shared folder. Names in it are relative, with slashes."""

    address: str

    @property
    def files(self) -> AbstractFileSystem:
        """The file system of the address; each process has its own.

        Raises:
            ValueError: for an unknown kind of address, with the kinds that are allowed.
            ImportError: where a package is missing; says what to type.
        """
        import fsspec

        kind = self.address.split("://")[0]
        package = PACKAGES.get(kind)
        if package and find_spec(package) is None:
            raise ImportError(f"{kind}:// needs the package {package}: type  pip install {package}")
        try:
            return fsspec.url_to_fs(self.address, use_listings_cache=False)[0]
        except (ValueError, ImportError) as error:
            raise ValueError(f"{self.address} cannot be used: {error}; allowed: a folder, s3://, gs://") from error

    def _at(self, name: str) -> str:
        return f"{self.files._strip_protocol(self.address)}/{name}".rstrip("/")

    def check(self) -> None:
        """Raises OSError where nothing can be written."""
        name = f".write-test-{secrets.token_hex(4)}"
        try:
            self.write(name, b"")
            self.remove(name)
        except Exception as error:  # each file system has errors of its own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"cannot write to {self.address}: {reason}; choose another place with --out") from error

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder, without what is below; empty where there is none."""
        try:
            found = self.files.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted({PurePosixPath(path).name for path in found} - {PurePosixPath(self._at(folder)).name})

    def read(self, name: str) -> bytes | None:
        """A file; None where there is none."""
        try:
            return bytes(self.files.cat_file(self._at(name)))  # type: ignore[arg-type]
        except FileNotFoundError:
            return None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """The files that exist of these, by name; many at once where the file system can."""
        paths = {self._at(name): name for name in names}
        found: Any = self.files.cat(list(paths), on_error="omit") if paths else {}
        return {paths[path]: content for path, content in found.items()}

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole."""
        path = self._at(name)
        if self.address.split("://")[0] not in PACKAGES:  # object stores have no folders, and would make a bucket
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(path, content)

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if there is one."""
        try:
            self.files.rm(self._at(name), recursive=True)
        except FileNotFoundError:
            return

    def publish(self, folder: Path, name: str, marker: str) -> None:
        """Writes a local folder to `name`, the file `marker` last."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        for path in sorted(files, key=lambda path: path == folder / marker):
            self.write(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def fetch(self, name: str, folder: Path) -> None:
        """Writes a published folder to a local one, which appears whole and replaces what was there."""
        start, parts = (
            self._at(name),
            folder.with_name(f"{PARTIAL}{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"),
        )
        try:
            for path in self.files.find(start):
                target = parts / path.removeprefix(start).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.files.cat_file(path))
            shutil.rmtree(folder, ignore_errors=True)
            parts.rename(folder)
        finally:
            shutil.rmtree(parts, ignore_errors=True)

    def save(self, folder: Path, name: str) -> None:
        """Writes a local folder as one object, NAME.zip."""
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."):
                archive.write(path, path.relative_to(folder).as_posix())
        self.write(f"{name}.zip", data.getvalue())

    def load(self, name: str, folder: Path) -> bool:
        """Unpacks NAME.zip, as `save` wrote it, to a local folder; whether there is one."""
        content = self.read(f"{name}.zip")
        if content is None:
            return False
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(folder)  # it removes ".." and leading slashes from names
        return True

    def claim(self, name: str) -> Claim:
        """Becomes the owner of a name."""
        claim = Claim(self, f"work/{name}.owner", secrets.token_hex(8))
        self.write(claim.name, claim.token.encode())
        return claim

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Keeps other drivers off the folder, as long as this process lives and a little longer.

        Raises:
            ValueError: where another driver is at work.
        """
        name, mine = "driver.json", {"machine": platform.node(), "process": os.getpid(), "token": secrets.token_hex(8)}
        other = _lease(self.read(name))
        if other and time.time() - other["time"] < LEASE_SECONDS and not _ended(other):
            raise ValueError(
                f"another process ({other['process']} on {other['machine']}) is at work in {self.address}: wait until "
                f"it has ended; if it is dead, wait {LEASE_SECONDS:.0f} seconds"
            )

        def renew() -> None:
            self.write(name, json.dumps({**mine, "time": time.time()}, allow_nan=False).encode())

        renew()
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(RENEW_SECONDS):
                with suppress(Exception):  # the next time may work
                    renew()

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.remove(name)


@dataclass(frozen=True)
class Claim:
    """The right to publish a folder, until another worker claims it."""

    store: Store
    name: str
    token: str

    @property
    def holds(self) -> bool:
        """Whether nobody else has claimed it since."""
        return self.store.read(self.name) == self.token.encode()

    def release(self) -> None:
        """Removes what says that somebody is at work."""
        self.store.remove(self.name)


def _lease(content: bytes | None) -> dict[str, Any] | None:
    try:
        found = json.loads(content or b"")
        return {name: found[name] for name in ("machine", "process", "time")}
    except (ValueError, KeyError, TypeError):
        return None


def _ended(lease: Mapping[str, Any]) -> bool:
    """Whether a driver of this machine has ended."""
    return lease["machine"] == platform.node() and not is_running(int(lease["process"]))
