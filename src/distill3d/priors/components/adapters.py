"""Additions to a model: LoRA weights, textual-inversion tokens, another autoencoder, a ControlNet."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.priors.components.folder import (
    check_files,
    check_finite,
    check_weights,
    first_line,
    load_model,
    quiet,
    read_json,
)

# Parts of the names of weights in adapters that are not the product of two matrices.
OTHER_ADAPTERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
OTHER_ADAPTERS |= {"lora_mid": "LoCon with Tucker decomposition", ".oft_": "OFT", "oft_blocks": "OFT", ".boft_": "BOFT"}
OTHER_ADAPTERS |= {".a1.": "GLoRA", ".b1.": "GLoRA", ".on_input": "IA3", "ia3_l": "IA3", ".diff_b": "full difference"}
OTHER_ADAPTERS |= {".diff": "full difference", ".w_norm": "full difference", "lora_B.bias": "LoRA with bias"}
LORA_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")  # of peft's config
TEXT_LORA = ("lora_te", "text_encoder.", "text_encoder_2.")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


def path_and_scale(text: str) -> tuple[Path, float]:
    """Splits FILE[:SCALE]; ValueError if the file does not exist or is not a .safetensors file."""
    path, _, scale = text.rpartition(":")
    try:
        found, factor = (Path(path), float(scale)) if path else (Path(text), 1.0)
    except ValueError:
        found, factor = Path(text), 1.0
    if not math.isfinite(factor):
        raise ValueError(f"the scale of LoRA weights must be a finite number, got {text}")
    return _safetensors(found, "LoRA weights"), factor


def check_lora(path: Path) -> None:
    """Raises ValueError for adapters that are no plain LoRA or not finite, and warns of weights for text encoders."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"LoRA weights {path} are damaged: {first_line(error)}") from None
    for name in names:
        kind = next((kind for part, kind in OTHER_ADAPTERS.items() if part in name), None)
        if kind is not None:
            raise ValueError(f"{path} is an adapter of kind {kind} ({name}), which is not supported: use a plain LoRA")
    check_files([path])
    if any(name.startswith(TEXT_LORA) for name in names):
        warnings.warn(f"{path.name}: the LoRA weights for text encoders are ignored", stacklevel=1)


def merge_lora(network: Any, component: str, loader: str, path: Path, scale: float) -> None:
    """Adds scale times the LoRA update of a file to the network's weights, in place.

    Reads all formats that diffusers reads, and what `save_lora_adapter` of a network writes, which does not name the
    component. Ignores weights for text encoders. Raises ValueError if the file has no weights for this network,
    ImportError with the command to type if peft is missing.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA weights need peft: type  pip install 'distill3d[student]'") from error
    from diffusers.loaders import lora_pipeline

    check_lora(path)
    family = getattr(lora_pipeline, loader)
    before = torch.get_rng_state()  # peft initializes the update at random before loading it
    try:
        with quiet():
            options = {"unet_config": network.config} if component == "unet" else {}
            found = family.lora_state_dict(str(path), return_alphas=True, return_lora_metadata=True, **options)
            state, metadata, alphas = found[0], found[-1], found[1] if len(found) == 3 else None  # SD 3's has no alphas
            modules, named = dict(network.named_modules()), any(key.startswith(f"{component}.") for key in state)
            if not named and not any(key.partition(".lora_")[0] in modules for key in state):
                raise ValueError(f"there are none for a {component}")
            # Scales are in tensors of their own or in the metadata, of which nothing else is used.
            prefix = f"{component}." if named else ""
            config = {key: metadata[prefix + key] for key in LORA_SCALES if prefix + key in dict(metadata or {})}
            largest = max(length for value in state.values() for length in value.shape)
            if config and max(config["r"], *config.get("rank_pattern", {}).values(), 0) > largest:
                raise ValueError(f"its metadata says rank {config['r']}, but its largest matrix has {largest} rows")
            network.load_lora_adapter(
                state,
                network_alphas=alphas if named else None,
                prefix=component if named else None,
                metadata=None if alphas or not config else {prefix + key: value for key, value in config.items()},
                adapter_name="lora",
            )
            network.fuse_lora(lora_scale=scale)
            network.unload_lora()
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, OSError, re.error) as error:
        raise ValueError(f"LoRA weights {path} do not fit: {first_line(error)}") from error
    finally:
        torch.set_rng_state(before)
    for name, value in network.named_parameters():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"LoRA weights {path} at scale {scale} make weights that are not finite: {name}; use a smaller scale"
            )


def read_token(text: str, encoders: list[str]) -> tuple[str, dict[str, Tensor]]:
    """Reads a textual-inversion file FILE[:NAME]: the token's name and its vectors [V, C] for each encoder.

    A model with one encoder uses the only tensor of the file; one with two uses those with the encoders' keys (clip_l
    and clip_g). The name is NAME, or else the file's key or the file's name in <>. Raises ValueError if the file does
    not exist, is not a .safetensors file, or lacks what is needed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, _, name = text.rpartition(":") if not Path(text).is_file() else (text, "", "")
    path = _safetensors(Path(file), "a textual-inversion file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"textual-inversion file {path} is damaged: {first_line(error)}") from None
    check_finite(tensors.items(), path)
    if len(encoders) == 1 and len(tensors) == 1:
        ((key, value),) = tensors.items()
        own = key if key not in ("emb_params", "clip_l", "clip_g") else f"<{path.stem}>"
        return name or own, {encoders[0]: value.reshape(-1, value.shape[-1])}
    if not set(encoders) <= tensors.keys():
        needed = " and ".join(encoders) if len(encoders) > 1 else "one tensor"
        raise ValueError(f"textual-inversion file {path} contains {', '.join(tensors)}: this model needs {needed}")
    return name or f"<{path.stem}>", {key: tensors[key].reshape(-1, tensors[key].shape[-1]) for key in encoders}


def load_autoencoder(folder: Path) -> nn.Module:
    """Loads an autoencoder from its folder, or from the vae folder of a whole model; ValueError for another class."""
    import diffusers

    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: use a folder of an autoencoder saved with save_pretrained")
    name = read_json(folder / "config.json").get("_class_name")
    if name not in AUTOENCODERS:
        raise ValueError(f"{folder} contains a {name}: an autoencoder must be one of {', '.join(AUTOENCODERS)}")
    check_weights(folder)
    return load_model(getattr(diffusers, name), folder, torch.float32)


def load_controlnet(folder: Path, unet: Any, dtype: torch.dtype) -> nn.Module:
    """Loads a ControlNet from its folder; ValueError for another class, or one that was made for another UNet."""
    import diffusers

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: use a folder of a ControlNet saved with save_pretrained")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise ValueError(f"{folder} contains a {config.get('_class_name')}: a ControlNet must be a ControlNetModel")
    check_weights(folder)
    network: Any = load_model(diffusers.ControlNetModel, folder, dtype)
    for key in ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type"):
        ours, theirs = getattr(unet.config, key), getattr(network.config, key)
        if ours != theirs:
            raise ValueError(
                f"the ControlNet in {folder} is for another model: its {key} is {theirs}, that of the UNet {ours}"
            )
    return network


def _safetensors(path: Path, what: str) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{what}: {path} is not a .safetensors file; other formats can run code when opened")
    return path
