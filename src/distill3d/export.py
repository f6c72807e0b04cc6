"""From a scene to a mesh that other programs take: surface, fewer faces, a texture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trimesh

from distill3d.bake import bake, paint_vertices
from distill3d.mesh_files import Mesh
from distill3d.scenes.mesh import MeshScene
from distill3d.surface import extract_surface, simplify
from distill3d.textured import check_texture_size


@dataclass(frozen=True)
class ExportOptions:
    """How a field becomes a mesh. The defaults give a file of one to two megabytes in a few seconds."""

    texture: int | None = 1024  # texels a side; None paints the vertices instead
    faces: int = 20_000  # a surface with more is simplified to about so many
    resolution: int = 128  # lattice points a side for marching cubes
    level: float | None = None  # density at the surface, per world unit; None fits the field's outlines
    soften: float = 0.7  # lattice steps, see `extract_surface`

    def __post_init__(self) -> None:
        if self.texture is not None:
            check_texture_size(self.texture)
        if self.faces < 4:
            raise ValueError(f"a surface needs at least 4 faces, got {self.faces}; type for instance --faces 20000")


def export_mesh(scene: Any, options: ExportOptions = ExportOptions()) -> Mesh:
    """The mesh of a scene: textured, or with vertex colours.

    Args:
        scene: on the CPU. One with `query` and `half_size` (every field), or a mesh, which keeps its faces.

    Raises:
        ValueError: for a scene that has no surface, or a field that is empty.
    """
    if isinstance(scene, MeshScene):
        return scene.textured(options.texture)
    if not hasattr(scene, "query"):
        raise ValueError(
            f"a {type(scene).__name__} has no density, so there is no surface to export; only fields become meshes"
        )
    surface = extract_surface(scene.query, options.level, options.resolution, scene.half_size, options.soften)
    surface = simplify(surface, options.faces)
    if options.texture is None:
        return paint_vertices(scene.query, surface, scene.half_size)
    return bake(scene.query, surface, options.texture, scene.half_size)


def openness(mesh: Mesh) -> str:
    """The word "closed" where each edge lies between two faces, else "not closed"."""
    return "closed" if trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).is_watertight else "not closed"
