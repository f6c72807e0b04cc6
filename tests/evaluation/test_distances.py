"""Distances between sets of features, against scipy and expectations in closed form."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import torch

from distill3d.evaluation.distances import diversity, frechet_distance, kernel_distance


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_is_the_formula_with_scipys_matrix_root_and_zero_for_itself():
    a = normal(60, 4) @ normal(4, 4, seed=1)
    b = normal(50, 4, seed=2) + torch.tensor([1.0, 0, 0, 2.0])
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca + cb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 4, rel=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(a[:1], b)


def test_kernel_distance_of_few_samples_is_right_in_the_mean():
    """A kernel of degree 1 compares means: the true value is |m|^2 gamma, for any number of samples."""
    shift = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    draws = [kernel_distance(normal(3, 3, seed=2 * i), normal(4, 3, seed=2 * i + 1) + shift, degree=1, gamma=1.0)
             for i in range(2000)]  # fmt: skip
    error = np.std(draws) / len(draws) ** 0.5
    assert abs(np.mean(draws) - 0.25) < 3.5 * error
    same = [kernel_distance(normal(3, 3, seed=2 * i), normal(4, 3, seed=2 * i + 1)) for i in range(2000)]
    assert abs(np.mean(same)) < 3.5 * np.std(same) / len(same) ** 0.5 and min(same) < 0
    assert kernel_distance(normal(400, 3), normal(400, 3, seed=1)) < kernel_distance(
        normal(400, 3), normal(400, 3, seed=1) + 1
    )
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(normal(1, 3), normal(4, 3))


def test_diversity_is_the_mean_cosine_distance_of_scipy_and_zero_for_copies():
    features = normal(4, 3, 6)
    expected = np.mean([scipy.spatial.distance.pdist(features[:, v].numpy(), "cosine").mean() for v in range(3)])
    assert diversity(features) == pytest.approx(expected, rel=1e-9)
    assert diversity(features[:1].expand(4, -1, -1)) == pytest.approx(0, abs=1e-12)
    assert diversity(torch.stack((features[0], -features[0]))) == pytest.approx(2)
    with pytest.raises(ValueError, match="at least two seeds"):
        diversity(features[:1])
