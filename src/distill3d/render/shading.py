"""The shading of a surface by a point light, and which shading a training step draws.

Training on lit and on white surfaces keeps a prior's pictures from being painted on a flat shape (DreamFusion, Poole
et al. 2022, section 3.2). What is saved and tested is the albedo alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.types import Cameras, Lighting


@dataclass(frozen=True)
class ShadingOptions:
    """How often a step is lit and from where: the recipe of the SDI release."""

    albedo_steps: int = 1000  # only the albedo before
    textureless: float = 0.225  # share of the steps after; what is left of 1 is albedo
    lambertian: float = 0.075
    ambient: float = 0.1
    diffuse: float = 0.9
    jitter: float = 1.0  # standard deviation that moves the light off the camera's direction, world units
    distance: tuple[float, float] = (0.8, 1.5)  # of the light from the origin

    def __post_init__(self) -> None:
        if min(self.textureless, self.lambertian) < 0 or self.textureless + self.lambertian > 1:
            raise ValueError(
                f"textureless and lambertian are shares of 1, got {self.textureless} and {self.lambertian}"
            )
        if not 0 < self.distance[0] <= self.distance[1]:
            raise ValueError(f"distance must be (low, high) above 0, got {self.distance}")

    def draw(self, step: int, cameras: Cameras, generator: torch.Generator) -> Lighting:
        """The lighting of B views at a step: one mode for all, a light for each.

        The light lies at normalize(camera + jitter N(0, I)) U(distance). The same numbers are drawn at every step,
        so that a mode does not change what comes after it.
        """
        share = float(torch.rand((), generator=generator))
        noise = torch.randn(len(cameras), 3, generator=generator)
        length = torch.rand(len(cameras), 1, generator=generator)
        eye = cameras.camera_to_world[:, :3, 3]
        low, high = self.distance
        position = F.normalize(eye + self.jitter * noise.to(eye), dim=1) * (low + (high - low) * length.to(eye))
        if step < self.albedo_steps or share >= self.textureless + self.lambertian:
            return Lighting("albedo", position, self.ambient, self.diffuse)
        mode = "textureless" if share < self.textureless else "lambertian"
        return Lighting(mode, position, self.ambient, self.diffuse)


def needs_normals(lighting: Lighting | None) -> bool:
    """Whether surfaces lit so look different from their bare color."""
    return lighting is not None and lighting.mode != "albedo"


def shade(albedo: Tensor, normal: Tensor | None, points: Tensor, light: Tensor, lighting: Lighting) -> Tensor:
    """Colors [N, 3] of surface points, in [0, 1] if ambient + diffuse is.

    Lambert's law: a (ambient + diffuse max(0, n.l)), with l the direction to the light; a is the albedo or, where
    the mode is textureless, 1.

    Args:
        albedo: [N, 3] in [0, 1].
        normal: [N, 3], unit and outward.
        points: [N, 3], world.
        light: [N, 3], where the light is that shines on each point (rows of lighting.position).

    Raises:
        ValueError: without normals, unless the mode is albedo.
    """
    if not needs_normals(lighting):
        return albedo
    if normal is None:
        raise ValueError(f"{lighting.mode} shading needs normals, got a scene that gave none")
    facing = (normal * F.normalize(light - points, dim=1)).sum(1, keepdim=True).clamp_min(0)
    lit = lighting.ambient + lighting.diffuse * facing
    return lit.expand_as(albedo) if lighting.mode == "textureless" else albedo * lit
