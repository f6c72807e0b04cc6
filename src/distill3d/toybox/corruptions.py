"""Bad objects made from good images: what the critic is trained to reject.

Every corruption takes layers [B, 4, H, W], premultiplied color and coverage in [0, 1] as from `world.cutout`, another
view or another toy for each of them, and a generator, and returns layers. They imitate what distillation yields when
it fails: lumps, mottled colors, fog, bent or lost parts, several fronts, ragged surfaces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Layers = Float[Tensor, "b 4 h w"]
Corruption = Callable[[Layers, Layers, torch.Generator], Layers]

CHANGE = 0.1  # smallest mean change of a corrupted image, as a fraction of the object's area
SECOND = 0.4  # fraction of images with a second corruption


def blur(x: Float[Tensor, "b c h w"], sigma: float) -> Float[Tensor, "b c h w"]:
    """Gaussian blur with a standard deviation in pixels; at the border the weights are normalized anew."""

    def weights(size: int) -> Tensor:
        at = torch.arange(size)
        return torch.softmax(-0.5 * ((at - at[:, None]) / sigma).square(), dim=1)

    return weights(x.shape[2]) @ (x @ weights(x.shape[3]).T)


def uniform(low: float, high: float, generator: torch.Generator, rows: int = 1) -> Float[Tensor, "rows 1 1 1"]:
    """Uniform random numbers, one for each row of a batch."""
    return low + (high - low) * torch.rand(rows, 1, 1, 1, generator=generator)


def smooth_noise(like: Tensor, channels: int, cells: int, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Normal noise on a grid of `cells` a side, interpolated to the images' size."""
    noise = torch.randn(len(like), channels, cells, cells, generator=generator)
    return F.interpolate(noise, size=like.shape[-2:], mode="bicubic")


def _cells(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _painted(color: Tensor, coverage: Tensor) -> Layers:
    return torch.cat((color.clamp(0, 1) * coverage, coverage), dim=1)


def _filled(layers: Layers, sigma: float) -> Float[Tensor, "b 3 h w"]:
    """Low-passed color of the object, continued outside of it."""
    wide = blur(layers, sigma) + 0.02 * blur(layers, 8.0) + 1e-3 * layers.mean((2, 3), keepdim=True)
    return wide[:, :3] / wide[:, 3:].clamp_min(1e-6)


def lump(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """A smooth blob in place of the silhouette, in low-passed colors; half of them cover both views."""
    both = torch.maximum(layers[:, 3:], others[:, 3:])
    alpha = torch.where(uniform(0, 1, generator, len(layers)) < 0.5, both, layers[:, 3:])
    wide = blur(alpha, uniform(2.5, 5, generator).item())
    coverage = torch.sigmoid(uniform(10, 50, generator, len(layers)) * (wide - uniform(0.3, 0.5, generator)))
    color = _filled(layers, uniform(1.5, 4, generator).item())
    return _painted(color + 0.08 * smooth_noise(layers, 3, _cells(5, 12, generator), generator), coverage)


def blob(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """A random smooth shape at the object's place, in its mean color and another one."""
    alpha = layers[:, 3:]
    size = alpha.mean((2, 3), keepdim=True)
    wide = blur(alpha, 7.0) / (size.sqrt() + 1e-3) + 0.15 * smooth_noise(layers, 1, _cells(5, 9, generator), generator)
    level = wide.flatten(1).quantile(0.85).item()
    coverage = torch.sigmoid(25 * (wide - level))
    one, two = (x[:, :3].mean((2, 3), keepdim=True) / x[:, 3:].mean((2, 3), keepdim=True) for x in (layers, others))
    color = torch.lerp(one, two, torch.sigmoid(3 * smooth_noise(layers, 1, _cells(4, 8, generator), generator) - 1))
    return _painted(color + 0.1 * smooth_noise(layers, 1, _cells(3, 8, generator), generator), coverage)


def soft(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """A strong blur, as of an object in the middle of its distillation."""
    return blur(layers, uniform(1.8, 3.5, generator).item())


def mottle(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """Band-limited noise on the colors."""
    cells = _cells(7, 24, generator)
    noise = smooth_noise(layers, 3, cells, generator) + smooth_noise(layers, 1, cells, generator)
    color = layers[:, :3] / layers[:, 3:].clamp_min(1e-3)
    return _painted(color + uniform(0.05, 0.18, generator, len(layers)) * noise, layers[:, 3:])


def fog(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """Gray or colored haze around the object and in its holes."""
    near = blur(layers[:, 3:], uniform(3, 6, generator).item())
    cloud = near * (1 + 0.5 * smooth_noise(layers, 1, _cells(4, 10, generator), generator))
    haze = (uniform(0.6, 1.4, generator, len(layers)) * cloud).clamp(0, 0.8)
    gray = uniform(0.1, 0.8, generator, len(layers)).expand(-1, 3, -1, -1)
    color = torch.lerp(gray, _filled(layers, 4.0), uniform(0, 1, generator, len(layers)))
    return layers + (1 - layers[:, 3:]) * _painted(color.expand(-1, -1, *layers.shape[-2:]), haze)


def veil(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """An object that is half transparent in places."""
    holes = torch.sigmoid(4 * smooth_noise(layers, 1, _cells(3, 9, generator), generator))
    return layers * (1 - uniform(0.5, 0.9, generator, len(layers)) * holes)


def warp(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """A smooth displacement of several pixels."""
    flow = smooth_noise(layers, 2, _cells(4, 8, generator), generator) * uniform(0.09, 0.2, generator, len(layers))
    identity = torch.eye(2, 3).expand(len(layers), -1, -1)
    grid = F.affine_grid(identity, list(layers.shape), align_corners=False) + flow.movedim(1, -1)
    return F.grid_sample(layers, grid, align_corners=False)


def parts(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """A region of each object is missing, or shows another region of it."""
    b, _, height, width = layers.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    chosen = torch.multinomial(layers[:, 3].flatten(1) + 1e-6, 2, generator=generator)
    rows, columns = chosen // width, chosen % width
    distance = (y - rows[:, :1, None]).square() + (x - columns[:, :1, None]).square()
    wobble = 2 * smooth_noise(layers, 1, 8, generator)[:, 0]
    region = torch.sigmoid(2 * (uniform(5, 11, generator, b)[:, 0] - distance.sqrt() + wobble))[:, None]
    moved = torch.stack(
        [
            image.roll((int(r[0] - r[1]), int(c[0] - c[1])), (1, 2))
            for image, r, c in zip(layers, rows, columns, strict=True)
        ]
    )
    return torch.lerp(layers, moved * (torch.rand(b, 1, 1, 1, generator=generator) < 0.5), region)


def stubs(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """Thin parts erode; where nothing is thin, the lower end of the object is lost."""
    alpha, size = layers[:, 3:], 2 * _cells(2, 5, generator) + 1
    opened = -F.max_pool2d(-alpha, size, 1, size // 2)
    opened = (1.5 * blur(F.max_pool2d(opened, size, 1, size // 2), 1.0)).clamp(0, 1)
    kept = (opened * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp_min(1)
    height = torch.arange(alpha.shape[2]).view(1, 1, -1, 1)
    lowest = torch.where(alpha.amax(3, keepdim=True) > 0.5, height, 0).amax(2, keepdim=True)
    cut = lowest - uniform(6, 14, generator, len(layers)) + smooth_noise(layers, 1, 6, generator)
    return layers * torch.where(kept < 0.92, opened, torch.sigmoid(1.5 * (cut - height)))


def janus(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """Two views in one: side by side at the object's middle, or laid over each other."""
    alpha, column = layers[:, 3:], torch.arange(layers.shape[3])
    middle = (alpha * column).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp_min(1)
    right = torch.sigmoid((column - middle) / uniform(0.3, 2, generator, len(layers))).expand_as(alpha)
    over = uniform(0.4, 0.6, generator, len(layers)).expand_as(alpha)
    return torch.lerp(
        layers, others, torch.where(torch.rand(len(layers), 1, 1, 1, generator=generator) < 0.6, right, over)
    )


def ragged(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """Black or white shreds along the outline and the color edges."""
    alpha = layers[:, 3:]
    wide, narrow = F.max_pool2d(layers, 5, 1, 2), -F.max_pool2d(-layers, 5, 1, 2)
    edge = (2 * (wide - narrow).amax(1, keepdim=True)).clamp(0, 1)
    shreds = edge * torch.sigmoid(6 * smooth_noise(layers, 1, _cells(12, 28, generator), generator))
    ink = (torch.rand(len(layers), 1, 1, 1, generator=generator) < 0.5).float().expand(-1, 3, -1, -1)
    return torch.lerp(layers, _painted(ink.expand(-1, -1, *alpha.shape[-2:]), torch.ones_like(alpha)), shreds)


CORRUPTIONS: dict[str, Corruption] = {
    f.__name__: f for f in (lump, blob, soft, mottle, fog, veil, warp, parts, stubs, janus, ragged)
}
SURFACE = ("mottle", "soft", "fog", "warp", "lump")  # also follow on others


def corrupt(layers: Layers, others: Layers, generator: torch.Generator) -> Layers:
    """Corrupts each image, by turns with every corruption; many get a second one.

    Images that change too little, a symmetric toy that is glued to itself for example, become mottled lumps.
    """
    names, bad = list(CORRUPTIONS), layers.clone()
    start = _cells(0, len(names) - 1, generator)
    for i, name in enumerate(names[start:] + names[:start]):
        rows = slice(i, None, len(names))
        if len(layers[rows]):
            bad[rows] = CORRUPTIONS[name](layers[rows], others[rows], generator)
    second = torch.rand(len(bad), generator=generator) < SECOND
    if second.any():
        surface = CORRUPTIONS[SURFACE[_cells(0, len(SURFACE) - 1, generator)]]
        bad[second] = surface(bad[second], others[second], generator)
    area = layers[:, 3:].sum((1, 2, 3)).clamp_min(1)
    small = (bad - layers).abs().mean(1).sum((1, 2)) < CHANGE * area
    if small.any():
        bad[small] = mottle(lump(layers[small], others[small], generator), others[small], generator)
    return bad.clamp(0, 1)
