"""What a user may change of a prior, and how its parts come together under those settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distill3d.priors.base import Where
from distill3d.priors.components import adapters as additions
from distill3d.priors.components import hub
from distill3d.priors.components.autoencoder import Autoencoder
from distill3d.priors.components.folder import Parts, freeze
from distill3d.priors.components.text_cache import DiskCache, Texts
from distill3d.priors.components.text_encoders import Clip


@dataclass(frozen=True)
class PriorOptions:
    """Settings of a prior; the defaults are the model as it is."""

    picture_size: int | None = None
    """Pixels a side of what the prior sees; default: what it was trained on."""
    vae: str | None = None
    """Another autoencoder: "taesd" (the family's tiny one, fast), a folder, or a hub id."""
    lora: tuple[str, ...] = ()
    """LoRA weights on the denoising network, FILE.safetensors[:SCALE]."""
    token: tuple[str, ...] = ()
    """Textual inversion, FILE.safetensors[:NAME]; write NAME in the prompt."""
    controlnet: str | None = None
    """A ControlNet, a folder or a hub id: it is told a rendering of the object (see --control)."""
    control: str = "depth"
    """What the ControlNet is told: depth or normal."""
    control_scale: float = 1.0
    """How much the ControlNet counts."""
    distilled_guidance: float = 3.5
    """Guidance that a guidance-distilled model (FLUX.1 dev) is told to act as."""
    config: str | None = None
    """For a single-file checkpoint: a folder or hub id of the same family, for configuration and tokenizers."""
    slicing: bool = False
    """Encode and decode one picture at a time: less memory for batches."""
    tiling: bool = False
    """Encode and decode in overlapping tiles: less memory for large pictures, nearly the same result."""
    checkpointing: bool = False
    """Compute the encoder's inner values again for its gradient: less memory, more time."""
    offload: bool = False
    """Keep the denoising network in main memory and send it to the GPU layer by layer: little memory, slow."""
    compile: bool = False
    """Compile the denoising network (torch.compile): minutes at first, faster from then on."""

    def __post_init__(self) -> None:
        if self.control not in ("depth", "normal"):
            raise ValueError(f"a ControlNet can be told depth or normal, got {self.control!r}")
        if self.picture_size is not None and self.picture_size < 8:
            raise ValueError(f"a prior sees pictures of 8 pixels or more, got {self.picture_size}")
        for name in ("control_scale", "distilled_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name.replace('_', ' ')} must be a finite number, got {getattr(self, name)}")


@dataclass(frozen=True)
class Setup:
    """One model about to be loaded."""

    parts: Parts
    where: Where
    options: PriorOptions
    lora_loader: str  # the class of diffusers that reads LoRA files for this family
    disk: DiskCache | None = None
    name: str = "prior"

    def network(self, part: str) -> Any:
        """The denoising network, with the LoRA weights merged into it."""
        network: Any = self.parts.model(part)
        for text in self.options.lora:
            additions.merge_lora(network, part, self.lora_loader, *additions.path_and_scale(text))
        return network

    def autoencoder(self, tiny: str) -> Autoencoder:
        """The model's own autoencoder or the one chosen with `vae`; `tiny` is the family's "taesd"."""
        o, vae = self.options, None
        if o.vae is not None:
            folder = hub.resolve(tiny if o.vae == "taesd" else o.vae, "autoencoder", names=("taesd",))
            vae = additions.load_autoencoder(folder)
        vae = self.parts.model("vae") if vae is None else vae
        return Autoencoder(vae, self.where.device, self.where.dtype, o.slicing, o.tiling, o.checkpointing)

    def steer(self, prior: Any) -> None:
        """Attaches the ControlNet to a prior with a UNet, if one is wanted."""
        if self.options.controlnet is None:
            return
        folder = hub.resolve(self.options.controlnet, "ControlNet", names=())
        network = additions.load_controlnet(folder, prior.network, self.where.dtype)
        network = freeze(network, self.where.device, self.where.dtype)
        prior.controlnet = additions.Scaled(network, self.options.control_scale)
        prior.control = self.options.control

    def texts(self, load: Callable[[], Any]) -> Texts:
        """The prior's texts; `load` gives the encoders."""
        return Texts(load, self.where.device, self.disk)

    def teach(self, encoders: dict[str, Clip]) -> None:
        """Adds the textual-inversion tokens to CLIP encoders, keyed as in files that hold vectors for several."""
        for text in self.options.token:
            name, vectors = additions.read_token(text, list(encoders))
            for key, clip in encoders.items():
                clip.add_token(name, vectors[key])

    def size(self, own: int, factor: int, multiple: int) -> int:
        """Elements a side of x: the model's own, or what `picture_size` asks for."""
        wanted = self.options.picture_size
        if wanted is None:
            return own
        if wanted % (factor * multiple):
            raise ValueError(
                f"the picture size must be a multiple of {factor * multiple} for {self.name}, got {wanted}"
            )
        return wanted // factor

    def refuse(self, flags: str, *values: object) -> None:
        """Raises ValueError if any of the values was given: this family has no use for it."""
        if any(values):
            raise ValueError(f"{self.name} does not take {flags}: leave that away")
