"""A mesh as a scene: its color is distilled, and its shape too where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill3d.cameras import project
from distill3d.export.options import ExportOptions
from distill3d.meshes.mesh import (
    Mesh,
    Placement,
    Up,
    place,
    read_mesh,
    save_arrays,
    usable_uv,
    weld,
    with_texture,
)
from distill3d.meshes.texture import TexturedMesh, paint_texels
from distill3d.render.edges import Edges, antialias, mesh_edges
from distill3d.render.mesh import Seen, see, shrink, vertex_normals
from distill3d.render.shading import needs_normals, shade
from distill3d.scenes.surface_grid import Shell
from distill3d.types import Cameras, Lighting, Rendering, Scene, SceneOptions

OWN_MESH = "source.npz"  # a run's copy of the mesh that it paints
START = 0.02  # colors of a file are taken to lie in [START, 1 - START]: a logit of 0 or 1 could not move any more


@dataclass(frozen=True)
class MeshOptions(SceneOptions):
    """Which mesh, and how it is painted and moved. Lengths in world units."""

    mesh: str = ""  # a .glb, .gltf, .obj or .ply file
    up: Up = "auto"  # the file's upward axis: y for glTF, z for the others
    turn: float = 0.0  # degrees by which the mesh is turned (from above, counter-clockwise) to face the front
    refit: bool = True  # centered and scaled to the size of an object; else the file's unit is the world's
    colors: bool = False  # begin with the colors of the file
    levels: tuple[int, ...] = (16, 32, 64)  # lattice points a side of the color, coarse to fine
    supersample: int = 2  # squared, the samples a pixel
    move: float = 0.0  # learning rate of the shape relative to that of the color; 0 leaves the shape alone
    shape_levels: tuple[int, ...] = (8, 16, 32)

    def __post_init__(self) -> None:
        if self.supersample < 1 or self.move < 0:
            raise ValueError(
                f"supersample must be at least 1 and move at least 0, got {self.supersample} and {self.move}"
            )

    def build(self, device: torch.device | str | None = None) -> MeshScene:
        """Reads the mesh; ValueError where it cannot be read."""
        if not self.mesh:
            raise ValueError("no mesh is named: give the file of one, --scene.mesh FILE")
        return MeshScene(read_mesh(self.mesh, self.up), self, device)

    def with_own_files(self, folder: Path) -> Self:
        """Copies the mesh into a run's folder, exactly as it was read."""
        save_arrays(folder / OWN_MESH, read_mesh(self.mesh, self.up))
        return replace(self, mesh=OWN_MESH)

    def located(self, folder: Path) -> Self:
        """The same with the mesh of a run found where the folder is now."""
        return replace(self, mesh=str(folder / self.mesh))


class MeshScene(nn.Module, Scene):
    """A mesh painted by values near its surface (see `Shell`); the picture of a place on it is its albedo.

    color = sigmoid(paint(rest place)), position = rest place + offset(rest place). Both are functions of the place,
    so what a file splits at a seam stays together. Geometry is fixed unless `options.move` is above 0.
    """

    export_settings = frozenset({"texture"})
    rest: Tensor
    faces: Tensor
    edges_ends: Tensor
    edges_edge: Tensor
    edges_third: Tensor

    def __init__(self, source: Mesh, options: MeshOptions = MeshOptions(), device: torch.device | str | None = None):
        super().__init__()
        self.source, self.options = source, options
        self.placement = place(source) if options.refit else Placement(np.zeros(3), 1.0)
        vertices, faces = weld(self._to_scene(source.vertices), source.faces)
        self.register_buffer("rest", torch.tensor(vertices, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("faces", torch.tensor(faces, device=device), persistent=False)
        for name, tensor in vars(mesh_edges(self.faces)).items():  # buffers, so that they move with the module
            self.register_buffer(f"edges_{name}", tensor, persistent=False)
        ends = self.rest[self.edges.ends]
        self.edge = float((ends[:, 0] - ends[:, 1]).norm(dim=1).mean())  # mean length, world units
        self.half_size = 1.01 * float(self.rest[self.faces].abs().max())
        face, weights = self._samples(max((*options.levels, *options.shape_levels)))
        points = self.places(face, weights).to(self.rest.device)
        self.paint = Shell(points, options.levels, 3, self.half_size)
        if options.colors:
            known = torch.tensor(source.colors(face, weights), dtype=torch.float32).clamp(START, 1 - START)
            self.paint.fit(points, torch.logit(known).to(points))
        self.offset = Shell(points, options.shape_levels, 3, self.half_size) if options.move else None
        for i, (index, weights) in enumerate([] if self.offset is None else self.offset.rows(self.rest)):
            self.register_buffer(f"shape_index{i}", index, persistent=False)
            self.register_buffer(f"shape_weights{i}", weights, persistent=False)

    @property
    def vertices(self) -> Tensor:
        """Where the vertices are now [V, 3], world."""
        if self.offset is None:
            return self.rest
        levels = range(len(self.offset.levels))
        rows = [(getattr(self, f"shape_index{i}"), getattr(self, f"shape_weights{i}")) for i in levels]
        return self.rest + self.offset.mix(rows)

    @property
    def edges(self) -> Edges:
        """The edges of its faces."""
        return Edges(self.edges_ends, self.edges_edge, self.edges_third)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Scene`."""
        groups = [{"params": list(self.paint.parameters()), "scale": 1.0}]
        if self.offset is not None:
            groups.append({"params": list(self.offset.parameters()), "scale": self.options.move})
        return groups

    def penalties(self) -> dict[str, Callable[[], Tensor]]:
        """Differences of the paint in the neighborhood and, where vertices move, how unevenly they do."""
        terms: dict[str, Callable[[], Tensor]] = {"smooth_color": self.paint.roughness}
        if self.offset is not None:
            terms["smooth_shape"] = lambda: bending(self.vertices - self.rest, self.edges, self.edge)
        return terms

    def render(
        self,
        cameras: Cameras,
        size: int,
        background: Tensor,
        *,
        generator: torch.Generator | None = None,
        normals: bool = False,
        lighting: Lighting | None = None,
    ) -> Rendering:
        """See `Scene`. Normals are those of the vertices, interpolated, on the side that is seen."""
        fine, vertices = size * self.options.supersample, self.vertices
        seen = see(cameras, vertices, self.faces, fine, fine)
        view = seen.hit.nonzero()[:, 0]
        places = seen.interpolate(vertices, self.faces)
        offset = places - cameras.camera_to_world[view, :3, 3]
        length = offset.norm(dim=1, keepdim=True)
        normal = None
        if normals or needs_normals(lighting):
            normal = F.normalize(seen.interpolate(vertex_normals(vertices, self.faces), self.faces), dim=1)
            normal = torch.where((normal * offset).sum(1, keepdim=True) > 0, -normal, normal)
        color = self.color(seen.interpolate(self.rest, self.faces))
        if lighting is not None:
            color = shade(color, normal, places, lighting.position[view], lighting)
        channels = [color, torch.ones_like(length), length] + ([normal] if normals and normal is not None else [])
        image = self._softened(cameras, vertices, seen, torch.cat(channels, dim=1))
        return _assemble(shrink(image, self.options.supersample), background)

    def color(self, places: Tensor) -> Tensor:
        """Albedo [N, 3] in [0, 1] at places [N, 3] of the surface at rest."""
        return torch.sigmoid(self.paint(places.detach()))

    def export(self, folder: Path, options: ExportOptions) -> list[Path]:
        """Writes mesh.glb with the faces of the source, in its own coordinates, and a texture or vertex colors."""
        from distill3d.meshes.files import save_mesh, with_vertex_colors

        mesh = with_vertex_colors(self.textured()) if options.texture is None else self.textured(options.texture)
        return save_mesh(options.mesh_path(folder), mesh)

    @torch.no_grad()
    def textured(self, size: int = 1024) -> TexturedMesh:
        """The mesh in the file's own coordinates (world axes), the paint baked into a texture of `size` texels.

        Its UV map is the file's where that can hold a texture, else a new one (see `uv_problem`).
        """
        uv, uv_faces, _ = usable_uv(self.source, size)

        def colors(face: np.ndarray, weights: np.ndarray) -> np.ndarray:
            places = self.places(face, weights).to(self.rest.device)
            return torch.cat([(self.color(part) * 255).round().byte().cpu() for part in places.split(1 << 18)]).numpy()

        return with_texture(self._moved(), paint_texels(uv, uv_faces, size, colors), uv, uv_faces)

    def _moved(self) -> Mesh:
        """The source with its vertices where they are now."""
        if self.offset is None:
            return self.source
        own = torch.tensor(self._to_scene(self.source.vertices), dtype=torch.float32, device=self.rest.device)
        moved = self._to_file((own + self.offset(own)).double().cpu().numpy())
        return replace(self.source, vertices=moved, normals=None)

    def _softened(self, cameras: Cameras, vertices: Tensor, seen: Seen, values: Tensor) -> Tensor:
        """Pictures [B, H, W, C] of values [P, C] with smooth silhouettes."""
        size = seen.face.shape[-1]
        pixels, along = project(cameras, vertices.expand(len(cameras), -1, -1), size, size)
        depth = torch.where(seen.hit, seen.image(seen.depth.detach()[:, None])[..., 0], math.inf)
        return antialias(seen.image(values), depth, pixels, along, self.edges)

    def _samples(self, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Places on the surface, about 8 for each face of a cell that it passes: faces [N] and weights [N, 3]."""
        a, b, c = self.rest[self.faces].unbind(1)
        area = float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum()) / 2
        count = int(8 * area / (2 * self.half_size / (level - 1)) ** 2)
        return self.source.sample(min(max(count, 10_000), 5_000_000))

    def places(self, face: np.ndarray, weights: np.ndarray) -> Tensor:
        """Places [N, 3] of the surface at rest, on the CPU: faces [N] and weights [N, 3] of their corners."""
        corners = self.rest.cpu()[self.faces.cpu()[torch.from_numpy(face)]]
        return (corners * torch.from_numpy(weights).to(corners)[..., None]).sum(1)

    def _to_scene(self, points: np.ndarray) -> np.ndarray:
        return self.placement.to_scene(points) @ _turn(self.options.turn).T

    def _to_file(self, points: np.ndarray) -> np.ndarray:
        return self.placement.to_file(points @ _turn(self.options.turn))


def bending(values: Tensor, edges: Edges, edge: float) -> Tensor:
    """How unevenly neighbors move: the mean over vertices of |mean of the neighbors' values - own value|^2 / edge^4.

    The umbrella Laplacian goes with the square of the edges' length, so that divided by it a weight means the same on
    a coarse and on a fine mesh: the integral of (Laplace of u)^2, about, of a movement u.

    Args:
        values: [V, C], one a vertex.
        edge: mean length of the edges, in the unit of the positions.
    """
    a, b = edges.ends.unbind(1)
    total = torch.zeros_like(values).index_add(0, a, values[b]).index_add(0, b, values[a])
    ones = values.new_ones(len(a))
    count = values.new_zeros(len(values)).index_add(0, a, ones).index_add(0, b, ones)
    mean = total / count.clamp_min(1)[:, None]
    return (torch.where(count[:, None] > 0, mean - values, 0.0)).square().sum(1).mean() / edge**4


def _turn(degrees: float) -> np.ndarray:
    """Rotation [3, 3] about the upward axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _assemble(image: Tensor, background: Tensor) -> Rendering:
    """A Rendering from [B, H, W, C]: color, opacity, ray length, each times the opacity, and perhaps the normal."""
    image = image.permute(0, 3, 1, 2)
    opacity = image[:, 3:4].clamp(0, 1)
    behind = background.to(image)
    behind = behind[:, :, None, None] if behind.ndim == 2 else behind
    depth = torch.where(opacity > 0, image[:, 4:5] / opacity.clamp_min(1e-6), 0.0)
    normal = orientation = None
    if image.shape[1] > 5:
        normal, orientation = image[:, 5:8], torch.zeros_like(opacity)  # no surface is seen from behind
    rgb = image[:, :3] + (1 - opacity) * behind
    return Rendering(rgb, opacity, depth, torch.zeros_like(depth), normal, orientation)
