"""Depth and normals as pictures: as ControlNets are told them, and as pictures that are distilled themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from distill3d.types import Rendering


@torch.no_grad()
def control_image(rendering: Rendering, camera_to_world: Tensor, kind: str) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1]; kind is "depth" or "normal", camera_to_world [B, 4, 4].

    depth: nearness 1 / distance, stretched over what is seen of the object in each view, black behind it
    (as MiDaS). normal: in the camera's frame, red to the left, green up, blue to the viewer; the empty parts
    face the viewer (as ScanNet). Raises ValueError for another kind, and for normals that were not rendered.
    """
    seen = rendering.opacity > 0.5
    if kind == "depth":
        return torch.where(seen, _nearness(rendering, seen), 0.0).expand(-1, 3, -1, -1)
    if kind != "normal":
        raise ValueError(f"a ControlNet can be told depth or normal, got {kind!r}")
    normal = torch.nn.functional.normalize(_in_camera(rendering, camera_to_world), dim=1)
    normal = torch.where(seen, normal, normal.new_tensor([0.0, 0.0, 1.0])[:, None, None])
    return normal * normal.new_tensor([-0.5, 0.5, 0.5])[:, None, None] + 0.5


def geometry_image(rendering: Rendering, camera_to_world: Tensor, kind: str) -> Tensor:
    """The shape alone as pictures [B, 3, H, W] in [0, 1] with gradients, camera_to_world [B, 4, 4].

    normal: 0.5 n + 0.5 in the camera's frame (red to the right, green up, blue to the viewer) composited as colors
    are, over a plane that faces the viewer: the common normal map, and linear in what was rendered.
    depth: the nearness that `control_image` shows, composited over black. How it is stretched depends on the
    object too, and so do the gradients: moving it as a whole changes nothing but its perspective.

    Raises ValueError for another kind, and for normals that were not rendered.
    """
    if kind == "depth":
        nearness = _nearness(rendering, rendering.opacity > 0.5)
        return (rendering.opacity * nearness).expand(-1, 3, -1, -1)
    if kind != "normal":
        raise ValueError(f"a shape is shown by depth or normal, got {kind!r}")
    normal = _in_camera(rendering, camera_to_world)  # weighted by opacity, as the rendering's colors are
    empty = normal.new_tensor([0.5, 0.5, 1.0])[:, None, None]
    return 0.5 * normal + 0.5 * rendering.opacity + (1 - rendering.opacity) * empty


def _nearness(rendering: Rendering, seen: Tensor) -> Tensor:
    """1 / distance [B, 1, H, W], stretched to [0.1, 1] over the pixels that are seen; 0.1 where none is.

    What is seen farthest must still differ from the background, which is 0.
    """
    # Depths of what is hardly seen are out of range, and those of nothing are 0: neither may give gradients.
    near = 1 / torch.where(rendering.opacity > 0, rendering.depth, 1.0).clamp(min=1e-6)
    anything = seen.flatten(1).any(1)[:, None, None, None]
    low = torch.where(seen, near, torch.inf).amin((2, 3), keepdim=True)
    high = torch.where(seen, near, -torch.inf).amax((2, 3), keepdim=True)
    low, high = torch.where(anything, low, 0.0), torch.where(anything, high, torch.inf)
    return 0.1 + 0.9 * ((near - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _in_camera(rendering: Rendering, camera_to_world: Tensor) -> Tensor:
    """Normals [B, 3, H, W] in the camera's frame."""
    if rendering.normal is None:
        raise ValueError("the normals of this rendering were not asked for")
    world_to_camera = camera_to_world[:, :3, :3].transpose(1, 2).to(rendering.normal)
    return torch.einsum("bij,bjhw->bihw", world_to_camera, rendering.normal)
