"""A whole model in one .safetensors file, as its authors and most fine-tunings publish it.

The file contains only weights. Configuration and tokenizers come from the option `config` or, a few megabytes at most,
from the hub; diffusers converts the names of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill3d.priors.components import hub
from distill3d.priors.components.folder import (
    ModelFolder,
    explain_out_of_memory,
    first_line,
    is_out_of_memory,
    libraries,
    quiet,
)
from distill3d.priors.families import check_folder

TEXT_COMPONENTS = ("text_encoder", "tokenizer")  # or with a suffix, _2 or _3


@dataclass(frozen=True)
class SingleFile(ModelFolder):
    """The components of a model in one file: its networks are read first, its text encoders with the first text.

    A component is handed out only once and then read again, so that freed text encoders do not stay in memory.
    """

    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    def model(self, component: str) -> nn.Module:
        """A network with its weights; ValueError if the file lacks them, or they do not fit the configuration."""
        return self._take(component)

    def tokenizer(self, component: str) -> Any:
        """A tokenizer, from the folder with the configuration."""
        return self._take(component)

    def _take(self, component: str) -> Any:
        if component not in self._read:
            is_text = component.startswith(TEXT_COMPONENTS)
            names = (name for name, entry in self.index.items() if isinstance(entry, list) and self.has(name))
            self._read.update(self._open([name for name in names if name.startswith(TEXT_COMPONENTS) == is_text]))
        return self._read.pop(component)

    def _open(self, wanted: list[str]) -> dict[str, Any]:
        diffusers, _ = libraries()
        with quiet():
            pipeline = getattr(diffusers, self.index["_class_name"])
        # None for what a pipeline would also load: safety checkers and the like, which priors do not use.
        others = {name for name, entry in self.index.items() if isinstance(entry, list)}
        unused = dict.fromkeys((others | set(pipeline._optional_components)) - {*wanted, "scheduler"})
        options: dict[str, Any] = {"torch_dtype": self.dtype, "config": str(self.path), "local_files_only": True}
        file = str(self.checkpoint)
        with quiet(), explain_out_of_memory(file):
            try:
                found = pipeline.from_single_file(file, **options, **unused).components
            except Exception as error:  # diffusers raises all kinds for weights of another configuration
                if is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"{file} does not fit the configuration in {self.path}: {first_line(error)}; pass one of its "
                    "family as --set prior_options.config=FOLDER"
                ) from error
        components = {name: found[name] for name in wanted if found.get(name) is not None}
        for name, component in components.items():
            parameters = component.named_parameters() if isinstance(component, nn.Module) else ()
            if missing := [key for key, p in parameters if p.is_meta]:
                raise ValueError(f"{file} has no weights for {name}: {', '.join(missing[:3])} missing")
        return components


def open_checkpoint(path: Path, config: str | None, dtype: torch.dtype) -> SingleFile:
    """The components of a single-file checkpoint; config is a folder or hub id of the same family.

    Raises ValueError for other formats, damaged files and unknown families.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is neither a folder nor a .safetensors file; other formats can run code when opened: convert it, "
            "or use a folder in diffusers format"
        )
    folder = hub.resolve(config or _config_hub_id(path), "configuration", weights=False)
    check_folder(folder, weights=False)
    return SingleFile(folder, dtype, path)


def _config_hub_id(path: Path) -> str:
    """The hub id of the configuration that fits the names and shapes of the weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            weights = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights file {path} is damaged: {first_line(error)}; download it again") from None
    hub_id = _default_hub_id(weights)
    if hub_id is None:
        raise ValueError(f"{path} is not a known text-to-image model: pass --set prior_options.config=FOLDER")
    return hub.WITHDRAWN.get(hub_id, hub_id)


def _default_hub_id(weights: dict[str, torch.Tensor]) -> str | None:
    """The hub id that diffusers associates with these weights; None for an unknown model.

    The only use of tables that are not part of diffusers' public interface; ValueError if this version lacks them.
    """
    try:
        from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

        family = infer_diffusers_model_type(weights)
        hub_id = DIFFUSERS_DEFAULT_PIPELINE_PATHS[family]["pretrained_model_name_or_path"]
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            "the installed version of diffusers cannot identify single-file checkpoints: pass its "
            "configuration, a folder or hub id, as --set prior_options.config=FOLDER"
        ) from error
    is_v1 = any(name.startswith("model.diffusion_model.") for name in weights)
    return hub_id if family != "v1" or is_v1 else None  # v1 is also what diffusers returns for unknown weights
