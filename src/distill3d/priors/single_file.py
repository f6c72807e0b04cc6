"""A whole model in one .safetensors file, as its authors and most fine-tunings publish it.

The file contains only weights. Configuration and tokenizers come from the option `config` or, a few megabytes at most,
from the hub; diffusers converts the names of the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
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
    remember_files,
)
from distill3d.priors.families import check_folder

PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
PREDICTIONS |= {"v-prediction": "v_prediction", "sample": "sample"}
# Names of the scales of fp8, and of the states of other quantizations.
SCALES = (".scale_weight", ".weight_scale", ".scale_input", "scaled_fp8", ".absmax", ".quant_state", ".quant_map")
TEXT_COMPONENTS = ("text_encoder", "tokenizer")  # or with a suffix, _2 or _3


@dataclass(frozen=True)
class SingleFile(ModelFolder):
    """The components of a model in one file: its networks are read first, its text encoders with the first text.

    A component is handed out only once and then read again, so that freed text encoders do not stay in memory.
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)  # settings that the file has itself
    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component; what the file says of its scheduler has priority."""
        return {**super().config(component), **(self.scheduler if component == "scheduler" else {})}

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
            if isinstance(component, nn.Module):
                remember_files(component, [Path(file)])
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
    weights, metadata = _read_header(path)
    scheduler = _scheduler_settings(weights.keys(), metadata)
    if scaled := next((name for name in weights if name.endswith(SCALES)), None):
        raise ValueError(
            f"{path} contains quantized weights with scales ({scaled}), which cannot be read: convert it to 16 bits"
        )
    folder = hub.resolve(config or _config_hub_id(path, weights, scheduler), "configuration", weights=False)
    check_folder(folder, weights=False)
    return SingleFile(folder, dtype, path, scheduler)


def _read_header(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights of a file as tensors without values, and its metadata; ValueError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            weights = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
            return weights, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights file {path} is damaged: {first_line(error)}; download it again") from None


def _scheduler_settings(names: Collection[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of its prediction and its schedule, by the empty tensors and the metadata that tools read."""
    found: dict[str, Any] = {}
    said = metadata.get("modelspec.prediction_type", "").lower()
    if said:
        if said not in PREDICTIONS:
            raise ValueError(f"modelspec.prediction_type must be one of {', '.join(PREDICTIONS)}, got {said!r}")
        found["prediction_type"] = PREDICTIONS[said]
    if "v_pred" in names or metadata.get("ss_v_parameterization", "").lower() == "true":
        found["prediction_type"] = "v_prediction"
    if "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        found["rescale_betas_zero_snr"] = True
    return found


def _config_hub_id(path: Path, weights: dict[str, torch.Tensor], scheduler: Mapping[str, Any]) -> str:
    """The hub id of the configuration that fits the names and shapes of the weights, and what the file says."""
    hub_id = _default_hub_id(weights)
    if hub_id is None:
        raise ValueError(f"{path} is not a known text-to-image model: pass --set prior_options.config=FOLDER")
    hub_id = hub.WITHDRAWN.get(hub_id, hub_id)
    if hub_id in ("sd21", "sd21-v"):  # the same network, trained with two predictions
        said = scheduler.get("prediction_type")
        hub_id = "sd21" if said == "epsilon" else "sd21-v"
        if said is None:
            warnings.warn(
                f"{path.name} does not say which Stable Diffusion 2 it is: v-prediction at 768 pixels is assumed; "
                "for a base model (512 pixels) pass --set prior_options.config=sd21",
                stacklevel=1,
            )
    return hub_id


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
