"""Files and texts of unknown origin: read within limits, and shown without being obeyed."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# What a terminal obeys instead of showing it: control characters and changes of direction. And half characters, which
# stand for bytes that are not UTF-8 in what the system passes on.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MOST_TEXT = 2**24  # bytes of a text file
MOST_PIXELS = 2**26  # of an image: 8192 x 8192
MOST_ARRAYS = 2**31  # bytes of the arrays in an .npz file
FORMULA = ("=", "+", "-", "@", "\t")


def printable(text: str) -> str:
    """A text for terminals and reports: what `CONTROL` finds becomes an escape such as \\x1b."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_text(path: str | os.PathLike[str], most: int = MOST_TEXT) -> str:
    """The UTF-8 text of a file of at most `most` bytes; ValueError for another one, OSError if it cannot be read."""
    with Path(path).open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    return data.decode("utf-8-sig")


def read_image_file(
    file: str | os.PathLike[str] | IO[bytes],
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP"),
    most: int = MOST_PIXELS,
) -> Image.Image:
    """A decoded image. Its declared size is checked first, since a small file can hold any number of pixels.

    Raises:
        ValueError: for another format, more than `most` pixels, and a damaged or missing file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > most:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {most:,}")
            image.load()
            return image
    except UnidentifiedImageError as error:
        raise ValueError(f"it is of no kind that can be decoded ({', '.join(formats)})") from error
    except ValueError:
        raise
    except Exception as error:  # decoders raise all kinds for damaged files
        if isinstance(error, MemoryError):
            raise
        raise ValueError(f"it cannot be decoded ({error})") from error


def read_npz(path: str | os.PathLike[str], most: int = MOST_ARRAYS) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. Their declared sizes are compared with the file before memory is taken.

    Raises:
        ValueError: for more than `most` bytes, and a damaged or missing file.
    """
    import numpy as np
    from numpy.lib import format as npy

    try:
        with zipfile.ZipFile(path) as archive:
            content = archive.infolist()
            if (total := sum(entry.file_size for entry in content)) > most:
                raise ValueError(f"it holds {total:,} bytes, more than {most:,}")
            for entry in content:
                with archive.open(entry) as file:
                    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = read(file)
                    if dtype.hasobject or math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
                        raise ValueError(f"{entry.filename} is not what its header says")
        with np.load(path) as found:
            return dict(found)
    except Exception as error:  # zip, zlib and numpy raise all kinds for damaged files
        if isinstance(error, MemoryError):
            raise
        raise ValueError(f"{path} cannot be read: {error}".splitlines()[0]) from error


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV. A text that a spreadsheet would take for a formula gets an apostrophe, others are `printable`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_csv_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _csv_cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value)
    try:
        float(text)  # a negative number is none
    except ValueError:
        return f"'{text}" if text.startswith(FORMULA) else text
    return text
