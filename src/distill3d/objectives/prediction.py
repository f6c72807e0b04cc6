"""How the network is used at x_t: functions (query, x_t) -> (noise [B, ...], NFE), some with the reference too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.devices import at_once, on_host
from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import cfg, guided_prediction, rescale
from distill3d.diffusion.schedule import coefficients, from_eps, to_eps
from distill3d.objectives.objective import Prediction, PredictionAndReference, Query, check_fraction, check_number
from distill3d.types import Condition, Conditioning, Schedule

Text = Callable[[Query], Condition]  # the condition of each sample
Coefficient = float | Callable[[Query], Tensor]  # a number, or one per sample [B], on the host


def guided(scale: float) -> Prediction:
    """Classifier-free guidance e_u + s (e_c - e_u), with Perp-Neg where the conditioning has it, or `Objective.apg`.

    Raises ValueError if scale is not a finite number.
    """
    check_number("scale", scale)

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        return guided_prediction(query.prior, x_t, query.t, query.conditioning, scale, query.apg)

    return prediction


def effective_guidance(scale: float, inversion_scale: float, c: float = 0.5) -> float:
    """W = (w - c g) / (1 - c): the guidance that SDI amounts to near the end of a run.

    There the gradient of SDI, predicted at scale w with a kappa found at scale g, is -rho^2 (1 - c) times the score of
    p_W ~ p(x | prompt)^W p(x)^(1 - W), so x moves to a mode of p_W. c is the kappa that was found over the one that
    solves equation 8: 1/2 for exact inversion (W = 2 w - g), (n - 1) / (2 n) for one of n equal steps (so 7.5 and -7.5
    with ten act like 19.8), 0 for random noise, towards 1 for a solver at the same time. docs/theory.md has the
    derivation.

    Raises ValueError unless all are finite numbers and c is not 1, where no W is left.
    """
    for name, value in (("scale", scale), ("inversion_scale", inversion_scale), ("c", c)):
        check_number(name, value)
    if c == 1:
        raise ValueError("c must not be 1: an exact solution of equation 8 at the same time has no effective guidance")
    return (scale - c * inversion_scale) / (1 - c)


def prediction_scale(nominal: float, inversion_scale: float, c: float) -> float:
    """w = (1 - c) W + c g: the scale to predict at, so that the effective guidance is `nominal` (W).

    c as in `effective_guidance`. Raises ValueError unless all are finite numbers.
    """
    for name, value in (("nominal", nominal), ("inversion_scale", inversion_scale), ("c", c)):
        check_number(name, value)
    return nominal + c * (inversion_scale - nominal)


def inversion_factor(schedule: Schedule, t: Float[Tensor, " b"], steps: int) -> Float[Tensor, " b"]:
    """c of `noise.ddim_inversion` in hops of 1/steps to t + tau, averaged over tau ~ U[0, 1/steps).

    Hop k from rho_k to rho_(k+1) adds (rho_(k+1) - rho_k) rho_k times the score to a path that ends at rho_n =
    rho(t + tau), so c = sum_k (rho_(k+1) - rho_k) rho_k / (rho_n rho(t)): (n - 1) / (2 n) for n equal hops to t itself.
    To first order in rho, and without eta.
    """
    draws = 16
    tau = (torch.arange(draws, dtype=t.dtype, device=t.device) + 0.5) / (draws * steps)  # midpoints
    ends = (t + tau[:, None]).clamp(max=1.0)  # [16, B]
    times = torch.cat([ddim.ascending(ends.flatten(), steps), t.repeat(draws)[None]])
    alpha, sigma = coefficients(schedule, times.flatten(), times.new_empty(times.numel()))
    *path, here = (sigma / alpha).view(-1, *ends.shape)
    total = torch.stack([(b - a) * a for a, b in itertools.pairwise(path)]).sum(0)
    return (total / (path[-1] * here)).mean(0)


def nominal(scale: float, inversion_scale: float, steps: int) -> Prediction:
    """Guided prediction for SDI by `noise.ddim_inversion(steps, inversion_scale)` whose effective guidance is `scale`.

    It predicts at `prediction_scale` with the inversion's own c (`inversion_factor`) at the time of the step. Raises
    ValueError unless both scales are finite numbers, and in a step whose samples differ in time.
    """
    prediction_scale(scale, inversion_scale, 0.5)  # raises ValueError

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        t = on_host(query.t)
        if bool((t != t[0]).any()):
            raise ValueError(f"nominal guidance needs one time for all samples of a step, got {t.tolist()}")
        c = inversion_factor(query.prior.schedule, t[:1], steps).item()
        return guided(prediction_scale(scale, inversion_scale, c))(query, x_t)

    return prediction


def rescaled(scale: float, fraction: float = 0.5) -> Prediction:
    """Guidance whose x0_hat is rescaled, by this fraction, to the standard deviation of the conditional x0_hat.

    Lin et al. 2023, eq. 15 and 16, on x0_hat and over all views of a group together, as in MVDream (Shi et al. 2023).
    Raises ValueError unless scale is a finite number and fraction lies in [0, 1].
    """
    check_number("scale", scale)
    check_fraction("rescale", fraction)

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        everywhere = torch.ones(2, len(x_t), dtype=torch.bool)
        (e_u, e_c), nfe = noise_under_texts(query, x_t, [negative, positive], everywhere)
        levels = coefficients(query.prior.schedule, query.t, x_t)
        full, conditional = (
            from_eps("x0", e, x_t, *levels).unflatten(0, (-1, query.views)) for e in (cfg(e_u, e_c, scale), e_c)
        )
        return to_eps("x0", rescale(full, conditional, fraction).flatten(0, 1), x_t, *levels), nfe

    return prediction


def balanced(denoising: float = 1.25) -> PredictionAndReference:
    """kappa + rms(e_u - kappa) m, and kappa as reference: m = a c + (1 - a) d is the shortest vector between c and d.

    c = e_c - e_u and d = denoising (e_u - kappa); a = <d - c, d> / |d - c|^2, in [0, 1], for each sample (Huang et al.
    2024). Raises ValueError unless denoising is a finite number.
    """
    check_number("denoising", denoising)

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int, Tensor]:
        everywhere = torch.ones(2, len(x_t), dtype=torch.bool)
        (e_u, e_c), nfe = noise_under_texts(query, x_t, [negative, positive], everywhere)
        kappa = to_eps("x0", query.x, x_t, *coefficients(query.prior.schedule, query.t, x_t))
        denoise = (e_u - kappa).flatten(1)
        c, d = (e_c - e_u).flatten(1), denoising * denoise
        square = (d - c).square().sum(1, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
        a = (((d - c) * d).sum(1, keepdim=True) / square).clamp(0, 1)
        size = denoise.square().mean(1, keepdim=True).sqrt()
        return kappa + (size * (a * c + (1 - a) * d)).view_as(kappa), nfe, kappa

    return prediction


def positive(query: Query) -> Condition:
    """The positive condition of each sample; in `linear_combination` it comes with its Perp-Neg push."""
    return query.conditioning.positive


def negative(query: Query) -> Condition:
    """The negative condition of each sample: the empty prompt, or the user's negative one."""
    return query.conditioning.negative


def fixed_text(text: str) -> Text:
    """The same text for every sample; camera and ControlNet image stay those of the sample."""

    def condition(query: Query) -> Condition:
        own = query.conditioning.positive
        return replace(query.prior.embed([text] * len(query.x)), control=own.control, camera=own.camera)

    return condition


def without_negative(query: Query) -> Query:
    """The query with the empty text as the negative one, for methods that show a user's negative words to no e_u."""
    return replace(query, conditioning=replace(query.conditioning, negative=fixed_text("")(query)))


def linear_combination(
    prediction: Mapping[Text, Coefficient], reference: Mapping[Text, Coefficient]
) -> PredictionAndReference:
    """Prediction and reference as two sums of coefficient times e(x_t | text), from ONE network call.

    A sample is not evaluated under a text whose coefficient is zero in both sums. Perp-Neg moves the noise under
    `positive` to e_c + sum_k w_k perp(e_k - e_u, e_c - e_u), as in guided prediction.
    """
    texts = list(dict.fromkeys([*prediction, *reference]))

    def coefficients_of(terms: Mapping[Text, Coefficient], query: Query) -> Tensor:  # [K, B] on the host
        values, t = [terms.get(text, 0.0) for text in texts], on_host(query.t)
        values = [on_host(value(query)) if callable(value) else t.new_tensor(value) for value in values]
        return torch.stack([value.expand(len(query.x)) for value in values])

    def predict(query: Query, x_t: Tensor) -> tuple[Tensor, int, Tensor]:
        sums = [coefficients_of(terms, query) for terms in (prediction, reference)]
        e, nfe = noise_under_texts(query, x_t, texts, (sums[0] != 0) | (sums[1] != 0))
        sums = at_once(e.device, *sums)
        predicted, compared = ((c.to(e).reshape(*c.shape, *[1] * (e.ndim - 2)) * e).sum(0) for c in sums)
        return predicted, nfe, compared

    return predict


def noise_under_texts(query: Query, x_t: Tensor, texts: list[Text], where: Tensor) -> tuple[Tensor, int]:
    """Noise [K, B, ...] under K texts where `where` [K, B] (host) is true, zero elsewhere; the NFE of the one call."""
    own, k = query.conditioning, len(texts)
    each = Condition.cat([text(query) for text in texts])  # K B rows
    conditioning = Conditioning(each, Condition.cat([own.negative] * k))
    if own.perp is not None and own.perp_weights is not None:  # beside the prompt only
        weights = torch.cat([own.perp_weights * float(text is positive) for text in texts])
        conditioning = replace(conditioning, perp=Condition.cat([own.perp] * k), perp_weights=weights)
    rows = torch.arange(where.numel(), device=x_t.device)
    if not bool(where.all()):
        (rows,) = at_once(x_t.device, where.flatten().nonzero().squeeze(1))
    sample = rows % len(x_t)
    # At scale 1 guidance is e_c plus the Perp-Neg push, and evaluates nothing else where nothing pushes.
    e, nfe = guided_prediction(query.prior, x_t[sample], query.t[sample], conditioning[rows], 1.0)
    out = e.new_zeros(where.numel(), *e.shape[1:]).index_copy(0, rows, e)
    return out.unflatten(0, tuple(where.shape)), nfe
