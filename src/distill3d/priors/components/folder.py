"""The parts of one model in diffusers format, each loaded by its class when asked for.

With `autoencoder.py`, `encoders.py` and `additions.py` the only place that touches diffusers and transformers,
and only when a prior is loaded. Parts are loaded by their classes, not through a pipeline: no safety checker, no
scheduler object, and what is not needed is not read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIGS = {"scheduler": "scheduler_config.json"}  # others: tokenizer_config.json, config.json


@dataclass(frozen=True)
class Parts:
    """A folder with model_index.json; `checkpoint` is the file that holds the weights, where they lie elsewhere."""

    folder: Path
    dtype: torch.dtype = torch.float32
    checkpoint: Path | None = None

    @property
    def index(self) -> dict[str, Any]:
        """What model_index.json says: a class for each part, and settings of the whole."""
        return read_json(self.folder / "model_index.json")

    def has(self, part: str) -> bool:
        """Whether the model has this part at all: SD 3 comes with and without its third text encoder."""
        entry = self.index.get(part)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part, as its JSON file says."""
        return read_json(self.folder / part / config_name(part))

    def model(self, part: str) -> nn.Module:
        """A network with its weights, read anew; ValueError if these do not match its configuration."""
        library, name = self.index[part]
        diffusers, transformers = libraries()
        kind = getattr(transformers if library == "transformers" else diffusers, name)
        return load_model(kind, self.folder / part, self.dtype)

    def tokenizer(self, part: str) -> Any:
        """A tokenizer; ValueError if its files are incomplete."""
        _, transformers = libraries()
        try:
            return getattr(transformers, self.index[part][1]).from_pretrained(self.folder / part, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"cannot load {self.folder / part}: {first_line(error)}") from error


def config_name(part: str) -> str:
    """The file that configures a part: tokenizers and schedulers have names of their own."""
    return "tokenizer_config.json" if part.startswith("tokenizer") else CONFIGS.get(part, "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"file {path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"file {path} is damaged: it does not hold a JSON object")
    return value


def libraries() -> tuple[Any, Any]:
    """diffusers and transformers; ImportError with the command to type if one is missing."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: type  pip install {error.name}") from error
    return diffusers, transformers


def check_weights(folder: Path) -> None:
    """Raises ValueError unless the folder of a part holds whole safetensors; reads their headers only."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    for listing in folder.glob("*.safetensors.index*.json"):
        shards = set(read_json(listing).get("weight_map", {}).values())
        lost = sorted(shard for shard in shards if not (folder / shard).is_file())
        if lost:
            raise ValueError(f"{folder} lacks {len(lost)} of its {len(shards)} files of weights, {lost[0]} for one: "
                             "download or save the model again")  # fmt: skip
    if not files:
        pickles = [f.name for s in ("bin", "ckpt", "pt", "pth") for f in sorted(folder.glob(f"*.{s}"))]
        if pickles:
            raise ValueError(
                f"{folder} has its weights only as pickle ({pickles[0]}), which can run code when opened: "
                "convert them with save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"{folder} has no weights (*.safetensors): download or save the model again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"weights file {file} is damaged: {error}; download or save it again") from None


def load_model(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """One network from its folder; a tensor that the file lacks is an error, never a random initialization.

    Raises ValueError for weights that are missing, damaged or of another model, and for want of memory.
    """
    files = [f.name for f in folder.glob("*.safetensors")]
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    options["variant"] = "fp16" if files and all(".fp16" in name for name in files) else None
    # diffusers and transformers name the same argument differently.
    options["torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"] = dtype
    with quiet(), memory_told(f"{folder.name} in {str(dtype).removeprefix('torch.')}"):
        try:
            part, info = kind.from_pretrained(folder, **options)
        except (OSError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"cannot load {folder}: {first_line(error)}") from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"weights in {folder} do not match its config.json: {some} missing")
    return part


def freeze(part: nn.Module, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The part on its device, in evaluation mode, without gradients of its own; ValueError for want of memory."""
    with memory_told(f"{type(part).__name__} on {device}"):
        # Module's own `to`: the override of diffusers prints a warning about float32 parts it does not have.
        return nn.Module.to(part, device=device, dtype=dtype).eval().requires_grad_(False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on whichever device: only some of them have an exception of their own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def memory_told(what: str) -> Iterator[None]:
    """Turns a want of memory inside into one line that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"out of memory with {what}: {MEMORY_ADVICE}") from error


MEMORY_ADVICE = "try --dtype bfloat16, a smaller --picture-size, --checkpointing, --offload, or fewer views"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and advice, which would tear up ours; their state is put back."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in libraries]
    for logging in libraries:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, level, shown in before:
            logging.set_verbosity(level)
            if shown:
                logging.enable_progress_bar()
