"""Images of any kind as sRGB bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import numpy as np
from jaxtyping import UInt8

from distill3d.untrusted import MOST_PIXELS, read_image_file

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "TIFF", "GIF")  # of the images beside a mesh


def read_image(
    file: str | os.PathLike[str] | IO[bytes], formats: tuple[str, ...] = FORMATS, most: int = MOST_PIXELS
) -> UInt8[np.ndarray, "h w c"]:
    """A image as [H, W, 3] sRGB, or [H, W, 4] if it has an alpha channel or a transparent color.

    Gray values and 16 or 32 bits are brought to 8 bits; values in float are taken as [0, 1].

    Raises:
        ValueError: if it cannot be decoded, is of another format, or has more than `most` pixels.
    """
    image = read_image_file(file, formats, most)
    if image.mode.startswith("I") or image.mode == "F":
        value = np.asarray(image).astype(np.float64)
        value = value * 255 if image.mode == "F" else value / 257
        return np.repeat(value.round().clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    transparent = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
    return np.array(image.convert("RGBA" if transparent else "RGB"))


def find_file(folder: Path, name: str) -> Path | None:
    """The file that a line of a model names, relative to the model's folder; None if there is none.

    Names may be quoted, percent-encoded, have backslashes or other upper and lower case, or begin with the folders of
    the machine that they come from, of which the last part is then looked for.
    """
    plain = name.strip().strip("\"'")
    for text in dict.fromkeys((plain, plain.replace("\\", "/"), unquote(plain).replace("\\", "/"))):
        if text and (path := folder / text).is_file():
            return path
    wanted = folder / unquote(plain).replace("\\", "/")
    for parent in (wanted.parent, folder):
        if parent.is_dir():
            for path in sorted(parent.iterdir()):
                if path.name.lower() == wanted.name.lower() and path.is_file():
                    return path
    return None
