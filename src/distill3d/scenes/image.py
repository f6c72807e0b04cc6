"""Images as a scene: their parameters are pixels, or latents of a prior. There is one view and no camera."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.types import Cameras, Lighting, Rendering, Scene

Map = Callable[[Tensor], Tensor]


def unit_range(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels clamped to [0, 1]."""
    return images.clamp(0, 1)


def encodable(encode: Map, decode: Map) -> Map:
    """A projection of latents onto those of images: decode, clamp, encode.

    Latents that are optimized directly may leave this set. Those that an encoder computes from a rendering never do.
    """
    return lambda x: encode(unit_range(decode(x)))


class ImageScene(nn.Module, Scene):
    """B images as parameters, `values` [B, C, H, W]: pixels in [0, 1], or latents.

    `project` applies `projection`, which maps values to allowed ones, in place and outside of any gradient.
    """

    def __init__(self, values: Tensor, projection: Map | None = None):
        """Starts from a copy of `values`; ValueError unless they are [B, C, H, W] and finite."""
        super().__init__()
        if values.ndim != 4 or not values.is_floating_point() or not bool(values.isfinite().all()):
            raise ValueError(f"images must be finite floats [B, C, H, W], got {list(values.shape)} {values.dtype}")
        self.values = nn.Parameter(values.detach().clone())
        self.projection = projection

    @staticmethod
    def gray(shape: Sequence[int], level: float = 0.5) -> ImageScene:
        """Pixels [B, 3, H, W] of one gray level in [0, 1]."""
        if not 0 <= level <= 1:
            raise ValueError(f"a gray level must lie in [0, 1], got {level}")
        return ImageScene(torch.full(tuple(shape), level), unit_range)

    @staticmethod
    def noise(shape: Sequence[int], generator: torch.Generator, std: float = 0.2) -> ImageScene:
        """Pixels [B, 3, H, W] drawn from N(1/2, std^2), clamped."""
        drawn = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return ImageScene(unit_range(0.5 + std * drawn), unit_range)

    @torch.no_grad()
    def project(self) -> None:
        """Maps the values to allowed ones."""
        if self.projection is not None:
            self.values.copy_(self.projection(self.values))

    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Projects the values before each step."""
        self.project()

    def render(
        self,
        cameras: Cameras | None = None,
        size: int | None = None,
        background: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        normals: bool = False,
        lighting: Lighting | None = None,
    ) -> Rendering:
        """The values as they are, opaque and flat; the arguments are not used."""
        one = torch.ones_like(self.values[:, :1], requires_grad=False)
        zero = torch.zeros_like(one)
        return Rendering(rgb=self.values, opacity=one, depth=zero, depth_variance=zero)
