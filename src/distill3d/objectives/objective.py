"""Score distillation as a design space: which noise, at which time, predicted how, compared with what, weighted how.

    g = w(t) (prediction(x_t, t) - reference),   x_t = alpha_t x + sigma_t kappa

Every method is five functions; nothing here depends on a method's name.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.devices import at_once
from distill3d.diffusion import random as draw
from distill3d.diffusion.guidance import APG, CFG
from distill3d.diffusion.random import Generators
from distill3d.diffusion.schedule import coefficients, expand, from_eps
from distill3d.texels import Texels
from distill3d.types import Conditioning, Guidance, Prior, Schedule


@dataclass(frozen=True)
class Query:
    """One evaluation of an objective: x [B, *prior.sample_shape] with its conditions at the times t [B]."""

    x: Tensor
    t: Tensor
    prior: Prior
    conditioning: Conditioning
    generator: Generators
    step: int
    total: int
    views: int = 1  # neighbors in the batch that form a group: the network sees them together, at one time
    apg: APG = CFG  # how `prediction.guided` combines prompt and empty text
    same_images: bool = True  # whether each sample is the same image, or view, at every step
    texels: Texels | None = None  # of a noise atlas, that the views show (3D)


# The five axes. Those that may call the network also return its NFE, counted in rows.
Timesteps = Callable[[int, int, int, Generators], Tensor]  # step, total, batch, generator -> t [B]
Noise = Callable[[Query], tuple[Tensor, int]]  # -> kappa [B, ...], NFE
Prediction = Callable[[Query, Tensor], tuple[Tensor, int]]  # query, x_t -> noise [B, ...], NFE
Reference = Callable[[Query, Tensor, Tensor], tuple[Tensor, int]]  # query, x_t, kappa -> noise [B, ...], NFE
Weight = Callable[[Schedule, Tensor], Tensor]  # schedule, t [B] -> w [B]

# What a noise that stays is fixed to. "image": each sample of the batch (2D). In 3D, where views change, the pixels of
# all views alike ("constant"), those of the views from each of some azimuths ("camera"), or the object ("surface").
NoiseFrame = Literal["image", "constant", "camera", "surface"]

# Not an axis of its own: methods that are samplers take a fraction of each step, which depends on the next time too.
StepSize = Callable[[Schedule, Tensor, Tensor], Tensor]  # schedule, t [B], next t [B] -> fraction of g [B]

# A noise or a prediction may find the reference on its way; it then returns that too, as a third value, and the
# objective has no `reference` of its own.
NoiseAndReference = Callable[[Query], tuple[Tensor, int, Tensor]]
PredictionAndReference = Callable[[Query, Tensor], tuple[Tensor, int, Tensor]]


class Stateful(Protocol):
    """What learns during a run and belongs in its checkpoints."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to continue."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Objective:
    """A score distillation method; see methods.py for the published ones.

    Args:
        reference: None if noise or prediction return the reference too.
        views: for a multi-view prior. The batch consists of groups of this many neighbors, and the views of a group
            share their time, as in the training of such a prior.
        suffixes: what the caller has to append to the prompt for the positive and for the negative text; None leaves
            the positive text as it is and the negative one empty, or the user's own.
        texts: other texts that the prior has to embed.
        pull: the share of a recipe's `image_weight` that this method takes: 1 where the gradient on x is a multiple of
            x - x0_hat, so that a pull of the image to decode(x0_hat) is the same match on images, and 0 elsewhere.
        image_weight: w(t) of a loss of the method's own on images, 0.5 mean(w(t) (image - decode(x0_hat))^2).
        apg: how `prediction.guided` combines prompt and empty text.
        state: what the objective learns or remembers, for checkpoints.
        step_size: the fraction of g to take on the way to the next time of `timesteps`, which must fall and must not
            be random. The last step takes g whole; None always does.
        fixed_views: whether the samples of a batch with cameras are the same views at every step. Images always are.
        frame: what its noise is fixed to; unless "image", `guidance` has to be given the texels of the views.
    """

    noise: Noise | NoiseAndReference
    timesteps: Timesteps
    prediction: Prediction | PredictionAndReference
    reference: Reference | None
    weight: Weight
    views: int = 1
    suffixes: tuple[str, str] | None = None
    texts: tuple[str, ...] = ()
    pull: float = 0.0
    image_weight: Weight | None = None
    apg: APG = CFG
    state: Stateful | None = None
    step_size: StepSize | None = None
    fixed_views: bool = False
    frame: NoiseFrame = "image"

    def __post_init__(self) -> None:
        check_count("views", self.views)

    def build(self, prior: Prior, steps: int, generator: torch.Generator) -> Objective:
        """The objective itself: an Objective of your own can be used wherever settings of a method can."""
        return self

    def loss(
        self,
        x: Float[Tensor, "b *shape"],
        prior: Prior,
        conditioning: Conditioning,
        *,
        step: int,
        total: int,
        generator: Generators,
        texels: Texels | None = None,
    ) -> Float[Tensor, ""]:
        """A scalar whose gradient on x is that of `guidance`, divided by the number of elements (see `attach`).

        Arguments and errors as in `guidance`.
        """
        guidance = self.guidance(x, prior, conditioning, step=step, total=total, generator=generator, texels=texels)
        return attach(x, guidance.gradient)

    @torch.no_grad()
    def guidance(
        self,
        x: Float[Tensor, "b *shape"],
        prior: Prior,
        conditioning: Conditioning,
        *,
        step: int,
        total: int,
        generator: Generators,
        texels: Texels | None = None,
    ) -> Guidance:
        """The gradient on x at `step` (from 0) of a run of `total` steps; no graph is kept.

        generator is one for the batch or one per sample (then a batch equals its samples one by one). texels is what
        the views x show of a noise atlas, for an objective whose noise has a frame in 3D.
        Raises ValueError if x does not fit the prior or the conditions, or is not a whole number of groups.
        """
        if tuple(x.shape[1:]) != tuple(prior.sample_shape) or len(conditioning) != len(x):
            raise ValueError(
                f"got x {list(x.shape)} with {len(conditioning)} conditions: {prior.name} needs "
                f"[B, {', '.join(map(str, prior.sample_shape))}] and one condition per sample"
            )
        if len(x) % self.views:
            raise ValueError(f"the batch must be groups of {self.views} views, got {len(x)} samples")
        x = x.detach()
        steps = [step] if self.step_size is None or step + 1 >= total else [step, step + 1]
        t, *following = at_once(x.device, *(self._times(x, each, total, generator) for each in steps))
        same = self.fixed_views or conditioning.positive.camera is None
        query = Query(x, t, prior, conditioning, generator, step, total, self.views, self.apg, same, texels)
        kappa, noise_nfe, *found = self.noise(query)
        alpha, sigma = coefficients(prior.schedule, t, x)
        x_t = alpha * x + sigma * kappa
        prediction, prediction_nfe, *found_too = self.prediction(query, x_t)
        reference, reference_nfe = self._reference(query, x_t, kappa, [*found, *found_too])
        return Guidance(
            x_t=x_t,
            t=t,
            noise=kappa,
            prediction=prediction,
            x0=from_eps("x0", prediction, x_t, alpha, sigma),
            gradient=expand(self._weight(query, following), x) * (prediction - reference),
            nfe=noise_nfe + prediction_nfe + reference_nfe,
        )

    def _times(self, x: Tensor, step: int, total: int, generator: Generators) -> Tensor:
        times = self.timesteps(step, total, len(x) // self.views, draw.per_group(generator, self.views))
        return times.to(x.dtype).repeat_interleave(self.views)

    def _weight(self, query: Query, following: list[Tensor]) -> Tensor:
        schedule = query.prior.schedule
        weight = self.weight(schedule, query.t)
        return (
            weight
            if self.step_size is None or not following
            else self.step_size(schedule, query.t, *following) * weight
        )

    def _reference(self, query: Query, x_t: Tensor, kappa: Tensor, found: list[Tensor]) -> tuple[Tensor, int]:
        if self.reference is not None:
            return self.reference(query, x_t, kappa)
        if not found:
            raise ValueError("neither noise nor prediction return a reference: pass one, such as injected_noise")
        return found[-1], 0


def attach(x: Float[Tensor, "..."], gradient: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """A scalar loss 0.5 mean((x - sg(x - g))^2), so that d loss / d x = g / x.numel().

    The mean over all elements is the one scale of every method. Raises ValueError for unlike shapes.
    """
    if x.shape != gradient.shape:
        raise ValueError(f"the gradient {list(gradient.shape)} must have the shape of x {list(x.shape)}")
    target = (x - gradient).detach()
    return 0.5 * ((x - target) ** 2).mean()


# Settings are checked where an objective is made, not in the middle of a run.


def check_number(name: str, value: object) -> None:
    """Raises ValueError unless value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    """Raises ValueError unless value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
