"""Numbers about pictures [N, 3, H, W] in [0, 1] alone: error, sharpness, edges, color.

Sharpness has no single number. Three are here, each against a reference set of pictures of the same things:
`sharpness` counts the energy of high frequencies and takes noise for detail; `spectrum_gap` compares the spectrum
ring by ring and punishes blur and noise alike; `edge_concentration` asks whether the change sits in few places, as
edges do, or everywhere, as mottle does.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRAY = (0.299, 0.587, 0.114)  # luma, ITU-R BT.601
# Power of a pixel, per pixel of the picture, below which a ring counts as dark: rounding to 8 bits gives 1.3e-6.
FLOOR = 1e-6


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over everything given: -10 log10 of the mean squared difference."""
    return -10 * (images - reference).square().mean().log10()


def luma(images: Tensor) -> Tensor:
    """Brightness [N, H, W] as weighed by BT.601."""
    return torch.einsum("nchw,c->nhw", images.float(), images.new_tensor(GRAY).float())


def radial_power(images: Tensor) -> Tensor:
    """Mean power [H // 2] of the luma's spectrum on rings of integer frequency 0, 1, ... below Nyquist.

    A Hann window keeps the picture's borders from posing as edges. Raises ValueError for pictures not square.
    """
    size = images.shape[-1]
    if images.shape[-2] != size:
        raise ValueError(f"the radial spectrum needs square pictures, got {list(images.shape)}")
    gray = luma(images)
    window = torch.hann_window(size, periodic=False, device=images.device)
    gray = (gray - gray.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(gray).abs().square().mean(0)
    frequency = torch.fft.fftfreq(size, 1 / size, device=images.device)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round().long()
    rings = torch.zeros(int(radius.max()) + 1, device=images.device)
    count = torch.bincount(radius.flatten())
    return (rings.index_add(0, radius.flatten(), power.flatten()) / count)[: size // 2]


def sharpness(images: Tensor, reference: Tensor, low: float = 0.25) -> float:
    """High-frequency energy of pictures, as a share of a reference set's: 1 is as sharp as the reference.

    The energy is summed over frequencies from `low` times Nyquist upwards, each ring weighed by its length. It sees
    blur. It does not see where the energy lies: mottle, grain and fog with a texture raise it as edges do, and
    higher contrast raises it by its square.
    """
    energy = []
    for pictures in (images, reference):
        power = radial_power(pictures)
        rings = torch.arange(len(power), device=power.device)
        energy.append(float((power * rings)[rings >= low * len(power)].sum()))
    return energy[0] / energy[1]


def spectrum_gap(images: Tensor, reference: Tensor) -> float:
    """Mean over the rings 1, 2, ... of |ln(power / power of the reference)|: 0 is the reference's own spectrum.

    Too little at high frequencies (blur) and too much (noise) both raise it, and so does a wrong contrast: a picture
    k times as contrasty has a gap of 2 |ln k|. It is blind to phase: a picture with the reference's spectrum and none
    of its shapes has a gap of 0, and mottle on one object may make up for blur on another. Rings below the rounding
    of 8 bits count as that dark.
    """
    size = images.shape[-1]
    if reference.shape[-1] != size:
        raise ValueError(f"spectra of one size only: got pictures of {size} and {reference.shape[-1]} pixels")
    floor = FLOOR * size * size * (3 / 8) ** 2  # the window's mean square is 3/8 in each direction
    mine, theirs = ((radial_power(p)[1:] + floor).log() for p in (images, reference))
    return float((mine - theirs).abs().mean())


def edge_concentration(images: Tensor, reference: Tensor) -> float:
    """How much the change sits in few places, as a share of the reference's: 1 is as the reference.

    For each picture E[g^2] / E[g]^2 of the luma's gradient g (central differences), averaged over the pictures. Edges
    between flat colors make it large; blur spreads the change, mottle and noise put it everywhere, and both make it
    small. It does not depend on contrast. It cannot tell a small object from a large one with crisper edges, so the
    reference should be of the same things at the same size; a picture without any change counts as 0.
    """
    return float(_concentration(images).mean() / _concentration(reference).mean())


def _concentration(images: Tensor) -> Tensor:
    gray = luma(images)
    right = (gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2]) / 2
    down = (gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]) / 2
    square = right.square() + down.square()
    mean = square.sqrt().mean((1, 2))
    return torch.where(mean > 0, square.mean((1, 2)) / mean.square().clamp_min(1e-20), 0.0)


def saturation(images: Tensor) -> float:
    """Mean chroma: the largest minus the smallest color channel, over all pixels of all pictures, in [0, 1].

    This is the numerator of HSV's saturation. The quotient itself calls the darkest noise fully saturated; chroma
    is 0 for every gray, black and white included, and 1 only for pure bright colors.
    """
    return float((images.amax(1) - images.amin(1)).mean())
