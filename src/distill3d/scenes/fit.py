"""Fits a scene to images: what a representation and its renderer can do, without a diffusion model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.types import Cameras, Scene


@dataclass(frozen=True)
class Fitting:
    """How a scene is fitted. The loss is l1_weight mean |d| + mean d^2 of the difference d."""

    steps: int = 600
    views: int = 4  # per step
    learning_rate: float = 0.02  # times the scale of each group of parameters
    decay: float = 0.7  # fraction of the steps, at the end, over which the rate falls to a twentieth
    l1_weight: float = 0.2
    adam_eps: float = 1e-15
    seed: int = 0  # of the order of the views and the jitter of samples

    def __post_init__(self) -> None:
        if self.steps < 1 or self.views < 1:
            raise ValueError(f"steps and views must be at least 1, got {self.steps} and {self.views}")

    def rate(self, step: int) -> float:
        """Learning rate: constant, then an exponential fall to a twentieth."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * 0.05 ** (1 - min(1.0, left))


def fit(
    scene: Scene,
    cameras: Cameras,
    images: Float[Tensor, "v 3 s s"],
    background: Float[Tensor, " 3"],
    fitting: Fitting = Fitting(),
    penalties: dict[str, float] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fits a scene, in place, to square images in [0, 1] that were taken by V cameras.

    Args:
        background: the color behind the object.
        penalties: weights of the scene's own regularizers by name; others are not used.
        on_step: called with the step and its loss after each step.

    Raises:
        ValueError: where images and cameras do not match, or the scene has no such penalty.
    """
    if len(images) != len(cameras) or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"{len(cameras)} cameras need as many square images, got {list(images.shape)}")
    weights = penalties or {}
    unknown = weights.keys() - scene.penalties().keys()
    if unknown:
        raise ValueError(f"a {type(scene).__name__} has no penalty {', '.join(sorted(unknown))}")
    scene.train()
    generator = torch.Generator().manual_seed(fitting.seed)
    optimizer = torch.optim.Adam(scene.parameter_groups(), betas=(0.9, 0.99), eps=fitting.adam_eps)
    queue = torch.empty(0, dtype=torch.long)
    for step in range(fitting.steps):
        scene.adapt(step, fitting.steps, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = fitting.rate(step) * group["scale"]
        if len(queue) < min(fitting.views, len(images)):  # all views are used equally often
            queue = torch.cat((queue, torch.randperm(len(images), generator=generator)))
        rows, queue = queue[: fitting.views], queue[fitting.views :]
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
    scene.eval()


@torch.no_grad()
def psnr(scene: Scene, cameras: Cameras, images: Float[Tensor, "v 3 s s"], background: Float[Tensor, " 3"]) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10 of the mean squared error over all images."""
    errors = [
        (scene.render(cameras[i : i + 1], images.shape[-1], background.to(images)[None]).rgb[0] - image).square().mean()
        for i, image in enumerate(images)
    ]
    return -10 * math.log10(max(float(torch.stack(errors).mean()), 1e-12))
