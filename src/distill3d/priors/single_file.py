"""A whole model in one .safetensors file, as its authors and most fine-tunings publish it.

The file holds weights only. Configuration and tokenizers are those of the family, from `config` or, a few
megabytes at most, from the hub; diffusers knows the names of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill3d.priors.components import hub
from distill3d.priors.components.folder import Parts, first_line, is_out_of_memory, libraries, memory_told, quiet
from distill3d.priors.families import check_folder

READERS = ("text_encoder", "tokenizer")  # what the parts that belong to texts are called, with _2 or _3 behind

# What diffusers raises, by its own will or not, for weights that are not those of the configuration.
MISFITS = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError)


@dataclass(frozen=True)
class SingleFile(Parts):
    """The parts of a model in one file: its networks are read first, its text encoders when a text comes.

    What was handed out is forgotten here, so that dropped text encoders free their memory; they are read again
    if they are asked for again.
    """

    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    def model(self, part: str) -> nn.Module:
        """A network with its weights; ValueError if the file lacks them, or they do not fit the configuration."""
        return self._take(part)

    def tokenizer(self, part: str) -> Any:
        """A tokenizer, from the folder of the configuration."""
        return self._take(part)

    def _take(self, part: str) -> Any:
        if part not in self._read:
            of_texts = part.startswith(READERS)
            entries = (name for name, entry in self.index.items() if isinstance(entry, list) and self.has(name))
            self._read.update(self._open([name for name in entries if name.startswith(READERS) == of_texts]))
        return self._read.pop(part)

    def _open(self, wanted: list[str]) -> dict[str, Any]:
        diffusers, _ = libraries()
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        with quiet():
            pipeline = getattr(diffusers, self.index["_class_name"])
        # What a pipeline would load beside that: safety checkers and the like, which no prior has.
        others = {name for name, entry in self.index.items() if isinstance(entry, list)}
        left = dict.fromkeys((others | set(pipeline._optional_components)) - {*wanted, "scheduler"})
        wanted = [name for name in wanted if name not in left]
        options: dict[str, Any] = {"torch_dtype": self.dtype, "config": str(self.folder), "local_files_only": True}
        path = self.checkpoint
        with quiet(), memory_told(str(path)):
            try:
                found = pipeline.from_single_file(str(path), **options, **left).components
            except (*MISFITS, SingleFileComponentError) as error:
                if is_out_of_memory(error):
                    raise
                raise ValueError(f"{path} does not fit the configuration in {self.folder}: {first_line(error)}; "
                                 "give one of its family with --config") from error  # fmt: skip
        parts = {name: found[name] for name in wanted if found.get(name) is not None}
        for name, part in parts.items():
            empty = [k for k, p in part.named_parameters() if p.is_meta] if isinstance(part, nn.Module) else []
            if empty:
                raise ValueError(f"{path} holds no weights for {name}: {', '.join(empty[:3])} missing")
        return parts


def open_checkpoint(path: Path, config: str | None, dtype: torch.dtype) -> SingleFile:
    """The parts of a single-file checkpoint; config is a folder or hub id of the same family.

    Raises ValueError for other formats, damaged files and families that are unknown.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is neither a folder nor a .safetensors file; other formats can run code when opened: "
                         "convert it, or give a folder in diffusers format")  # fmt: skip
    folder = hub.resolve(config or _family(path), "configuration", weights=False)
    check_folder(folder, weights=False)
    return SingleFile(folder, dtype, path)


def _family(path: Path) -> str:
    """The hub id whose configuration fits the names of the weights."""
    from diffusers.loaders import single_file_utils
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: _Shape(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights file {path} is damaged: {first_line(error)}; download it again") from None
    kind = single_file_utils.infer_diffusers_model_type(shapes)
    if kind == "v1" and not any(key.startswith("model.diffusion_model.") for key in shapes):  # what it falls back to
        raise ValueError(f"{path} holds no text-to-image model that is known: give its configuration with --config")
    hub_id = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    return hub.WITHDRAWN.get(hub_id, hub_id)


class _Shape:
    """A tensor of which only the shape is known: enough to tell families apart without reading gigabytes."""

    def __init__(self, shape: list[int]):
        self.shape = tuple(shape)
