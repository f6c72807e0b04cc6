"""Guidance: the only place where its formulas are written.

One convention everywhere: e_u + s (e_c - e_u), so s = 0 is unconditional and s = 1 conditional.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.devices import marked, on_host
from distill3d.diffusion.schedule import coefficients, from_eps, to_eps
from distill3d.types import Condition, Conditioning, Prior


def cfg(e_u: Float[Tensor, "b *shape"], e_c: Float[Tensor, "b *shape"], scale: float) -> Float[Tensor, "b *shape"]:
    """Classifier-free guidance e_u + s (e_c - e_u) (Ho & Salimans 2022)."""
    return e_u + scale * (e_c - e_u)


@dataclass(frozen=True)
class APG:
    """Settings of `adaptive_projected`. The default is classifier-free guidance itself; the paper takes parallel=0.

    Raises ValueError unless parallel lies in [0, 1] and the threshold is 0 or above.
    """

    parallel: float = 1.0
    """Weight of the part of guidance that is parallel to the conditional x0_hat, in [0, 1]; it saturates colors."""
    threshold: float = 0.0
    """Largest norm of x0_hat's difference between prompt and empty text, over a whole sample; 0 is no limit."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.parallel <= 1.0 or not 0.0 <= self.threshold < float("inf"):
            raise ValueError(
                f"parallel must lie in [0, 1] and threshold be 0 (none) or above, got {self.parallel} and "
                f"{self.threshold}"
            )


CFG = APG()  # classifier-free guidance itself


def adaptive_projected(
    x0_u: Float[Tensor, "b *shape"], x0_c: Float[Tensor, "b *shape"], scale: float, settings: APG
) -> Float[Tensor, "b *shape"]:
    """x0_c + (s - 1) d', adaptive projected guidance of denoised images (Sadat et al. 2024, algorithm 1).

    d' is d = x0_c - x0_u, shortened to the threshold r and with its part along x0_c weighted:

    d' = perp(d, x0_c) + parallel <d, x0_c> / <x0_c, x0_c> x0_c,   d <- d min(1, r / |d|) first

    The paper's momentum follows one sample through its steps. A run in 3D has no such sample, so it is left out.
    """
    d, along = (x0_c - x0_u).flatten(1), x0_c.flatten(1)
    tiny = torch.finfo(d.dtype).tiny
    if settings.threshold > 0:
        d = d * (settings.threshold / d.norm(dim=1, keepdim=True).clamp(min=tiny)).clamp(max=1)
    part = (d * along).sum(1, keepdim=True) / (along * along).sum(1, keepdim=True).clamp(min=tiny) * along
    return x0_c + (scale - 1) * (d - (1 - settings.parallel) * part).view_as(x0_c)


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
    prior: Prior,
    x_t: Float[Tensor, "b *shape"],
    t: Float[Tensor, " b"],
    conditioning: Conditioning,
    scale: float,
    apg: APG = CFG,
) -> tuple[Float[Tensor, "b *shape"], int]:
    """The guided noise at x_t, and its network function evaluations (NFE), counted in rows of the batch.

    One call of prior.predict with only the rows that matter: s = 1 leaves out the unconditional ones, s = 0 all
    others, and negatives of weight zero are not evaluated. With other settings than CFG the two denoised images are
    combined by `adaptive_projected`, a Perp-Neg push counting as part of the prompt. Raises ValueError if conditioning
    and x_t differ in length, and for Perp-Neg with a multi-view prior.
    """
    b = len(x_t)
    if len(conditioning) != b:
        raise ValueError(f"got {len(conditioning)} conditions for {b} samples: pass one per sample")
    if scale == 0:
        return prior.predict(x_t, t, conditioning.negative), b
    if conditioning.perp is not None and conditioning.perp_weights is not None:
        return _perp_neg_prediction(
            prior, x_t, t, conditioning, conditioning.perp, conditioning.perp_weights, scale, apg
        )
    if scale == 1:
        return prior.predict(x_t, t, conditioning.positive), b
    both = Condition.cat([conditioning.negative, conditioning.positive])
    e = prior.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    return _combined(prior, x_t, t, e[:b], e[b:], scale, apg), 2 * b


def _combined(prior: Prior, x_t: Tensor, t: Tensor, e_u: Tensor, e_c: Tensor, scale: float, apg: APG) -> Tensor:
    if apg == CFG:
        return cfg(e_u, e_c, scale)
    levels = coefficients(prior.schedule, t, x_t)
    x0_u, x0_c = (from_eps("x0", e, x_t, *levels) for e in (e_u, e_c))
    return to_eps("x0", adaptive_projected(x0_u, x0_c, scale, apg), x_t, *levels)


def _perp_neg_prediction(
    prior: Prior,
    x_t: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    perp: Condition,
    weights: Tensor,
    scale: float,
    apg: APG,
) -> tuple[Tensor, int]:
    if prior.views > 1:  # dropping rows of weight zero would break its groups
        raise ValueError(
            f"{prior.name} is a multi-view prior and does not support Perp-Neg; pass --set recipe.perp_neg=false"
        )
    pushes, weights = on_host(weights) != 0, weights.to(x_t)
    active = weights != 0  # as pushes [B, K]
    needs_u = marked(active.any(1) | (scale != 1), int((pushes.any(1) | (scale != 1)).sum()))
    pushing = marked(active.flatten(), int(pushes.sum()))
    negatives = torch.div(pushing, weights.shape[1], rounding_mode="floor")
    everyone = torch.arange(len(x_t), device=x_t.device)
    rows = torch.cat([everyone, needs_u, negatives])
    conditions = [conditioning.positive, conditioning.negative[needs_u], perp[pushing]]
    e = prior.predict(x_t[rows], t[rows], Condition.cat(conditions))
    e_c, some_u, some_n = e.split([len(everyone), len(needs_u), len(negatives)])
    # e_c stands in for rows that were not evaluated: where s = 1 and nothing pushes, the result is e_c.
    e_u = e_c.index_copy(0, needs_u, some_u)
    e_n = e_c.repeat_interleave(weights.shape[1], 0).index_copy(0, pushing, some_n).unflatten(0, weights.shape)
    if apg == CFG:
        return perp_neg(e_u, e_c, e_n, weights, scale), len(rows)
    return _combined(prior, x_t, t, e_u, perp_neg(e_u, e_c, e_n, weights, 1.0), scale, apg), len(rows)


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
