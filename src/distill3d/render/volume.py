"""Emission-absorption volume rendering (Max 1995; NeRF, equation 3) as pure functions that take callables.

With densities sigma_i on samples of width delta along a ray:
    alpha_i = 1 - exp(-sigma_i delta),  T_i = exp(-sum_{j<i} sigma_j delta),  w_i = T_i alpha_i,
so that sum_i w_i + T_end = 1. Nearly all of a trained volume is empty or hidden, and the cost is in asking the
field. Three filters, cheapest first, decide where it is asked with gradients: the box (rays that miss it are
dropped), an occupancy grid, and a density-only march without gradients that finds the samples whose weight
can be seen. The survivors are packed to the left in [rays, most samples a ray] and composited there.

Memory is bounded twice: rays are marched `Sampling.chunk` at a time, and a chunk is composited `Sampling.points`
samples at a time. What a backward pass needs of all of them at once is bounded by `Sampling.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill3d.render.shading import shade
from distill3d.types import Lighting, Rays, Rendering

SLAB = 16  # samples that are marched together

Field = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""Maps points [N, 3] to density [N] (per world unit), color [N, 3] in [0, 1], outward unit normal [N, 3] or None."""


@dataclass(frozen=True)
class Sampling:
    """How finely rays are marched and what is too faint to be worth a look.

    min_weight and min_transmittance act only where `render_rays` is given the density by itself. A ray then
    loses at most samples * min_weight + min_transmittance of its opacity; two zeros make the picture exact.
    """

    samples: int = 80  # per ray, evenly spaced over its way through the box
    importance: int = 0  # samples more a ray, drawn where the weights of the first lie
    min_weight: float = 1e-4
    min_transmittance: float = 1e-3
    chunk: int = 2048  # rays marched at once: bounds the memory and stays in the cache
    points: int = 2**19  # samples composited at once; at least those of one ray
    checkpoint: bool = False  # computes the field once more in the backward pass and keeps nothing of it until then

    def __post_init__(self) -> None:
        if min(self.samples, self.chunk, self.points) < 1 or self.importance < 0:
            raise ValueError(
                "samples, chunk and points must be at least 1 and importance at least 0, "
                f"got {self.samples}, {self.chunk}, {self.points} and {self.importance}"
            )


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


@dataclass(frozen=True)
class Filters:
    """What is cheaply known of a field, so that it is asked only where it can be seen."""

    density: Callable[[Tensor], Tensor] | None = None  # its density [N] at points [N, 3] alone, without gradients
    occupancy: Occupancy | None = None  # exact where the density outside of it is zero


def render_rays(
    rays: Rays,
    field: Field,
    bounds: Tensor,
    background: Tensor,
    sampling: Sampling = Sampling(),
    *,
    filters: Filters = Filters(),
    lighting: Lighting | None = None,
    generator: torch.Generator | None = None,
) -> Rendering:
    """Renders a field inside a box over a background; differentiable in the field and the background.

    Args:
        rays: B pictures of rays [B, H, W, 3].
        field: see `Field`; asked only inside the box.
        bounds: lowest and highest corner [2, 3] of the box.
        background: colors [B, 3], or a picture [B, 3, H, W].
        filters: where the field need not be asked (see `Sampling` for what is given up).
        lighting: shades every sample (see `shading.shade`); the field must give normals unless it is albedo.
        generator: shifts all samples of a ray by one uniform draw within their strata (so that every stratum
            is sampled uniformly); without it they sit in the middle.

    Returns:
        every entry of `Rendering`; normal and orientation where the field gives normals.

    Raises:
        ValueError: for importance sampling of a field whose density alone is not given, and for a lighting that
            needs normals of a field that gives none.
    """
    batch, height, width, _ = rays.directions.shape
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    near, far = intersect_box(origins, directions, bounds)
    hits = (far > near).nonzero()[:, 0]
    shift = near.new_full((3 if sampling.importance else 1, len(hits)), 0.5)
    if generator is not None:
        shift = torch.rand(shift.shape, generator=generator, device=generator.device).to(shift)

    columns, indices = [], []
    for rows, offset in zip(hits.split(sampling.chunk), shift.split(sampling.chunk, 1), strict=True):
        march = _March(origins[rows], directions[rows], near[rows], far[rows], offset[-1], sampling.samples)
        if sampling.importance:
            march = _refined(march, sampling, filters, offset)
        keep = _visible(march, sampling, filters)
        light = None if lighting is None else (lighting, lighting.position.to(origins)[rows // (height * width)])
        for part in _groups(keep.sum(1), sampling.points):
            samples = _Samples.gather(march, keep, part, light)
            if sampling.checkpoint and torch.is_grad_enabled():
                values = checkpoint(_composite, samples, field, use_reentrant=False, preserve_rng_state=False)
            else:
                values = _composite(samples, field)
            columns.append(values)
            indices.append(rows[part][samples.count > 0])
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
    """Samples on R rays: ray lengths `t` [R, S] and widths of their strata, [R, 1] where they are even, else [R, S]."""

    def __init__(self, origins: Tensor, directions: Tensor, near: Tensor, far: Tensor, offset: Tensor, samples: int):
        self.origins, self.directions, self.near = origins, directions, near
        self.width = ((far - near) / samples)[:, None]
        index = torch.arange(samples, device=near.device, dtype=near.dtype)
        self.t = torch.addcmul(near[:, None], index + offset[:, None], self.width)

    def points(self, ray: Tensor, t: Tensor) -> Tensor:
        """World points [M, 3] at lengths t [M] of the rays numbered `ray` [M]."""
        return torch.addcmul(self.origins.index_select(0, ray), self.directions.index_select(0, ray), t[:, None])

    def widths(self, ray: Tensor, sample: Tensor) -> Tensor:
        """Widths [M] of the strata of single samples."""
        even = self.width.shape[1] == 1
        return self.width[:, 0].index_select(0, ray) if even else self.width[ray, sample]


@dataclass(frozen=True)
class _Samples:
    """The M samples of R rays that the field is asked about, ray after ray."""

    points: Tensor  # [M, 3]
    directions: Tensor  # [M, 3]
    lengths: Tensor  # [M]
    widths: Tensor  # [M]
    ray: Tensor  # [M]
    count: Tensor  # [R]
    light: tuple[Lighting, Tensor] | None  # and where it is for each ray, [R, 3]

    @staticmethod
    def gather(march: _March, keep: Tensor, part: slice, light: tuple[Lighting, Tensor] | None) -> _Samples:
        """Those of the rays in `part` that the mask `keep` [R, S] marks."""
        index = keep[part].view(-1).nonzero()[:, 0] + part.start * keep.shape[1]
        ray = torch.div(index, keep.shape[1], rounding_mode="floor")
        lengths = march.t.view(-1).index_select(0, index)
        directions = march.directions.index_select(0, ray)
        return _Samples(
            torch.addcmul(march.origins.index_select(0, ray), directions, lengths[:, None]), directions, lengths,
            march.widths(ray, index - ray * keep.shape[1]), ray - part.start, keep[part].sum(1),
            None if light is None else (light[0], light[1][part]),
        )  # fmt: skip


def _groups(count: Tensor, most: int) -> Iterator[slice]:
    """Splits rays with `count` [R] samples into runs of at most `most` samples, or of one ray."""
    total = count.cumsum(0)
    begin = 0
    while begin < len(count):
        before = total[begin - 1] if begin else total.new_zeros(())
        end = max(begin + 1, int(torch.searchsorted(total, before + most, right=True)))
        yield slice(begin, end)
        begin = end


@torch.no_grad()
def _refined(march: _March, sampling: Sampling, filters: Filters, shift: Tensor) -> _March:
    """Adds samples where the weights lie (NeRF, section 5.2: inverse transform, stratified).

    New edges cut the even strata, and every stratum has one sample of its own width. So no part of a ray is out of
    reach. Shifts [3, R] are those of the samples, of the edges and of `march`: drawn apart, so that each sample's
    optical depth is unbiased given the edges.
    """
    if filters.density is None:
        raise ValueError("importance sampling needs the field's density by itself")
    keep = torch.ones_like(march.t, dtype=torch.bool)
    if filters.occupancy is not None:
        keep = _occupied(march, filters.occupancy)
    ray, sample = keep.nonzero(as_tuple=True)
    points = march.points(ray, march.t[ray, sample])
    found = [filters.density(p) for p in points.split(sampling.points)]
    passed = torch.zeros_like(march.t)
    if found:
        passed[ray, sample] = torch.cat(found).to(passed) * march.widths(ray, sample)
    # Widened, for an edge may hide in a stratum whose one sample missed it, and never zero (mip-NeRF, equation 18).
    weights = torch.nn.functional.pad(alpha_weights(passed)[0][:, None], (1, 1), mode="replicate")[:, 0]
    pairs = torch.maximum(weights[:, 1:], weights[:, :-1])
    weights = 0.5 * (pairs[:, 1:] + pairs[:, :-1]) + 0.01 / sampling.samples
    total = torch.nn.functional.pad(weights.cumsum(1), (1, 0))
    total = total / total[:, -1:]

    share = torch.arange(sampling.importance, device=total.device, dtype=total.dtype) + shift[1, :, None]
    share = share / sampling.importance
    stratum = (torch.searchsorted(total, share, right=True) - 1).clamp_(0, sampling.samples - 1)
    low, high = total.gather(1, stratum), total.gather(1, stratum + 1)
    cuts = stratum + ((share - low) / (high - low).clamp_min(torch.finfo(total.dtype).tiny)).clamp(0, 1)
    even = torch.arange(sampling.samples + 1, device=total.device, dtype=total.dtype).expand(len(total), -1)
    edges = march.near[:, None] + torch.cat((even, cuts), 1).sort(1).values * march.width
    finer = _March(march.origins, march.directions, march.near, edges[:, -1], shift[0], 1)
    finer.width = edges.diff(dim=1)
    finer.t = torch.addcmul(edges[:, :-1], shift[0, :, None], finer.width)
    return finer


@torch.no_grad()
def _visible(march: _March, sampling: Sampling, filters: Filters) -> Tensor:
    """Mask [R, S] of the samples that the field has to be asked about."""
    empty = filters.occupancy
    keep = torch.ones_like(march.t, dtype=torch.bool) if empty is None else _occupied(march, empty)
    if filters.density is None:
        return keep
    # Front to back, a slab of samples at a time: behind a surface nothing has to be asked.
    depth = torch.zeros_like(march.near)
    for begin in range(0, keep.shape[1], SLAB):
        slab, lengths = keep[:, begin : begin + SLAB], march.t[:, begin : begin + SLAB]
        slab &= (torch.exp(-depth) >= sampling.min_transmittance)[:, None]
        ray, sample = slab.nonzero(as_tuple=True)
        if not len(ray):
            continue
        found = filters.density(march.points(ray, lengths[ray, sample])).to(depth)
        found = found * march.widths(ray, sample + begin)
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


def _composite(samples: _Samples, field: Field) -> Tensor:
    """Asks the field about the samples and sums them up along the rays.

    Returns:
        of the K rays that have any, values [K, C] in the order that `_assemble` reads.
    """
    count, ray = samples.count, samples.ray
    rays = count.nonzero()[:, 0]
    density, rgb, normal = field(samples.points)
    if samples.light is not None:
        lighting, position = samples.light
        rgb = shade(rgb, normal, samples.points, position.index_select(0, ray), lighting)

    # Packed: row = rank of the ray among those that have samples, slot = rank of the sample in its ray.
    slots = int(count.max()) if len(rays) else 0
    first = ((count > 0).cumsum(0) - 1) * slots - (count.cumsum(0) - count)
    at = first.index_select(0, ray) + torch.arange(len(ray), device=ray.device)

    def pack(values: Tensor) -> Tensor:
        flat = values.new_zeros(len(rays) * slots, *values.shape[1:])
        return flat.index_copy(0, at, values).unflatten(0, (-1, slots))

    if not slots:  # nothing to be seen; an empty sum keeps the graph, so that backward() is legal
        columns = [rgb, density[:, None].expand(-1, 3)] + ([] if normal is None else [normal, rgb[:, :1]])
        return torch.cat(columns, 1)
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


def _assemble(image: Tensor, background: Tensor) -> Rendering:
    """A Rendering from channels [B, C, H, W]: color, opacity, depth, variance and, if given, normal, orientation."""
    opacity = image[:, 3:4]
    background = background if background.ndim == 4 else background[:, :, None, None]
    rgb = image[:, :3] + (1 - opacity) * background.to(image)
    extra = (image[:, 6:9], image[:, 9:10]) if image.shape[1] > 6 else (None, None)
    return Rendering(rgb, opacity, image[:, 4:5], image[:, 5:6], *extra)
