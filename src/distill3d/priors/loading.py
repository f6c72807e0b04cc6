"""A name, a folder, a file or a hub id -> the prior it means. Everything wrong on the way is one clear ValueError."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from distill3d.priors.base import FrozenPrior, Where
from distill3d.priors.components import hub
from distill3d.priors.components.folder import Parts, first_line
from distill3d.priors.components.text_cache import DiskCache, cache_folder
from distill3d.priors.families import check_folder
from distill3d.priors.options import PriorOptions, Setup
from distill3d.priors.single_file import open_checkpoint
from distill3d.priors.speed import compiled, offloaded

ENCODING = 1  # raise it when a text is encoded otherwise than before: what is kept on disk is then not read again


def load_prior(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    options: PriorOptions | None = None,
) -> FrozenPrior:
    """The frozen prior behind a short name, a folder in diffusers format, a .safetensors file, or a hub id.

    "toybox" is bundled and needs no network. A hub id owner/name is downloaded once into the cache of
    huggingface_hub, or only looked up there when HF_HUB_OFFLINE is set. dtype is that of the network and the text
    encoders (default float32). Text encoders are loaded when the first text comes. Raises ValueError, in one line,
    for whatever does not exist or cannot be used.
    """
    if isinstance(dtype, str):  # SHIM
        from distill3d.priors.speed import fast_dtype

        dtype = fast_dtype(str(device)) if dtype == "auto" else getattr(torch, dtype)
    options = options or PriorOptions()
    where = Where(_device(device), dtype or torch.float32, options.offload)
    path = hub.resolve(name_or_path, half=where.dtype in (torch.float16, torch.bfloat16))
    text = str(name_or_path)
    name = text if text in hub.NAMES or not hub.is_path(text) else path.resolve().name
    parts = open_checkpoint(path, options.config, where.dtype) if path.is_file() else Parts(path, where.dtype)
    family = check_folder(parts.folder, weights=not path.is_file())
    disk = None if text in hub.BUNDLED else DiskCache(cache_folder(), _identity(parts, where.dtype, options))
    try:
        prior = family.build(Setup(parts, where, options, family.lora, disk, name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    if options.offload:
        offloaded(prior)
    if options.compile:
        compiled(prior)
    return prior


def _device(device: str | torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"cannot compute on {device}: {first_line(error).split('. ')[0]}; distill3d doctor lists the devices"
        ) from error


def _identity(parts: Parts, dtype: torch.dtype, options: PriorOptions) -> str:
    """What an embedding depends on beside its text: how it is encoded, by which files, in which precision and words."""
    files = [] if parts.checkpoint is None else [parts.checkpoint]
    files += [Path(token if hub.is_path(token) else token.rpartition(":")[0]) for token in options.token]
    for pattern in ("text_encoder*/*", "tokenizer*/*", "model_index.json"):
        files += sorted(parts.folder.glob(pattern))
    stats = ((str(f.resolve()), f.stat()) for f in files if f.is_file())
    told = [f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats]
    return hashlib.sha256("\n".join([str(ENCODING), str(dtype), *options.token, *told]).encode()).hexdigest()
