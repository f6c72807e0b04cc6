"""A Gaussian mixture as prior: the score is exact at every t, in any dimension, for any schedule.

It needs no network and no training, so statements about samplers and objectives can be checked against closed
forms, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.diffusion.schedule import coefficients, stable_diffusion
from distill3d.prompts import DIRECTIONS
from distill3d.types import Condition, Prior, Schedule


class MixturePrior(Prior):
    """sum_k w_k N(mean_k, diag(std_k^2)), each condition being a sub-mixture; implements the Prior protocol.

    encode and decode are the identity: an image is a sample. The empty text allows all components.
    """

    def __init__(
        self,
        means: Float[Tensor, " k *x"],
        stds: Tensor | float = 1.0,
        weights: Tensor | None = None,
        conditions: Mapping[str, Sequence[int]] | None = None,
        schedule: Schedule | None = None,
        name: str = "mixture",
    ):
        """A mixture of K components.

        Args:
            means: [K, *sample_shape].
            stds: a number, [K] (isotropic) or shaped like means (diagonal); positive.
            weights: [K], positive, equal by default.
            conditions: text -> the components it allows. "x" also stands for its view texts, "x, front view" etc.,
                unless these are conditions themselves.
            schedule: default `schedule.stable_diffusion()`.
            name: used in messages.

        Raises ValueError for shapes, weights or components that do not fit.
        """
        if means.ndim < 2:
            raise ValueError(f"means must be [K, ...] with K components, got shape {list(means.shape)}")
        k = len(means)
        stds = torch.as_tensor(stds, dtype=means.dtype, device=means.device)
        if stds.ndim <= 1:
            stds = stds.expand(k).reshape(-1, *[1] * (means.ndim - 1))
        if not bool((stds > 0).all()):
            raise ValueError("stds must be positive")
        weights = torch.ones(k).to(means) if weights is None else weights.to(means)
        if weights.shape != (k,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {k} positive numbers, one per component")
        conditions = conditions or {}
        for text, parts in conditions.items():
            if not parts or not all(0 <= i < k for i in parts):
                raise ValueError(f"condition {text!r} must name components from 0 to {k - 1}, got {list(parts)}")
        self.means, self.stds, self.weights = means, stds.expand_as(means), weights / weights.sum()
        self.conditions, self.name, self.device = conditions, name, means.device
        self.schedule: Schedule = schedule or stable_diffusion()
        self.sample_shape, self.image_size = tuple(means.shape[1:]), means.shape[-1]

    def encode(self, images: Float[Tensor, " b *x"]) -> Float[Tensor, " b *x"]:
        """Returns the images as they are."""
        return images

    def decode(self, x: Float[Tensor, " b *x"]) -> Float[Tensor, " b *x"]:
        """Returns x as it is."""
        return x

    def embed(self, texts: Sequence[str]) -> Condition:
        """The weights of the sub-mixture of each text, hidden [N, 1, K]; ValueError for an unknown text."""
        rows = []
        for text in texts:
            parts = self._components(text)
            row = torch.zeros_like(self.weights)
            row[parts] = self.weights[parts]
            rows.append(row / row.sum())
        return Condition(torch.stack(rows)[:, None])

    def predict(
        self, x_t: Float[Tensor, " n *x"], t: Float[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, " n *x"]:
        """The exact noise [N, *sample_shape] in x_t's dtype, E[eps | x_t], for t [N] and a condition of N rows.

        x_t ~ sum_k w_k N(alpha m_k, alpha^2 s_k^2 + sigma^2), and eps = -sigma grad log p(x_t).
        """
        alpha, sigma = coefficients(self.schedule, t, x_t[:, None])  # [N, 1, ...]
        variance = (alpha * self.stds.to(x_t)) ** 2 + sigma**2  # [N, K, ...]
        distance = x_t[:, None] - alpha * self.means.to(x_t)
        log_density = -0.5 * (distance**2 / variance + variance.log()).flatten(2).sum(-1)
        posterior = torch.softmax(log_density + condition.hidden[:, 0].to(x_t).log(), dim=1)  # [N, K]
        posterior = posterior.reshape(*posterior.shape, *[1] * (x_t.ndim - 1))
        return (sigma * posterior * distance / variance).sum(1)

    def _components(self, text: str) -> list[int]:
        if not text:
            return list(range(len(self.means)))
        stems = (text.removesuffix(f", {direction} view") for direction in DIRECTIONS)
        stem = next((known for known in (text, *stems) if known in self.conditions), None)
        if stem is None:
            known = ", ".join(map(repr, self.conditions)) or "none"
            raise ValueError(f"unknown condition {text!r}: this mixture knows {known} and the empty text")
        return list(self.conditions[stem])
