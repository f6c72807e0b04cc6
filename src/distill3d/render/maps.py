"""Depth and normal maps of a rendering as images: as a ControlNet expects them, and to be distilled themselves."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.types import Rendering


@torch.no_grad()
def control_image(rendering: Rendering, camera_to_world: Float[Tensor, "b 4 4"], kind: str) -> Float[Tensor, "b 3 h w"]:
    """Control images in [0, 1]; `kind` is "depth" or "normal".

    depth: nearness 1 / distance, rescaled over the visible part of the object in each view, black behind it (as
    MiDaS). normal: in the camera's frame, red to the left, green up, blue to the viewer; empty pixels face the viewer
    (as ScanNet).

    Raises:
        ValueError: for another kind, or for a rendering without normals.
    """
    seen = rendering.opacity > 0.5
    if kind == "depth":
        return torch.where(seen, _nearness(rendering, seen), 0.0).expand(-1, 3, -1, -1)
    if kind != "normal":
        raise ValueError(f"a control image shows depth or normal, got {kind!r}")
    normal = torch.nn.functional.normalize(_in_camera(rendering, camera_to_world), dim=1)
    normal = torch.where(seen, normal, normal.new_tensor([0.0, 0.0, 1.0])[:, None, None])
    return normal * normal.new_tensor([-0.5, 0.5, 0.5])[:, None, None] + 0.5


def geometry_image(
    rendering: Rendering, camera_to_world: Float[Tensor, "b 4 4"], kind: str
) -> Float[Tensor, "b 3 h w"]:
    """The shape alone as images in [0, 1], with gradients; `kind` is "depth" or "normal".

    normal: 0.5 n + 0.5 in the camera's frame (red to the right, green up, blue to the viewer), composited over a plane
    that faces the viewer. This is the common normal map, and it is linear in the rendered normals.
    depth: the nearness of `control_image`, composited over black. Its rescaling depends on the object too, and so do
    the gradients: moving the object as a whole changes only its perspective.

    Raises:
        ValueError: for another kind, or for a rendering without normals.
    """
    if kind == "depth":
        nearness = _nearness(rendering, rendering.opacity > 0.5)
        return (rendering.opacity * nearness).expand(-1, 3, -1, -1)
    if kind != "normal":
        raise ValueError(f"a geometry image shows depth or normal, got {kind!r}")
    normal = _in_camera(rendering, camera_to_world)  # weighted by opacity, as the rendering's colors are
    empty = normal.new_tensor([0.5, 0.5, 1.0])[:, None, None]
    return 0.5 * normal + 0.5 * rendering.opacity + (1 - rendering.opacity) * empty


def _nearness(rendering: Rendering, seen: Tensor) -> Tensor:
    """1 / distance [B, 1, H, W], rescaled to [0.1, 1] over the pixels `seen`; 0.1 where there are none.

    The farthest visible point must still differ from the background, which is 0.
    """
    # Depths of faint pixels are out of range, and those of empty pixels are 0: neither may give gradients.
    near = 1 / torch.where(rendering.opacity > 0, rendering.depth, 1.0).clamp(min=1e-6)
    anything = seen.flatten(1).any(1)[:, None, None, None]
    low = torch.where(seen, near, torch.inf).amin((2, 3), keepdim=True)
    high = torch.where(seen, near, -torch.inf).amax((2, 3), keepdim=True)
    low, high = torch.where(anything, low, 0.0), torch.where(anything, high, torch.inf)
    return 0.1 + 0.9 * ((near - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _in_camera(rendering: Rendering, camera_to_world: Tensor) -> Tensor:
    """Normals [B, 3, H, W] in the camera's frame."""
    if rendering.normal is None:
        raise ValueError("the rendering has no normals: render with normals=True")
    world_to_camera = camera_to_world[:, :3, :3].transpose(1, 2).to(rendering.normal)
    return torch.einsum("bij,bjhw->bihw", world_to_camera, rendering.normal)
