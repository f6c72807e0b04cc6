"""Gaussian splatting (Kerbl et al. 2023, "3D Gaussian Splatting") as pure functions of tensors.

Notation, for one view. A splat has mean mu, covariance S = R diag(s)^2 R^T, opacity o and color c.
    camera frame   t = W (mu - eye), right, down and forward; z = its last entry
    footprint      S' = J W S W^T J^T + blur I, with J the Jacobian of the projection at t (EWA: Zwicker et al.
                   2001); `blur` (pixels squared) is the low-pass filter that keeps every splat about a pixel wide
    at a pixel p   alpha = min(max_alpha, o exp(-(p - m)^T S'^-1 (p - m) / 2)), m = projection of mu;
                   nothing where that is below min_alpha
    image          front to back by z: w_i = alpha_i prod_{j<i} (1 - alpha_j), so that sum w_i + T_end = 1
`reference` composites this pixel by splat as written; `composite` expands each footprint's box into fragments (see
splat_compositing.py). On CUDA gsplat does all of it if it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill3d.cameras import focal_length, world_to_camera
from distill3d.devices import marked
from distill3d.render.shading import over_background
from distill3d.render.splat_compositing import Footprints, SplatSampling, composite
from distill3d.types import Cameras, Rendering

Compositor = Callable[[Footprints, int, SplatSampling], Tensor]
"""Maps the footprints of one view and its size to the features [size^2, C] of its pixels, row by row."""


@dataclass(frozen=True)
class Splats:
    """N Gaussians in world units."""

    means: Float[Tensor, "n 3"]
    quaternions: Float[Tensor, "n 4"]  # (w, x, y, z), of any length but zero
    log_scales: Float[Tensor, "n 3"]  # logarithms of the standard deviations along the three axes
    opacities: Float[Tensor, " n"]  # raw: the opacity is their sigmoid
    colors: Float[Tensor, "n 3"] | Float[Tensor, "b n 3"]  # in [0, 1]; per view if they are lit

    def __len__(self) -> int:
        return self.means.shape[0]

    def axes(self) -> Float[Tensor, "n 3 3"]:
        """Rotation matrices whose columns are the axes in world space."""
        w, x, y, z = F.normalize(self.quaternions, dim=1).unbind(1)
        rows = (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        )
        return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)

    def normals(self, eyes: Float[Tensor, "b 3"]) -> Float[Tensor, "b n 3"]:
        """Unit vectors along the shortest axis of each splat, turned towards the eyes."""
        shortest = self.log_scales.argmin(1)[:, None, None].expand(-1, 3, 1)
        axis = self.axes().gather(2, shortest)[..., 0]
        towards = ((eyes[:, None] - self.means) * axis).sum(-1, keepdim=True)
        return torch.where(towards < 0, -axis, axis)


def render_splats(
    splats: Splats,
    cameras: Cameras,
    size: int,
    background: Float[Tensor, "b 3"] | Float[Tensor, "b 3 h w"],
    sampling: SplatSampling = SplatSampling(),
    *,
    normals: bool = False,
    watch: Callable[[Tensor], None] | None = None,
    compositor: Compositor | None = None,
) -> Rendering:
    """Square images of splats over a background; differentiable in the splats and the background.

    Args:
        size: pixels a side.
        background: colors or images.
        normals: whether to composite the normals of the splats too. `orientation` stays None: they face the viewer
            by construction.
        watch: called in the backward pass with the gradient [B, N, 2] of the projected means, per pixel.
        compositor: default is `composite`, or gsplat on CUDA if that is installed.

    Returns:
        a `Rendering`. The depth of a splat is that of its mean; at a pixel it is converted to the length of the
        pixel's ray to the plane of that depth.
    """
    if compositor is None and splats.means.is_cuda and _gsplat() is not None:
        image = _gsplat_image(splats, cameras, size, sampling, normals, watch)
    else:
        image = _image(splats, cameras, size, sampling, normals, watch, compositor or composite)
    return _assemble(image, cameras, background)


def _world_to_view(cameras: Cameras) -> Tensor:
    """Rotations [B, 3, 3] from the world to right, down and forward."""
    return _flipped(cameras.camera_to_world[:, :3, :3]).mT


def _flipped(values: Tensor) -> Tensor:
    """Right, up and back [..., 3] as right, down and forward."""
    return torch.cat((values[..., :1], -values[..., 1:]), -1)


def _image(
    splats: Splats,
    cameras: Cameras,
    size: int,
    sampling: SplatSampling,
    normals: bool,
    watch: Callable[[Tensor], None] | None,
    compositor: Compositor,
) -> Tensor:
    """Features [B, C, size, size], composited view by view."""
    rotation = _world_to_view(cameras)
    place = _flipped(world_to_camera(cameras, splats.means))  # right, down, forward
    drawn = place[..., 2] > sampling.near
    # Splats behind the camera get a harmless place: the numbers are not used, but must be finite.
    depth = torch.where(drawn, place[..., 2], 1.0)
    slope = torch.where(drawn[..., None], place[..., :2], 0.0) / depth[..., None]
    focal = focal_length(cameras.fov_y, size)[:, None]
    center = 0.5 * size + focal[..., None] * slope
    if watch is not None and center.requires_grad:
        center.register_hook(watch)
    cc, cr, rr = _footprint(splats, rotation, depth, slope, focal, size).unbind(-1)
    cc, rr = cc + sampling.blur, rr + sampling.blur
    conic = torch.stack((rr, -cr, cc), -1) / (cc * rr - cr * cr)[..., None]
    opacity = torch.sigmoid(splats.opacities)
    drawn = drawn & (opacity > sampling.min_alpha)
    # alpha >= min_alpha inside the ellipse d^T S'^-1 d <= 2 ln(o / min_alpha), whose box this is.
    square = 2 * (opacity / sampling.min_alpha).clamp_min(1).log()
    reach = (square[:, None] * torch.stack((cc, rr), -1)).sqrt().detach()
    features = _features(splats, cameras, depth, normals)

    images = []
    for view, count in enumerate(drawn.sum(1).tolist()):
        visible = marked(drawn[view], count)
        order = visible[depth[view, visible].argsort(stable=True)]
        parts = (center[view], conic[view], opacity, features[view], reach[view])
        images.append(compositor(Footprints(*(part.index_select(0, order) for part in parts)), size, sampling))
    return torch.stack(images).unflatten(1, (size, size)).permute(0, 3, 1, 2)


def _footprint(splats: Splats, rotation: Tensor, depth: Tensor, slope: Tensor, focal: Tensor, size: int) -> Tensor:
    """Covariances [B, N, 3] = (cc, cr, rr) in pixels squared: (J W R diag(s)) times its transpose."""
    axes = rotation[:, None] @ (splats.axes() * splats.log_scales.exp()[:, None])  # [B, N, 3, 3], one axis a column
    # Far outside the image the linear projection diverges; the original limits its slope to 1.3 times the frame's.
    limit = (1.3 * 0.5 * size / focal)[..., None]
    slope = torch.minimum(torch.maximum(slope, -limit), limit)
    flat = axes[..., :2, :] - slope[..., None] * axes[..., 2:, :]
    column, row = ((focal / depth)[..., None, None] * flat).unbind(-2)
    return torch.stack(((column * column).sum(-1), (column * row).sum(-1), (row * row).sum(-1)), -1)


def _features(splats: Splats, cameras: Cameras, depth: Tensor, normals: bool) -> Tensor:
    """The composited features [B, N, C]: color, one, depth and its square (from the origin's depth), normal."""
    eye = cameras.camera_to_world[:, :3, 3]
    offset = depth - _origin_depth(cameras)[:, None]
    colors = splats.colors.expand(len(cameras), -1, -1)
    parts = [colors, torch.stack((torch.ones_like(offset), offset, offset.square()), -1)]
    if normals:
        parts.append(splats.normals(eye))
    return torch.cat(parts, -1)


def _origin_depth(cameras: Cameras) -> Tensor:
    """Depth [B] of the world's origin: variances are differences of squares and need small numbers."""
    return (cameras.camera_to_world[:, :3, 2] * cameras.camera_to_world[:, :3, 3]).sum(-1)


def reference(footprints: Footprints, size: int, sampling: SplatSampling) -> Float[Tensor, "pixels c"]:
    """Slow, readable version of `composite`: a chunk of pixels at a time against all splats."""
    axis = torch.arange(size, device=footprints.center.device, dtype=footprints.center.dtype) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    cc, cr, rr = footprints.conic.unbind(-1)
    rows = []
    for part in pixels.split(max(1, sampling.chunk // max(1, len(cc)))):
        dx, dy = (part[:, None] - footprints.center).unbind(-1)
        power = -0.5 * (cc * dx * dx + rr * dy * dy) - cr * dx * dy
        alpha = footprints.opacity * power.exp()
        alpha = torch.where(alpha >= sampling.min_alpha, alpha.clamp_max(sampling.max_alpha), 0.0)
        transmittance = F.pad(1 - alpha, (1, 0), value=1.0).cumprod(-1)[:, :-1]
        rows.append((transmittance * alpha) @ footprints.features)
    return torch.cat(rows)


def _assemble(image: Tensor, cameras: Cameras, background: Tensor) -> Rendering:
    """A Rendering from composited features [B, C, size, size]."""
    size = image.shape[-1]
    opacity = image[:, 3:4]
    rgb = over_background(image[:, :3], opacity, background)
    hit = (opacity > 0).to(image)
    visible = opacity.clamp_min(torch.finfo(image.dtype).eps)
    offset = image[:, 4:5] / visible
    depth = hit * (_origin_depth(cameras)[:, None, None, None] + offset)
    variance = (image[:, 5:6] / visible - offset.square()).clamp_min(0)
    axis = (torch.arange(size, device=image.device, dtype=image.dtype) + 0.5 - 0.5 * size).square()
    focal = focal_length(cameras.fov_y, size)
    length = (1 + (axis[:, None] + axis) / focal.square()[:, None, None]).sqrt()[:, None]
    normal = image[:, 6:9] if image.shape[1] > 6 else None
    return Rendering(rgb, opacity, length * depth, length.square() * variance, normal)


@cache
def _gsplat() -> Callable | None:
    """gsplat's rasterizer, or None if it is not installed (`pip install 'distill3d[splats]'`)."""
    try:
        return importlib.import_module("gsplat").rasterization
    except ImportError:
        return None


def _gsplat_image(
    splats: Splats,
    cameras: Cameras,
    size: int,
    sampling: SplatSampling,
    normals: bool,
    watch: Callable[[Tensor], None] | None,
) -> Tensor:
    """Same as `_image`, by gsplat (Ye et al. 2024)."""
    rasterization = _gsplat()
    assert rasterization is not None
    rotation, eye = _world_to_view(cameras), cameras.camera_to_world[:, :3, 3]
    view = torch.eye(4, device=eye.device, dtype=eye.dtype).repeat(len(cameras), 1, 1)
    view[:, :3, :3], view[:, :3, 3] = rotation, -(rotation @ eye[..., None])[..., 0]
    focal, zero = focal_length(cameras.fov_y, size), torch.zeros_like(cameras.fov_y)
    middle = torch.full_like(focal, 0.5 * size)
    rows = ((focal, zero, middle), (zero, focal, middle), (zero, zero, torch.ones_like(focal)))
    intrinsics = torch.stack([torch.stack(row, -1) for row in rows], -2)
    depth = ((splats.means - eye[:, None]) * rotation[:, None, 2]).sum(-1)
    image, _, info = rasterization(
        splats.means,
        F.normalize(splats.quaternions, dim=1),
        splats.log_scales.exp(),
        torch.sigmoid(splats.opacities),
        _features(splats, cameras, depth, normals).contiguous(),
        view,
        intrinsics,
        size,
        size,
        near_plane=sampling.near,
        eps2d=sampling.blur,
        packed=False,
    )
    if watch is not None and info["means2d"].requires_grad:
        info["means2d"].register_hook(watch)
    return image.permute(0, 3, 1, 2)
