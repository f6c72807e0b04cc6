"""Text embeddings, each computed once: kept in memory, and on disk for models with large text encoders.

Text encoders can be larger than the network they serve. They are loaded when a text has to be encoded, not before, and
can be freed when all texts of a run are known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distill3d.files import replacing
from distill3d.priors.components.folder import check_finite
from distill3d.priors.components.text_encoders import TextEncoders
from distill3d.types import Condition


@dataclass(frozen=True)
class DiskCache:
    """A folder of embeddings. `identity` identifies the encoders: another model does not read these embeddings."""

    folder: Path
    identity: str

    def path(self, text: str) -> Path:
        """The file of a text's embedding."""
        key = hashlib.sha256(f"{self.identity}\n{text}".encode())
        return self.folder / f"{key.hexdigest()}.safetensors"

    def read(self, text: str) -> Condition | None:
        """The embedding of a text; None if there is none, or the file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.path(text))
            check_finite(tensors.items(), self.path(text))
            return Condition(tensors["hidden"], tensors.get("pooled"))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write(self, text: str, embedding: Condition) -> None:
        """Saves an embedding of one row; does nothing if the disk cannot be written to."""
        from safetensors.torch import save_file

        tensors = {"hidden": embedding.hidden.cpu().contiguous()}
        if embedding.pooled is not None:
            tensors["pooled"] = embedding.pooled.cpu().contiguous()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(text)) as draft:
                save_file(tensors, draft)
        except OSError:
            return


def cache_folder() -> Path:
    """DISTILL3D_CACHE, or distill3d/embeddings in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("DISTILL3D_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill3d") / "embeddings"


class TextCache:
    """The text embeddings of a prior, on its device, and float32 if the encoders have a lower precision."""

    def __init__(self, load: Callable[[], TextEncoders], device: str | torch.device, disk: DiskCache | None = None):
        """`load` is called when a text has to be encoded, and again after `free_encoders`."""
        self._load, self.device, self.disk = load, torch.device(device), disk
        self._encoders: TextEncoders | None = None
        self._known: dict[str, Condition] = {}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Condition:
        """One row per text; ValueError if the encoders cannot be loaded, or if their numbers are not finite."""
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = self._find(text)
        return Condition.cat([self._known[text] for text in texts])

    def encoders(self) -> TextEncoders:
        """The text encoders; loads them if necessary."""
        if self._encoders is None:
            self._encoders = self._load()
        return self._encoders

    def free_encoders(self) -> None:
        """Frees the memory of the encoders. Known texts stay known; a new one loads the encoders again."""
        self._encoders = None

    def modules(self) -> Mapping[str, nn.Module]:
        """The encoders by name; empty if they are not loaded."""
        return {} if self._encoders is None else self._encoders.modules

    def _find(self, text: str) -> Condition:
        found = None if self.disk is None else self.disk.read(text)
        if found is None:
            found = _each(self.encoders().encode(text), _at_least_float32)
            if not all(bool(x.isfinite().all()) for x in (found.hidden, found.pooled) if x is not None):
                raise ValueError(
                    f"the text encoder gives numbers that are not finite for {text!r}: try --dtype float32"
                )
            if self.disk is not None:
                self.disk.write(text, found)
        return _each(found, lambda x: x.to(self.device))


def _each(condition: Condition, change: Callable[[Tensor], Tensor]) -> Condition:
    return Condition(change(condition.hidden), None if condition.pooled is None else change(condition.pooled))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
