"""A picture is a scene too: one view, no camera. Its parameters are pixels, or x of a prior (latents)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill3d.types import Rays, Rendering

Map = Callable[[Tensor], Tensor]


def unit_range(images: Tensor) -> Tensor:
    """Pixels held in [0, 1]."""
    return images.clamp(0, 1)


def encodable(encode: Map, decode: Map) -> Map:
    """Latents held among those that a picture can have: decode, clamp, encode.

    Latents that are parameters themselves may leave that set, and nothing calls them back; what a renderer
    makes and an encoder reads never does.
    """
    return lambda x: encode(unit_range(decode(x)))


class ImageScene(nn.Module):
    """B pictures as parameters, values [B, C, H, W]: pixels in [0, 1], or latents.

    `hold` maps values back to allowed ones and is applied by `settle`, in place and outside of any gradient.
    """

    def __init__(self, values: Tensor, hold: Map | None = None):
        """Starts from a copy of `values`; ValueError unless they are [B, C, H, W] and finite."""
        super().__init__()
        if values.ndim != 4 or not values.is_floating_point() or not bool(values.isfinite().all()):
            raise ValueError(f"pictures must be finite floats [B, C, H, W], got {list(values.shape)} {values.dtype}")
        self.values = nn.Parameter(values.detach().clone())
        self.hold = hold

    @staticmethod
    def gray(shape: Sequence[int], level: float = 0.5) -> ImageScene:
        """Pixels [B, 3, H, W] of one gray level in [0, 1]."""
        if not 0 <= level <= 1:
            raise ValueError(f"a gray level lies in [0, 1], got {level}")
        return ImageScene(torch.full(tuple(shape), level), unit_range)

    @staticmethod
    def noise(shape: Sequence[int], generator: torch.Generator, std: float = 0.2) -> ImageScene:
        """Pixels [B, 3, H, W] drawn from N(1/2, std^2), clamped."""
        drawn = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return ImageScene(unit_range(0.5 + std * drawn), unit_range)

    @staticmethod
    def encoded(images: Tensor, encode: Map, decode: Map | None = None) -> ImageScene:
        """Latents of pictures [B, 3, H, W]; with `decode` they are held among the encodable ones."""
        with torch.no_grad():
            return ImageScene(encode(images), None if decode is None else encodable(encode, decode))

    @torch.no_grad()
    def settle(self) -> None:
        """Puts the values back among the allowed ones."""
        if self.hold is not None:
            self.values.copy_(self.hold(self.values))

    def render(self, rays: Rays | None = None, background: Tensor | None = None) -> Rendering:
        """The values as they are, opaque and flat; rays and background have no meaning here."""
        one = torch.ones_like(self.values[:, :1], requires_grad=False)
        return Rendering(
            rgb=self.values, opacity=one, depth=torch.zeros_like(one), depth_variance=torch.zeros_like(one)
        )
