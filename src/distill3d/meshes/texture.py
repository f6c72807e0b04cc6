"""UV maps and what is painted into them: unwrapping, the texels of each face, and what lies between the islands.

A UV map cuts a surface into islands and lays them flat into one square texture. (0, 0) is the lower left corner of
the texture and (1, 1) the upper right, as in OBJ and OpenGL; row 0 of a texture is its top.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distill3d.meshes.mesh import Mesh, check_mesh, weld
from distill3d.render.raster import rasterize_plane

BAND = 1 << 20  # texels that are painted at once: bounds the memory
OVERLAP = 0.005  # fraction of a UV map's area that may be covered twice: islands may touch


def check_texture_size(size: int) -> None:
    """Raises ValueError unless `size` is a sensible number of texels a side."""
    if not 8 <= size <= 8192:
        raise ValueError(f"a texture has 8 to 8192 texels a side, got {size}; 1024 are usual")


def unwrap(vertices: np.ndarray, faces: np.ndarray, size: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Lays a surface flat by xatlas (charts by growing, least-squares conformal maps, packing).

    The same mesh gives the same map. Charts are packed to be 4 texels apart in a picture of `size` texels.

    Args:
        vertices: [V, 3]; faces: [F, 3].
        size: texels a side of the picture that the map is meant for.

    Returns:
        uv [T, 2] in [0, 1] and uv_faces [F, 3]; the order of faces and of their corners is kept.

    Raises:
        ValueError: for what is no mesh (`check_mesh`) or no size (`check_texture_size`).
    """
    import xatlas

    check_mesh(vertices, faces)
    check_texture_size(size)
    atlas = xatlas.Atlas()
    atlas.add_mesh(np.ascontiguousarray(vertices, np.float32), np.ascontiguousarray(faces, np.uint32))
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding, packing.bilinear = size, 4, True
    atlas.generate(xatlas.ChartOptions(), packing)
    _, corners, places = atlas[0]
    return places.astype(np.float64).clip(0, 1), corners.astype(np.int64)


def paint_texels(
    uv: np.ndarray, uv_faces: np.ndarray, size: int, colors: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """A texture [size, size, 3] uint8 whose texels between the islands repeat the nearest one.

    Args:
        uv: [T, 2] and uv_faces: [F, 3], see `TexturedMesh`.
        colors: maps faces [N], N > 0, and barycentric coordinates [N, 3] in them to colors [N, 3] uint8; asked for
            a band of rows of about `BAND` texels at once.

    Raises:
        ValueError: for no size (`check_texture_size`).
    """
    check_texture_size(size)
    texture, covered = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), bool)
    height = -(-BAND // size)
    for top in range(0, size, height):
        rows = slice(top, min(size, top + height))
        face, weights = uv_texels(uv, uv_faces, size, (rows.start, rows.stop))
        here = face >= 0
        if here.any():
            covered[rows] = here
            texture[rows][here] = colors(face[here], weights[here])
    return pad(texture, covered)


def uv_texels(
    uv: np.ndarray, uv_faces: np.ndarray, size: int, rows: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which face each texel of a [size, size] picture lies on, and where inside it.

    Args:
        rows: the first row asked for and the one after the last; else all R = size of them.

    Returns:
        face [R, size] int64, -1 between the islands, and barycentric coordinates [R, size, 3] of the texel's center
        in the face's corners, 0 where there is no face. Where islands overlap the later face wins.
    """
    check_texture_size(size)
    top, bottom = rows or (0, size)
    pixels = torch.from_numpy(np.stack((uv[:, 0] * size, (1 - uv[:, 1]) * size - top), axis=1))
    face, weights = rasterize_plane(pixels, torch.from_numpy(uv_faces), bottom - top, size)
    return face.numpy(), weights.numpy()


def pad(texture: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Fills the texels between the islands from the nearest covered one, so that filters find no gap at a seam.

    Args:
        texture: [H, W, C].
        covered: [H, W] bool.

    Returns:
        a new texture; covered texels are as they were, and all are if none is covered.
    """
    from scipy.ndimage import distance_transform_edt

    if not covered.any():
        return texture.copy()
    row, column = np.asarray(distance_transform_edt(~covered, return_distances=False, return_indices=True))
    return texture[row, column]


def uv_problem(mesh: Mesh) -> str | None:
    """Why a mesh's UV map cannot hold a texture that is painted anew; None if it can."""
    if mesh.uv is None or mesh.uv_faces is None:
        return "it has none"
    corner = mesh.uv[mesh.uv_faces]
    if not np.isfinite(corner).all() or corner.min() < -1e-4 or corner.max() > 1 + 1e-4:
        return "it reaches beyond the texture"
    side, other = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    flat = np.abs(side[:, 0] * other[:, 1] - side[:, 1] * other[:, 0]) < 1e-12
    a, b, c = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if area[flat].sum() > 0.01 * area.sum():
        return "it leaves faces without any place in the texture"
    # An odd scale, for edges that run through many texel centers would count as overlaps there. Where islands overlap,
    # the order of the faces decides who is seen.
    points = torch.from_numpy(mesh.uv * [509.31, 503.77] + [0.173, 0.291])
    faces = torch.from_numpy(mesh.uv_faces)
    first, _ = rasterize_plane(points, faces, 512, 512)
    last, _ = rasterize_plane(points, faces.flip(0), 512, 512)
    last = torch.where(last >= 0, len(faces) - 1 - last, -1)
    if float((first != last).sum()) > OVERLAP * float((first >= 0).sum()):
        return "its islands overlap"
    return None


def usable_uv(mesh: Mesh, size: int) -> tuple[np.ndarray, np.ndarray, str | None]:
    """The mesh's own UV map if a texture can be painted into it, else a new one for a picture of `size` texels.

    Returns:
        uv [T, 2] in [0, 1], uv_faces [F, 3], and why the map is new (None if it is the mesh's own).
    """
    problem = uv_problem(mesh)
    if problem is None:
        assert mesh.uv is not None and mesh.uv_faces is not None
        return mesh.uv.clip(0, 1), mesh.uv_faces, None
    shared, faces = weld(mesh.vertices, mesh.faces)
    return *unwrap(shared, faces, size), problem
