"""PLY files with faces or triangle strips, in the file's axes and colors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from distill3d.meshes.images import find_file, read_image
from distill3d.meshes.mesh import Mesh, check_count, joined
from distill3d.meshes.polygons import triangulate

PREFIXES = ("diffuse_", "vertex_", "face_", "color_", "colour_", "ambient_", "scalar_")
COLORS = (("red", "green", "blue"), ("r", "g", "b"))
PLACES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texcoord_u", "texcoord_v"))
INDICES = ("vertex_indices", "vertex_index", "vertex_indexes", "indices")


def read_ply(path: Path) -> Mesh:
    """The faces of a PLY file in their order; those with colors of their own get vertices of their own.

    Raises:
        ValueError: if it is damaged, holds something else, or has no faces.
    """
    from plyfile import PlyData, PlyElementParseError, PlyHeaderParseError

    with path.open("rb") as file:
        head = file.read(8192)
    if not head.startswith(b"ply"):
        raise ValueError("this is not a PLY file, although its name ends in .ply")
    if b"f_dc_0" in head or b" scale_0" in head:
        raise ValueError("this file holds Gaussian splats, not a mesh; a mesh has faces")
    for name, count in re.findall(rb"^element (\w+) (\d+)", head.partition(b"end_header")[0], re.MULTILINE):
        check_count(name.decode(), int(count))
    try:
        data = PlyData.read(path)
    except (PlyElementParseError, PlyHeaderParseError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"this file cannot be read as a mesh, is it damaged? {error}") from error
    elements = {element.name.lower().rstrip("s"): element.data for element in data.elements}
    vertex = elements.get("vertex", elements.get("vertice"))
    if vertex is None or not {"x", "y", "z"} <= set(vertex.dtype.names or ()):
        raise ValueError("this file cannot be read as a mesh: its vertices have no x, y and z")
    vertices = np.stack([np.asarray(vertex[name], np.float64) for name in "xyz"], axis=1)
    faces, face, corners = _faces(vertices, elements)
    colors, normals, alpha = _colors(vertex), _normals(vertex), _alpha(vertex)
    painted = None if face is None else _colors(face)
    if painted is not None:
        vertices, flat = vertices[faces].reshape(-1, 3), faces.reshape(-1)
        colors = np.repeat(painted, 3, axis=0)
        normals, alpha = (None if value is None else value[flat] for value in (normals, alpha))
        faces, index = np.arange(len(vertices)).reshape(-1, 3), flat
    else:
        index = np.arange(len(vertices))
    more = _texture(path, data.comments, vertex, face, corners, index, faces)
    if alpha is not None and ((alpha == 1).all() or not alpha.any()):
        alpha = None
    mode = "OPAQUE" if alpha is None else "BLEND"
    mesh = Mesh(vertices, faces, colors, normals, alpha=alpha, alpha_mode=mode, **more)
    return joined([mesh])


def _faces(vertices: np.ndarray, elements: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Triangles [F, 3], the row of the file that each comes from, and which corners [F, 3] of its polygon it has."""
    face = elements.get("face")
    name = None if face is None else _list_name(face)
    if face is not None and name is not None and len(face):
        polygons = [row.tolist() for row in face[name]]
        counts = np.array([len(polygon) for polygon in polygons])
        if (counts < 3).any():
            warnings.warn(f"{int((counts < 3).sum())} faces of less than three corners are left out", stacklevel=1)
        kept = np.flatnonzero(counts >= 3)
        triangles, source, corners = triangulate(vertices, [polygons[i] for i in kept])
        return triangles, face[kept[source]], corners
    strips = elements.get("tristrip")
    name = None if strips is None else _list_name(strips)
    if strips is not None and name is not None:
        found = [faces for row in strips[name] for faces in _strip(np.asarray(row, np.int64))]
        if found:
            return np.concatenate(found), None, np.zeros((0, 3), np.int64)
    raise ValueError("the mesh has no faces; a surface needs triangles, a point cloud has none")


def _list_name(rows: np.ndarray) -> str | None:
    names = rows.dtype.names or ()
    return next((name for name in names if name.lower() in INDICES), None)


def _strip(index: np.ndarray) -> list[np.ndarray]:
    """Triangles of a strip; -1 begins anew, and every other triangle is turned."""
    found = []
    for piece in np.split(index, np.flatnonzero(index == -1)):
        piece = piece[piece != -1]
        if len(piece) >= 3:
            number = np.arange(len(piece) - 2)
            odd = number % 2
            faces = np.stack((piece[number], piece[number + 1 + odd], piece[number + 2 - odd]), axis=1)
            a, b, c = faces.T
            found.append(faces[(a != b) & (b != c) & (c != a)])
    return found


def _columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    """The properties with a number each, by their plain names."""
    found: dict[str, np.ndarray] = {}
    for name in rows.dtype.names or ():
        if rows.dtype[name].kind in "iuf":
            plain = name.lower()
            for prefix in PREFIXES:
                plain = plain.removeprefix(prefix)
            found.setdefault(plain, rows[name])
    return found


def _colors(rows: np.ndarray) -> np.ndarray | None:
    """Colors [N, 3] in [0, 1], whatever the names and types of the properties; None if there are none."""
    columns = _columns(rows)
    for names in COLORS:
        if all(name in columns for name in names):
            return _unit(np.stack([columns[name] for name in names], axis=1))
    return None


def _alpha(rows: np.ndarray) -> np.ndarray | None:
    columns = _columns(rows)
    return _unit(columns["alpha"]) if "alpha" in columns and _colors(rows) is not None else None


def _unit(values: np.ndarray) -> np.ndarray:
    """Colors in [0, 1]: bytes and shorts are fractions of their largest value, other numbers above 1 of 255."""
    kind, values = values.dtype, values.astype(np.float64)
    if kind.kind in "iu" and kind.itemsize <= 2:
        return (values / (65535 if kind.itemsize == 2 else 255)).clip(0, 1)
    return (values / (255 if kind.kind in "iu" or values.max(initial=0) > 1 else 1)).clip(0, 1)


def _normals(rows: np.ndarray) -> np.ndarray | None:
    for names in (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")):
        if set(names) <= set(rows.dtype.names or ()):
            return np.stack([np.asarray(rows[name], np.float64) for name in names], axis=1)
    return None


def _texture(
    path: Path,
    comments: list[str],
    vertex: np.ndarray,
    face: np.ndarray | None,
    corners: np.ndarray,
    index: np.ndarray,
    faces: np.ndarray,
) -> dict[str, Any]:
    """The UV map, of vertices or of corners (as MeshLab writes it), and the images that a comment names."""
    names = None
    if face is not None:
        names = next((name for name in face.dtype.names or () if name.lower() == "texcoord"), None)
    if face is not None and names is not None and all(len(row) >= 6 for row in face[names]):
        rows = np.stack(
            [np.asarray(row, np.float64).reshape(-1, 2)[c] for row, c in zip(face[names], corners, strict=True)]
        )
        uv, uv_faces = rows.reshape(-1, 2), np.arange(3 * len(faces)).reshape(-1, 3)
    else:
        columns = _columns(vertex)
        pair = next((pair for pair in PLACES if all(name in columns for name in pair)), None)
        if pair is None:
            return {}
        uv = np.stack([np.asarray(columns[name], np.float64) for name in pair], axis=1)[index]
        uv_faces = faces
    images = []
    for comment in comments:
        key, _, name = comment.partition(" ")
        if key.lower() == "texturefile":
            file = find_file(path.parent, name)
            if file is None:
                warnings.warn(f"{path.name}: there is no image {name!r}", stacklevel=1)
                return {"uv": uv, "uv_faces": uv_faces}
            images.append(read_image(file)[:, :, :3])
    number = None
    if len(images) > 1 and face is not None and "texnumber" in (face.dtype.names or ()):
        number = np.asarray(face["texnumber"], np.int64).clip(-1, len(images) - 1)
    return {"uv": uv, "uv_faces": uv_faces, "textures": tuple(images), "texture_of": number}
