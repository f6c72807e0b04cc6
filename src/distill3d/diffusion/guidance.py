"""Guidance: the only place where its formulas are written.

One convention everywhere: e_u + s (e_c - e_u), so s = 0 is unconditional and s = 1 conditional.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill3d.types import Condition, Conditioning, Prior


def cfg(e_u: Tensor, e_c: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance e_u + s (e_c - e_u) (Ho & Salimans 2022); all [B, ...]."""
    return e_u + scale * (e_c - e_u)


def rescale(guided: Tensor, conditional: Tensor, fraction: float = 1.0) -> Tensor:
    """Gives `guided` [B, ...] the standard deviation of `conditional`, mixed in by fraction in [0, 1].

    Lin et al. 2023, eq. 15 and 16: large scales no longer over-expose.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (fraction * ratio + 1 - fraction)


def perp_neg(e_u: Tensor, e_c: Tensor, e_n: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Guidance with the part of each negative that is orthogonal to the prompt (Armandpour et al. 2023).

    e_u + s (d + sum_k w_k perp(e_k - e_u, d)),  d = e_c - e_u,  perp(y, d) = y - <y, d> / <d, d> d

    e_u and e_c [B, ...], e_n [B, K, ...], weights [B, K] (negative ones push away).
    """
    d = (e_c - e_u).flatten(1)[:, None]  # [B, 1, D]
    y = e_n.flatten(2) - e_u.flatten(1)[:, None]  # [B, K, D]
    # Where prompt and empty prompt agree there is no direction to be orthogonal to: y stays whole.
    along = (y * d).sum(-1, keepdim=True) / (d * d).sum(-1, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
    push = (weights.to(y)[..., None] * (y - along * d)).sum(1)
    return e_u + scale * (d[:, 0] + push).view_as(e_u)


def guided_prediction(
    prior: Prior, x_t: Tensor, t: Tensor, conditioning: Conditioning, scale: float
) -> tuple[Tensor, int]:
    """The guided noise at x_t [B, ...], t [B], and how many rows the network was shown.

    One call of prior.predict with only the rows that matter: s = 1 leaves out the unconditional ones, s = 0
    shows nothing else, and negatives of weight zero are not evaluated. Raises ValueError if conditioning
    and x_t differ in length, and for Perp-Neg with a multi-view prior.
    """
    b = len(x_t)
    if len(conditioning) != b:
        raise ValueError(f"got {len(conditioning)} conditions for {b} samples: pass one per sample")
    if scale == 0:
        return prior.predict(x_t, t, conditioning.negative), b
    if conditioning.perp is None or conditioning.perp_weights is None:
        if scale == 1:
            return prior.predict(x_t, t, conditioning.positive), b
        text = Condition.cat([conditioning.negative, conditioning.positive])
        e = prior.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), text)
        return cfg(e[:b], e[b:], scale), 2 * b
    return _perp_neg_prediction(prior, x_t, t, conditioning, scale)


def _perp_neg_prediction(prior, x_t, t, conditioning, scale) -> tuple[Tensor, int]:
    if prior.views > 1:  # dropping rows of weight zero would break its groups
        raise ValueError(f"{prior.name} is a multi-view prior and does not support Perp-Neg; pass --no-perp-neg")
    weights = conditioning.perp_weights.to(x_t)
    wanted = weights != 0  # [B, K]
    pushed = wanted.any(1)
    needs_u = (pushed | (scale != 1)).nonzero().squeeze(1)
    views, _ = wanted.nonzero(as_tuple=True)
    everyone = torch.arange(len(x_t), device=x_t.device)
    rows = torch.cat([everyone, needs_u, views])
    text = [conditioning.positive, conditioning.negative[needs_u], conditioning.perp[wanted.flatten()]]
    e = prior.predict(x_t[rows], t[rows], Condition.cat(text))
    e_c, some_u, some_n = e.split([len(everyone), len(needs_u), len(views)])
    # e_c stands in for rows that were not asked for: where s = 1 and nothing pushes, the result is e_c.
    e_u = e_c.index_copy(0, needs_u, some_u)
    e_n = e_c[:, None].repeat(1, weights.shape[1], *[1] * (e_c.ndim - 1))
    e_n[wanted] = some_n
    return perp_neg(e_u, e_c, e_n, weights, scale), len(rows)


class Guided:
    """A prior with its conditions and scale as the model eps(x, t, rows) of the DDIM loops; counts rows."""

    def __init__(self, prior: Prior, conditioning: Conditioning, scale: float):
        self.prior, self.conditioning, self.scale = prior, conditioning, scale
        self.nfe = 0

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """Guided noise for the samples `rows` [N] of the batch: x [N, ...], t [N]."""
        every = len(rows) == len(self.conditioning)
        conditioning = self.conditioning if every else self.conditioning[rows]
        eps, count = guided_prediction(self.prior, x, t, conditioning, self.scale)
        self.nfe += count
        return eps
