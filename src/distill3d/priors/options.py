"""The options of a prior, and how its components are loaded under them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from distill3d.diffusion.schedule import Kind
from distill3d.priors.base import DeviceConfig, FrozenPrior
from distill3d.priors.components import adapters, hub
from distill3d.priors.components.autoencoder import Autoencoder, Codec
from distill3d.priors.components.folder import ModelFolder, freeze
from distill3d.priors.components.text_cache import DiskCache, TextCache
from distill3d.priors.components.text_encoders import T5, Clip, TextEncoders
from distill3d.types import Schedule

PriorClass = TypeVar("PriorClass", bound=FrozenPrior)


@dataclass(frozen=True)
class PriorOptions:
    """Options of a prior; by default the model is used as it is."""

    image_size: int | None = None
    """Image size of the prior in pixels; default: the size it was trained on."""
    vae: str | None = None
    """Another autoencoder: "taesd" (the tiny one of the model family, fast), a folder, or a hub id."""
    lora: tuple[str, ...] = ()
    """LoRA weights for the denoising network, FILE.safetensors[:SCALE]."""
    token: tuple[str, ...] = ()
    """A textual-inversion token, FILE.safetensors[:NAME]; write NAME in the prompt."""
    controlnet: str | None = None
    """A ControlNet, a folder or a hub id, for the rendered depth or normals (see --control)."""
    control: str = "depth"
    """The image that the ControlNet expects: depth or normal."""
    control_scale: float = 1.0
    """Weight of the ControlNet's output."""
    distilled_guidance: float = 3.5
    """Guidance scale that a guidance-distilled model (FLUX.1 dev) is conditioned on."""
    config: str | None = None
    """For a single-file checkpoint: a folder or hub id of the same family, for configuration and tokenizers."""
    slicing: bool = False
    """Encode and decode images one by one: less memory for batches."""
    tiling: bool = False
    """Encode and decode in overlapping tiles: less memory for large images, nearly the same result."""
    checkpointing: bool = False
    """Gradient checkpointing in the autoencoder's encoder: less memory, more time."""
    offload: bool = False
    """Keep the denoising network in main memory and send it to the GPU layer by layer: little memory, slow."""
    packed: bool | None = None
    """Keep a reordered copy of the network's convolutions on a CPU: large networks are faster. Default: where the
    weights are mapped from their file, so that it needs no more memory; true: in any case."""
    compile: bool = False
    """Compile the denoising network (torch.compile): the first steps take minutes, later ones are faster."""

    def __post_init__(self) -> None:
        if self.control not in ("depth", "normal"):
            raise ValueError(f"control must be depth or normal, got {self.control!r}")
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise ValueError(
                f"the image size of a prior must be at least 8 pixels, got {self.image_size}; at most 4096"
            )
        for name in ("control_scale", "distilled_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name.replace('_', ' ')} must be a finite number, got {getattr(self, name)}")


@dataclass(frozen=True)
class PriorBuilder:
    """Loads the components of one model under a user's options; the model families assemble priors from them."""

    folder: ModelFolder
    config: DeviceConfig
    options: PriorOptions
    lora_loader: str  # the class of diffusers that reads LoRA files for this family
    disk: DiskCache | None = None
    name: str = "prior"

    def network(self, component: str) -> Any:
        """The denoising network, with the LoRA weights merged into it."""
        network: Any = self.folder.model(component)
        for text in self.options.lora:
            adapters.merge_lora(network, component, self.lora_loader, *adapters.path_and_scale(text))
        return network

    def autoencoder(self, tiny: str) -> Autoencoder:
        """The model's own autoencoder, or the one of the option `vae`; `tiny` is the hub id of the family's "taesd"."""
        o = self.options
        if o.vae is None:
            vae = self.folder.model("vae")
        else:
            vae = adapters.load_autoencoder(
                hub.resolve(tiny if o.vae == "taesd" else o.vae, "autoencoder", names=("taesd",))
            )
        return Autoencoder(vae, self.config.device, self.config.dtype, o.slicing, o.tiling, o.checkpointing)

    def clip(self, suffix: str) -> Clip:
        """The CLIP text encoder of the components text_encoder and tokenizer with this suffix ("", "_2")."""
        tokenizer, encoder = self._text_encoder(suffix)
        return Clip(tokenizer, encoder, self.config.device, self.config.dtype)

    def t5(self, suffix: str, length: int, masked: bool = False) -> T5:
        """As `clip`, for a T5 encoder that reads `length` tokens."""
        tokenizer, encoder = self._text_encoder(suffix)
        return T5(tokenizer, encoder, length, self.config.device, self.config.dtype, masked)

    def assemble(
        self,
        prior_class: type[PriorClass],
        network: Any,
        codec: Codec,
        load: Callable[[], TextEncoders],
        schedule: Schedule,
        kind: Kind,
        size: int,
    ) -> PriorClass:
        """A prior of this class; `load` loads the text encoders, the rest is as for `FrozenPrior`."""
        texts = TextCache(load, self.config.device, self.disk)
        return prior_class(network, codec, texts, schedule, kind, size, self.config, self.name)

    def add_tokens(self, encoders: dict[str, Clip]) -> None:
        """Adds the textual-inversion tokens to CLIP encoders, by the keys that files for several encoders use."""
        for text in self.options.token:
            name, vectors = adapters.read_token(text, list(encoders))
            for key, clip in encoders.items():
                clip.add_token(name, vectors[key])

    def controlnet(self, unet: Any) -> nn.Module:
        """The ControlNet of the option `controlnet`, frozen; ValueError if it was made for another UNet."""
        folder = hub.resolve(self.options.controlnet or "", "ControlNet", names=())
        network = adapters.load_controlnet(folder, unet, self.config.dtype)
        return freeze(network, self.config.device, self.config.dtype)

    def sample_size(self, default: object, factor: int, multiple: int) -> int:
        """Height and width of x: the default of the model's configuration, or those for the option `image_size`.

        factor is the autoencoder's downsampling; the network needs a multiple of `multiple`. Raises ValueError for an
        image size that is not possible.
        """
        size = self.options.image_size
        if size is None:
            height, width = default if isinstance(default, list | tuple) and len(default) == 2 else (default, default)
            if not isinstance(height, int) or height != width or height < 1:
                raise ValueError(
                    f"the configuration of {self.name} has sample_size {default}, which is no size of square images: "
                    "pass --image-size"
                )
            return height
        if size % (factor * multiple):
            raise ValueError(f"the image size of {self.name} must be a multiple of {factor * multiple}, got {size}")
        return size // factor

    def reject_options(self, flags: str, *values: object) -> None:
        """Raises ValueError if any of the values was given: the model family does not support these options."""
        if any(values):
            raise ValueError(f"{self.name} does not support {flags}")

    def _text_encoder(self, suffix: str) -> tuple[Any, nn.Module]:
        return self.folder.tokenizer(f"tokenizer{suffix}"), self.folder.model(f"text_encoder{suffix}")


def check_text_width(encoder: int | None, network: int) -> None:
    """Raises ValueError unless the text encoder has as many channels as the denoising network expects."""
    if encoder != network:
        raise ValueError(
            f"the text encoder gives {encoder} channels, the network expects {network}: the components belong to "
            "different models"
        )
