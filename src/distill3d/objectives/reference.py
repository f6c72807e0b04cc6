"""What the prediction is compared with: functions (query, x_t, kappa) -> (noise [B, ...], NFE)."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill3d.diffusion.guidance import cfg
from distill3d.diffusion.random import Generators
from distill3d.objectives.objective import Query, Reference, check_count, check_fraction
from distill3d.types import Conditioning


def injected_noise(
    query: Query, x_t: Float[Tensor, "b *shape"], kappa: Float[Tensor, "b *shape"]
) -> tuple[Float[Tensor, "b *shape"], int]:
    """The noise that was put into x_t."""
    return kappa, 0


def zero(
    query: Query, x_t: Float[Tensor, "b *shape"], kappa: Float[Tensor, "b *shape"]
) -> tuple[Float[Tensor, "b *shape"], int]:
    """Zero: the same mean gradient under random noise as `injected_noise`, with far more variance."""
    return torch.zeros_like(kappa), 0


class Student(Protocol):
    """A second network, which learns the distribution of the images that are being made."""

    def predict(
        self,
        x_t: Float[Tensor, "n *shape"],
        t: Float[Tensor, " n"],
        conditioning: Conditioning,
        with_camera: Bool[Tensor, " n"],
    ) -> Float[Tensor, "n *shape"]:
        """The noise for N rows; those that are not with_camera are predicted without their camera."""
        ...

    def learn(self, x: Float[Tensor, "b *shape"], conditioning: Conditioning, generator: Generators) -> int:
        """One training step on the clean samples x; returns its NFE."""
        ...


def student(model: Student, camera: float = 1.0, steps: int = 1, lookahead: bool = False) -> Reference:
    """e_0 + camera (e_camera - e_0) of the student, without and with its camera, from one call of it.

    Afterwards the student takes `steps` training steps on x: the two alternate, as in ProlificDreamer (Wang et al.
    2023); with lookahead it takes them before (Lin et al. 2025). Raises ValueError unless camera lies in [0, 1] and
    steps is 1 or more.
    """
    check_fraction("camera", camera)
    check_count("student_steps", steps)
    kinds = [with_camera for with_camera, amount in ((True, camera), (False, 1 - camera)) if amount > 0]

    def train(query: Query) -> int:
        return sum(model.learn(query.x, query.conditioning, query.generator) for _ in range(steps))

    def reference(query: Query, x_t: Tensor, kappa: Tensor) -> tuple[Tensor, int]:
        b, nfe = len(x_t), train(query) if lookahead else 0
        rows = torch.arange(b, device=x_t.device).repeat(len(kinds))
        with_camera = torch.cat([torch.full((b,), kind, device=x_t.device) for kind in kinds])
        e = model.predict(x_t[rows], query.t[rows], query.conditioning[rows], with_camera)
        out = cfg(e[b:], e[:b], camera) if len(kinds) == 2 else e
        return out, len(rows) + (nfe if lookahead else train(query))

    return reference
