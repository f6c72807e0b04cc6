"""What views show of a noise atlas: passed from renderings to objectives, which know nothing of each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Texels:
    """Which texels of a noise atlas each pixel of B views of H x W latent pixels shows.

    N pairs of a texel and a pixel. A view shows a texel in one pixel at most, so that its pixels are independent.
    """

    count: int  # of the atlas
    texel: Int[Tensor, " n"]  # in [0, count)
    pixel: Int[Tensor, " n"]  # (view H + row) W + column
    counts: tuple[int, ...] | None = None  # pairs of each view, if known; they then stand one view after the other

    def of_view(self, view: int, pixels: int) -> Texels:
        """Those of one view, as if alone; pixels is H W."""
        if self.counts is not None:
            begin = sum(self.counts[:view])
            rows = slice(begin, begin + self.counts[view])
            return Texels(self.count, self.texel[rows], self.pixel[rows] - view * pixels, self.counts[view : view + 1])
        rows = (torch.div(self.pixel, pixels, rounding_mode="floor") == view).nonzero()[:, 0]
        return Texels(self.count, self.texel[rows], self.pixel[rows] - view * pixels)
