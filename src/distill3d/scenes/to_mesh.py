"""From a scene to a mesh that other programs take: surface, fewer faces, a texture, and a fit to the scene's pictures.

A soft field and a hard mesh cannot be equal. The surface and the baked colors are a first guess; then vertices and
texture are fitted to pictures of the field, by the differentiable renderer of `MeshScene` and no diffusion model.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import trimesh

from distill3d.cameras import orbit
from distill3d.export.options import ExportOptions
from distill3d.meshes.bake import bake, paint_vertices
from distill3d.meshes.files import Mesh, with_vertex_colors
from distill3d.meshes.mesh import from_textured, weld
from distill3d.meshes.surface import extract_surface, halved, simplify
from distill3d.meshes.texture import TexturedMesh
from distill3d.scenes.fit import Fitting, fit
from distill3d.scenes.mesh import MeshOptions, MeshScene
from distill3d.types import Cameras


def export_mesh(scene: Any, options: ExportOptions = ExportOptions()) -> Mesh:
    """The mesh of a scene: textured, or with vertex colors.

    Args:
        scene: on the CPU. One with `query` and `half_size` (every field), or a mesh, which keeps its faces.

    Raises:
        ValueError: for a scene that has no surface, or a field that is empty.
    """
    if isinstance(scene, MeshScene):
        return scene.textured(options.texture) if options.texture else with_vertex_colors(scene.textured())
    if not hasattr(scene, "query"):
        raise ValueError(
            f"a {type(scene).__name__} has no density, so there is no surface to export; only fields become meshes"
        )
    surface = extract_surface(scene.query, options.level, options.resolution, scene.half_size, options.soften)
    surface = simplify(surface, options.faces)
    if options.texture is None:
        return paint_vertices(scene.query, surface, scene.half_size)
    baked = bake(scene.query, surface, options.texture, scene.half_size)
    return fit_to_field(scene, baked, options.fit, options.resolution) if options.fit else baked


def fit_to_field(scene: Any, mesh: TexturedMesh, steps: int, resolution: int = 128) -> TexturedMesh:
    """The same faces with vertices moved and texture repainted so that the mesh looks as the field does.

    Pictures of the field from `FIT_VIEWS` sides are what is fitted, in mean square; vertices stay smooth among their
    neighbors. It takes away what baking cannot know: where the level set lies inside or outside of the soft outline,
    and which of the colors along a ray is seen from most sides.

    Args:
        scene: the field, on the CPU.
        resolution: pixels a side of the pictures, and lattice points a side of the finest paint.
    """
    box = halved(scene.half_size, float(np.abs(mesh.vertices).max()))
    cameras, gray = _around(FIT_VIEWS, 2.8 * box), torch.full((3,), FIT_GRAY)
    with torch.no_grad():
        pictures = [scene.render(cameras[i : i + 1], resolution, gray[None]).rgb for i in range(FIT_VIEWS)]
    levels = (resolution // 4, resolution // 2, resolution)
    painted = MeshScene(from_textured(mesh), MeshOptions(refit=False, colors=True, levels=levels, move=FIT_MOVE))
    fitting = Fitting(steps, views=2, learning_rate=0.05, l1_weight=0.0)
    with torch.enable_grad():  # whoever exports may have switched it off
        fit(painted, cameras, torch.cat(pictures).clamp(0, 1), gray, fitting, {"smooth_shape": FIT_SMOOTH})
    return painted.textured(len(mesh.texture))


FIT_VIEWS, FIT_GRAY, FIT_MOVE = 24, 0.9, 0.02
FIT_SMOOTH = 6e-4  # at a thousandth of it surfaces are bumpy under light, which pictures without light cannot tell


def _around(count: int, distance: float) -> Cameras:
    """Cameras evenly spread over the sphere from a little below the horizon to near the zenith, on a spiral."""
    share = (torch.arange(count) + 0.5) / count
    lowest, highest = math.sin(math.radians(-15)), math.sin(math.radians(75))
    elevation = torch.rad2deg(torch.asin(lowest + (highest - lowest) * share))
    return orbit(torch.arange(count) * 137.50776, elevation, distance, 40.0)


def openness(mesh: Mesh) -> str:
    """The word "closed" where each edge lies between two faces, else "not closed"."""
    vertices, faces = weld(np.asarray(mesh.vertices), np.asarray(mesh.faces))  # files split them along seams
    return "closed" if trimesh.Trimesh(vertices, faces, process=False).is_watertight else "not closed"
