"""A mesh as a scene: its color is distilled, and optionally its shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.cameras import focal_length, project
from distill3d.export.options import ExportOptions
from distill3d.meshes.files import Up, file_up, read_mesh, save_mesh
from distill3d.meshes.mesh import Mesh, Placement, place, resized, rotation_about_z, weld
from distill3d.meshes.texture import paint_texels, usable_uv
from distill3d.render.edges import Edges, antialias, mesh_edges
from distill3d.render.mesh import RasterOutput, downsample, rasterize_views, vertex_normals
from distill3d.render.raster import NEAR
from distill3d.render.shading import needs_normals, over_background, shade
from distill3d.scenes.parameters import color_logits
from distill3d.scenes.surface_grid import SurfaceGrid
from distill3d.texels import Texels
from distill3d.types import Cameras, Lighting, Rendering, Scene, SceneOptions

OWN_MESH = "source.npz"  # a run's copy of its mesh
NOISE_DENSITY = 64  # places of noise on a mesh for each latent pixel of a view
NOISE_DETAIL = 8  # pixels a side of a latent pixel, for what hides a place


@dataclass(frozen=True)
class MeshOptions(SceneOptions):
    """Which mesh is painted, and whether it moves. Lengths in world units."""

    mesh: str = ""  # a .glb, .gltf, .obj or .ply file
    up: Up = "auto"  # the file's upward axis: y for glTF and OBJ, z for PLY
    turn: float = 0.0  # degrees by which the mesh is turned (counter-clockwise from above) to face the front
    refit: bool = True  # centers and scales it to the size of an object; else the file's unit is the world's
    colors: bool = False  # starts from the colors of the file
    levels: tuple[int, ...] = (16, 32, 64)  # lattice points a side of the color, coarse to fine
    supersample: int = 2  # squared, the samples per pixel
    move: float = 0.0  # learning rate of the shape relative to that of the color; with 0 the shape is fixed
    shape_levels: tuple[int, ...] = (8, 16, 32)

    def __post_init__(self) -> None:
        if self.supersample < 1 or self.move < 0:
            raise ValueError(
                f"supersample must be at least 1 and move at least 0, got {self.supersample} and {self.move}"
            )

    def build(self, device: torch.device | str | None = None) -> MeshScene:
        """Reads the mesh; ValueError where it cannot be read."""
        if not self.mesh:
            raise ValueError("no mesh is given: --set scene.mesh=FILE")
        return MeshScene(read_mesh(self.mesh, self.up), self, device)

    def with_own_files(self, folder: Path) -> MeshOptions:
        """Copies the mesh into a run's folder, exactly as it was read."""
        save_mesh(folder / OWN_MESH, read_mesh(self.mesh, self.up))
        return replace(self, mesh=OWN_MESH, up=file_up(self.mesh, self.up))

    def located(self, folder: Path) -> MeshOptions:
        """The settings with the path of the mesh in the run's folder, wherever that is now."""
        return replace(self, mesh=str(folder / self.mesh))


class MeshScene(nn.Module, Scene):
    """A mesh with colors from a grid near its surface (see `SurfaceGrid`).

    color = sigmoid(color_grid(rest)) and position = rest + offset_grid(rest) are functions of the position at rest, so
    vertices that a file splits at a seam stay together. Geometry is fixed unless `options.move` is above 0.
    """

    export_settings = frozenset({"texture"})
    rest: Tensor
    faces: Tensor

    def __init__(self, source: Mesh, options: MeshOptions = MeshOptions(), device: torch.device | str | None = None):
        super().__init__()
        self.source, self.options = source, options
        self.placement = place(source) if options.refit else Placement(np.zeros(3), 1.0)
        vertices, faces = weld(self._to_scene(source.vertices), source.faces)
        self.register_buffer("rest", torch.tensor(vertices, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("faces", torch.tensor(faces, device=device), persistent=False)
        self.edges = mesh_edges(self.faces)
        ends = self.rest[self.edges.ends]
        self.edge_length = float((ends[:, 0] - ends[:, 1]).norm(dim=1).mean())  # world units
        self.half_size = 1.01 * float(self.rest[self.faces].abs().max())
        face, weights = self._samples(max((*options.levels, *options.shape_levels)))
        points = self.positions(face, weights).to(self.rest.device)
        self.color_grid = SurfaceGrid(points, options.levels, 3, self.half_size)
        if options.colors:
            known = torch.tensor(source.colors(face, weights), dtype=torch.float32)
            self.color_grid.fit(points, color_logits(known).to(points))
        self.offset_grid = SurfaceGrid(points, options.shape_levels, 3, self.half_size) if options.move else None
        self.vertex_rows = [] if self.offset_grid is None else self.offset_grid.rows(self.rest)

    def _apply(self, fn, recurse: bool = True) -> MeshScene:
        """Moves what follows from the mesh with the module: it is neither a parameter nor part of the state."""
        self.edges = Edges(*(fn(values) for values in vars(self.edges).values()))
        self.vertex_rows = [(fn(index), fn(weights)) for index, weights in self.vertex_rows]
        return super()._apply(fn, recurse)

    @property
    def vertices(self) -> Float[Tensor, "v 3"]:
        """Current vertices, world units."""
        return self.rest if self.offset_grid is None else self.rest + self.offset_grid.mix(self.vertex_rows)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Color, and the offsets of the shape at the rate `options.move`; see `Scene.parameter_groups`."""
        groups = [{"params": list(self.color_grid.parameters()), "scale": 1.0}]
        if self.offset_grid is not None:
            groups.append({"params": list(self.offset_grid.parameters()), "scale": self.options.move})
        return groups

    def penalties(self) -> dict[str, Callable[[], Tensor]]:
        """Roughness of the color and, if vertices move, of their displacement."""
        terms: dict[str, Callable[[], Tensor]] = {"smooth_color": self.color_grid.roughness}
        if self.offset_grid is not None:
            terms["smooth_shape"] = lambda: bending(self.vertices - self.rest, self.edges, self.edge_length)
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
        """See `Scene.render`. Normals are interpolated from the vertices and turned to the visible side."""
        fine, vertices = size * self.options.supersample, self.vertices
        seen = rasterize_views(cameras, vertices, self.faces, fine, fine)
        view = torch.div(seen.seen, fine * fine, rounding_mode="floor")
        points = seen.interpolate(vertices, self.faces)
        from_eye = points - cameras.camera_to_world[view, :3, 3]
        length = from_eye.norm(dim=1, keepdim=True)
        normal = None
        if normals or needs_normals(lighting):
            normal = F.normalize(seen.interpolate(vertex_normals(vertices, self.faces), self.faces), dim=1)
            normal = torch.where((normal * from_eye).sum(1, keepdim=True) > 0, -normal, normal)
        color = self.color(seen.interpolate(self.rest, self.faces))
        if lighting is not None:
            color = shade(color, normal, points, lighting.position[view], lighting)
        channels = [color, torch.ones_like(length), length] + ([normal] if normals and normal is not None else [])
        image = self._antialiased(cameras, vertices, seen, torch.cat(channels, dim=1))
        return _rendering(downsample(image, self.options.supersample), background)

    @torch.no_grad()
    def noise_texels(self, cameras: Cameras, height: int, width: int) -> Texels:
        """See `Scene.noise_texels`: places spread evenly over the surface, which move with it."""
        count = NOISE_DENSITY * height * width
        face, weights = (torch.from_numpy(value).to(self.rest.device) for value in self.source.sample(count))
        vertices, rows, columns = self.vertices, NOISE_DETAIL * height, NOISE_DETAIL * width
        points = (vertices[self.faces[face]] * weights.to(vertices)[..., None]).sum(1)
        seen = rasterize_views(cameras, vertices, self.faces, rows, columns)
        nearest = seen.image(seen.depth[:, None])[..., 0]
        pixels, depth = project(cameras, points, rows, columns)
        limit = pixels.new_tensor([columns, rows])
        inside = ((pixels >= 0) & (pixels < limit)).all(2) & (depth > NEAR)
        view, place = inside.nonzero().unbind(1)
        column, row = pixels[view, place].long().unbind(1)
        # A place is seen if its own face is, or another one as near, up to two pixels' width.
        depth = depth[view, place]
        slack = 2 * depth / focal_length(cameras.fov_y, rows)[view]
        visible = (seen.face[view, row, column] == face[place]) | (depth < nearest[view, row, column] + slack)
        pixel = (view * height + row // NOISE_DETAIL) * width + column // NOISE_DETAIL
        return Texels(count, place[visible], pixel[visible])

    def color(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Albedo in [0, 1] at rest positions on the surface."""
        return torch.sigmoid(self.color_grid(positions.detach()))

    def export(self, folder: Path, options: ExportOptions) -> list[Path]:
        """Writes mesh.glb with the faces of the source, in its own coordinates, and a texture or vertex colors.

        Formats that may have any upward axis have that of the source.
        """
        mesh = self.textured().with_vertex_colors() if options.texture is None else self.textured(options.texture)
        path, up = options.mesh_path(folder), options.up
        if up == "auto" and path.suffix != ".glb":
            in_run = Path(self.options.mesh).name == OWN_MESH  # there `up` says what the source had
            up = self.options.up if in_run else file_up(self.options.mesh, self.options.up)
        return save_mesh(path, resized(mesh, options.size, options.pivot), up)

    @torch.no_grad()
    def textured(self, size: int = 1024, uv_map: tuple[np.ndarray, np.ndarray] | None = None) -> Mesh:
        """The mesh in the file's own coordinates (world axes), with the colors baked into a texture of `size` texels.

        Args:
            size: texels per side.
            uv_map: uv and uv_faces; default: the file's, if that can hold a texture, otherwise a new one (see
                `uv_problem`).
        """
        uv, uv_faces = uv_map or usable_uv(self.source, size)[:2]

        def colors(face: np.ndarray, weights: np.ndarray) -> np.ndarray:
            points = self.positions(face, weights).to(self.rest.device)
            rgb = torch.cat([(self.color(part) * 255).round().byte().cpu() for part in points.split(1 << 18)]).numpy()
            if self.source.alpha_mode == "OPAQUE":
                return rgb
            opacity = (self.source.opacity(face, weights).clip(0, 1) * 255).round().astype(np.uint8)
            return np.concatenate((rgb, opacity[:, None]), axis=1)

        return self._moved().with_texture(paint_texels(uv, uv_faces, size, colors), uv, uv_faces)

    def _moved(self) -> Mesh:
        """The source with its current vertices."""
        if self.offset_grid is None:
            return self.source
        own = torch.tensor(self._to_scene(self.source.vertices), dtype=torch.float32, device=self.rest.device)
        moved = self._to_file((own + self.offset_grid(own)).cpu().double().numpy())
        return replace(self.source, vertices=moved, normals=None)

    def _antialiased(self, cameras: Cameras, vertices: Tensor, seen: RasterOutput, values: Tensor) -> Tensor:
        """Images [B, H, W, C] of values [P, C] with smooth silhouettes."""
        size = seen.face.shape[-1]
        pixels, vertex_depth = project(cameras, vertices, size, size)
        depth = torch.where(seen.hit, seen.image(seen.depth.detach()[:, None])[..., 0], math.inf)
        return antialias(seen.image(values), depth, pixels, vertex_depth, self.edges)

    def _samples(self, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Places on the surface, about 8 per face of a cell of this level: faces [N] and weights [N, 3]."""
        a, b, c = self.rest[self.faces].unbind(1)
        area = float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum()) / 2
        count = int(8 * area / (2 * self.half_size / (level - 1)) ** 2)
        return self.source.sample(min(max(count, 10_000), 5_000_000))

    def positions(self, face: np.ndarray, weights: np.ndarray) -> Float[Tensor, "n 3"]:
        """Rest positions, on the CPU, of places given by faces [N] and weights [N, 3] of their corners."""
        corners = self.rest.cpu()[self.faces.cpu()[torch.from_numpy(face)]]
        return (corners * torch.from_numpy(weights).to(corners)[..., None]).sum(1)

    def _to_scene(self, points: np.ndarray) -> np.ndarray:
        return self.placement.to_scene(points) @ rotation_about_z(self.options.turn).T

    def _to_file(self, points: np.ndarray) -> np.ndarray:
        return self.placement.to_file(points @ rotation_about_z(self.options.turn))


def bending(values: Float[Tensor, "v c"], edges: Edges, edge_length: float) -> Float[Tensor, ""]:
    """How unevenly neighbors move: the mean over vertices of |mean of the neighbors' values - own value|^2 / edge^4.

    The umbrella Laplacian scales with the square of the edge length, so after the division a weight means the same on
    coarse and fine meshes: about the integral of (Laplace of u)^2 of a displacement u.

    Args:
        values: one per vertex.
        edge_length: mean length of the edges, in the unit of the positions.
    """
    a, b = edges.ends.unbind(1)
    total = torch.zeros_like(values).index_add(0, a, values[b]).index_add(0, b, values[a])
    ones = values.new_ones(len(a))
    count = values.new_zeros(len(values)).index_add(0, a, ones).index_add(0, b, ones)
    mean = total / count.clamp_min(1)[:, None]
    return (torch.where(count[:, None] > 0, mean - values, 0.0)).square().sum(1).mean() / edge_length**4


def _rendering(image: Tensor, background: Tensor) -> Rendering:
    """A Rendering from [B, H, W, C]: color, opacity, ray length and optionally the normal, times the opacity."""
    image = image.permute(0, 3, 1, 2)
    opacity = image[:, 3:4].clamp(0, 1)
    depth = torch.where(opacity > 0, image[:, 4:5] / opacity.clamp_min(1e-6), 0.0)
    normal = orientation = None
    if image.shape[1] > 5:
        normal, orientation = image[:, 5:8], torch.zeros_like(opacity)  # back sides are turned to the viewer
    rgb = over_background(image[:, :3], opacity, background)
    return Rendering(rgb, opacity, depth, torch.zeros_like(depth), normal, orientation)
