"""Emission-absorption volume rendering (Max 1995; NeRF, equation 3) as pure functions that take callables.

With densities sigma_i on samples of width delta along a ray:
    alpha_i = 1 - exp(-sigma_i delta),  T_i = exp(-sum_{j<i} sigma_j delta),  w_i = T_i alpha_i,
so that sum_i w_i + T_end = 1. Nearly all of a trained volume is empty or hidden, and evaluating the field is what
costs. Three filters, cheapest first, decide where it is evaluated with gradients: the box (rays that miss it are
dropped), an occupancy grid, and a density-only march without gradients that finds the samples whose weight is
visible. The remaining samples are packed to the left in [rays, most samples of a ray] and composited there.

Memory is bounded twice: `Sampling.chunk` rays are marched at a time, and `Sampling.points` samples of a chunk are
composited at a time. `Sampling.checkpoint` bounds what a backward pass needs of all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from distill3d.devices import marked
from distill3d.render.shading import over_background, shade
from distill3d.types import Lighting, Rays, Rendering

SLAB = 20  # samples of a ray that the CPU marches together
AT_ONCE = 2**24  # samples that an accelerator marches together, because it waits in each chunk of rays

FieldValues = tuple[Float[Tensor, " n"], Float[Tensor, "n 3"], Float[Tensor, "n 3"] | None]
"""Density per world unit, color in [0, 1], and outward unit normal or None."""
Field = Callable[[Tensor], FieldValues]
"""Maps points [N, 3] to `FieldValues`."""


@dataclass(frozen=True)
class Sampling:
    """How finely rays are sampled and what is too faint to matter.

    min_weight and min_transmittance take effect only where `render_rays` is given the density alone. A ray then
    loses at most samples * min_weight + min_transmittance of its opacity; with both 0 the rendering is exact.
    """

    samples: int = 80  # per ray, evenly spaced between entering and leaving the box
    importance: int = 0  # additional samples per ray, drawn where the weights of the first ones are
    min_weight: float = 1e-4
    min_transmittance: float = 1e-3
    chunk: int = 2048  # rays marched at once: bounds the memory and stays in the cache
    points: int = 2**19  # samples composited at once; at least those of one ray
    checkpoint: bool = False  # whether the backward pass evaluates the field again instead of storing its activations

    def __post_init__(self) -> None:
        if min(self.samples, self.chunk, self.points) < 1 or self.importance < 0:
            raise ValueError(
                "samples, chunk and points must be at least 1 and importance at least 0, "
                f"got {self.samples}, {self.chunk}, {self.points} and {self.importance}"
            )


@dataclass(frozen=True)
class Occupancy:
    """Cells outside which the density is taken to be zero."""

    cells: Bool[Tensor, "z y x"]
    bounds: Float[Tensor, "2 3"]  # lowest and highest corner (x, y, z) of the whole grid

    def tight(self) -> Float[Tensor, "2 3"]:
        """Corners of the smallest box around the occupied cells (of the whole grid if there are none)."""
        low, extent, corners = self.bounds[0], self.bounds[1] - self.bounds[0], []
        for axis, (a, b) in enumerate(((0, 0), (0, 1), (1, 1))):
            occupied = self.cells.any(a).any(b)
            size = len(occupied)
            index = torch.arange(size, device=occupied.device)
            first, last = torch.where(occupied, index, size).amin(), torch.where(occupied, index, -1).amax()
            corners.append(low[axis] + extent[axis] * torch.stack((first, last + 1)) / size)
        return torch.where(self.cells.any(), torch.stack(corners, 1), self.bounds)


@dataclass(frozen=True)
class Filters:
    """What is cheap to know about a field, so that it is evaluated only where it is visible."""

    density: Callable[[Tensor], Tensor] | None = None  # density [N] at points [N, 3], without gradients
    occupancy: Occupancy | None = None  # exact if the density outside of it is zero


def render_rays(
    rays: Rays,
    field: Field,
    bounds: Float[Tensor, "2 3"],
    background: Float[Tensor, "b 3"] | Float[Tensor, "b 3 h w"],
    sampling: Sampling = Sampling(),
    *,
    filters: Filters = Filters(),
    lighting: Lighting | None = None,
    generator: torch.Generator | None = None,
) -> Rendering:
    """Renders a field inside a box over a background; differentiable in the field and the background.

    Args:
        rays: of B images, [B, H, W, 3].
        field: see `Field`; evaluated only inside the box.
        bounds: lowest and highest corner of the box.
        background: colors or images.
        filters: where the field need not be evaluated (see `Sampling` for the error).
        lighting: shades every sample (see `shading.shade`); the field must return normals unless it is albedo.
        generator: shifts all samples of a ray by one uniform draw within their strata (so that every stratum is
            sampled uniformly); without it they lie in the middle.

    Returns:
        every field of `Rendering`; normal and orientation only if the field returns normals.

    Raises:
        ValueError: for importance sampling without `filters.density`, and for a lighting that needs normals if the
            field returns none.
    """
    batch, height, width, _ = rays.directions.shape
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    near, far = intersect_box(origins, directions, bounds)
    hits = (far > near).nonzero()[:, 0]
    shift = near.new_full((3 if sampling.importance else 1, len(hits)), 0.5)
    if generator is not None:
        shift = torch.rand(shift.shape, generator=generator, device=generator.device).to(shift)

    columns, indices = [], []
    chunk = sampling.chunk if hits.device.type == "cpu" else max(sampling.chunk, AT_ONCE // sampling.samples)
    for rows, shifts in zip(hits.split(chunk), shift.split(chunk, 1), strict=True):
        *refined, first = shifts
        march = _march_evenly(origins[rows], directions[rows], (near[rows], far[rows]), first, sampling.samples)
        if sampling.importance:
            march = _refined(march, near[rows], sampling, filters, *refined)
        keep = _visible(march, sampling, filters)
        light = None if lighting is None else (lighting, lighting.position.to(origins)[rows // (height * width)])
        for part, counts in _groups(keep.sum(1).cpu(), sampling.points):
            samples = _Samples.gather(march, keep, part, counts, light)
            if sampling.checkpoint and torch.is_grad_enabled():
                values = checkpoint(_composite, samples, field, use_reentrant=False, preserve_rng_state=False)
            else:
                values = _composite(samples, field)
            columns.append(values)
            indices.append(samples.of_rays(rows[part].index_select(0, samples.ray)))
    columns, indices = columns or [origins.new_zeros(0, 6)], indices or [hits[:0]]
    values = torch.cat(columns)
    image = values.new_zeros(len(origins), values.shape[1]).index_copy(0, torch.cat(indices), values)
    image = image.view(batch, height, width, -1).permute(0, 3, 1, 2)
    normal, orientation = (image[:, 6:9], image[:, 9:10]) if image.shape[1] > 6 else (None, None)
    rgb = over_background(image[:, :3], image[:, 3:4], background)
    return Rendering(rgb, image[:, 3:4], image[:, 4:5], image[:, 5:6], normal, orientation)


def intersect_box(
    origins: Float[Tensor, "r 3"], directions: Float[Tensor, "r 3"], bounds: Float[Tensor, "2 3"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """Ray lengths where rays enter and leave a box; far <= near where they miss it.

    The slab method; a direction component of zero is nudged, because 0/0 on a face would be undefined.
    """
    tiny = torch.finfo(directions.dtype).tiny ** 0.5
    safe = torch.where(directions.abs() < tiny, tiny, directions)
    first, second = (bounds[0] - origins) / safe, (bounds[1] - origins) / safe
    near = torch.minimum(first, second).amax(-1).clamp_min(0)
    return near, torch.maximum(first, second).amin(-1)


def alpha_weights(
    optical_depth: Float[Tensor, "r s"],
) -> tuple[Float[Tensor, "r s"], Float[Tensor, "r s"]]:
    """Weights w_i and the transmittance T_i before each sample, from sigma_i delta."""
    before = pad(optical_depth, (1, 0)).cumsum(-1)[..., :-1]
    transmittance = torch.exp(-before)
    return transmittance * -torch.expm1(-optical_depth), transmittance


@dataclass(frozen=True)
class _March:
    """Samples on R rays."""

    origins: Tensor  # [R, 3]
    directions: Tensor  # [R, 3]
    t: Tensor  # [R, S] ray lengths
    width: Tensor  # of their strata, [R, 1] if they are even, else [R, S]

    def points(self, ray: Tensor, t: Tensor) -> Tensor:
        """World points [M, 3] at lengths t [M] of the rays with indices `ray` [M]."""
        return torch.addcmul(self.origins.index_select(0, ray), self.directions.index_select(0, ray), t[:, None])

    def widths(self, ray: Tensor, sample: Tensor) -> Tensor:
        """Widths [M] of the strata of single samples."""
        even = self.width.shape[1] == 1
        return self.width[:, 0].index_select(0, ray) if even else self.width[ray, sample]


def _march_evenly(
    origins: Tensor, directions: Tensor, span: tuple[Tensor, Tensor], shift: Tensor, samples: int
) -> _March:
    """One sample in each of `samples` even strata between the ends [R] of `span`."""
    near, far = span
    width = ((far - near) / samples)[:, None]
    index = torch.arange(samples, device=near.device, dtype=near.dtype)
    return _March(origins, directions, torch.addcmul(near[:, None], index + shift[:, None], width), width)


@dataclass(frozen=True)
class _Samples:
    """The M samples of R rays at which the field is evaluated, ray after ray."""

    points: Tensor  # [M, 3]
    directions: Tensor  # [M, 3]
    lengths: Tensor  # [M]
    widths: Tensor  # [M]
    ray: Tensor  # [M]
    place: Tensor  # [M] in a table of `shape`: rank of the ray among those that have samples, rank of the sample in it
    shape: tuple[int, int]  # rays that have samples, most samples of a ray
    light: tuple[Lighting, Tensor] | None  # and its position for each ray, [R, 3]

    def of_rays(self, values: Tensor) -> Tensor:
        """The value of each ray that has samples, from values [M] that its samples share."""
        rank = torch.div(self.place, self.shape[1], rounding_mode="floor")
        return values.new_zeros(self.shape[0]).scatter_(0, rank, values)

    @staticmethod
    def gather(
        march: _March, keep: Tensor, part: slice, counts: Tensor, light: tuple[Lighting, Tensor] | None
    ) -> _Samples:
        """Those of the rays in `part` that the mask `keep` [R, S] marks, `counts` (on the host) of each ray."""
        index = marked(keep[part].reshape(-1), int(counts.sum())) + part.start * keep.shape[1]
        ray = torch.div(index, keep.shape[1], rounding_mode="floor")
        lengths = march.t.view(-1).index_select(0, index)
        directions = march.directions.index_select(0, ray)
        points = torch.addcmul(march.origins.index_select(0, ray), directions, lengths[:, None])
        widths = march.widths(ray, index - ray * keep.shape[1])
        ray = ray - part.start
        shape = (int((counts > 0).sum()), max(1, int(counts.max())))
        count = keep[part].sum(1)
        first = ((count > 0).cumsum(0) - 1) * shape[1] - (count.cumsum(0) - count)
        return _Samples(
            points=points,
            directions=directions,
            lengths=lengths,
            widths=widths,
            ray=ray,
            place=first.index_select(0, ray) + torch.arange(len(ray), device=ray.device),
            shape=shape,
            light=None if light is None else (light[0], light[1][part]),
        )


def _groups(counts: Tensor, most: int) -> Iterator[tuple[slice, Tensor]]:
    """Splits rays with so many samples [R] (on the host) into groups of at most `most` samples, or of one ray."""
    total = pad(counts.cumsum(0), (1, 0))
    begin = 0
    while begin < len(counts):
        end = int(torch.searchsorted(total, total[begin] + most, right=True)) - 1
        end = max(begin + 1, end)
        yield slice(begin, end), counts[begin:end]
        begin = end


@torch.no_grad()
def _refined(
    march: _March, near: Tensor, sampling: Sampling, filters: Filters, sample_shift: Tensor, edge_shift: Tensor
) -> _March:
    """Adds samples where the weights are (NeRF, section 5.2: inverse transform, stratified).

    New edges cut the even strata, and every stratum has one sample of its own width, so every part of a ray can be
    sampled. The shifts [R] of the samples, of the edges and of `march` are drawn independently, so that the optical
    depth of each stratum is unbiased given the edges.
    """
    if filters.density is None:
        raise ValueError("importance sampling needs the field's density: pass Filters(density=...)")
    keep = torch.ones_like(march.t, dtype=torch.bool)
    if filters.occupancy is not None:
        keep = _occupied(march, filters.occupancy)
    ray, sample = keep.nonzero(as_tuple=True)
    points = march.points(ray, march.t[ray, sample])
    found = [filters.density(p) for p in points.split(sampling.points)]
    passed = torch.zeros_like(march.t)
    if found:
        passed[ray, sample] = torch.cat(found).to(passed) * march.widths(ray, sample)
    # Widened, because an edge may hide in a stratum whose one sample missed it, and never zero (mip-NeRF, equation 18).
    weights = pad(alpha_weights(passed)[0][:, None], (1, 1), mode="replicate")[:, 0]
    pairs = torch.maximum(weights[:, 1:], weights[:, :-1])
    weights = 0.5 * (pairs[:, 1:] + pairs[:, :-1]) + 0.01 / sampling.samples
    total = pad(weights.cumsum(1), (1, 0))
    total = total / total[:, -1:]

    quantile = torch.arange(sampling.importance, device=total.device, dtype=total.dtype) + edge_shift[:, None]
    quantile = quantile / sampling.importance
    stratum = (torch.searchsorted(total, quantile, right=True) - 1).clamp_(0, sampling.samples - 1)
    low, high = total.gather(1, stratum), total.gather(1, stratum + 1)
    cuts = stratum + ((quantile - low) / (high - low).clamp_min(torch.finfo(total.dtype).tiny)).clamp(0, 1)
    even = torch.arange(sampling.samples + 1, device=total.device, dtype=total.dtype).expand(len(total), -1)
    edges = near[:, None] + torch.cat((even, cuts), 1).sort(1).values * march.width
    width = edges.diff(dim=1)
    t = torch.addcmul(edges[:, :-1], sample_shift[:, None], width)
    return _March(march.origins, march.directions, t, width)


@torch.no_grad()
def _visible(march: _March, sampling: Sampling, filters: Filters) -> Tensor:
    """Mask [R, S] of the samples at which the field has to be evaluated."""
    occupancy = filters.occupancy
    keep = torch.ones_like(march.t, dtype=torch.bool) if occupancy is None else _occupied(march, occupancy)
    if filters.density is None:
        return keep
    # Front to back, a slab of samples at a time: what lies behind a surface is skipped, and rays with nothing in a slab
    # are left out of it. Only the CPU gains by it.
    depth, on_cpu = torch.zeros_like(march.t[:, 0]), keep.device.type == "cpu"
    size = SLAB if on_cpu else keep.shape[1]
    for begin in range(0, keep.shape[1], size):
        slab, lengths = keep[:, begin : begin + size], march.t[:, begin : begin + size]
        slab &= (torch.exp(-depth) >= sampling.min_transmittance)[:, None]
        live = slab.any(1).nonzero()[:, 0] if on_cpu else torch.arange(len(slab), device=slab.device)
        seen = slab.index_select(0, live)
        rank, sample = seen.nonzero(as_tuple=True)
        if not len(rank):
            continue
        ray = live.index_select(0, rank)
        points = march.points(ray, lengths[ray, sample])
        found = torch.cat([filters.density(p) for p in points.split(sampling.points)]).to(depth)
        found = found * march.widths(ray, sample + begin)
        passed = depth.new_zeros(seen.shape).index_put_((rank, sample), found)
        weights, transmittance = alpha_weights(passed)
        before = torch.exp(-depth.index_select(0, live))[:, None]
        seen &= (before * weights >= sampling.min_weight) & (before * transmittance >= sampling.min_transmittance)
        slab.index_copy_(0, live, seen)
        depth.index_add_(0, live, passed.sum(1))
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


def _composite(samples: _Samples, field: Field) -> Tensor:
    """Evaluates the field at the samples and composites them along the rays.

    Returns:
        [K, C] for the K rays that have samples: color, opacity, depth, depth variance and, if the field returns
        normals, normal and orientation.
    """
    density, rgb, normal = field(samples.points)
    if samples.light is not None:
        lighting, position = samples.light
        rgb = shade(rgb, normal, samples.points, position.index_select(0, samples.ray), lighting)

    def pack(values: Tensor) -> Tensor:
        flat = values.new_zeros(math.prod(samples.shape), *values.shape[1:])
        return flat.index_copy(0, samples.place, values).unflatten(0, samples.shape)

    t = pack(samples.lengths)
    weights, _ = alpha_weights(pack(density * samples.widths))
    opacity = weights.sum(1)
    visible = opacity.clamp_min(torch.finfo(opacity.dtype).eps)
    depth = (weights * t).sum(1) / visible
    variance = (weights * (t - depth[:, None]).square()).sum(1) / visible
    columns = [(weights[..., None] * pack(rgb)).sum(1), torch.stack((opacity, depth, variance), 1)]
    if normal is not None:
        away = (normal * samples.directions).sum(1).clamp_min(0).square()
        columns.append((weights[..., None] * pack(normal)).sum(1))
        columns.append((weights.detach() * pack(away)).sum(1, keepdim=True))
    return torch.cat(columns, 1)
