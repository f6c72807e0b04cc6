"""Distances between sets of feature vectors: Frechet distance, kernel distance (MMD), diversity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> float:
    """Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features (Heusel et al. 2017).

    Means and covariances are computed in float64. Small sets overestimate it, so compare sets of equal size only.

    Raises:
        ValueError: for fewer than two samples.
    """
    means, covariances = [], []
    for values in (features.double(), reference.double()):
        if len(values) < 2:
            raise ValueError(f"a covariance needs at least two samples, got {len(values)}")
        means.append(values.mean(0))
        covariances.append(torch.cov(values.T).reshape(values.shape[1], values.shape[1]))
    first, second = covariances
    # The eigenvalues of C1 C2 are real and not negative, as C1 and C2 are positive semidefinite.
    cross = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * cross)


def kernel_distance(
    features: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of features (Binkowski et al. 2018, equation 4).

    The kernel is (gamma x.y + coef)^degree in float64, with gamma = 1 / d by default. The estimate has the correct
    mean for any number of samples. That mean is 0 for two sets from one distribution, so single values can be
    negative. Use gamma = 1 for unit embeddings: the kernel is then (cosine + 1)^3.

    Raises:
        ValueError: for fewer than two samples.
    """
    x, y = features.double(), reference.double()
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"an unbiased estimate needs at least two samples of each set, got {n} and {m}")
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (gamma * a @ b.T + coef) ** degree

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def diversity(features: Float[Tensor, "seeds views d"]) -> float:
    """Mean of 1 - cosine over all pairs of seeds and all views, in [0, 2]; 0 if all seeds look alike.

    It cannot tell variety from failure, because broken objects differ from each other as well.

    Raises:
        ValueError: for fewer than two seeds.
    """
    if len(features) < 2:
        raise ValueError(f"diversity needs features [S, V, D] of at least two seeds, got {list(features.shape)}")
    unit = torch.nn.functional.normalize(features, dim=-1)
    cosine = torch.einsum("svd,tvd->vst", unit, unit)
    first, second = torch.triu_indices(len(features), len(features), offset=1)
    return float((1 - cosine[:, first, second]).mean())
