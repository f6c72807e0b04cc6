"""Numbers about pictures [N, 3, H, W] in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # luma, ITU-R BT.601


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over everything given: -10 log10 of the mean squared difference."""
    return -10 * (images - reference).square().mean().log10()


def radial_power(images: Tensor) -> Tensor:
    """Mean power [H // 2] of the luma's spectrum on rings of integer frequency 0, 1, ... below Nyquist.

    A Hann window keeps the picture's borders from posing as edges. Raises ValueError for pictures not square.
    """
    size = images.shape[-1]
    if images.shape[-2] != size:
        raise ValueError(f"the radial spectrum needs square pictures, got {list(images.shape)}")
    luma = torch.einsum("nchw,c->nhw", images.float(), images.new_tensor(GREY).float())
    window = torch.hann_window(size, periodic=False, device=images.device)
    luma = (luma - luma.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(luma).abs().square().mean(0)
    frequency = torch.fft.fftfreq(size, 1 / size, device=images.device)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round().long()
    rings = torch.zeros(int(radius.max()) + 1, device=images.device)
    count = torch.bincount(radius.flatten())
    return (rings.index_add(0, radius.flatten(), power.flatten()) / count)[: size // 2]


def sharpness(images: Tensor, reference: Tensor, low: float = 0.25) -> float:
    """High-frequency energy of pictures, as a share of a reference set's: 1 is as sharp as the reference.

    The energy is summed over frequencies from `low` times Nyquist upwards, each ring weighed by its length.
    """
    energy = []
    for pictures in (images, reference):
        power = radial_power(pictures)
        rings = torch.arange(len(power), device=power.device)
        energy.append(float((power * rings)[rings >= low * len(power)].sum()))
    return energy[0] / energy[1]


def saturation(images: Tensor) -> float:
    """Mean chroma: the largest minus the smallest colour channel, over all pixels of all pictures, in [0, 1].

    This is the numerator of HSV's saturation. The quotient itself calls the darkest noise fully saturated; chroma
    is 0 for every grey, black and white included, and 1 only for pure bright colours.
    """
    return float((images.amax(1) - images.amin(1)).mean())


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
