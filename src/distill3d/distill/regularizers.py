"""Regularizers of rendered views: pure functions of a `Rendering`, each a scalar mean, and how their weights change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.types import Rendering


@dataclass(frozen=True)
class WeightSchedule:
    """A weight that goes linearly from `start` to `end` between two moments of a run and is constant outside them.

    `begin` and `finish` are fractions of the run, in [0, 1]; they are rounded to whole steps. With begin = finish the
    weight jumps. Raises ValueError for negative weights and for fractions out of order.
    """

    start: float = 0.0
    end: float = 0.0
    begin: float = 0.0
    finish: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.finish <= 1:
            raise ValueError(
                f"begin and finish must satisfy 0 <= begin <= finish <= 1, got {self.begin}, {self.finish}"
            )
        if not (0 <= self.start < math.inf and 0 <= self.end < math.inf):
            raise ValueError(f"a weight must be a finite number of at least 0, got {self.start} and {self.end}")

    def __bool__(self) -> bool:
        """Whether the weight is above 0 at any time."""
        return self.start > 0 or self.end > 0

    def __call__(self, step: int, total: int) -> float:
        """The weight at a step of a run of `total` steps."""
        first, last = round(self.begin * total), round(self.finish * total)
        if step >= last:
            return self.end
        if step <= first:
            return self.start
        return self.start + (step - first) / (last - first) * (self.end - self.start)


def orientation(rendering: Rendering) -> Tensor:
    """sum_rays sum_i sg(w_i) max(0, n_i . d)^2 / (number of rays with opacity > 0); visible normals face the camera.

    Ref-NeRF, equation 11, with the weights held fixed as in DreamFusion.

    Raises:
        ValueError: if the rendering was made without normals.
    """
    if rendering.orientation is None:
        raise ValueError("orientation needs a rendering with normals, got one without")
    return rendering.orientation.sum() / (rendering.opacity > 0).sum().clamp_min(1)


def sparsity(rendering: Rendering) -> Tensor:
    """mean sqrt(o^2 + 0.01) of the opacity o (DreamFusion, appendix A); keeps empty space empty."""
    return (rendering.opacity.square() + 0.01).sqrt().mean()


def opaque(rendering: Rendering) -> Tensor:
    """mean of -o log o - (1-o) log(1-o), in nats, o clamped to [0.001, 0.999]: the entropy of the opacity."""
    o = rendering.opacity.clamp(1e-3, 1 - 1e-3)
    return -(o * o.log() + (1 - o) * torch.log1p(-o)).mean()


def z_variance(rendering: Rendering) -> Tensor:
    """Mean depth variance over the pixels with o > 0.5 (HiFA, section 3.3); makes surfaces thin.

    Exactly 0, with a gradient of 0, where no pixel is opaque.
    """
    seen = rendering.opacity > 0.5
    return torch.where(seen, rendering.depth_variance, 0.0).sum() / seen.sum().clamp_min(1)


CONVEX_BLOCKS = 8


def convexity(rendering: Rendering, camera_to_world: Tensor) -> Tensor:
    """How far neighboring normals turn towards each other; penalizes concave surfaces (SDI's recipe).

    The normal map is averaged over 8 x 8 blocks. n is a block's unit normal in the camera frame (x right, y up). Only
    blocks with a mean opacity above 0.5 count. The value is the mean over pairs of neighboring blocks of
        max(0, n_x(left) - n_x(right)) in a row, max(0, n_y(lower) - n_y(upper)) in a column.
    It is 0 for a sphere, and 0 with zero gradient for an image without such a pair. The SDI release uses world-space
    normals as displayed, (n + 1) / 2, whose y axis is not the image's; that variant is not offered.

    Args:
        camera_to_world: poses [B, 4, 4] of the views.

    Raises:
        ValueError: if the rendering was made without normals.
    """
    if rendering.normal is None:
        raise ValueError("convexity needs a rendering with normals, got one without")
    seen = F.adaptive_avg_pool2d(rendering.opacity, CONVEX_BLOCKS) > 0.5
    mean = F.adaptive_avg_pool2d(rendering.normal, CONVEX_BLOCKS)
    rotation = camera_to_world[:, :3, :3].to(mean)
    # Empty blocks are replaced before normalization, whose gradient is not finite at zero.
    mean = torch.where(seen, mean, 1.0)
    normal = F.normalize(torch.einsum("bji,bjhw->bihw", rotation, mean), dim=1, eps=1e-6)
    row = normal[:, :1, :, :-1] - normal[:, :1, :, 1:]
    column = normal[:, 1:2, 1:] - normal[:, 1:2, :-1]
    pairs = seen[..., :-1] & seen[..., 1:], seen[:, :, 1:] & seen[:, :, :-1]
    total = sum((torch.where(p, d.clamp_min(0), 0.0).sum() for p, d in zip(pairs, (row, column), strict=True)), start=0)
    return total / sum(p.sum() for p in pairs).clamp_min(1)  # type: ignore[union-attr]
