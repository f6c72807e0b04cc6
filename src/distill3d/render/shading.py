"""Shading of surfaces by a point light, and which shading a training step uses.

Training on lit and on white surfaces prevents the prior's images from being painted on a flat shape (DreamFusion,
Poole et al. 2022, section 3.2). Only the albedo is exported and evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill3d.devices import at_once
from distill3d.types import Cameras, Lighting


@dataclass(frozen=True)
class ShadingOptions:
    """How often a step is lit and from where; the defaults are those of the SDI release."""

    albedo_until: float = 0.1  # fraction of the run in which only the albedo is rendered
    textureless: float = 0.225  # fraction of the later steps; the rest of 1 is albedo
    lambertian: float = 0.075
    ambient: float = 0.1
    diffuse: float = 0.9
    jitter: float = 1.0  # standard deviation of the light's position about the camera, world units
    distance: tuple[float, float] = (0.8, 1.5)  # of the light from the origin

    def __post_init__(self) -> None:
        if min(self.textureless, self.lambertian) < 0 or self.textureless + self.lambertian > 1:
            raise ValueError(
                f"textureless and lambertian are fractions of the steps, got {self.textureless} and {self.lambertian}"
            )
        if not 0 < self.distance[0] <= self.distance[1]:
            raise ValueError(f"distance must be (low, high) above 0, got {self.distance}")

    def draw(self, step: int, total: int, cameras: Cameras, generator: torch.Generator) -> Lighting:
        """The lighting of B views at a step of a run of `total` steps: one mode for all, a light for each.

        The light is at normalize(camera + jitter N(0, I)) U(distance). The same amount of noise is drawn at every
        step, so that the mode does not change what is drawn later.
        """
        u = float(torch.rand((), generator=generator))
        noise = torch.randn(len(cameras), 3, generator=generator)
        length = torch.rand(len(cameras), 1, generator=generator)
        eye = cameras.camera_to_world[:, :3, 3]
        low, high = self.distance
        noise, length = at_once(eye.device, noise, length)
        position = F.normalize(eye + self.jitter * noise.to(eye), dim=1) * (low + (high - low) * length.to(eye))
        if step < round(self.albedo_until * total) or u >= self.textureless + self.lambertian:
            return Lighting("albedo", position, self.ambient, self.diffuse)
        mode = "textureless" if u < self.textureless else "lambertian"
        return Lighting(mode, position, self.ambient, self.diffuse)


def needs_normals(lighting: Lighting | None) -> bool:
    """Whether the shaded surface differs from its albedo, so that normals are needed."""
    return lighting is not None and lighting.mode != "albedo"


def shade(
    albedo: Float[Tensor, "n 3"],
    normal: Float[Tensor, "n 3"] | None,
    points: Float[Tensor, "n 3"],
    light: Float[Tensor, "n 3"],
    lighting: Lighting,
) -> Float[Tensor, "n 3"]:
    """Colors of surface points, in [0, 1] if ambient + diffuse is.

    Lambert's law: a (ambient + diffuse max(0, n.l)), with l the direction to the light; a is the albedo or, in mode
    textureless, 1.

    Args:
        albedo: in [0, 1].
        normal: unit and outward.
        points: world positions.
        light: position of the light that shines on each point (rows of lighting.position).

    Raises:
        ValueError: without normals, unless the mode is albedo.
    """
    if not needs_normals(lighting):
        return albedo
    if normal is None:
        raise ValueError(f"{lighting.mode} shading needs normals, but the scene has none")
    facing = (normal * F.normalize(light - points, dim=1)).sum(1, keepdim=True).clamp_min(0)
    lit = lighting.ambient + lighting.diffuse * facing
    return lit.expand_as(albedo) if lighting.mode == "textureless" else albedo * lit


def over_background(
    color: Float[Tensor, "b 3 h w"],
    opacity: Float[Tensor, "b 1 h w"],
    background: Float[Tensor, "b 3"] | Float[Tensor, "b 3 h w"],
) -> Float[Tensor, "b 3 h w"]:
    """Composites colors that are multiplied by the opacity over a background."""
    background = background if background.ndim == 4 else background[:, :, None, None]
    return color + (1 - opacity) * background.to(color)
