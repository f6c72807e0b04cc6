"""From a field to a mesh for other programs: surface, fewer faces, a texture, and a fit to renderings of the field.

A soft field and a hard mesh cannot be equal. The surface and its baked colors are a first estimate; then vertices and
colors are fitted to renderings of the field, by the differentiable renderer of `MeshScene` and no diffusion model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distill3d.cameras import BACKGROUND, DISTANCE, FOV, orbit
from distill3d.export.options import ExportOptions
from distill3d.export.splats import load_splats
from distill3d.export.video import render_each
from distill3d.meshes.bake import bake, paint_vertices
from distill3d.meshes.files import Up, file_up, read_mesh
from distill3d.meshes.mesh import Mesh, faces_per_edge, weld
from distill3d.meshes.surface import extract_surface, halved, simplify, without_bumps
from distill3d.meshes.texture import unwrap
from distill3d.scenes.fit import Fitting, fit
from distill3d.scenes.mesh import MeshOptions, MeshScene
from distill3d.types import Cameras

if TYPE_CHECKING:
    from distill3d.scenes.field import FieldScene


def field_to_mesh(field: FieldScene, options: ExportOptions = ExportOptions()) -> Mesh:
    """The mesh of a field that is on the CPU: textured, or with vertex colors.

    Raises:
        ValueError: where the field is empty, or no UV map can be made.
    """
    surface = extract_surface(field.query, options.level, options.resolution, field.half_size, options.soften)
    surface = simplify(surface, options.faces)
    if options.texture is None:
        return paint_vertices(field.query, surface, field.half_size)
    if not options.fit:
        return bake(field.query, surface, options.texture, field.half_size)
    with ThreadPoolExecutor(1) as pool, _one_thread_less():  # a UV map is made by a process of its own
        uv_map = pool.submit(unwrap, without_bumps(surface), options.texture)
        painted = paint_vertices(field.query, surface, field.half_size)
        fitted = fit_to_field(field, painted, options.fit, options.resolution)
        return fitted.textured(options.texture, uv_map.result())


@contextmanager
def _one_thread_less() -> Iterator[None]:
    """Leaves a core to another process: threads of torch that share cores wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_to_field(field: FieldScene, mesh: Mesh, steps: int, resolution: int = 128) -> MeshScene:
    """The same faces, with vertices moved and colors changed so that the mesh looks like the field.

    Minimizes the mean squared difference from renderings of the field in `FIT_VIEWS` views, with a penalty on uneven
    displacements. That corrects what the colors along single rays cannot know: where the level set lies inside or
    outside of the soft outline, and which of the colors along a ray is visible from most sides.

    Args:
        field: on the CPU.
        mesh: with the field's colors at its vertices.
        resolution: pixels a side of the renderings, and lattice points a side of the finest color grid.
    """
    box = halved(field.half_size, float(np.abs(mesh.vertices).max()))
    cameras, gray = _around(FIT_VIEWS, DISTANCE * box), torch.full((3,), BACKGROUND)
    images = torch.stack(list(render_each(field, cameras, resolution))).clamp(0, 1)
    levels = (resolution // 4, resolution // 2, resolution)
    options = MeshOptions(refit=False, colors=True, levels=levels, move=FIT_MOVE)
    painted = MeshScene(mesh, replace(options, supersample=math.ceil(FIT_SAMPLES / resolution)))
    fitting = Fitting(steps, views=2, learning_rate=0.05, l1_weight=0.0)
    with torch.enable_grad():  # export is usually called under no_grad
        fit(painted, cameras, images, gray, fitting, {"smooth_shape": FIT_SMOOTH})
    return painted


FIT_VIEWS, FIT_MOVE = 30, 0.025
FIT_SAMPLES = 96  # at least so many samples along a side of an image, so that outlines are seen sharply
FIT_SMOOTH = 1e-3  # with a thousandth of it surfaces are bumpy under light, which unlit renderings do not show


def _around(count: int, distance: float) -> Cameras:
    """Cameras evenly spread over the sphere from a little below the horizon to near the zenith, on a spiral."""
    u = (torch.arange(count) + 0.5) / count
    lowest, highest = math.sin(math.radians(-15)), math.sin(math.radians(75))
    elevation = torch.rad2deg(torch.asin(lowest + (highest - lowest) * u))
    return orbit(torch.arange(count) * 137.50776, elevation, distance, FOV)


def describe_file(path: Path, up: Up = "auto") -> str:
    """One line about an exported file: vertices, faces, colors, whether it is closed, axis, size and pivot.

    The size is width x depth x height, seen from the front; `up` is as for `read_mesh`.
    """
    if path.suffix == ".ply":
        with suppress(ValueError):
            return f"{len(load_splats(path))} splats"
    mesh = read_mesh(path, up)
    vertices, _ = weld(mesh.vertices, mesh.faces)  # files split them along seams
    colors = "vertex colors"
    if mesh.textures:
        height, width = mesh.textures[0].shape[:2]
        colors = f"texture {width} x {height}"
    closed = "closed" if (faces_per_edge(mesh) == 2).all() else "not closed"
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    size, middle = high - low, low / 2 + high / 2
    pivot = "origin where it was"
    for name, point in (("center", middle), ("bottom", np.append(middle[:2], low[2]))):
        if np.abs(point).max() < 1e-3 * size.max():
            pivot = f"origin at its {name}"
    extent = " x ".join(f"{size[i]:.3g}" for i in (1, 0, 2))
    counts = f"{len(vertices)} vertices, {len(mesh.faces)} faces"
    return f"{counts}, {colors}, {closed}, {file_up(path, up)} up, {extent} (width x depth x height), {pivot}"
