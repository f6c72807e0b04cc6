"""Compositing of Gaussian footprints by fragments: a fragment is one splat at one pixel.

Every footprint's box is expanded into pixels, the fragments that can be seen are sorted by pixel (they come
nearest first, and the sort is stable), and each pixel's run is composited by differences of one cumulative sum
of log(1 - alpha). With g_i = dL/dw_i for the weights w_i = T_i alpha_i of a run, the backward pass is
    dL/dalpha_i = T_i g_i - (sum_{j>i} g_j w_j) / (1 - alpha_i),
and what the center and the conic of a splat receive are moments of its fragments.
"""

from __future__ import annotations

import math
from typing import Protocol

import scipy.sparse
import torch
from torch import Tensor


class Footprints(Protocol):
    """See `distill3d.render.splat.Footprints`: G splats of one view, nearest first."""

    @property
    def center(self) -> Tensor: ...
    @property
    def conic(self) -> Tensor: ...
    @property
    def opacity(self) -> Tensor: ...
    @property
    def features(self) -> Tensor: ...
    @property
    def reach(self) -> Tensor: ...


class Limits(Protocol):
    """See `distill3d.render.splat.SplatSampling`."""

    @property
    def min_alpha(self) -> float: ...
    @property
    def max_alpha(self) -> float: ...
    @property
    def chunk(self) -> int: ...


def composite(footprints: Footprints, size: int, limits: Limits) -> Tensor:
    """Features [size^2, C] composited front to back, rows of the picture first; differentiable.

    The picture is worked on in bands of rows of about `limits.chunk` fragments each.
    """
    box = _boxes(footprints.center, footprints.reach, size)
    if not box[:, 2:].prod(1).any():
        return footprints.features.new_zeros(size * size, footprints.features.shape[1]) + 0 * footprints.features.sum()
    bands = math.ceil(int(box[:, 2:].prod(1).sum()) / limits.chunk)
    height = math.ceil(size / bands)
    parts = (footprints.center, footprints.conic, footprints.opacity, footprints.features, box)
    rows = [
        _Composite.apply(*parts, size, (top, min(size, top + height)), limits.min_alpha, limits.max_alpha)
        for top in range(0, size, height)
    ]
    return torch.cat(rows)


@torch.no_grad()
def _boxes(center: Tensor, reach: Tensor, size: int) -> Tensor:
    """First column and row, width and height [G, 4] of the pixels whose centers a footprint's box holds."""
    slack = 1e-3  # pixels: the box is rounded otherwise than alpha is
    # Clamped before it becomes an integer: a footprint may be anywhere.
    low = (center - reach - 0.5 - slack).clamp(-1, size).ceil().clamp_min(0).long()
    high = (center + reach - 0.5 + slack).clamp(-1, size).floor().clamp_max(size - 1).long()
    extent = (high - low + 1).clamp_min(0)
    return torch.cat((low, extent * (extent.amin(1, keepdim=True) > 0)), 1)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, center, conic, opacity, features, box, size, band, min_alpha, max_alpha) -> Tensor:
        owner, column, row = _expand(box, band)
        dx = (column + 0.5).to(center) - center[:, 0].index_select(0, owner)
        dy = (row + 0.5).to(center) - center[:, 1].index_select(0, owner)
        cc, cr, rr = (entry.index_select(0, owner) for entry in conic.unbind(1))
        power = (cc * dx + 2 * cr * dy).mul_(dx).add_(rr.mul_(dy).mul_(dy)).mul_(-0.5)
        alpha = power.exp_().mul_(opacity.index_select(0, owner))

        keep = (alpha >= min_alpha).nonzero()[:, 0]
        pixel = ((row - band[0]) * size + column).index_select(0, keep)
        order, first = by_pixel(owner.index_select(0, keep), pixel, len(center), (band[1] - band[0]) * size)
        pixel, order = pixel.index_select(0, order), keep.index_select(0, order)
        owner, dx, dy, alpha = (values.index_select(0, order) for values in (owner, dx, dy, alpha))
        free = alpha < max_alpha
        alpha = alpha.clamp_max_(max_alpha)

        through = torch.log1p(-alpha).double()  # the sum runs over all pixels: single precision would not do
        before = through.cumsum(0) - through
        transmittance = (before - before.index_select(0, first.index_select(0, pixel))).exp().to(alpha)
        ctx.save_for_backward(center, conic, opacity, features, owner, pixel, first, dx, dy, alpha, transmittance, free)
        return _sum_rows(transmittance * alpha, owner, pixel, first, features)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        center, conic, opacity, features, owner, pixel, first, dx, dy, alpha, transmittance, free = ctx.saved_tensors
        gradient, splats = gradient.contiguous(), len(center)
        weight = transmittance * alpha
        on_weight = (features.index_select(0, owner) * gradient.index_select(0, pixel)).sum(1)
        on_features = _sum_columns(weight, owner, pixel, first, gradient, splats)

        run = (on_weight * weight).double().cumsum(0)
        total = torch.cat((run.new_zeros(1), run))
        behind = (total.index_select(0, first.index_select(0, pixel + 1)) - run).to(alpha)  # of its run, after it
        on_alpha = (transmittance * on_weight - behind / (1 - alpha)) * free
        on_power = on_alpha * alpha

        x, y = on_power * dx, on_power * dy
        moments = [_sum_by(owner, v, splats) for v in (on_power, x, y, x * dx, x * dy, y * dy)]
        zero, mx, my, mxx, mxy, myy = moments
        cc, cr, rr = conic.unbind(1)
        on_center = torch.stack((cc * mx + cr * my, cr * mx + rr * my), 1)
        on_conic = torch.stack((-0.5 * mxx, -mxy, -0.5 * myy), 1)
        return on_center, on_conic, zero / opacity, on_features, None, None, None, None, None


def _expand(box: Tensor, band: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels of all boxes within a band of rows: number of the box, column and row, each [M] (int32)."""
    left, top, width, height = box.int().unbind(1)
    bottom = (top + height).clamp_max(band[1])
    top = top.clamp_min(band[0])
    count = width * (bottom - top).clamp_min(0)
    owner = torch.repeat_interleave(torch.arange(len(box), device=box.device, dtype=torch.int32), count)
    begin = (count.cumsum(0) - count).int()
    place = torch.arange(len(owner), device=box.device, dtype=torch.int32) - begin.index_select(0, owner)
    width = width.index_select(0, owner)
    down = torch.div(place, width, rounding_mode="floor")
    column = left.index_select(0, owner) + place - down * width
    return owner, column, top.index_select(0, owner) + down


def by_pixel(owner: Tensor, pixel: Tensor, splats: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Order [K] by pixel, stable, of fragments [K] ordered by owner, and the first of each pixel [pixels + 1]."""
    if pixel.device.type == "cpu":
        return by_pixel_counted(owner, pixel, splats, pixels)
    return by_pixel_sorted(pixel, pixels)


def by_pixel_sorted(pixel: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """`by_pixel` on any device."""
    first = torch.bincount(pixel, minlength=pixels).cumsum(0)
    return torch.sort(pixel, stable=True).indices, torch.nn.functional.pad(first, (1, 0))


def by_pixel_counted(owner: Tensor, pixel: Tensor, splats: int, pixels: int) -> tuple[Tensor, Tensor]:
    """`by_pixel` on CPUs: scipy's conversion from columns (splats) to rows (pixels) is a counting sort."""
    ends = torch.nn.functional.pad(torch.bincount(owner, minlength=splats).cumsum(0), (1, 0)).int()
    number = torch.arange(len(pixel), dtype=torch.int32)
    columns = scipy.sparse.csc_matrix((number.numpy(), pixel.numpy(), ends.numpy()), shape=(pixels, splats))
    rows = columns.tocsr()
    return torch.from_numpy(rows.data), torch.from_numpy(rows.indptr)


def _sum_rows(weight: Tensor, owner: Tensor, pixel: Tensor, first: Tensor, features: Tensor) -> Tensor:
    """sum_i w_i features[owner_i] for each pixel: [P, C]."""
    if weight.device.type != "cpu":
        picture = features.new_zeros(len(first) - 1, features.shape[1])
        return picture.index_add_(0, pixel, weight[:, None] * features.index_select(0, owner))
    return torch.from_numpy(_matrix(weight, owner, first, len(features)) @ features.detach().numpy())


def _sum_columns(weight: Tensor, owner: Tensor, pixel: Tensor, first: Tensor, gradient: Tensor, splats: int) -> Tensor:
    """sum_i w_i gradient[pixel_i] for each splat: [G, C]."""
    if weight.device.type != "cpu":
        total = gradient.new_zeros(splats, gradient.shape[1])
        return total.index_add_(0, owner, weight[:, None] * gradient.index_select(0, pixel))
    return torch.from_numpy(_matrix(weight, owner, first, splats).T @ gradient.numpy())


def _matrix(weight: Tensor, owner: Tensor, first: Tensor, splats: int) -> scipy.sparse.csr_matrix:
    """The weights as a matrix [pixels, splats]."""
    shape = (len(first) - 1, splats)
    return scipy.sparse.csr_matrix((weight.numpy(), owner.numpy(), first.numpy()), shape=shape)


def _sum_by(owner: Tensor, values: Tensor, splats: int) -> Tensor:
    """Sum of the values [K] of each splat: [G]."""
    if values.device.type == "cpu":
        return torch.bincount(owner, values, minlength=splats).to(values)
    return values.new_zeros(splats).index_add_(0, owner, values)
