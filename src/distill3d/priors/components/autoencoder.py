"""From images to what the denoising network sees, and back: a latent autoencoder, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.priors.components.folder import freeze
from distill3d.priors.components.layout import autoencoder_format, in_format

LOW_PRECISION = (torch.float16, torch.bfloat16)
Images = Float[Tensor, "b 3 H W"]
Latents = Float[Tensor, "b c h w"]


class Codec(Protocol):
    """Images in [0, 1] to x in the unit of the noise schedule, and back."""

    channels: int
    factor: int  # downsampling: height and width of an image over those of x

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """Images to x; differentiable. With a generator, a draw from the posterior instead of its mean."""
        ...

    def decode(self, x: Latents) -> Images:
        """x to images."""
        ...

    def modules(self) -> Mapping[str, nn.Module]:
        """The networks by their names in diffusers."""
        ...


class Pixels:
    """No autoencoder: x is the image, in [-1, 1]."""

    channels, factor = 3, 1

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """[B, 3, H, W] in [0, 1] to [-1, 1]; the generator is not used."""
        return images * 2 - 1

    def decode(self, x: Latents) -> Images:
        """[B, 3, H, W] in [-1, 1] to [0, 1]."""
        return (x / 2 + 0.5).clamp(0, 1)

    def modules(self) -> Mapping[str, nn.Module]:
        """No networks."""
        return {}


class Autoencoder:
    """A frozen autoencoder of diffusers (AutoencoderKL or AutoencoderTiny), float32 in and out.

    Latents are normalized for the noise schedule: (z - shift) * scale, or per channel if the configuration has
    latents_mean and latents_std. With float16 or bfloat16 the autoencoder stays float32, because its gradient reaches
    the scene and its decoder overflows in float16.
    """

    def __init__(
        self,
        vae: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        slicing: bool = False,
        tiling: bool = False,
        checkpointing: bool = False,
    ):
        """slicing: one image at a time; tiling: overlapping tiles, whose seams are blended, so the result is only
        nearly the same; checkpointing: gradient checkpointing in the encoder."""
        inside = torch.float32 if dtype in LOW_PRECISION else dtype
        self.memory_format = autoencoder_format(vae, torch.device(device))
        self.vae = in_format(freeze(vae, device, inside), self.memory_format)
        config = vae.config
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        scale = torch.tensor(float(config.scaling_factor or 1.0))
        shift = torch.tensor(float(getattr(config, "shift_factor", None) or 0.0))
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            shift, scale = torch.tensor(mean).view(1, -1, 1, 1), scale / torch.tensor(std).view(1, -1, 1, 1)
        self._scale, self._shift = scale.to(device), shift.to(device)
        if slicing:
            vae.enable_slicing()
        if tiling:
            vae.enable_tiling()
        if checkpointing:
            vae.enable_gradient_checkpointing()

    def encode(self, images: Images, generator: torch.Generator | None = None) -> Latents:
        """[B, 3, H, W] in [0, 1] to [B, channels, H / factor, W / factor]; differentiable.

        The mean of the posterior, or a draw from it if a generator is given (an AutoencoderTiny has no variance).
        """
        out = self.vae.encode(self._inside(images * 2 - 1))
        if not hasattr(out, "latent_dist"):
            z = out.latents
        elif generator is None:
            z = out.latent_dist.mean
        else:
            z = out.latent_dist.sample(generator)
        z = z.to(images.dtype)
        return (z - self._shift.to(z)) * self._scale.to(z)

    def decode(self, x: Latents) -> Images:
        """Latents to images in [0, 1]."""
        images = self.vae.decode(self._inside(x / self._scale.to(x) + self._shift.to(x))).sample
        return (images.to(x.dtype) / 2 + 0.5).clamp(0, 1)

    def modules(self) -> Mapping[str, nn.Module]:
        """The autoencoder by its name in diffusers."""
        return {"vae": self.vae}

    def _inside(self, values: Tensor) -> Tensor:
        return values.to(self.vae.dtype).contiguous(memory_format=self.memory_format)
