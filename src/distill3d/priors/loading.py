"""From a short name, a folder, a file or a hub id to a prior; everything that goes wrong is a one-line ValueError."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from distill3d.priors.base import DeviceConfig, FrozenPrior, resolve_device, resolve_dtype
from distill3d.priors.components import hub
from distill3d.priors.components.folder import ModelFolder
from distill3d.priors.components.packing import pack_convolutions, pack_mapped_convolutions
from distill3d.priors.components.text_cache import DiskCache, cache_folder
from distill3d.priors.families import check_folder
from distill3d.priors.options import PriorBuilder, PriorOptions
from distill3d.priors.single_file import open_checkpoint

ENCODING = 2  # increase it when texts are encoded differently, so that older embeddings on disk are not read


def load_prior(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    options: PriorOptions = PriorOptions(),
) -> FrozenPrior:
    """Loads a frozen prior. Text encoders are loaded only when the first text is embedded.

    Args:
        name: a short name, a folder in diffusers format, a .safetensors file, or a hub id. "toybox" is bundled and
            needs no network. A hub id OWNER/NAME is downloaded once into the cache of huggingface_hub; if
            HF_HUB_OFFLINE is set, it is only looked up there.
        device: "cpu", "cuda", "cuda:0", "mps".
        dtype: precision of the denoising network and the text encoders: "float32", "bfloat16", "float16", "float64", or
            "auto" for what is fast on the device (see `resolve_dtype`).
        options: LoRA weights, ControlNet, image size and so on.

    Raises:
        ValueError: if the model, the device or the dtype does not exist, or the model cannot be used.
        ImportError: if a package is missing; says what to type.
    """
    config = DeviceConfig(resolve_device(device), resolve_dtype(dtype, device), options.offload)
    if options.offload and config.device.type == "cpu":
        raise ValueError("--offload sends layers from main memory to a GPU: choose one with --device")
    if options.packed and config.device.type != "cpu":
        raise ValueError("prior_options.packed is for networks on the CPU: leave it out")
    path = hub.resolve(name, half=config.dtype in (torch.float16, torch.bfloat16))
    text = str(name)
    single = path.is_file()
    folder = open_checkpoint(path, options.config, config.dtype) if single else ModelFolder(path, config.dtype)
    family = check_folder(folder.path, weights=not single)
    disk = None if text in hub.BUNDLED else DiskCache(cache_folder(), _identity(folder, config.dtype, options))
    label = text if text in hub.NAMES or not hub.is_path(text) else path.resolve().name
    try:
        prior = family.build(PriorBuilder(folder, config, options, family.lora, disk, label))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:  # settings of a wrong type
        raise ValueError(f"{path} has a setting that cannot be used: {type(error).__name__} {error}") from error
    if options.offload:
        prior.network.enable_group_offload(config.device, torch.device("cpu"), offload_type="leaf_level")
    if options.packed:
        pack_convolutions(prior.network)
    elif options.packed is None and config.device.type == "cpu" and not (options.lora or options.compile):
        pack_mapped_convolutions(prior.network)
    if options.compile:
        prior.network.compile()  # in place, at the first call: its parameters stay those of the plain network
    return prior


def _identity(folder: ModelFolder, dtype: torch.dtype, options: PriorOptions) -> str:
    """Identifies everything besides the text that an embedding depends on: encoders, precision, added tokens."""
    files = [] if folder.checkpoint is None else [folder.checkpoint]
    files += [Path(token if hub.is_path(token) else token.rpartition(":")[0]) for token in options.token]
    for pattern in ("text_encoder*/*", "tokenizer*/*", "model_index.json"):
        files += sorted(folder.path.glob(pattern))
    stats = ((str(f.resolve()), f.stat()) for f in files if f.is_file())
    versions = [f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats]
    return hashlib.sha256("\n".join([str(ENCODING), str(dtype), *options.token, *versions]).encode()).hexdigest()
