"""Texts to embeddings, each encoded once: remembered in memory, and on disk for models with large encoders.

Text encoders outweigh some of the networks they serve. They are loaded when a text has to be encoded, not before,
and can be dropped when all texts of a run are known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from distill3d.files import replacing
from distill3d.types import Condition


class Encoder(Protocol):
    """The text encoders of one family, loaded."""

    def encode(self, text: str) -> Condition: ...
    def modules(self) -> dict[str, nn.Module]: ...


@dataclass(frozen=True)
class DiskCache:
    """A folder of embeddings. `identity` names encoders and revision: another model finds nothing of this one's."""

    folder: Path
    identity: str

    def path(self, text: str) -> Path:
        """The file of a text's embedding."""
        key = hashlib.sha256(f"{self.identity}\n{text}".encode())
        return self.folder / f"{key.hexdigest()}.safetensors"

    def read(self, text: str) -> Condition | None:
        """What was written for a text; None if nothing was, or the file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.path(text))
            return Condition(tensors["hidden"], tensors.get("pooled"))
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, text: str, embedding: Condition) -> None:
        """Keeps an embedding of one row; a disk that cannot be written to is no mistake, only slower next time."""
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


class Texts:
    """What a prior knows of texts: embeddings on its device, float32 where the encoders have a low precision."""

    def __init__(self, load: Callable[[], Any], device: str | torch.device, disk: DiskCache | None = None):
        """load gives the `Encoder`, and is called again if it was dropped and a new text comes."""
        self._load, self.device, self._disk = load, torch.device(device), disk
        self._encoder: Encoder | None = None
        self._known: dict[str, Condition] = {}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Condition:
        """One row per text; ValueError where the encoders cannot be loaded."""
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = self._find(text)
        return Condition.cat([self._known[text] for text in texts])

    def drop(self) -> None:
        """Frees the encoders' memory. Texts seen so far stay known; a new one loads the encoders again."""
        self._encoder = None

    def modules(self) -> dict[str, nn.Module]:
        """The encoders, as far as they are loaded."""
        return {} if self._encoder is None else self._encoder.modules()

    def encoder(self) -> Encoder:
        """The encoders, loaded if they are not."""
        if self._encoder is None:
            self._encoder = self._load()
        assert self._encoder is not None
        return self._encoder

    def _find(self, text: str) -> Condition:
        kept = None if self._disk is None else self._disk.read(text)
        if kept is None:
            kept = _precise(self.encoder().encode(text))
            if self._disk is not None:
                self._disk.write(text, kept)
        return Condition(kept.hidden.to(self.device), None if kept.pooled is None else kept.pooled.to(self.device))


def _precise(embedding: Condition) -> Condition:
    def float32(x):
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    return Condition(float32(embedding.hidden), None if embedding.pooled is None else float32(embedding.pooled))
