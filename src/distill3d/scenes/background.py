"""Backgrounds: what is seen past the object, a colour per view or per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill3d.types import Cameras


@dataclass(frozen=True)
class ConstantBackground:
    """The same colour behind every view; three numbers in [0, 1], or one grey level."""

    colour: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.colour, dtype=torch.float32)
        if values.shape not in ((), (3,)) or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"a background is a grey level or three numbers in [0, 1], got {self.colour}")

    def build(self, device: torch.device | str | None = None) -> ConstantBackground:
        """The background itself: it has no parameters."""
        return self

    def __call__(self, cameras: Cameras, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Colours [B, 3]; size and generator are not used."""
        device = cameras.fov_y.device
        return torch.as_tensor(self.colour, dtype=torch.float32, device=device).expand(len(cameras), 3).clone()


@dataclass(frozen=True)
class RandomGrey:
    """A neutral grey per view, uniform in [low, high].

    A background that changes every step cannot be imitated by fog, so the volume has to become opaque or
    empty. Neutral, for saturated colours leave the pictures that a small prior was trained on.
    """

    low: float = 0.3
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"grey levels must satisfy 0 <= low <= high <= 1, got {self.low} and {self.high}")

    def build(self, device: torch.device | str | None = None) -> RandomGrey:
        """The background itself: it has no parameters."""
        return self

    def __call__(self, cameras: Cameras, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Colours [B, 3]: drawn from `generator`, or without one the middle of the range."""
        share = torch.full((len(cameras), 1), 0.5)
        if generator is not None:
            share = torch.rand(share.shape, generator=generator, device=generator.device)
        return (self.low + (self.high - self.low) * share).expand(-1, 3).to(cameras.fov_y.device).clone()
