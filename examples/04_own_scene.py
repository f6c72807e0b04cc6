"""Your own scene: anything with a `render` method can be distilled into.

    python examples/04_own_scene.py

This one is a cloud of soft colored balls. Only `render` is needed; checkpoints and turntables come with a run.
"""

import torch
from torch import nn

import distill3d as d3d


class Balls(nn.Module, d3d.Scene):
    """N soft balls with a position and a color each; the nearest one is seen."""

    def __init__(self, count: int = 32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.positions = nn.Parameter(torch.randn(count, 3, generator=generator) * 0.4)
        self.colors = nn.Parameter(torch.zeros(count, 3))

    def render(self, cameras, size, background, *, generator=None, normals=False, lighting=None):
        """Splats the balls onto the image plane."""
        to_camera = torch.linalg.inv(cameras.camera_to_world)
        p = self.positions @ to_camera[:, :3, :3].mT + to_camera[:, None, :3, 3]
        focal = 1 / torch.tan(cameras.fov_y / 2)[:, None, None]
        xy = focal * p[..., :2] / -p[..., 2:] * torch.tensor([1.0, -1.0])  # in [-1, 1], y down
        axis = (torch.arange(size) + 0.5) / size * 2 - 1
        pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
        distance = (pixels[None, :, :, None] - xy[:, None, None]).square().sum(-1)
        weight = torch.softmax(-30 * distance, -1)
        opacity = torch.exp(-30 * distance.min(-1).values)[:, None]
        color = (weight @ self.colors.sigmoid()).permute(0, 3, 1, 2)
        rgb = opacity * color + (1 - opacity) * background.view(len(cameras), 3, 1, 1)
        return d3d.Rendering(rgb, opacity, 2.8 * opacity, 0 * opacity)


def main(prior_name: str = "toybox", steps: int = 20) -> Balls:
    """Distills a prompt into the balls."""
    scene = Balls()
    d3d.distill(scene, d3d.load_prior(prior_name), d3d.sdi(), "a red apple", steps=steps)
    return scene


if __name__ == "__main__":
    print(main().colors.sigmoid().mean(0))
