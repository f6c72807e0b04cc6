"""Builds toys from a kind, two colors and a seed, and draws them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from distill3d.cameras import BACKGROUND, DISTANCE, FOV, orbit, world_to_camera
from distill3d.meshes.mesh import RADIUS, Mesh
from distill3d.prompts import direction_of
from distill3d.render.raster import rasterize
from distill3d.toybox.shapes import ACCENT, COLORS, KINDS, MAIN, Toy
from distill3d.toybox.solids import corner_normals
from distill3d.types import Cameras

DISTANCES = (2.6, 3.1)  # of random views, world units
LIGHT = np.array([0.45, -0.35, 0.82]) / np.linalg.norm([0.45, -0.35, 0.82])  # fixed to the world


@dataclass(frozen=True)
class ToyMesh:
    """A colored toy in world units: front +x, z up, inside the sphere of `RADIUS`."""

    vertices: np.ndarray  # [V, 3]
    faces: np.ndarray  # [F, 3]
    face_colors: np.ndarray  # [F, 3] in [0, 1]

    @cached_property
    def shaded(self) -> np.ndarray:
        """Color at each face corner [F, 3, 3] under the toy world's light.

        Light from the whole sky, a soft key light that wraps around, and a little darkening towards the ground. It
        does not depend on the viewer, so the shading belongs to the surface as an albedo does.
        """
        normals = corner_normals(self.vertices, self.faces)
        sky = 0.5 + 0.5 * normals[..., 2]
        key = np.clip((normals @ LIGHT + 0.35) / 1.35, 0, None)
        ground = np.clip((self.vertices[self.faces][..., 2] + RADIUS) / RADIUS, 0, 1)
        shade = (0.50 + 0.22 * sky + 0.38 * key) * (0.90 + 0.10 * ground)
        return np.clip(self.face_colors[:, None, :] * shade[..., None], 0, 1)

    def mesh(self) -> Mesh:
        """The toy with the colors that it is drawn in; each face has three vertices of its own."""
        corners = self.vertices[self.faces].reshape(-1, 3)
        return Mesh(corners, np.arange(len(corners)).reshape(-1, 3), self.shaded.reshape(-1, 3))


def build(kind: str, color: str, accent: str | None = None, seed: int = 0) -> ToyMesh:
    """Builds one toy; `seed` determines its proportions, `accent` defaults to the kind's usual one.

    Raises:
        ValueError: for a kind or color that the world does not have.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; the toybox has: {', '.join(KINDS)}")
    accent = KINDS[kind][3] if accent is None else accent
    for name in (color, accent):
        if name not in COLORS:
            raise ValueError(f"unknown color {name!r}; the toybox has: {', '.join(COLORS)}")
    rng = np.random.default_rng(seed)
    toy = Toy()
    KINDS[kind][0](toy, lambda low, high: float(rng.uniform(low, high)))
    named = {MAIN: COLORS[color], ACCENT: COLORS[accent]}
    offsets = np.cumsum([0] + [len(s.vertices) for s, _ in toy.parts])
    vertices = np.concatenate([s.vertices for s, _ in toy.parts])
    faces = np.concatenate([s.faces + o for (s, _), o in zip(toy.parts, offsets, strict=False)])
    colors = np.concatenate([np.broadcast_to(named.get(c, c), (len(s.faces), 3)) for s, c in toy.parts])
    vertices = vertices - (vertices.min(0) + vertices.max(0)) / 2
    vertices = vertices * (RADIUS / np.linalg.norm(vertices, axis=1).max())
    return ToyMesh(vertices, faces, colors)


@dataclass(frozen=True)
class View:
    """A camera that looks near the origin: angles in degrees, distance from `target`, the point that it looks at."""

    azimuth: float
    elevation: float
    distance: float = DISTANCE
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def word(self) -> str:
        """front, side, back or overhead, see `distill3d.prompts.direction_of`."""
        return direction_of(self.azimuth, self.elevation)

    def camera(self) -> Cameras:
        """One camera in double precision."""
        azimuth, elevation, distance = torch.tensor([self.azimuth, self.elevation, self.distance], dtype=torch.float64)
        around = orbit(azimuth, elevation, distance, FOV)
        around.camera_to_world[:, :3, 3] += torch.tensor(self.target, dtype=torch.float64)
        return around


def draw(toy: ToyMesh, view: View, background: float = BACKGROUND, size: int = 64, supersample: int = 2) -> np.ndarray:
    """An image [size, size, 3] in [0, 1] over a gray background, with `supersample`^2 samples per pixel."""
    hit, colors = _samples(toy, view, size * supersample)
    image = torch.where(hit[..., None], colors, background)
    return image.view(size, supersample, size, supersample, 3).mean((1, 3)).numpy()


def cutout(toy: ToyMesh, view: View, size: int = 64, supersample: int = 2) -> np.ndarray:
    """An image without a background, [size, size, 4] in [0, 1]: color premultiplied by the coverage, and coverage.

    Over a background b it is `color + (1 - coverage) * b`, which equals `draw`.
    """
    hit, colors = _samples(toy, view, size * supersample)
    image = torch.cat((colors, hit[..., None].float()), dim=-1)
    return image.view(size, supersample, size, supersample, 4).mean((1, 3)).numpy()


def _samples(toy: ToyMesh, view: View, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of n x n samples hit the toy, bool [n, n], and their colors [n, n, 3], 0 where nothing is hit."""
    camera = view.camera()
    points = world_to_camera(camera, torch.from_numpy(toy.vertices))[0].float()
    face, weights = rasterize(points, torch.from_numpy(np.ascontiguousarray(toy.faces)), float(camera.fov_y), n, n)
    hit = face >= 0
    colors = torch.zeros(n, n, 3)
    shaded = torch.from_numpy(toy.shaded).float()
    colors[hit] = torch.einsum("pc,pcr->pr", weights[hit], shaded[face[hit]])
    return hit, colors


def random_view(rng: np.random.Generator) -> View:
    """A camera as in training: all around, mostly from eye height to 45 degrees up, some from overhead."""
    elevation = float(rng.uniform(-8, 45) if rng.random() < 0.88 else rng.uniform(45, 85))
    x, y, z = rng.normal(0, 0.03, 3).tolist()
    return View(float(rng.uniform(-180, 180)), elevation, float(rng.uniform(*DISTANCES)), (x, y, z))
