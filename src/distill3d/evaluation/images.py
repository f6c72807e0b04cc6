"""Metrics of images [N, 3, H, W] in [0, 1] alone: error, sharpness, edges, color.

No single number measures sharpness. There are three here, each relative to reference images of the same things:
`sharpness` sums the energy at high frequencies and counts noise as detail; `spectrum_gap` compares the spectra ring
by ring and penalizes blur and noise alike; `edge_concentration` measures whether the gradient is concentrated in few
pixels, as at edges, or spread out, as in mottled images.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

GRAY = (0.299, 0.587, 0.114)  # luma weights, ITU-R BT.601
# Power per pixel (divided by the number of pixels) below which a ring counts as dark; 8-bit rounding gives 1.3e-6.
FLOOR = 1e-6


def psnr(images: Float[Tensor, "*shape"], reference: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB over all values: -10 log10 of the mean squared error."""
    return -10 * (images - reference).square().mean().log10()


def luma(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n h w"]:
    """Brightness with the weights of BT.601."""
    return torch.einsum("nchw,c->nhw", images.float(), images.new_tensor(GRAY).float())


def radial_power(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " frequencies"]:
    """Mean power [H // 2] of the luma's spectrum on rings of integer frequency 0, 1, ... below Nyquist.

    A Hann window keeps the borders of the image from looking like edges.

    Raises:
        ValueError: if the images are not square.
    """
    size = images.shape[-1]
    if images.shape[-2] != size:
        raise ValueError(f"the radial spectrum needs square images, got {list(images.shape)}")
    gray = luma(images)
    window = torch.hann_window(size, periodic=False, device=images.device)
    gray = (gray - gray.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(gray).abs().square().mean(0)
    frequency = torch.fft.fftfreq(size, 1 / size, device=images.device)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round().long()
    rings = torch.zeros(int(radius.max()) + 1, device=images.device)
    count = torch.bincount(radius.flatten())
    return (rings.index_add(0, radius.flatten(), power.flatten()) / count)[: size // 2]


def sharpness(images: Float[Tensor, "n 3 h w"], reference: Float[Tensor, "m 3 y x"], low: float = 0.25) -> float:
    """High-frequency energy of images relative to that of reference images; 1 is as sharp as the reference.

    The energy is summed over frequencies from `low` times Nyquist upwards, with each ring weighted by its length.
    It detects blur. It does not see where the energy lies: mottle, grain and textured fog raise it as edges do, and
    contrast raises it quadratically.
    """
    energy = []
    for part in (images, reference):
        power = radial_power(part)
        rings = torch.arange(len(power), device=power.device)
        energy.append(float((power * rings)[rings >= low * len(power)].sum()))
    return energy[0] / energy[1]


def spectrum_gap(images: Float[Tensor, "n 3 h w"], reference: Float[Tensor, "m 3 y x"]) -> float:
    """Mean over the rings 1, 2, ... of |ln(power / power of the reference)|; 0 is the spectrum of the reference.

    Too little power at high frequencies (blur) and too much (noise) both raise it, and so does the wrong contrast:
    k times the contrast gives 2 |ln k|. It ignores phase: images with the spectrum of the reference and none of its
    shapes have a gap of 0, and mottle in one image can compensate blur in another. Power below that of 8-bit rounding
    is clamped.

    Raises:
        ValueError: if images and reference differ in size.
    """
    size = images.shape[-1]
    if reference.shape[-1] != size:
        raise ValueError(f"spectra of one size only: got images of {size} and {reference.shape[-1]} pixels")
    floor = FLOOR * size * size * (3 / 8) ** 2  # the window's mean square is 3/8 in each direction
    ours, theirs = ((radial_power(part)[1:] + floor).log() for part in (images, reference))
    return float((ours - theirs).abs().mean())


def edge_concentration(images: Float[Tensor, "n 3 h w"], reference: Float[Tensor, "m 3 y x"]) -> float:
    """How concentrated the gradient is in few pixels, relative to the reference; 1 is as concentrated.

    For each image E[g^2] / E[g]^2 of the luma's gradient g (central differences), averaged over the images. Edges
    between flat colors make it large. Blur widens the edges, mottle and noise add gradients everywhere, and both make
    it small. It does not depend on contrast. It cannot tell a small object from a large one with crisper edges, so
    the reference should show the same things at the same size. A constant image counts as 0.
    """
    return float(_concentration(images).mean() / _concentration(reference).mean())


def _concentration(images: Tensor) -> Tensor:
    gray = luma(images)
    right = (gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2]) / 2
    down = (gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]) / 2
    square = right.square() + down.square()
    mean = square.sqrt().mean((1, 2))
    return torch.where(mean > 0, square.mean((1, 2)) / mean.square().clamp_min(1e-20), 0.0)


def saturation(images: Float[Tensor, "n 3 h w"]) -> float:
    """Mean chroma: the largest minus the smallest color channel, over all pixels of all images, in [0, 1].

    This is the numerator of HSV's saturation. HSV's quotient calls the darkest noise fully saturated; chroma is 0
    for every gray, including black and white, and 1 only for pure bright colors.
    """
    return float((images.amax(1) - images.amin(1)).mean())
