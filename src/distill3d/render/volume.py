"""Emission-absorption volume rendering (Max 1995; NeRF, equation 3) as pure functions that take callables.

With densities sigma_i on samples of width delta along a ray:
    alpha_i = 1 - exp(-sigma_i delta),  T_i = exp(-sum_{j<i} sigma_j delta),  w_i = T_i alpha_i,
so that sum_i w_i + T_end = 1. Nearly all of a trained volume is empty or hidden, and the cost is in asking the
field. Three filters, cheapest first, decide where it is asked with gradients: the box (rays that miss it are
dropped), an occupancy grid, and a density-only march without gradients that finds the samples whose weight
can be seen. The survivors are packed to the left in [rays, most samples a ray] and composited there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill3d.types import Rays, Rendering

SLAB = 16  # samples that are marched together

Field = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""Maps points [N, 3] to density [N] (per world unit), colour [N, 3] in [0, 1], outward unit normal [N, 3] or None."""


@dataclass(frozen=True)
class Sampling:
    """How finely rays are marched and what is too faint to be worth a look.

    min_weight and min_transmittance act only where `render_rays` is given the density by itself. A ray then
    loses at most samples * min_weight + min_transmittance of its opacity; two zeros make the picture exact.
    """

    samples: int = 80  # per ray, evenly spaced over its way through the box
    min_weight: float = 1e-4
    min_transmittance: float = 1e-3
    chunk: int = 2048  # rays marched at once: bounds the memory and stays in the cache

    def __post_init__(self) -> None:
        if self.samples < 1 or self.chunk < 1:
            raise ValueError(f"samples and chunk must be at least 1, got {self.samples} and {self.chunk}")


@dataclass(frozen=True)
class Occupancy:
    """Cells outside which the density is taken to be zero."""

    cells: Tensor  # [Z, Y, X] bool
    bounds: Tensor  # [2, 3] lowest and highest corner (x, y, z) of the whole grid

    def tight(self) -> Tensor:
        """Corners [2, 3] of the smallest box around the occupied cells (the whole grid if there are none)."""
        if not bool(self.cells.any()):
            return self.bounds
        spans = [self.cells.any(a).any(b).nonzero()[[0, -1], 0] for a, b in ((0, 0), (0, 1), (1, 1))]
        index = torch.stack(spans, dim=1) + torch.tensor([[0], [1]], device=self.cells.device)
        size = torch.tensor(self.cells.shape, device=self.cells.device).flip(0)
        return self.bounds[0] + (self.bounds[1] - self.bounds[0]) * index / size


def render_rays(
    rays: Rays,
    field: Field,
    bounds: Tensor,
    background: Tensor,
    sampling: Sampling = Sampling(),
    *,
    density: Callable[[Tensor], Tensor] | None = None,
    occupancy: Occupancy | None = None,
    generator: torch.Generator | None = None,
) -> Rendering:
    """Renders a field inside a box over a background; differentiable in the field and the background.

    Args:
        rays: B pictures of rays [B, H, W, 3].
        field: see `Field`; asked only inside the box.
        bounds: lowest and highest corner [2, 3] of the box.
        background: colours [B, 3].
        density: the field's density [N] at points [N, 3] alone; lets faint and hidden samples be dropped
            before the field is asked (see `Sampling`).
        occupancy: cells that may hold something; exact where the density outside them is zero.
        generator: shifts all samples of a ray by one uniform draw within their strata (so that every stratum
            is sampled uniformly); without it they sit in the middle.

    Returns:
        every entry of `Rendering`; normal and orientation where the field gives normals.
    """
    batch, height, width, _ = rays.directions.shape
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    near, far = intersect_box(origins, directions, bounds)
    hits = (far > near).nonzero()[:, 0]
    shift = torch.full_like(near[hits], 0.5)
    if generator is not None:
        shift = torch.rand(shift.shape, generator=generator, device=generator.device).to(shift)

    columns, indices = [], []
    for rows, offset in zip(hits.split(sampling.chunk), shift.split(sampling.chunk), strict=True):
        march = _March(origins[rows], directions[rows], near[rows], far[rows], offset, sampling.samples)
        keep = _visible(march, sampling, density, occupancy)
        kept, values = _composite(march, keep, field)
        columns.append(values)
        indices.append(rows[kept])
    if not columns:
        return _assemble(origins.new_zeros(batch, 6, height, width), background)
    image = columns[0].new_zeros(len(origins), columns[0].shape[1])
    image = image.index_copy(0, torch.cat(indices), torch.cat(columns))
    return _assemble(image.view(batch, height, width, -1).permute(0, 3, 1, 2), background)


def intersect_box(origins: Tensor, directions: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Ray lengths [R] where rays [R, 3] enter and leave the box [2, 3]; far <= near where they miss it.

    The slab method; a direction component of zero is nudged, for 0/0 on a face would be undefined.
    """
    tiny = torch.finfo(directions.dtype).tiny ** 0.5
    safe = torch.where(directions.abs() < tiny, tiny, directions)
    first, second = (bounds[0] - origins) / safe, (bounds[1] - origins) / safe
    near = torch.minimum(first, second).amax(-1).clamp_min(0)
    return near, torch.maximum(first, second).amin(-1)


def alpha_weights(optical_depth: Tensor) -> tuple[Tensor, Tensor]:
    """Weights w_i [R, S] and the transmittance before each sample T_i [R, S], from sigma_i delta [R, S]."""
    before = torch.nn.functional.pad(optical_depth, (1, 0)).cumsum(-1)[..., :-1]
    transmittance = torch.exp(-before)
    return transmittance * -torch.expm1(-optical_depth), transmittance


class _March:
    """Evenly spaced samples on R rays: ray lengths `t` [R, S] and the width `step` [R] of each stratum."""

    def __init__(self, origins: Tensor, directions: Tensor, near: Tensor, far: Tensor, offset: Tensor, samples: int):
        self.origins, self.directions = origins, directions
        self.step = (far - near) / samples
        index = torch.arange(samples, device=near.device, dtype=near.dtype)
        self.t = torch.addcmul(near[:, None], index + offset[:, None], self.step[:, None])

    def points(self, ray: Tensor, t: Tensor) -> Tensor:
        """World points [M, 3] at lengths t [M] of the rays numbered `ray` [M]."""
        return torch.addcmul(self.origins.index_select(0, ray), self.directions.index_select(0, ray), t[:, None])


@torch.no_grad()
def _visible(
    march: _March, sampling: Sampling, density: Callable[[Tensor], Tensor] | None, occupancy: Occupancy | None
) -> Tensor:
    """Mask [R, S] of the samples that the field has to be asked about."""
    keep = torch.ones_like(march.t, dtype=torch.bool) if occupancy is None else _occupied(march, occupancy)
    if density is None:
        return keep
    # Front to back, a slab of samples at a time: behind a surface nothing has to be asked.
    depth = torch.zeros_like(march.step)
    for slab, lengths in zip(keep.split(SLAB, dim=1), march.t.split(SLAB, dim=1), strict=True):
        slab &= (torch.exp(-depth) >= sampling.min_transmittance)[:, None]
        ray, sample = slab.nonzero(as_tuple=True)
        if not len(ray):
            continue
        found = density(march.points(ray, lengths[ray, sample])).to(depth) * march.step.index_select(0, ray)
        passed = depth.new_zeros(slab.shape).index_put_((ray, sample), found)
        weights, transmittance = alpha_weights(passed)
        before = torch.exp(-depth)[:, None]
        slab &= (before * weights >= sampling.min_weight) & (before * transmittance >= sampling.min_transmittance)
        depth += passed.sum(1)
    return keep


def _occupied(march: _March, occupancy: Occupancy) -> Tensor:
    """Mask [R, S] of the samples in occupied cells. One axis at a time, to touch little memory."""
    cells, (low, high) = occupancy.cells, occupancy.bounds
    flat = torch.zeros_like(march.t, dtype=torch.int32)
    for axis in (2, 1, 0):
        count = cells.shape[2 - axis]
        scale = count / (high[axis] - low[axis])
        origin, slope = (march.origins[:, axis] - low[axis]) * scale, march.directions[:, axis] * scale
        cell = torch.addcmul(origin[:, None], march.t, slope[:, None]).to(torch.int32).clamp_(0, count - 1)
        flat = flat.mul_(count).add_(cell)
    return cells.view(-1).index_select(0, flat.view(-1)).view_as(march.t)


def _composite(march: _March, keep: Tensor, field: Field) -> tuple[Tensor, Tensor]:
    """Asks the field about the kept samples and sums them up along the rays.

    Returns:
        the numbers [K] of the rays that have any, and their values [K, C] in the order that `_assemble` reads.
    """
    count = keep.sum(1)
    rays = count.nonzero()[:, 0]
    index = keep.view(-1).nonzero()[:, 0]
    ray = torch.div(index, keep.shape[1], rounding_mode="floor")
    lengths = march.t.view(-1).index_select(0, index)
    density, rgb, normal = field(march.points(ray, lengths))

    # Packed: row = rank of the ray among those that have samples, slot = rank of the sample in its ray.
    slots = int(count.max()) if len(rays) else 0
    first = ((count > 0).cumsum(0) - 1) * slots - (count.cumsum(0) - count)
    at = first.index_select(0, ray) + torch.arange(len(ray), device=ray.device)

    def pack(values: Tensor) -> Tensor:
        flat = values.new_zeros(len(rays) * slots, *values.shape[1:])
        return flat.index_copy(0, at, values).unflatten(0, (-1, slots))

    if not slots:  # nothing to be seen; an empty sum keeps the graph, so that backward() is legal
        columns = [rgb, density[:, None].expand(-1, 3)] + ([] if normal is None else [normal, rgb[:, :1]])
        return rays, torch.cat(columns, 1)
    t = pack(lengths)
    weights, _ = alpha_weights(pack(density * march.step.index_select(0, ray)))
    opacity = weights.sum(1)
    visible = opacity.clamp_min(torch.finfo(opacity.dtype).eps)
    depth = (weights * t).sum(1) / visible
    variance = (weights * (t - depth[:, None]).square()).sum(1) / visible
    columns = [(weights[..., None] * pack(rgb)).sum(1), torch.stack((opacity, depth, variance), 1)]
    if normal is not None:
        away = (normal * march.directions.index_select(0, ray)).sum(1).clamp_min(0).square()
        columns.append((weights[..., None] * pack(normal)).sum(1))
        columns.append((weights.detach() * pack(away)).sum(1, keepdim=True))
    return rays, torch.cat(columns, 1)


def _assemble(image: Tensor, background: Tensor) -> Rendering:
    """A Rendering from channels [B, C, H, W]: colour, opacity, depth, variance and, if given, normal, orientation."""
    opacity = image[:, 3:4]
    rgb = image[:, :3] + (1 - opacity) * background[:, :, None, None].to(image)
    extra = (image[:, 6:9], image[:, 9:10]) if image.shape[1] > 6 else (None, None)
    return Rendering(rgb, opacity, image[:, 4:5], image[:, 5:6], *extra)
