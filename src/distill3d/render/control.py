"""What a ControlNet is told about views: depth or normals as pictures, in the conventions it was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from distill3d.types import Rendering


@torch.no_grad()
def control_picture(rendering: Rendering, camera_to_world: Tensor, kind: str) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1]; kind is "depth" or "normal", camera_to_world [B, 4, 4].

    depth: nearness 1 / distance, stretched over what is seen of the object in each view, black behind it
    (as MiDaS). normal: in the camera's frame, red to the left, green up, blue to the viewer; the empty parts
    face the viewer (as ScanNet). Raises ValueError for another kind, and for normals that were not rendered.
    """
    seen = rendering.opacity > 0.5
    if kind == "depth":
        near = 1 / rendering.depth.clamp(min=1e-6)
        far = torch.where(seen, near, torch.inf).amin((2, 3), keepdim=True)
        most = torch.where(seen, near, -torch.inf).amax((2, 3), keepdim=True)
        share = (near - far) / (most - far).clamp(min=1e-6)
        # What is seen farthest must still differ from the background.
        return torch.where(seen, 0.1 + 0.9 * share, 0.0).expand(-1, 3, -1, -1)
    if kind != "normal":
        raise ValueError(f"a ControlNet can be told depth or normal, got {kind!r}")
    if rendering.normal is None:
        raise ValueError("the normals of this rendering were not asked for")
    world_to_camera = camera_to_world[:, :3, :3].transpose(1, 2).to(rendering.normal)
    normal = torch.nn.functional.normalize(torch.einsum("bij,bjhw->bihw", world_to_camera, rendering.normal), dim=1)
    normal = torch.where(seen, normal, normal.new_tensor([0.0, 0.0, 1.0])[:, None, None])
    return normal * normal.new_tensor([-0.5, 0.5, 0.5])[:, None, None] + 0.5
