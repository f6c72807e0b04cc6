"""What the prediction is compared with: functions (query, x_t, kappa) -> (noise [B, ...], network rows)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distill3d.diffusion.guidance import cfg
from distill3d.diffusion.random import Generators
from distill3d.objectives import checks
from distill3d.objectives.noise import INTERVAL_START
from distill3d.objectives.objective import Query, Reference
from distill3d.types import Conditioning


def injected_noise(query: Query, x_t: Tensor, kappa: Tensor) -> tuple[Tensor, int]:
    """The very noise that was put into x_t."""
    return kappa, 0


def nothing(query: Query, x_t: Tensor, kappa: Tensor) -> tuple[Tensor, int]:
    """Zero: same mean gradient under random noise, far more variance."""
    return torch.zeros_like(kappa), 0


def interval_start(query: Query, x_t: Tensor, kappa: Tensor) -> tuple[Tensor, int]:
    """The unconditional noise from which noise.interval_inversion hopped to x_t (ISM)."""
    return query.recall(INTERVAL_START), 0


class Student(Protocol):
    """A second model, of the pictures that are being made rather than of those that are wanted."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, with_camera: Tensor) -> Tensor:
        """Noise for N rows; with_camera [N] (bool) says which are conditioned on their camera."""
        ...

    def learn(self, x: Tensor, conditioning: Conditioning, generator: Generators) -> int:
        """One training step on the pictures x [B, ...]; returns the rows the network was shown."""
        ...


def student(model: Student, camera: float = 1.0) -> Reference:
    """e_0 + camera (e_camera - e_0) of the student, with and without its camera, in one call of it.

    Afterwards the student takes one training step on x: the two of them alternate, as in ProlificDreamer.
    Raises ValueError unless camera lies in [0, 1].
    """
    checks.share("camera", camera)
    kinds = [told for told, amount in ((True, camera), (False, 1 - camera)) if amount > 0]

    def reference(query: Query, x_t: Tensor, kappa: Tensor) -> tuple[Tensor, int]:
        b = len(x_t)
        rows = torch.arange(b, device=x_t.device).repeat(len(kinds))
        with_camera = torch.tensor(kinds, device=x_t.device).repeat_interleave(b)
        e = model.predict(x_t[rows], query.t[rows], query.conditioning[rows], with_camera)
        out = cfg(e[b:], e[:b], camera) if len(kinds) == 2 else e
        return out, len(rows) + model.learn(query.x, query.conditioning, query.generator)

    return reference
