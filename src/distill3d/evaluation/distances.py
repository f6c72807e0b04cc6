"""Distances between sets of features [N, D], whatever made the features: Frechet, kernel, diversity."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features [N, D] and [M, D] (Heusel et al. 2017).

    Means and covariances in float64. Few samples overestimate it: compare sets of one size only.
    """
    means, covariances = [], []
    for values in (features.double(), reference.double()):
        if len(values) < 2:
            raise ValueError(f"a covariance needs at least two samples, got {len(values)}")
        means.append(values.mean(0))
        covariances.append(torch.cov(values.T).reshape(values.shape[1], values.shape[1]))
    first, second = covariances
    # The eigenvalues of C1 C2 are real and not negative: a product of two positive semidefinite matrices.
    cross = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * cross)


def kernel_distance(
    features: Tensor, reference: Tensor, degree: int = 3, gamma: float | None = None, coef: float = 1.0
) -> float:
    """Squared maximum mean discrepancy of two sets of features, unbiased (Binkowski et al. 2018, equation 4).

    The kernel is (gamma x.y + coef)^degree, gamma 1 / D by default, in float64. The mean over draws is the true
    value for any number of samples, and 0 for two sets from one source, so single values may be below 0. Unit
    embeddings want gamma 1: the kernel then is (cosine + 1)^3.

    Raises:
        ValueError: for fewer than two samples.
    """
    x, y = features.double(), reference.double()
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"an unbiased estimate needs at least two samples of each, got {n} and {m}")
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (gamma * a @ b.T + coef) ** degree

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def diversity(features: Tensor) -> float:
    """Mean distance 1 - cosine between all pairs of seeds, for features [S, V, D] of S seeds from the same V views.

    0 where all seeds look alike; in [0, 2]. It cannot tell variety from failure: broken objects differ, too.

    Raises:
        ValueError: for fewer than two seeds.
    """
    if features.ndim != 3 or len(features) < 2:
        raise ValueError(f"diversity needs features [S, V, D] of at least two seeds, got {list(features.shape)}")
    unit = torch.nn.functional.normalize(features, dim=-1)
    cosine = torch.einsum("svd,tvd->vst", unit, unit)
    first, second = torch.triu_indices(len(features), len(features), offset=1)
    return float((1 - cosine[:, first, second]).mean())
