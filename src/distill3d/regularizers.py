"""Penalties as pure functions of a Rendering or of a lattice; each gives a scalar, a mean over what it looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

