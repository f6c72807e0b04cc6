"""What is put on top of a model: LoRA weights, words of textual inversion, another autoencoder, a ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.priors.components.folder import check_weights, first_line, load_model, quiet, read_json

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


def path_and_scale(text: str) -> tuple[Path, float]:
    """FILE[:SCALE] as the two it means; ValueError for a file that is not there or is no safetensors."""
    path, _, scale = text.rpartition(":")
    try:
        found, factor = (Path(path), float(scale)) if path else (Path(text), 1.0)
    except ValueError:
        found, factor = Path(text), 1.0
    return _safetensors(found, "LoRA weights"), factor


def merge_lora(network: Any, part: str, loader: str, path: Path, scale: float) -> None:
    """Adds scale times the LoRA update of a file to the network's weights, in place.

    Reads the formats that diffusers reads. Weights for text encoders in the file are not used. Raises ValueError
    for a file that holds nothing for this network, ImportError with the command to type if peft is missing.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA weights need peft: type  pip install 'distill3d[student]'") from error
    from diffusers.loaders import lora_pipeline

    family = getattr(lora_pipeline, loader)
    before = torch.get_rng_state()  # peft draws the update before it is loaded
    try:
        with quiet():
            options = {"unet_config": network.config} if part == "unet" else {}
            found = family.lora_state_dict(str(path), return_alphas=True, **options)
            state, alphas = found[:2] if isinstance(found, tuple) else (found, None)  # SD 3's gives no scales
            if not any(key.startswith(f"{part}.") for key in state):
                raise ValueError(f"it holds nothing for a {part}")
            network.load_lora_adapter(state, network_alphas=alphas, prefix=part, adapter_name="lora")
            network.fuse_lora(lora_scale=scale)
            network.unload_lora()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"LoRA weights {path} do not fit: {first_line(error)}") from error
    finally:
        torch.set_rng_state(before)


def read_token(text: str, encoders: list[str]) -> tuple[str, dict[str, Tensor]]:
    """FILE[:NAME] of textual inversion as the word and its vectors [V, C] for each encoder.

    A model with one encoder takes whatever tensor the file holds; one with two takes those with the encoders'
    keys (clip_l and clip_g). The word is NAME, or else the file's key or the file's name in <>. Raises ValueError
    for files that are not there, are no safetensors, or do not hold what is needed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, _, name = text.rpartition(":") if not Path(text).is_file() else (text, "", "")
    path = _safetensors(Path(file), "a textual-inversion file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"textual-inversion file {path} is damaged: {first_line(error)}") from None
    if len(encoders) == 1 and len(tensors) == 1:
        ((key, value),) = tensors.items()
        own = key if key not in ("emb_params", "clip_l", "clip_g") else f"<{path.stem}>"
        return name or own, {encoders[0]: value.reshape(-1, value.shape[-1])}
    if not set(encoders) <= tensors.keys():
        wanted = " and ".join(encoders) if len(encoders) > 1 else "one tensor"
        raise ValueError(f"textual-inversion file {path} holds {', '.join(tensors)}: this model needs {wanted}")
    return name or f"<{path.stem}>", {key: tensors[key].reshape(-1, tensors[key].shape[-1]) for key in encoders}


def load_autoencoder(folder: Path) -> nn.Module:
    """An autoencoder from its folder, or the vae of a whole model's; ValueError for another class."""
    import diffusers

    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no autoencoder: give a folder with config.json, as save_pretrained writes it")
    name = read_json(folder / "config.json").get("_class_name")
    if name not in AUTOENCODERS:
        raise ValueError(f"{folder} holds a {name}: an autoencoder is one of {', '.join(AUTOENCODERS)}")
    check_weights(folder)
    return load_model(getattr(diffusers, name), folder, torch.float32)


def load_controlnet(folder: Path, unet: Any, dtype: torch.dtype) -> Any:
    """A ControlNet from its folder; ValueError for another class, and for one made for another UNet."""
    import diffusers

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no ControlNet: give a folder with config.json, as save_pretrained writes it")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise ValueError(f"{folder} holds a {config.get('_class_name')}: a ControlNet is a ControlNetModel")
    check_weights(folder)
    network: Any = load_model(diffusers.ControlNetModel, folder, dtype)
    for key in ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type"):
        ours, theirs = getattr(unet.config, key), getattr(network.config, key)
        if ours != theirs:
            raise ValueError(f"the ControlNet in {folder} is for another model: its {key} is {theirs}, the network's "
                             f"is {ours}")  # fmt: skip
    return network


class Scaled(nn.Module):
    """A ControlNet whose residuals count `scale` times."""

    def __init__(self, network: nn.Module, scale: float):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, *args: Any, **options: Any) -> Any:
        """The network's own call."""
        return self.network(*args, conditioning_scale=self.scale, **options)


def _safetensors(path: Path, what: str) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{what}: {path} is no .safetensors file; other formats can run code when opened")
    return path
