"""A scene fitted to pictures: what a representation and its renderer can do, without any diffusion model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill3d.types import Cameras, Scene


@dataclass(frozen=True)
class Fitting:
    """How a scene is fitted. The loss is the mean of |d| times l1_weight plus that of d^2, d the difference."""

    steps: int = 600
    views: int = 4  # a step
    learning_rate: float = 0.02  # times the scale of each group of parameters
    decay: float = 0.7  # share of the steps at the end over which the rate falls to a twentieth
    l1_weight: float = 0.2
    adam_eps: float = 1e-15
    seed: int = 0  # of the order of the views and the jitter of samples

    def __post_init__(self) -> None:
        if self.steps < 1 or self.views < 1:
            raise ValueError(f"fitting needs at least one step and one view, got {self.steps} and {self.views}")

    def rate(self, step: int) -> float:
        """Learning rate: constant, then an exponential fall to a twentieth."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * 0.05 ** (1 - min(1.0, left))


def fit(
    scene: Scene,
    cameras: Cameras,
    images: Tensor,
    background: Tensor,
    fitting: Fitting = Fitting(),
    penalties: dict[str, float] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fits a scene, in place, to square pictures [V, 3, S, S] in [0, 1] that were taken by V cameras.

    Args:
        background: what was behind the object, a color [3].
        penalties: weights of the scene's own regularizers by name; others are left out.
        on_step: called with the step and its loss after each step.

    Raises:
        ValueError: where pictures and cameras do not match, or the scene has no such penalty.
    """
    if len(images) != len(cameras) or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"{len(cameras)} cameras need as many square pictures, got {list(images.shape)}")
    weights = penalties or {}
    unknown = weights.keys() - scene.penalties().keys()
    if unknown:
        raise ValueError(f"a {type(scene).__name__} has no penalty {', '.join(sorted(unknown))}")
    module: Any = scene
    module.train()
    generator = torch.Generator().manual_seed(fitting.seed)
    optimizer = torch.optim.Adam(scene.parameter_groups(), betas=(0.9, 0.99), eps=fitting.adam_eps)
    waiting = torch.empty(0, dtype=torch.long)
    for step in range(fitting.steps):
        scene.adapt(step, fitting.steps, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = fitting.rate(step) * group["scale"]
        if len(waiting) < min(fitting.views, len(images)):  # every view is seen as often as every other
            waiting = torch.cat((waiting, torch.randperm(len(images), generator=generator)))
        rows, waiting = waiting[: fitting.views], waiting[fitting.views :]
        behind = background.to(images).expand(len(rows), 3)
        out = scene.render(cameras[rows], images.shape[-1], behind, generator=generator)
        difference = out.rgb - images[rows]
        loss = fitting.l1_weight * difference.abs().mean() + difference.square().mean()
        for name, weight in weights.items():
            loss = loss + weight * scene.penalties()[name]()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        on_step(step, float(loss.detach()))
    module.eval()


@torch.no_grad()
def psnr(scene: Scene, cameras: Cameras, images: Tensor, background: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10 of the mean squared error over all pictures [V, 3, S, S]."""
    errors = [
        (scene.render(cameras[i : i + 1], images.shape[-1], background.to(images)[None]).rgb[0] - image).square().mean()
        for i, image in enumerate(images)
    ]
    return -10 * math.log10(max(float(torch.stack(errors).mean()), 1e-12))
