"""Guidance: the only place where its formulas are written.

One convention everywhere: e_u + s (e_c - e_u), so s = 0 is unconditional and s = 1 conditional.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.types import Condition, Conditioning, Prior


def cfg(e_u: Float[Tensor, "b *shape"], e_c: Float[Tensor, "b *shape"], scale: float) -> Float[Tensor, "b *shape"]:
    """Classifier-free guidance e_u + s (e_c - e_u) (Ho & Salimans 2022)."""
    return e_u + scale * (e_c - e_u)


def rescale(
    guided: Float[Tensor, "b *shape"], conditional: Float[Tensor, "b *shape"], fraction: float = 1.0
) -> Float[Tensor, "b *shape"]:
    """Gives `guided` the standard deviation of `conditional`, mixed with `guided` itself by fraction in [0, 1].

    Lin et al. 2023, eq. 15 and 16: large scales no longer over-expose. A sample without variance stays as it is.
    """
    dims = tuple(range(1, guided.ndim))
    correction = min(1, guided[0].numel() - 1)
    wanted, given = (e.std(dims, correction=correction, keepdim=True) for e in (conditional, guided))
    ratio = torch.where(given > 0, wanted / given, 1.0)
    return guided * (fraction * ratio + 1 - fraction)


def perp_neg(
    e_u: Float[Tensor, "b *shape"],
    e_c: Float[Tensor, "b *shape"],
    e_n: Float[Tensor, "b k *shape"],
    weights: Float[Tensor, "b k"],
    scale: float,
) -> Float[Tensor, "b *shape"]:
    """Guidance with the part of each negative that is orthogonal to the prompt (Armandpour et al. 2023).

    e_u + s (d + sum_k w_k perp(e_k - e_u, d)),  d = e_c - e_u,  perp(y, d) = y - <y, d> / <d, d> d

    Negative weights push away.
    """
    d = (e_c - e_u).flatten(1)[:, None]  # [B, 1, D]
    y = e_n.flatten(2) - e_u.flatten(1)[:, None]  # [B, K, D]
    # Where prompt and empty prompt agree there is no direction to be orthogonal to: y stays whole.
    along = (y * d).sum(-1, keepdim=True) / (d * d).sum(-1, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
    push = (weights.to(y)[..., None] * (y - along * d)).sum(1)
    return e_u + scale * (d[:, 0] + push).view_as(e_u)


def guided_prediction(
    prior: Prior, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], conditioning: Conditioning, scale: float
) -> tuple[Float[Tensor, "b *shape"], int]:
    """The guided noise at x_t, and its network function evaluations (NFE), counted in rows of the batch.

    One call of prior.predict with only the rows that matter: s = 1 leaves out the unconditional ones, s = 0 all
    others, and negatives of weight zero are not evaluated. Raises ValueError if conditioning and x_t differ in
    length, and for Perp-Neg with a multi-view prior.
    """
    b = len(x_t)
    if len(conditioning) != b:
        raise ValueError(f"got {len(conditioning)} conditions for {b} samples: pass one per sample")
    if scale == 0:
        return prior.predict(x_t, t, conditioning.negative), b
    if conditioning.perp is not None and conditioning.perp_weights is not None:
        return _perp_neg_prediction(prior, x_t, t, conditioning, conditioning.perp, conditioning.perp_weights, scale)
    if scale == 1:
        return prior.predict(x_t, t, conditioning.positive), b
    both = Condition.cat([conditioning.negative, conditioning.positive])
    e = prior.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    return cfg(e[:b], e[b:], scale), 2 * b


def _perp_neg_prediction(
    prior: Prior, x_t: Tensor, t: Tensor, conditioning: Conditioning, perp: Condition, weights: Tensor, scale: float
) -> tuple[Tensor, int]:
    if prior.views > 1:  # dropping rows of weight zero would break its groups
        raise ValueError(f"{prior.name} is a multi-view prior and does not support Perp-Neg; pass --no-perp-neg")
    weights = weights.to(x_t)
    active = weights != 0  # [B, K]
    needs_u = (active.any(1) | (scale != 1)).nonzero().squeeze(1)
    negatives, _ = active.nonzero(as_tuple=True)
    everyone = torch.arange(len(x_t), device=x_t.device)
    rows = torch.cat([everyone, needs_u, negatives])
    conditions = [conditioning.positive, conditioning.negative[needs_u], perp[active.flatten()]]
    e = prior.predict(x_t[rows], t[rows], Condition.cat(conditions))
    e_c, some_u, some_n = e.split([len(everyone), len(needs_u), len(negatives)])
    # e_c stands in for rows that were not evaluated: where s = 1 and nothing pushes, the result is e_c.
    e_u = e_c.index_copy(0, needs_u, some_u)
    e_n = e_c[:, None].repeat(1, weights.shape[1], *[1] * (e_c.ndim - 1))
    e_n[active] = some_n
    return perp_neg(e_u, e_c, e_n, weights, scale), len(rows)


class Guided:
    """A prior with B conditions and a scale as the model eps(x, t) of the DDIM loops; counts its NFE.

    guided[rows] is the model of some of the samples; their evaluations count too.
    """

    def __init__(self, prior: Prior, conditioning: Conditioning, scale: float):
        self.prior, self.conditioning, self.scale = prior, conditioning, scale
        self.nfe = 0

    def __call__(self, x: Float[Tensor, "b *shape"], t: Float[Tensor, " b"]) -> Float[Tensor, "b *shape"]:
        """Guided noise for the whole batch."""
        return self._predict(x, t, self.conditioning)

    def __getitem__(self, rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The model of the samples with these indices [N]."""
        conditioning = self.conditioning[rows]
        return lambda x, t: self._predict(x, t, conditioning)

    def _predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        eps, nfe = guided_prediction(self.prior, x, t, conditioning, self.scale)
        self.nfe += nfe
        return eps
