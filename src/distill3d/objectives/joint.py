"""Two priors in one objective: one of photographs for the looks, a multi-view one for the agreement of the views."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distill3d.diffusion import random as draw
from distill3d.diffusion.guidance import cfg
from distill3d.diffusion.schedule import coefficients, from_eps
from distill3d.objectives import noise, reference, timesteps, weighting
from distill3d.objectives.objective import Objective, Query, check_fraction, check_number
from distill3d.objectives.prediction import negative as negative_text
from distill3d.objectives.prediction import noise_under_texts, rescaled
from distill3d.objectives.prediction import positive as positive_text
from distill3d.types import Conditioning, Prior


def jsd(
    guide: Prior, scale: float = 31.0, weight: float = 1.25, guide_scale: float = 50.0, start: float = 0.12
) -> Objective:
    """g = sigma^2 (eps' - kappa), eps' = eps_s + sigma weight grad_{x_t} E, kappa ~ N(0, I).

    E = 1/2 |x0_u(x_t) - y|^2 is the disagreement of the run's prior with the guide: x0_u is the unconditional estimate
    of the prior, with its network held fixed, so that grad E = (x0_u - y) / alpha; y is the guide's estimate, as
    `mvdream` rescales it, from x with a fresh noise at the same t. So x goes where p(x) exp(-weight E) is high: to
    photographs of views that the multi-view guide agrees with.

    Joint score distillation (JointDreamer, Jiang et al. 2024), for a prior of single views and a multi-view guide.
    Constants: its public code, whose weight 5 is divided by its batch of 4, and whose prior sees x_t times the opacity
    in E, which is left out here. E comes in after the fraction `start` of the run; t is as in `mvdream`, over 0.6.

    Args:
        guide: a prior with the sample shape and the text encoder of the run's prior, as MVDream and Stable Diffusion
            2.1 at one image size; it reads the same text embeddings.
        scale: guidance scale of the prior.
        weight: of E.
        guide_scale: guidance scale of the guide.

    Raises ValueError for settings out of range and, in a step, for priors whose samples differ in shape.
    """
    for name, value in (("scale", scale), ("weight", weight), ("guide_scale", guide_scale)):
        check_number(name, value)
    check_fraction("start", start)
    estimate = rescaled(guide_scale)

    def guided_by(query: Query) -> tuple[Tensor, int]:
        """y, and its NFE."""
        if tuple(guide.sample_shape) != tuple(query.prior.sample_shape):
            raise ValueError(
                f"{guide.name} has samples {list(guide.sample_shape)}, {query.prior.name} "
                f"{list(query.prior.sample_shape)}: load both with one image size"
            )
        conditioning = Conditioning(query.conditioning.positive, query.conditioning.negative)
        if conditioning.positive.camera is not None:
            conditioning = conditioning.with_camera(conditioning.positive.camera, negative=not guide.camera_guidance)
        levels = coefficients(guide.schedule, query.t, query.x)
        x_t = levels[0] * query.x + levels[1] * draw.normal(query.x, query.generator)
        e, nfe = estimate(replace(query, prior=guide, conditioning=conditioning), x_t)
        return from_eps("x0", e, x_t, *levels), nfe

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        everywhere = torch.ones(2, len(x_t), dtype=torch.bool)
        (e_u, e_c), nfe = noise_under_texts(query, x_t, [negative_text, positive_text], everywhere)
        e = cfg(e_u, e_c, scale)
        if query.step < start * query.total:
            return e, nfe
        alpha, sigma = coefficients(query.prior.schedule, query.t, x_t)
        y, more = guided_by(query)
        return e + sigma / alpha * weight * (from_eps("x0", e_u, x_t, alpha, sigma) - y), nfe + more

    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.moving((0.98, 0.98), (0.02, 0.5), over=0.6),
        prediction=prediction,
        reference=reference.injected_noise,
        weight=weighting.noise_variance,
        views=guide.views,
    )
