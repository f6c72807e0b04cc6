"""Images of a mesh by a second renderer: its own colors without light, several samples per pixel. Tests use it too."""

from __future__ import annotations

import torch
from torch import Tensor

from distill3d.cameras import BACKGROUND, world_to_camera
from distill3d.meshes.mesh import Mesh
from distill3d.render.raster import rasterize
from distill3d.types import Cameras


@torch.no_grad()
def unlit_views(mesh: Mesh, cameras: Cameras, size: int, background: float = BACKGROUND, samples: int = 4) -> Tensor:
    """Images [B, 4, size, size] in [0, 1] over a gray background: color, and the fraction of the pixel covered.

    Each pixel has `samples` x `samples` samples.
    """
    fine, faces = size * samples, torch.from_numpy(mesh.faces)
    local = world_to_camera(cameras, torch.from_numpy(mesh.vertices))
    images = torch.full((len(cameras), fine, fine, 4), background)
    for image, points, fov in zip(images, local, cameras.fov_y, strict=True):
        face, weights = rasterize(points, faces, float(fov), fine, fine)
        hit = face >= 0
        image[hit, :3] = torch.from_numpy(mesh.colors(face[hit].numpy(), weights[hit].numpy())).float()
        image[:, :, 3] = hit
    return torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), samples)
