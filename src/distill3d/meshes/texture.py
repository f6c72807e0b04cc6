"""Meshes with a picture on them: the UV map, the texels of each face, and what lies between the islands.

A UV map cuts a surface into islands and lays them flat into one square picture. (0, 0) is the lower left corner
of the picture and (1, 1) the upper right, as OBJ and OpenGL have it; glTF, which counts from the top, is
converted by the writer (`mesh_files`). Row 0 of a texture is its top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from distill3d.render.raster import rasterize_plane

BAND = 1 << 20  # texels that are worked on at once: bounds the memory


@dataclass(frozen=True)
class TexturedMesh:
    """Triangles with a UV map and a texture, in world space (z up, front +x).

    A vertex on a seam has one place in space and several in the picture: corners name both.
    """

    vertices: np.ndarray  # [V, 3] float64
    faces: np.ndarray  # [F, 3] int64, counter-clockwise seen from outside
    uv: np.ndarray  # [T, 2] float64, (0, 0) the lower left of the picture
    uv_faces: np.ndarray  # [F, 3] int64, rows of uv
    texture: np.ndarray  # [H, W, 3] uint8 sRGB, row 0 is the top
    normals: np.ndarray | None = None  # [V, 3] unit, where the mesh brought its own; else they follow from the faces

    def __post_init__(self) -> None:
        check_mesh(self.vertices, self.faces)
        if self.uv_faces.shape != self.faces.shape or self.uv.ndim != 2 or self.uv.shape[1] != 2:
            raise ValueError(
                f"a UV map needs [T, 2] places and one of them a corner, got {list(self.uv.shape)} places and "
                f"{list(self.uv_faces.shape)} corners for {len(self.faces)} faces"
            )
        if not np.isfinite(self.uv).all():
            raise ValueError("the UV map has places that are no numbers (NaN or infinite)")
        if self.uv_faces.min() < 0 or self.uv_faces.max() >= len(self.uv):
            raise ValueError(f"the UV map's corners name places beyond the {len(self.uv)} that there are")
        if self.texture.ndim != 3 or self.texture.shape[2] != 3 or not self.texture.size:
            raise ValueError(f"a texture is [H, W, 3], got {list(self.texture.shape)}")
        if self.normals is not None and self.normals.shape != self.vertices.shape:
            raise ValueError(f"normals are one a vertex, got {list(self.normals.shape)}")


def check_mesh(vertices: np.ndarray, faces: np.ndarray) -> None:
    """Raises ValueError for what is no triangle mesh: no faces, NaN vertices, corners that name no vertex."""
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices are [V, 3], got {list(vertices.shape)}")
    if not len(faces):
        raise ValueError("the mesh has no faces; a surface needs triangles (a cloud of points has none)")
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces are triangles [F, 3], got {list(faces.shape)}")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"the mesh's faces name vertices beyond the {len(vertices)} that there are")
    wrong = ~np.isfinite(vertices).all(1)
    if wrong.any():
        raise ValueError(f"{int(wrong.sum())} of {len(vertices)} vertices are no numbers (NaN or infinite)")


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


def texture_colors(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear samples [N, C] float64, in the texture's own unit, at places uv [N, 2]; edges are clamped."""
    height, width = texture.shape[:2]
    x = (uv[:, 0] * width - 0.5).clip(0, width - 1)
    y = ((1 - uv[:, 1]) * height - 0.5).clip(0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    upper = texture[top, left] * (1 - fx) + texture[top, right] * fx
    return upper * (1 - fy) + (texture[bottom, left] * (1 - fx) + texture[bottom, right] * fx) * fy
