"""Backgrounds of renderings: a color per view or per pixel."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.cameras import rays
from distill3d.types import Cameras


@dataclass(frozen=True)
class ConstantBackground:
    """The same color behind every view: three numbers in [0, 1], or one gray level."""

    color: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.color, dtype=torch.float32)
        if values.shape not in ((), (3,)) or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"a background must be a gray level or three numbers in [0, 1], got {self.color}")

    def build(self, device: torch.device | str | None = None) -> ConstantBackground:
        """Returns itself, because it has no parameters."""
        return self

    def __call__(self, cameras: Cameras, size: int, generator: torch.Generator | None = None) -> Float[Tensor, "b 3"]:
        """The color of each view; size and generator are not used."""
        channels = [self.color] * 3 if isinstance(self.color, int | float) else self.color
        return torch.stack([torch.full((len(cameras),), float(c), device=cameras.fov_y.device) for c in channels], 1)


@dataclass(frozen=True)
class RandomGray:
    """A neutral gray per view, uniform in [low, high].

    Fog cannot imitate a background that changes at every step, so the volume has to become opaque or empty. It is
    neutral because saturated colors are unlike the images that a small prior was trained on.
    """

    low: float = 0.3
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"gray levels must satisfy 0 <= low <= high <= 1, got {self.low} and {self.high}")

    def build(self, device: torch.device | str | None = None) -> RandomGray:
        """Returns itself, because it has no parameters."""
        return self

    def __call__(self, cameras: Cameras, size: int, generator: torch.Generator | None = None) -> Float[Tensor, "b 3"]:
        """Gray levels drawn from `generator`, or without one the middle of the range; size is not used."""
        u = torch.full((len(cameras), 1), 0.5)
        if generator is not None:
            u = torch.rand(u.shape, generator=generator, device=generator.device)
        return (self.low + (self.high - self.low) * u).expand(-1, 3).to(cameras.fov_y.device).clone()


@dataclass(frozen=True)
class LearnedBackground:
    """A small network that gives the color in each direction; see `BackgroundNetwork`."""

    hidden: int = 16  # width of each layer
    layers: int = 2  # hidden ones
    scale: float = 0.1  # of the recipe's learning rate
    seed: int = 0  # of the initial weights

    def __post_init__(self) -> None:
        if min(self.hidden, self.layers) < 1 or self.scale < 0:
            raise ValueError(
                "hidden and layers must be at least 1 and scale at least 0, "
                f"got {self.hidden}, {self.layers} and {self.scale}"
            )

    def build(self, device: torch.device | str | None = None) -> BackgroundNetwork:
        """A network with these settings."""
        return BackgroundNetwork(self, device)


class BackgroundNetwork(nn.Module):
    """Color = sigmoid(MLP(spherical harmonics of the direction)); ReLU between layers, no biases.

    The first 16 harmonics are too smooth to show an object in the background.
    """

    def __init__(self, options: LearnedBackground = LearnedBackground(), device: torch.device | str | None = None):
        super().__init__()
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)
        widths = [16, *[options.hidden] * options.layers, 3]
        self.weights = nn.ParameterList(
            ((2 * torch.rand(b, a, generator=generator) - 1) * a**-0.5).to(device)
            for a, b in itertools.pairwise(widths)
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group at `options.scale`; see `Scene.parameter_groups`."""
        return [{"params": list(self.parameters()), "scale": self.options.scale}]

    def color(self, directions: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
        """Colors in [0, 1] in unit directions."""
        x = harmonics(directions)
        for weight in self.weights[:-1]:
            x = torch.relu(x @ weight.T)
        return torch.sigmoid(x @ self.weights[-1].T)

    def forward(
        self, cameras: Cameras, size: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b 3 size size"]:
        """Square images of `size` pixels; the generator is not used."""
        return self.color(rays(cameras, size, size).directions).permute(0, 3, 1, 2)


def harmonics(directions: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 16"]:
    """The 16 real spherical harmonics of degree 0 to 3 at unit directions; orthonormal.

    As polynomials (Sloan 2008, "Stupid Spherical Harmonics Tricks", appendix A2), without the phase (-1)^m.
    """
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    terms = [0.28209479 * torch.ones_like(x), 0.48860251 * y, 0.48860251 * z, 0.48860251 * x]
    terms += [1.09254843 * x * y, 1.09254843 * y * z, 0.31539157 * (3 * zz - 1)]
    terms += [1.09254843 * x * z, 0.54627422 * (xx - yy)]
    terms += [0.59004359 * y * (3 * xx - yy), 2.89061144 * x * y * z, 0.45704580 * y * (5 * zz - 1)]
    terms += [0.37317633 * z * (5 * zz - 3), 0.45704580 * x * (5 * zz - 1)]
    terms += [1.44530572 * z * (xx - yy), 0.59004359 * x * (xx - 3 * yy)]
    return torch.stack(terms, -1)


BackgroundOptions = ConstantBackground | RandomGray | LearnedBackground
