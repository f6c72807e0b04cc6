"""How the network is asked at x_t: functions (query, x_t) -> (noise [B, ...], network rows)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill3d.diffusion.guidance import cfg, guided_prediction, rescale
from distill3d.diffusion.schedule import coefficients, from_eps, to_eps
from distill3d.objectives import checks
from distill3d.objectives.objective import Prediction, Query, Reference
from distill3d.types import Condition, Conditioning

Text = Callable[[Query], Condition]  # what the network is told: one row per sample
Amount = float | Callable[[Query], Tensor]  # how much that counts: a number, or one per sample [B]


def guided(scale: float) -> Prediction:
    """Classifier-free guidance e_u + s (e_c - e_u), with Perp-Neg where the conditions carry it.

    Raises ValueError if scale is not a finite number.
    """
    checks.number("scale", scale)

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        return guided_prediction(query.prior, x_t, query.t, query.conditioning, scale)

    return prediction


def rescaled(scale: float, fraction: float = 0.5) -> Prediction:
    """Guidance whose x0_hat has, by this fraction, the standard deviation of the conditional x0_hat.

    Lin et al. 2023, eq. 15 and 16, on x0_hat and over all views of a group together, as MVDream (Shi et al. 2023)
    does it. Raises ValueError unless scale is a finite number and fraction lies in [0, 1].
    """
    checks.number("scale", scale)
    checks.share("rescale", fraction)

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        everyone = torch.ones(2, len(x_t), dtype=torch.bool, device=x_t.device)
        (e_u, e_c), rows = _told(query, x_t, (negative, prompt), everyone)
        levels = coefficients(query.prior.schedule, query.t, x_t)
        full, conditional = (
            from_eps("x0", e, x_t, *levels).unflatten(0, (-1, query.views)) for e in (cfg(e_u, e_c, scale), e_c)
        )
        return to_eps("x0", rescale(full, conditional, fraction).flatten(0, 1), x_t, *levels), rows

    return prediction


def prompt(query: Query) -> Condition:
    """The positive text of each sample's condition; in `contrast`, with its Perp-Neg push."""
    return query.conditioning.positive


def negative(query: Query) -> Condition:
    """The empty (or the user's negative) text of each sample's condition."""
    return query.conditioning.negative


def words(text: str) -> Text:
    """The same text for every sample, beside whatever else its condition says of it."""

    def told(query: Query) -> Condition:
        of = query.conditioning.positive
        return replace(query.prior.embed([text] * len(query.x)), control=of.control, camera=of.camera)

    return told


def contrast(prediction: Mapping[Text, Amount], reference: Mapping[Text, Amount]) -> tuple[Prediction, Reference]:
    """Two sums, amount times what the network says at x_t when told a text, from ONE network call.

    The pair belongs into one Objective. A sample is not shown to the network under a text that counts zero
    in both sums. Perp-Neg moves e_c to e_c + sum_k w_k perp(e_k - e_u, e_c - e_u), as in guided prediction.
    """
    texts = list(dict.fromkeys([*prediction, *reference]))
    key = object()

    def predict(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
        first, second = (_amounts(terms, texts, query) for terms in (prediction, reference))
        e, rows = _told(query, x_t, texts, (first != 0) | (second != 0))
        query.notes[key] = _sum(second, e)
        return _sum(first, e), rows

    def refer(query: Query, x_t: Tensor, kappa: Tensor) -> tuple[Tensor, int]:
        return query.recall(key), 0

    return predict, refer


def guided_against(
    scale: float, reference: Mapping[Text, Amount], goal: Text = prompt, source: Text = negative
) -> tuple[Prediction, Reference]:
    """The contrast of e_source + s (e_goal - e_source) with a sum; ValueError unless scale is a finite number."""
    checks.number("scale", scale)
    return contrast({goal: scale, source: 1 - scale}, reference)


def _amounts(terms: Mapping[Text, Amount], texts: Sequence[Text], query: Query) -> Tensor:
    """[K, B] for K texts."""
    values = [terms.get(text, 0.0) for text in texts]
    return torch.stack([(v(query) if callable(v) else query.t.new_tensor(v)).expand(len(query.x)) for v in values])


def _sum(amounts: Tensor, e: Tensor) -> Tensor:
    return (amounts.to(e).reshape(*amounts.shape, *[1] * (e.ndim - 2)) * e).sum(0)


def _told(query: Query, x_t: Tensor, texts: Sequence[Text], wanted: Tensor) -> tuple[Tensor, int]:
    """Noise [K, B, ...] under K texts where wanted [K, B], zero elsewhere; and the rows of the one call."""
    rows = wanted.flatten().nonzero().squeeze(1)
    sample = rows % len(x_t)
    # At scale 1 guidance is e_c plus the Perp-Neg push, and asks for nothing else where nothing pushes.
    e, count = guided_prediction(query.prior, x_t[sample], query.t[sample], _stacked(query, texts)[rows], 1.0)
    out = e.new_zeros(wanted.numel(), *e.shape[1:]).index_copy(0, rows, e)
    return out.unflatten(0, tuple(wanted.shape)), count


def _stacked(query: Query, texts: Sequence[Text]) -> Conditioning:
    """K B conditions: each text as positive of every sample, Perp-Neg beside the prompt only."""
    told = query.conditioning
    positive = Condition.cat([text(query) for text in texts])
    empty = Condition.cat([told.negative] * len(texts))
    if told.perp is None or told.perp_weights is None:
        return Conditioning(positive, empty)
    weights = torch.cat([told.perp_weights * float(text is prompt) for text in texts])
    return Conditioning(positive, empty, Condition.cat([told.perp] * len(texts)), weights)
