"""Camera batches: look-at, orbits, random sampling, rays, projection. The axis convention is defined here.

World: right-handed, z up. Azimuth 0 looks at the front of the object from +x and grows towards +y; elevation
grows upwards. Camera frame (OpenGL): x right, y up, looking along -z. So at azimuth 0 the image's right is
the world's +y. Angles are degrees at the API and radians inside. Pixel coordinates are continuous, (0, 0) is
the top left corner of the image and the center of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.types import Cameras, Rays

# The usual views of an object: of turntables, previews, metrics and the toy world. Degrees, world units, gray level.
ELEVATION, DISTANCE, FOV, BACKGROUND = 15.0, 2.8, 40.0, 0.9

Range = tuple[float, float]
Angle = float | Sequence[float] | Tensor
Angles = TypeVar("Angles", float, Tensor)


def look_at(
    eye: Float[Tensor, "*b 3"], target: Float[Tensor, "*b 3"], up: Float[Tensor, "*#b 3"]
) -> Float[Tensor, "*b 4 4"]:
    """Poses (camera to world) of cameras at `eye` that look at `target`.

    Raises:
        ValueError: where the eye is the target or `up` is parallel to the view, so that no pose is defined.
    """
    backward = eye - target
    right = torch.linalg.cross(up.expand_as(backward), backward)
    if not bool((right.norm(dim=-1) > 1e-6 * up.norm(dim=-1) * backward.norm(dim=-1)).all()):
        raise ValueError("look_at needs an eye away from its target and an up vector across the view")
    backward = torch.nn.functional.normalize(backward, dim=-1)
    right = torch.nn.functional.normalize(right, dim=-1)
    columns = torch.stack((right, torch.linalg.cross(backward, right), backward, eye), dim=-1)
    last = columns.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*columns.shape[:-2], 1, 4)
    return torch.cat((columns, last), dim=-2)


def orbit(azimuth: Angle, elevation: Angle, distance: Angle, fov: Angle) -> Cameras:
    """Cameras on a sphere about the origin, looking at it; defined at the poles too.

    Args:
        azimuth, elevation, fov: degrees, a number or B values each; single values are repeated.
        distance: world units, above 0.

    Raises:
        ValueError: for a field of view outside (0, 180), a distance not above 0 or an elevation beyond 90.
    """
    azimuth, elevation, distance, fov = _columns(azimuth, elevation, distance, fov)
    _check(elevation, distance, fov)
    outward, up = _frame(azimuth, elevation)
    pose = look_at(outward * distance[:, None], torch.zeros_like(outward), up)
    return Cameras(pose, torch.deg2rad(fov), azimuth, elevation, distance)


MOST_VIEWS = 10_000  # of a turntable


def turntable(n: int, elevation: float = ELEVATION, distance: float = DISTANCE, fov: float = FOV) -> Cameras:
    """`n` views evenly around the object, the first from the front; angles in degrees."""
    if not 1 <= n <= MOST_VIEWS:
        raise ValueError(f"a turntable needs at least one view, and at most {MOST_VIEWS}, got {n}")
    return orbit(torch.arange(n) * (360.0 / n), elevation, distance, fov)


@dataclass(frozen=True)
class CameraSampler:
    """Ranges (low, high) that random views are drawn from; angles in degrees, distances in world units.

    The azimuths of a batch are evenly spaced over their range with a common random offset, so that a batch sees the
    object from all around. Elevations are uniform in angle in one half of the draws and uniform on the sphere in the
    other (DreamFusion, appendix A). Jitters are standard deviations in world units, drawn independently.

    orthogonal: four neighbors in the batch see the object from azimuths 90 degrees apart, at one elevation, distance
    and field of view, as multi-view priors were trained (MVDream, Shi et al. 2023). It needs a full circle of
    azimuths and no jitter.
    """

    azimuth: Range = (-180.0, 180.0)
    elevation: Range = (-10.0, 45.0)
    distance: Range = (2.6, 3.1)
    fov: Range = (40.0, 40.0)
    position_jitter: float = 0.0
    target_jitter: float = 0.0
    up_jitter: float = 0.0
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if self.orthogonal and self.azimuth[1] - self.azimuth[0] != 360:
            raise ValueError(f"orthogonal views need a full circle of azimuths, got {self.azimuth}")
        if self.orthogonal and (self.position_jitter or self.target_jitter or self.up_jitter):
            raise ValueError("orthogonal views take no jitter: set position_jitter, target_jitter and up_jitter to 0")
        for name in ("azimuth", "elevation", "distance", "fov"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name} range must be (low, high), got {(low, high)}")
        _check(*(torch.tensor(r) for r in (self.elevation, self.distance, self.fov)))

    @property
    def visible_radius(self) -> float:
        """Radius of the largest ball about the origin that every view without jitter shows completely; world units."""
        return self.distance[0] * math.sin(math.radians(self.fov[0]) / 2)

    def sample(self, batch: int, generator: torch.Generator) -> Cameras:
        """Draws `batch` views, on the CPU; everything random comes from `generator`.

        Raises:
            ValueError: for a batch below 1, or one of orthogonal views that is not a multiple of 4.
        """
        if batch < 1:
            raise ValueError(f"a batch needs at least one view, got {batch}")
        if self.orthogonal:
            return self._quadruples(batch, generator)

        def uniform(span: Range, u: Tensor | None = None) -> Tensor:
            u = torch.rand(batch, generator=generator) if u is None else u
            return (span[0] + (span[1] - span[0]) * u).clamp(*span)

        offset = torch.rand(1, generator=generator)
        azimuth = uniform(self.azimuth, (torch.arange(batch) + offset) / batch)
        low, high = (math.sin(math.radians(e)) for e in self.elevation)
        on_sphere = torch.rad2deg(torch.asin(uniform((low, high)))).clamp(*self.elevation)
        by_angle = uniform(self.elevation)
        elevation = torch.where(torch.rand(batch, generator=generator) < 0.5, on_sphere, by_angle)
        views = orbit(azimuth, elevation, uniform(self.distance), uniform(self.fov))

        noise = torch.randn(3, batch, 3, generator=generator)
        eye = views.camera_to_world[:, :3, 3] + self.position_jitter * noise[0]
        up = views.camera_to_world[:, :3, 1] + self.up_jitter * noise[2]
        pose = look_at(eye, self.target_jitter * noise[1], up)
        return Cameras(pose, views.fov_y, azimuth, elevation, views.distance)

    def _quadruples(self, batch: int, generator: torch.Generator) -> Cameras:
        if batch % 4:
            raise ValueError(f"orthogonal views come in fours: set a batch of 4, 8, ..., got {batch}")
        low, high = self.azimuth
        quarter = replace(self, azimuth=(low, low + 90), orthogonal=False).sample(batch // 4, generator)
        four = quarter[torch.arange(batch // 4).repeat_interleave(4)]
        azimuth = (four.azimuth + 90.0 * torch.arange(4).repeat(batch // 4)).clamp(max=high)
        return orbit(azimuth, four.elevation, four.distance, torch.rad2deg(four.fov_y))


def rays(cameras: Cameras, height: int, width: int) -> Rays:
    """Rays through the pixel centers of images of height x width pixels; row 0 is the top."""
    row, column = (torch.arange(n, device=cameras.fov_y.device) + 0.5 for n in (height, width))
    v, u = torch.meshgrid(row, column, indexing="ij")
    pixels = torch.stack((u, v), dim=-1).reshape(1, -1, 2).to(cameras.fov_y)
    focal = focal_length(cameras.fov_y, height)[:, None]
    local = pixel_directions(pixels.expand(len(cameras), -1, -1), focal, height, width)
    world = local @ cameras.camera_to_world[:, :3, :3].mT
    directions = torch.nn.functional.normalize(world, dim=-1).view(-1, height, width, 3)
    origins = cameras.camera_to_world[:, None, None, :3, 3].expand_as(directions)
    return Rays(origins, directions)


def project(
    cameras: Cameras, points: Float[Tensor, "#b n 3"] | Float[Tensor, "n 3"], height: int, width: int
) -> tuple[Float[Tensor, "b n 2"], Float[Tensor, "b n"]]:
    """Projects world points into the images; points [N, 3] are seen by all cameras.

    Returns:
        pixels as (column, row), continuous and not clipped, and depth along the optical axis (negative behind the
        camera, where the pixel is meaningless).
    """
    local = world_to_camera(cameras, points)
    depth = -local[..., 2]
    focal = focal_length(cameras.fov_y, height)[:, None]
    column = 0.5 * width + focal * local[..., 0] / depth
    row = 0.5 * height - focal * local[..., 1] / depth
    return torch.stack((column, row), dim=-1), depth


def unproject(
    cameras: Cameras, pixels: Float[Tensor, "b n 2"], depth: Float[Tensor, "b n"], height: int, width: int
) -> Float[Tensor, "b n 3"]:
    """World points at pixels and depth along the optical axis; inverts `project`."""
    focal = focal_length(cameras.fov_y, height)[:, None]
    local = pixel_directions(pixels, focal, height, width) * depth[..., None]
    return local @ cameras.camera_to_world[:, :3, :3].mT + cameras.camera_to_world[:, None, :3, 3]


def world_to_camera(cameras: Cameras, points: Float[Tensor, "#b n 3"] | Float[Tensor, "n 3"]) -> Float[Tensor, "b n 3"]:
    """World points in the frame of each camera; points [N, 3] are seen by all."""
    pose = cameras.camera_to_world.to(points)
    return (points - pose[:, None, :3, 3]) @ pose[:, :3, :3]


def pixel_directions(
    pixels: Float[Tensor, "*n 2"], focal: Float[Tensor, "*#n"], height: int, width: int
) -> Float[Tensor, "*n 3"]:
    """Camera-frame directions with depth 1 through pixels (column, row), for focal lengths in pixels."""
    x = (pixels[..., 0] - 0.5 * width) / focal
    y = (0.5 * height - pixels[..., 1]) / focal
    return torch.stack((x, y, -torch.ones_like(x)), dim=-1)


def focal_length(fov_y: Angles, height: int) -> Angles:
    """Focal length in pixels of images `height` pixels high, for full vertical angles in radians."""
    if isinstance(fov_y, Tensor):
        return 0.5 * height / torch.tan(0.5 * fov_y)
    return 0.5 * height / math.tan(0.5 * fov_y)


def _frame(azimuth: Tensor, elevation: Tensor) -> tuple[Tensor, Tensor]:
    """Outward and up directions [B, 3] at spherical coordinates in degrees, perpendicular by construction."""
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    outward = torch.stack((e.cos() * a.cos(), e.cos() * a.sin(), e.sin()), dim=-1)
    up = torch.stack((-e.sin() * a.cos(), -e.sin() * a.sin(), e.cos()), dim=-1)
    return outward, up


def _columns(*values: Angle) -> list[Tensor]:
    """Numbers, sequences and tensors as floating point tensors [B] of one device and precision."""
    tensors = [torch.atleast_1d(torch.as_tensor(v)) for v in values]
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    wide = any(t.dtype == torch.float64 for t in tensors)
    tensors = [t.to(device, torch.float64 if wide else torch.float32) for t in tensors]
    return [t.contiguous() for t in torch.broadcast_tensors(*tensors)]


def _check(elevation: Tensor, distance: Tensor, fov: Tensor) -> None:
    if not bool((elevation.abs() <= 90).all()):
        raise ValueError(f"elevation must lie in [-90, 90] degrees, got {_span(elevation)}")
    if not bool((distance > 0).all()):
        raise ValueError(f"distance must be above 0, got {_span(distance)}")
    if not bool(((fov > 0) & (fov < 180)).all()):
        raise ValueError(f"field of view must lie in (0, 180) degrees, got {_span(fov)}")


def _span(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
