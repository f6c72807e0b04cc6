"""Files that appear whole or not at all, and what is written to them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`, with its suffix, and renames it to `path` on success.

    A reader sees the old file or the new one, never a part; after an error nothing is left behind. Missing
    parent folders are made.

    Raises:
        OSError: "cannot write PATH: ..." where that fails.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            yield draft
            draft.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or explain(error)}") from error
