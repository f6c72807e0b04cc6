"""Score distillation as a design space: which noise, when, predicted how, against what, weighed how.

    g = w(t) (prediction(x_t, t) - reference),   x_t = alpha_t x + sigma_t kappa

Every method of the family is five functions; nothing here asks for a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distill3d.diffusion import random as draw
from distill3d.diffusion.random import Generators
from distill3d.diffusion.schedule import coefficients, expand, from_eps
from distill3d.objectives import checks
from distill3d.types import Conditioning, Guidance, Prior, Schedule


@dataclass(frozen=True)
class Query:
    """What is asked of an objective once: pull x [B, ...] towards its conditions at the times t [B]."""

    x: Tensor
    t: Tensor
    prior: Prior
    conditioning: Conditioning
    generator: Generators
    step: int
    total: int
    views: int = 1  # neighbors in the batch that are one group: the network sees them together, at one time
    # What one part found out and a later one needs, so that the network is not asked twice; see `recall`.
    notes: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def recall(self, key: object) -> Tensor:
        """What an earlier part of this very evaluation left in `notes`; ValueError if none did."""
        if key not in self.notes:
            raise ValueError(
                "this reference goes with the noise or the prediction it was made for: use both or neither"
            )
        return self.notes[key]


# The five axes. Those that may consult the prior also tell how many network rows that took.
Noise = Callable[[Query], tuple[Tensor, int]]  # -> kappa [B, ...], rows
Timesteps = Callable[[int, int, int, Generators], Tensor]  # step, total, batch, generator -> t [B]
Prediction = Callable[[Query, Tensor], tuple[Tensor, int]]  # query, x_t -> noise [B, ...], rows
Reference = Callable[[Query, Tensor, Tensor], tuple[Tensor, int]]  # query, x_t, kappa -> noise, rows
Weight = Callable[[Schedule, Tensor], Tensor]  # schedule, t [B] -> w [B]


class Stateful(Protocol):
    """What learns during a run and belongs in its checkpoints."""

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Objective:
    """A score distillation method; see methods.py for the published ones.

    views: for a multi-view prior, the batch is groups of so many neighbors, and a group shares its time, as such
    a prior was trained.
    suffixes: what the caller appends to the prompt to write the positive and the negative text; None leaves the
    positive text as it is and the negative one empty (or the user's).
    state: what the objective learns or remembers, for checkpoints.
    """

    noise: Noise
    timesteps: Timesteps
    prediction: Prediction
    reference: Reference
    weight: Weight
    views: int = 1
    suffixes: tuple[str, str] | None = None
    state: Stateful | None = None

    def __post_init__(self) -> None:
        checks.count("views", self.views)

    def build(self, prior: Prior, steps: int, generator: torch.Generator) -> Objective:
        """The objective itself, so that one of your own goes wherever the settings of a method go."""
        return self

    def loss(
        self,
        x: Tensor,
        prior: Prior,
        conditioning: Conditioning,
        *,
        step: int,
        total: int,
        generator: Generators,
    ) -> Tensor:
        """A scalar whose gradient on x is that of `guidance`, divided by the number of elements (see `attach`).

        Arguments and errors as in `guidance`.
        """
        return attach(x, self.guidance(x, prior, conditioning, step=step, total=total, generator=generator).gradient)

    @torch.no_grad()
    def guidance(
        self,
        x: Tensor,
        prior: Prior,
        conditioning: Conditioning,
        *,
        step: int,
        total: int,
        generator: Generators,
    ) -> Guidance:
        """The gradient on x [B, *prior.sample_shape] at `step` (from 0) of a run of `total` steps; no graph is kept.

        generator is one for the batch or one per sample (then a batch equals its samples one by one).
        Raises ValueError if x does not fit the prior or the conditions, or is no whole number of groups.
        """
        if tuple(x.shape[1:]) != tuple(prior.sample_shape) or len(conditioning) != len(x):
            raise ValueError(
                f"got x {list(x.shape)} with {len(conditioning)} conditions: {prior.name} needs "
                f"[B, {', '.join(map(str, prior.sample_shape))}] and one condition per sample"
            )
        if len(x) % self.views:
            raise ValueError(f"the batch must be groups of {self.views} views, got {len(x)} samples")
        x = x.detach()
        times = self.timesteps(step, total, len(x) // self.views, draw.per_group(generator, self.views))
        t = times.to(x).repeat_interleave(self.views)
        query = Query(x, t, prior, conditioning, generator, step, total, self.views)
        kappa, noise_rows = self.noise(query)
        alpha, sigma = coefficients(prior.schedule, t, x)
        x_t = alpha * x + sigma * kappa
        prediction, rows = self.prediction(query, x_t)
        reference, reference_rows = self.reference(query, x_t, kappa)
        return Guidance(
            x_t=x_t,
            t=t,
            noise=kappa,
            prediction=prediction,
            x0=from_eps("x0", prediction, x_t, alpha, sigma),
            gradient=expand(self.weight(prior.schedule, t), x) * (prediction - reference),
            nfe=noise_rows + rows + reference_rows,
        )


def attach(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar loss 0.5 mean((x - sg(x - g))^2), so that d loss / d x = g / x.numel(); x and g of one shape.

    The mean over all elements is the one scale of every method. Raises ValueError for unlike shapes.
    """
    if x.shape != gradient.shape:
        raise ValueError(f"the gradient {list(gradient.shape)} must have the shape of x {list(x.shape)}")
    target = (x - gradient).detach()
    return 0.5 * ((x - target) ** 2).mean()
