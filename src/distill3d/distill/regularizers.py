"""Penalties as pure functions of a Rendering or of a lattice; each gives a scalar, a mean over what it looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.types import Rendering


@dataclass(frozen=True)
class WeightSchedule:
    """A weight that goes linearly from `start` to `end` between two steps and is constant outside them."""

    start: float
    end: float
    begin_step: int = 0
    end_step: int = 0

    def __post_init__(self) -> None:
        if self.end_step < self.begin_step:
            raise ValueError(f"end_step must not lie before begin_step, got {self.end_step} < {self.begin_step}")

    def __call__(self, step: int) -> float:
        """The weight at a step; a jump when both steps are the same."""
        if step >= self.end_step:
            return self.end
        if step <= self.begin_step:
            return self.start
        share = (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.start + share * (self.end - self.start)


def orientation(rendering: Rendering) -> Tensor:
    """sum_rays sum_i sg(w_i) max(0, n_i . d)^2 / (rays that hit anything): seen surfaces face the camera.

    Ref-NeRF, equation 11, with the weights held fixed as in DreamFusion.

    Raises:
        ValueError: if the rendering was made without normals.
    """
    if rendering.orientation is None:
        raise ValueError("orientation needs a rendering with normals, got one without")
    return rendering.orientation.sum() / (rendering.opacity > 0).sum().clamp_min(1)


def sparsity(rendering: Rendering) -> Tensor:
    """mean sqrt(o^2 + 0.01) of the opacity o (DreamFusion, appendix A): empty space stays empty."""
    return (rendering.opacity.square() + 0.01).sqrt().mean()


def opaque(rendering: Rendering) -> Tensor:
    """mean of -o log o - (1-o) log(1-o), in nats, o clamped to [0.001, 0.999]: pixels are hit or missed."""
    o = rendering.opacity.clamp(1e-3, 1 - 1e-3)
    return -(o * o.log() + (1 - o) * torch.log1p(-o)).mean()


def z_variance(rendering: Rendering) -> Tensor:
    """Mean depth variance of the pixels with o > 0.5 (HiFA, section 3.3): thin surfaces.

    Exactly 0, with a gradient of 0, where no pixel is opaque.
    """
    seen = rendering.opacity > 0.5
    return torch.where(seen, rendering.depth_variance, 0.0).sum() / seen.sum().clamp_min(1)


CONVEX_BLOCKS = 8


def convexity(rendering: Rendering, camera_to_world: Tensor) -> Tensor:
    """How far neighboring normals turn towards each other: seen from anywhere, surfaces bulge (SDI's recipe).

    The picture is averaged over 8 x 8 blocks. n is a block's normal, made unit, in the camera's frame (x right, y up);
    a block counts where its mean opacity is above 0.5. The value is the mean, over pairs of blocks that both count, of
        max(0, n_x(left) - n_x(right)) for neighbors in a row, max(0, n_y(lower) - n_y(upper)) for those in a column.
    A ball has 0. So has, with a gradient of 0, a picture without such a pair. The SDI release takes world-space
    normals as they are displayed, (n + 1) / 2, whose y axis is not the picture's: that is not offered here.

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
    # What does not count is replaced before it is made unit: its gradient would not be finite.
    mean = torch.where(seen, mean, 1.0)
    normal = F.normalize(torch.einsum("bji,bjhw->bihw", rotation, mean), dim=1, eps=1e-6)
    row = normal[:, :1, :, :-1] - normal[:, :1, :, 1:]
    column = normal[:, 1:2, 1:] - normal[:, 1:2, :-1]
    pairs = seen[..., :-1] & seen[..., 1:], seen[:, :, 1:] & seen[:, :, :-1]
    total = sum((torch.where(p, d.clamp_min(0), 0.0).sum() for p, d in zip(pairs, (row, column), strict=True)), start=0)
    return total / sum(p.sum() for p in pairs).clamp_min(1)  # type: ignore[union-attr]
