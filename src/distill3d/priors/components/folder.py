"""The components of a model in diffusers format.

diffusers and transformers are imported only when a prior is loaded. Components are loaded by their classes and not
through a pipeline, so that a safety checker or anything else that is not needed is never read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distill3d.priors.components.mapped import Mappings
from distill3d.untrusted import read_text

M = TypeVar("M", bound=nn.Module)
# Settings with which diffusers and transformers import, fetch or run code that a model's author names.
HOOKS = ("auto_map", "trust_remote_code", "custom_pipeline", "quantization_config", "base_model_name_or_path")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
PLAIN_ATTENTION = ("eager", "sdpa", None)  # others name packages, or repositories of kernels
LIBRARIES = ("diffusers", "transformers")
CONFIGS = {"scheduler": "scheduler_config.json"}  # others: tokenizer_config.json, config.json


@dataclass(frozen=True)
class ModelFolder:
    """A folder with model_index.json; `checkpoint` is the file with the weights if they are not in the folder."""

    path: Path
    dtype: torch.dtype = torch.float32
    checkpoint: Path | None = None

    @property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json: the class of each component, and settings of the pipeline."""
        return read_json(self.path / "model_index.json")

    def has(self, component: str) -> bool:
        """Whether the model has this component: SD 3 comes with and without its third text encoder."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component, from its JSON file."""
        return read_json(self.path / component / config_name(component))

    def model(self, component: str) -> nn.Module:
        """Loads a network with its weights; ValueError if these do not match its configuration."""
        library, name = self.index[component]
        diffusers, transformers = libraries()
        model_class = getattr(transformers if library == "transformers" else diffusers, name)
        return load_model(model_class, self.path / component, self.dtype)

    def tokenizer(self, component: str) -> Any:
        """Loads a tokenizer; ValueError if its files are incomplete."""
        _, transformers = libraries()
        folder = self.path / component
        try:
            return getattr(transformers, self.index[component][1]).from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the libraries raise all kinds for damaged files
            if is_out_of_memory(error):
                raise
            raise ValueError(f"cannot load {folder}: {first_line(error)}") from error


def config_name(component: str) -> str:
    """The file with the configuration of a component: tokenizers and schedulers have their own names for it."""
    return "tokenizer_config.json" if component.startswith("tokenizer") else CONFIGS.get(component, "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError if the file is damaged."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"file {path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"file {path} is damaged: it is not a JSON object")
    return value


def check_settings(folder: Path) -> None:
    """Raises ValueError if a JSON file of a component asks for code to be imported, fetched or run."""
    for path in sorted(folder.glob("*config*.json")):
        for key, value in _settings(read_json(path)):
            refused = value is not None and value is not False if key in HOOKS else False
            if refused or (key in ATTENTION and value not in PLAIN_ATTENTION):
                raise ValueError(f"{path} sets {key}, which can run code: remove it, or use another model")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) of a JSON tree."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if isinstance(key, str):
            yield key, item
        yield from _settings(item)


def libraries() -> tuple[ModuleType, ModuleType]:
    """diffusers and transformers; ImportError with the command to type if one is missing."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        # Without a name, a package is there in a version that does not fit, and the message says which.
        text = f"{error.name} is missing: type  pip install {error.name}" if error.name else first_line(error)
        raise ImportError(text) from error
    return diffusers, transformers


def check_weights(folder: Path) -> None:
    """Raises ValueError unless the folder of a component has complete safetensors files; reads only their headers."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    for listing in folder.glob("*.safetensors.index*.json"):
        shards = set(read_json(listing).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(shards)} weight files, for example {missing[0]}: download or "
                "save the model again"
            )
    if not files:
        pickles = [f.name for s in ("bin", "ckpt", "pt", "pth") for f in sorted(folder.glob(f"*.{s}"))]
        if pickles:
            raise ValueError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened: "
                "convert them with save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"{folder} has no weights (*.safetensors): download or save the model again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"weights file {file} is damaged: {error}; download or save it again") from None


def load_model(model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Loads a network from its folder; missing tensors are an error and never initialized at random.

    Raises ValueError for weights that are missing, damaged or of another model, and for settings that name code to run.
    """
    check_settings(folder)
    files = [f.name for f in folder.glob("*.safetensors")]
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    options["variant"] = _variant(files)
    # diffusers and transformers name the same argument differently.
    options["torch_dtype" if model_class.__module__.startswith("diffusers") else "dtype"] = dtype
    with quiet(), explain_out_of_memory(f"{folder.name} in {str(dtype).removeprefix('torch.')}"):
        try:
            network, info = model_class.from_pretrained(folder, **options)
        except Exception as error:  # the libraries raise all kinds for damaged files
            if is_out_of_memory(error):
                raise
            raise ValueError(f"cannot load {folder}: {first_line(error)}") from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"weights in {folder} do not match its config.json: {some} missing")
    remember_files(network, sorted(folder.glob("*.safetensors")))
    return network


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component by name, of one copy of its weights; ValueError as `check_weights`."""
    from safetensors.torch import load_file

    check_weights(folder)
    files = sorted(folder.glob("*.safetensors"))
    variant = _variant([f.name for f in files])
    chosen = [f for f in files if _variant([f.name]) == variant]
    return {name: tensor for file in chosen for name, tensor in load_file(file).items()}


def build_model(model_class: Any, config: Mapping[str, Any], weights: Mapping[str, Tensor], what: str) -> nn.Module:
    """A network of diffusers with exactly these weights; ValueError naming `what` if they do not match its config."""
    with quiet(), explain_out_of_memory(what):
        try:
            with torch.device("meta"):
                network = model_class.from_config(dict(config))
            network.load_state_dict(weights, assign=True)
        except (RuntimeError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"weights in {what} do not match its config.json: {reason}") from error
    return network


def _variant(files: Sequence[str]) -> str | None:
    """The variant in the names of weight files, such as fp16, bf16 or non_ema; None if some have none."""
    found = {match[1] for name in files if (match := re.search(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$", name))}
    plain = [name for name in files if not re.search(r"\.\w+(-\d+-of-\d+)?\.safetensors$", name)]
    if plain or not found:
        return None
    return next((name for name in ("fp16", "bf16") if name in found), min(found))


def freeze(network: M, device: str | torch.device, dtype: torch.dtype) -> M:
    """Moves a network, as it was loaded, to its device, in evaluation mode and without gradients.

    Raises ValueError for weights that are not finite: with the file and the tensor if the
    network was loaded here, else they are not finite in this dtype only.
    """
    with explain_out_of_memory(f"{type(network).__name__} on {device}"):
        # nn.Module's own `to`: the one of diffusers warns about float32 layers even if there are none.
        nn.Module.to(network, device=device, dtype=dtype)
        mappings = Mappings.of_this_process()
        for name, value in network.named_parameters():
            stored = mappings.read(value)  # read for this check only, so that it does not stay in memory
            if not value.is_meta and not bool((value if stored is None else stored).isfinite().all()):
                check_files(getattr(network, "source", ()))
                raise ValueError(
                    f"{type(network).__name__} has weights that are not finite in {dtype}: {name}; try --dtype "
                    "bfloat16 or float32"
                )
        return network.eval().requires_grad_(False)


def remember_files(network: Any, files: Iterable[Path]) -> None:
    """Tells `freeze` where the weights of a network are from."""
    network.source = tuple(files)


def check_finite(tensors: Iterable[tuple[str, Tensor]], file: Path) -> None:
    """Raises ValueError for a tensor of a file with values that are not finite, with both names."""
    for name, value in tensors:
        if not bool(value.float().isfinite().all()):
            raise ValueError(f"{file}: the tensor {name} has values that are not finite; download or save it again")


def check_files(files: Iterable[Path]) -> None:
    """Raises ValueError as `check_finite` for the tensors of safetensors files, one in memory at a time."""
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            check_finite(((name, file.get_tensor(name)) for name in file.keys()), path)  # noqa: SIM118


# What torch's CPU allocator, oneDNN, cuBLAS and safetensors' mmap say.
NO_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory", "could not create a primitive")
NO_MEMORY += ("cublas_status_alloc_failed", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out on any device, in this error or one that it was raised from or while handling.

    Only some devices and libraries have an exception class for it; a file that cannot be mapped is an OSError.
    """
    reason = error.__cause__ or error.__context__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (reason is not None and is_out_of_memory(reason)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in NO_MEMORY)


@contextlib.contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """Adds to an out-of-memory error inside the block what it was about."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(f"it was needed for {what}")
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turns off progress bars and warnings of diffusers and transformers inside the block."""
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
