"""Compositing of Gaussian footprints by fragments: a fragment is one splat at one pixel.

Every footprint's box is expanded into pixels, the visible fragments are sorted by pixel (they come nearest first, and
the sort is stable), and the run of each pixel is composited by differences of one cumulative sum of log(1 - alpha).
With g_i = dL/dw_i for the weights w_i = T_i alpha_i of a run, the backward pass is
    dL/dalpha_i = T_i g_i - (sum_{j>i} g_j w_j) / (1 - alpha_i),
and the gradients of the center and the conic of a splat are moments of its fragments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Footprints:
    """The G splats of one view on the screen, nearest first; pixels, (0, 0) is the top left corner."""

    center: Float[Tensor, "g 2"]  # column and row
    conic: Float[Tensor, "g 3"]  # entries (cc, cr, rr) of the inverse covariance
    opacity: Float[Tensor, " g"]  # in (0, 1)
    features: Float[Tensor, "g c"]  # composited like colors
    reach: Float[Tensor, "g 2"]  # half the sides of the box outside which alpha is below min_alpha


@dataclass(frozen=True)
class SplatSampling:
    """Constants of the rasterizer; the values are the original's, or gsplat's where the two differ."""

    blur: float = 0.3  # pixels squared, added to both variances of a footprint
    near: float = 0.2  # world units; splats whose mean is nearer, or behind the camera, are not drawn
    min_alpha: float = 1 / 255  # fainter fragments are skipped
    max_alpha: float = 0.999  # so that what lies behind keeps a gradient
    chunk: int = 1 << 22  # fragments (or pixels times splats, in the reference) held at once: bounds the memory


def composite(footprints: Footprints, size: int, sampling: SplatSampling) -> Float[Tensor, "pixels c"]:
    """Features of all pixels, row by row, composited front to back; differentiable.

    The image is processed in bands of rows of about `sampling.chunk` fragments each.
    """
    box = _boxes(footprints.center, footprints.reach, size)
    fragments = int(box[:, 2:].prod(1).sum())
    if not fragments:
        return footprints.features.new_zeros(size * size, footprints.features.shape[1]) + 0 * footprints.features.sum()
    bands = math.ceil(fragments / sampling.chunk)
    height = math.ceil(size / bands)
    parts = (footprints.center, footprints.conic, footprints.opacity, footprints.features, box)
    rows = [
        _Composite.apply(*parts, size, (top, min(size, top + height)), sampling, fragments if bands == 1 else None)
        for top in range(0, size, height)
    ]
    return torch.cat(rows)


@torch.no_grad()
def _boxes(center: Tensor, reach: Tensor, size: int) -> Tensor:
    """First column and row, width and height [G, 4] of the pixels whose centers a footprint's box holds."""
    slack = 1e-3  # pixels: the box is rounded differently from alpha
    # Clamped before it becomes an integer: a footprint may be anywhere.
    low = (center - reach - 0.5 - slack).clamp(-1, size).ceil().clamp_min(0).long()
    high = (center + reach - 0.5 + slack).clamp(-1, size).floor().clamp_max(size - 1).long()
    extent = (high - low + 1).clamp_min(0)
    return torch.cat((low, extent * (extent.amin(1, keepdim=True) > 0)), 1)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, center, conic, opacity, features, box, size, band, sampling, count) -> Tensor:
        owner, column, row = _expand(box, band, count)
        dx = (column + 0.5).to(center) - center[:, 0].index_select(0, owner)
        dy = (row + 0.5).to(center) - center[:, 1].index_select(0, owner)
        cc, cr, rr = (entry.index_select(0, owner) for entry in conic.unbind(1))
        power = (cc * dx + 2 * cr * dy).mul_(dx).add_(rr.mul_(dy).mul_(dy)).mul_(-0.5)
        alpha = power.exp_().mul_(opacity.index_select(0, owner))

        if alpha.device.type == "cpu":
            keep = (alpha >= sampling.min_alpha).nonzero()[:, 0]
        else:  # their number would be waited for: fragments without alpha add nothing
            alpha = torch.where(alpha >= sampling.min_alpha, alpha, 0.0)
            keep = torch.arange(len(alpha), device=alpha.device)
        pixel = ((row - band[0]) * size + column).index_select(0, keep)
        order, first = by_pixel(owner.index_select(0, keep), pixel, len(center), (band[1] - band[0]) * size)
        pixel, order = pixel.index_select(0, order), keep.index_select(0, order)
        owner, dx, dy, alpha = (values.index_select(0, order) for values in (owner, dx, dy, alpha))
        free = alpha < sampling.max_alpha
        alpha = alpha.clamp_max_(sampling.max_alpha)

        transmittance = _sum_before(torch.log1p(-alpha), pixel, first).exp().to(alpha)
        ctx.save_for_backward(center, conic, opacity, features, owner, pixel, first, dx, dy, alpha, transmittance, free)
        return _sum_rows(transmittance * alpha, owner, pixel, first, features)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        center, conic, opacity, features, owner, pixel, first, dx, dy, alpha, transmittance, free = ctx.saved_tensors
        gradient, splats = gradient.contiguous(), len(center)
        weight = transmittance * alpha
        on_weight = (features.index_select(0, owner) * gradient.index_select(0, pixel)).sum(1)
        on_features = _sum_columns(weight, owner, pixel, first, gradient, splats)

        behind = _sum_after(on_weight * weight, pixel, first).to(alpha)
        on_alpha = (transmittance * on_weight - behind / (1 - alpha)) * free
        on_power = on_alpha * alpha

        x, y = on_power * dx, on_power * dy
        moments = [_sum_by(owner, v, splats) for v in (on_power, x, y, x * dx, x * dy, y * dy)]
        zero, mx, my, mxx, mxy, myy = moments
        cc, cr, rr = conic.unbind(1)
        on_center = torch.stack((cc * mx + cr * my, cr * mx + rr * my), 1)
        on_conic = torch.stack((-0.5 * mxx, -mxy, -0.5 * myy), 1)
        return on_center, on_conic, zero / opacity, on_features, None, None, None, None, None


def _sum_before(values: Tensor, pixel: Tensor, first: Tensor) -> Tensor:
    """Sum of the values [K] of the same pixel that come before each one, for fragments ordered by pixel.

    In double precision, because the cumulative sum runs over all pixels. MPS has none: there the CPU computes it.
    """
    if values.device.type == "mps":
        return _sum_before(values.cpu(), pixel.cpu(), first.cpu()).float().to(values.device)
    values = values.double()
    before = values.cumsum(0) - values
    return before - before.index_select(0, first.index_select(0, pixel))


def _sum_after(values: Tensor, pixel: Tensor, first: Tensor) -> Tensor:
    """The same for the values that come after each one."""
    if values.device.type == "mps":
        return _sum_after(values.cpu(), pixel.cpu(), first.cpu()).float().to(values.device)
    run = values.double().cumsum(0)
    total = torch.cat((run.new_zeros(1), run))
    return total.index_select(0, first.index_select(0, pixel + 1)) - run


def _expand(box: Tensor, band: tuple[int, int], total: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels of all boxes within a band of rows: index of the box, column and row, each [M] (int32).

    `total` is M if it is known.
    """
    left, top, width, height = box.int().unbind(1)
    bottom = (top + height).clamp_max(band[1])
    top = top.clamp_min(band[0])
    count = width * (bottom - top).clamp_min(0)
    number = torch.arange(len(box), device=box.device, dtype=torch.int32)
    owner = torch.repeat_interleave(number, count, output_size=total)
    begin = (count.cumsum(0) - count).int()
    place = torch.arange(len(owner), device=box.device, dtype=torch.int32) - begin.index_select(0, owner)
    width = width.index_select(0, owner)
    down = torch.div(place, width, rounding_mode="floor")
    column = left.index_select(0, owner) + place - down * width
    return owner, column, top.index_select(0, owner) + down


def by_pixel(owner: Tensor, pixel: Tensor, splats: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Stable order [K] by pixel of fragments [K] that are ordered by owner, and the first of each [pixels + 1]."""
    if pixel.device.type == "cpu":
        return by_pixel_counted(owner, pixel, splats, pixels)
    return by_pixel_sorted(pixel, pixels)


def by_pixel_sorted(pixel: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """`by_pixel` by sorting, on any device."""
    first = torch.zeros(pixels, dtype=torch.long, device=pixel.device)
    first = first.index_add_(0, pixel, torch.ones_like(pixel, dtype=torch.long)).cumsum(0)
    return torch.sort(pixel, stable=True).indices, torch.nn.functional.pad(first, (1, 0))


def by_pixel_counted(owner: Tensor, pixel: Tensor, splats: int, pixels: int) -> tuple[Tensor, Tensor]:
    """`by_pixel` on CPUs: scipy's conversion from columns (splats) to rows (pixels) is a counting sort."""
    import scipy.sparse

    ends = torch.nn.functional.pad(torch.bincount(owner, minlength=splats).cumsum(0), (1, 0)).int()
    number = torch.arange(len(pixel), dtype=torch.int32)
    columns = scipy.sparse.csc_matrix((number.numpy(), pixel.numpy(), ends.numpy()), shape=(pixels, splats))
    rows = columns.tocsr()
    return torch.from_numpy(rows.data), torch.from_numpy(rows.indptr)


def _sum_rows(weight: Tensor, owner: Tensor, pixel: Tensor, first: Tensor, features: Tensor) -> Tensor:
    """sum_i w_i features[owner_i] for each pixel: [P, C]."""
    if weight.device.type != "cpu":
        image = features.new_zeros(len(first) - 1, features.shape[1])
        return image.index_add_(0, pixel, weight[:, None] * features.index_select(0, owner))
    return torch.from_numpy(_matrix(weight, owner, first, len(features)) @ features.detach().numpy())


def _sum_columns(weight: Tensor, owner: Tensor, pixel: Tensor, first: Tensor, gradient: Tensor, splats: int) -> Tensor:
    """sum_i w_i gradient[pixel_i] for each splat: [G, C]."""
    if weight.device.type != "cpu":
        total = gradient.new_zeros(splats, gradient.shape[1])
        return total.index_add_(0, owner, weight[:, None] * gradient.index_select(0, pixel))
    return torch.from_numpy(_matrix(weight, owner, first, splats).T @ gradient.numpy())


def _matrix(weight: Tensor, owner: Tensor, first: Tensor, splats: int):
    """The weights as a sparse matrix [pixels, splats] of scipy."""
    import scipy.sparse

    shape = (len(first) - 1, splats)
    return scipy.sparse.csr_matrix((weight.numpy(), owner.numpy(), first.numpy()), shape=shape)


def _sum_by(owner: Tensor, values: Tensor, splats: int) -> Tensor:
    """Sum of the values [K] of each splat: [G]."""
    if values.device.type == "cpu":
        return torch.bincount(owner, values, minlength=splats).to(values)
    return values.new_zeros(splats).index_add_(0, owner, values)
