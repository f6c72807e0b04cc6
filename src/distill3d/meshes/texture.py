"""UV maps and textures: unwrapping, which face each texel lies on, painting, and padding between the islands.

A UV map cuts a surface into islands and lays them flat into one square texture. (0, 0) is the lower left corner of
the texture and (1, 1) the upper right, as in OBJ and OpenGL; row 0 of a texture is its top.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from distill3d.meshes.mesh import Mesh, weld
from distill3d.render.raster import rasterize_plane

LIMIT = (120.0, 0.02)  # seconds that xatlas may take, and more for each face
# In a process of its own: on some meshes xatlas does not come back.
XATLAS = """
import sys
import numpy as np
import xatlas
with np.load(sys.argv[1]) as given:
    vertices, faces = given["vertices"], given["faces"]
atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
atlas.add_mesh(vertices, faces)
packing.resolution, packing.padding, packing.bilinear = int(sys.argv[3]), 4, True
atlas.generate(xatlas.ChartOptions(), packing)
_, faces, uv = atlas[0]
np.savez(sys.argv[2], uv=uv, faces=faces)
"""
BAND = 1 << 20  # texels that are painted at once: bounds the memory
OVERLAP = 0.005  # fraction of a UV map's area that may be covered twice: islands may touch


def check_texture_size(size: int) -> None:
    """Raises ValueError unless `size` is a sensible number of texels per side."""
    if not 8 <= size <= 8192:
        raise ValueError(f"a texture must have 8 to 8192 texels per side, got {size}; 1024 is usual")


def unwrap(mesh: Mesh, size: int = 1024) -> tuple[Float[np.ndarray, "t 2"], Int[np.ndarray, "f 3"]]:
    """Makes a UV map by xatlas (charts by growing, least-squares conformal maps, packing); it is deterministic.

    Args:
        size: texels per side of the texture that the map is for; charts are packed 4 texels apart.

    Returns:
        uv in [0, 1] and uv_faces; the order of faces and of their corners is kept.

    Raises:
        ValueError: if this is not a size (`check_texture_size`), or no map is found in time.
    """
    check_texture_size(size)
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    unit = float((high / 2 - low / 2).max()) or 1.0
    vertices = (mesh.vertices - (low / 2 + high / 2)) / unit  # xatlas computes in 32 bits
    limit = LIMIT[0] + LIMIT[1] * len(mesh.faces)
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "mesh.npz", Path(folder) / "map.npz"
        np.savez(given, vertices=vertices.astype(np.float32), faces=mesh.faces.astype(np.uint32))
        command = [sys.executable, "-c", XATLAS, str(given), str(made), str(size)]
        path = os.pathsep.join(filter(None, sys.path))
        quiet: Any = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            ended = subprocess.run(command, timeout=limit, env={**os.environ, "PYTHONPATH": path}, **quiet)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"no UV map was found in {limit:.0f} s; use vertex colors, or a simpler mesh") from error
        if ended.returncode or not made.is_file():
            reason = ended.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"status {ended.returncode}"]
            raise ValueError(f"no UV map could be made (xatlas: {reason[0]}); use vertex colors")
        with np.load(made) as found:
            uv, uv_faces = found["uv"].astype(np.float64), found["faces"].astype(np.int64)
    if not np.isfinite(uv).all() or uv_faces.shape != mesh.faces.shape:
        raise ValueError("no UV map could be made for this mesh; use vertex colors")
    return uv.clip(0, 1), uv_faces


def paint_texels(
    uv: Float[np.ndarray, "t 2"],
    uv_faces: Int[np.ndarray, "f 3"],
    size: int,
    colors: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> UInt8[np.ndarray, "size size c"]:
    """Paints a texture; texels between the islands repeat the nearest painted one.

    Args:
        size: texels per side.
        colors: maps faces [N], N > 0, and barycentric coordinates [N, 3] in them to colors [N, 3] uint8, or [N, 4]
            with opacity; called for a band of rows of about `BAND` texels at a time.

    Raises:
        ValueError: if this is not a size (`check_texture_size`).
    """
    check_texture_size(size)
    texture, covered = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), bool)
    height = -(-BAND // size)
    for top in range(0, size, height):
        rows = slice(top, min(size, top + height))
        face, weights = rasterize_uv(uv, uv_faces, size, (rows.start, rows.stop))
        hit = face >= 0
        if hit.any():
            covered[rows] = hit
            painted = colors(face[hit], weights[hit])
            if painted.shape[1] != texture.shape[2]:
                texture = np.zeros((size, size, painted.shape[1]), np.uint8)
            texture[rows][hit] = painted
    return pad_islands(texture, covered)


def rasterize_uv(
    uv: Float[np.ndarray, "t 2"], uv_faces: Int[np.ndarray, "f 3"], size: int, rows: tuple[int, int] | None = None
) -> tuple[Int[np.ndarray, "r size"], Float[np.ndarray, "r size 3"]]:
    """Which face the center of each texel lies on, and where inside it.

    Args:
        size: texels per side.
        rows: the first row and the one after the last; by default all of them.

    Returns:
        faces, -1 between the islands, and barycentric coordinates, 0 where there is no face. Where islands overlap
        the later face wins.
    """
    check_texture_size(size)
    top, bottom = rows or (0, size)
    pixels = torch.from_numpy(np.stack((uv[:, 0] * size, (1 - uv[:, 1]) * size - top), axis=1))
    face, weights = rasterize_plane(pixels, torch.from_numpy(uv_faces), bottom - top, size)
    return face.numpy(), weights.numpy()


def pad_islands(texture: UInt8[np.ndarray, "h w c"], covered: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w c"]:
    """A new texture whose texels between the islands repeat the nearest covered one, so that filters find no gap.

    Covered texels stay as they are, and all do if none is covered.
    """
    from scipy.ndimage import distance_transform_edt

    if not covered.any():
        return texture.copy()
    row, column = np.asarray(distance_transform_edt(~covered, return_distances=False, return_indices=True))
    return texture[row, column]


def uv_problem(mesh: Mesh) -> str | None:
    """Why the UV map of a mesh cannot hold a new texture; None if it can."""
    if mesh.uv is None or mesh.uv_faces is None:
        return "it has none"
    corner = mesh.uv[mesh.uv_faces]
    if not np.isfinite(corner).all() or corner.min() < -1e-4 or corner.max() > 1 + 1e-4:
        return "it reaches beyond the texture"
    first, second = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    flat = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) < 1e-12
    a, b, c = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if area[flat].sum() > 0.01 * area.sum():
        return "it leaves faces without any place in the texture"
    # Where islands overlap, the order of the faces decides which one is visible. The scale is odd because edges that
    # run through many texel centers would count as overlaps.
    points = torch.from_numpy(mesh.uv * [509.31, 503.77] + [0.173, 0.291])
    faces = torch.from_numpy(mesh.uv_faces)
    above, _ = rasterize_plane(points, faces, 512, 512)
    below, _ = rasterize_plane(points, faces.flip(0), 512, 512)
    below = torch.where(below >= 0, len(faces) - 1 - below, -1)
    if float((above != below).sum()) > OVERLAP * float((above >= 0).sum()):
        return "its islands overlap"
    return None


def usable_uv(mesh: Mesh, size: int) -> tuple[Float[np.ndarray, "t 2"], Int[np.ndarray, "f 3"], str | None]:
    """The mesh's own UV map if it can hold a new texture, else one made for a texture of `size` texels per side.

    Returns:
        uv in [0, 1], uv_faces, and why the map is new (`uv_problem`; None if it is the mesh's own).
    """
    problem = uv_problem(mesh)
    if problem is None:
        assert mesh.uv is not None and mesh.uv_faces is not None
        return mesh.uv.clip(0, 1), mesh.uv_faces, None
    return *unwrap(Mesh(*weld(mesh.vertices, mesh.faces)), size), problem
