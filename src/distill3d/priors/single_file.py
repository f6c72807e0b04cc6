"""A whole model in one .safetensors file, as its authors and most fine-tunings publish it.

The file holds weights only. Configuration and tokenizers are those of the family, from `config` or, a few
megabytes at most, from the hub; diffusers knows the names of the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill3d.priors import hub
from distill3d.priors.families import check_folder
from distill3d.priors.parts import Parts, first_line, is_out_of_memory, libraries, memory_told, quiet, read_json

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def open_checkpoint(path: Path, config: str | None, dtype: torch.dtype) -> Parts:
    """The parts of a single-file checkpoint; config is a folder or hub id of the same family.

    Raises ValueError for other formats, damaged files, families that are unknown, and weights that do not fit
    their configuration.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is neither a folder nor a .safetensors file; other formats can run code when opened: "
                         "convert it, or give a folder in diffusers format")  # fmt: skip
    folder = hub.resolve(config or _family(path), "the configuration of a single-file checkpoint", weights=False)
    check_folder(folder, weights=False)
    diffusers, _ = libraries()
    pipeline = getattr(diffusers, read_json(folder / "model_index.json")["_class_name"])
    # What a pipeline would load beside what a prior needs, and cannot find in the file.
    spare = dict.fromkeys(set(pipeline._optional_components) - set(NETWORKS))
    options: dict[str, Any] = {"torch_dtype": dtype, "config": str(folder), "local_files_only": True}
    with quiet(), memory_told(path.name):
        try:
            found = pipeline.from_single_file(str(path), **options, **spare)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{path} does not fit the configuration in {folder}: {first_line(error)}; "
                             "give one of its family with --config") from error  # fmt: skip
    given = {name: part for name, part in found.components.items() if part is not None and name != "scheduler"}
    for name in NETWORKS:
        empty = [k for k, p in given[name].named_parameters() if p.is_meta] if name in given else []
        if empty:
            raise ValueError(f"{path} holds no weights for {name}: {', '.join(empty[:3])} missing")
    return Parts(folder, dtype, given, path)


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
