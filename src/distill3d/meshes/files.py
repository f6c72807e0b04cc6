"""Mesh files: GLB, glTF, OBJ and PLY are read, GLB, OBJ and PLY are written, all as one `Mesh`.

A `Mesh` is z-up with the front towards +x and has sRGB colors. glTF is y-up with the front towards +z, its vertex and
base colors are linear and its textures sRGB: reader and writer convert. OBJ is taken as y-up as well, which is what
most programs write and expect, PLY as z-up; both can be set. A .npz file holds every array of a mesh exactly.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill3d.files import replacing
from distill3d.meshes.gltf import read_gltf
from distill3d.meshes.mesh import Mesh, joined, surface_area
from distill3d.meshes.obj import read_obj
from distill3d.meshes.ply import read_ply
from distill3d.meshes.writers import write_glb, write_obj, write_ply
from distill3d.untrusted import read_npz

Up = Literal["auto", "y", "z"]
Y_UP = (".glb", ".gltf", ".obj")
TO_Y_UP, FROM_Y_UP = [1, 2, 0], [2, 0, 1]  # the world's (x, y, z) is (z, x, y) in a file with y up
SMALLEST, LARGEST = 1e-100, 1e100  # extents that can be squared twice
MOST_BYTES = 2**31  # of a file
LEAST_AREA = 1e-12  # of a surface, relative to the square of its extent


def file_up(path: str | os.PathLike[str], up: Up = "auto") -> Literal["y", "z"]:
    """The upward axis of a file: that of its kind unless it is given; glTF knows y only."""
    suffix = Path(path).suffix.lower()
    return up if up != "auto" else "y" if suffix in Y_UP else "z"


def read_mesh(path: str | os.PathLike[str], up: Up = "auto") -> Mesh:
    """Reads a mesh; the parts of a file are joined, each placed as the file's scene has it.

    The order of faces and of their corners is kept.

    Args:
        path: a .glb, .gltf, .obj, .ply or .npz file.
        up: the file's upward axis; "auto" is y for glTF and OBJ and z for PLY. With y up the front is +z.

    Raises:
        ValueError: if the file is missing, damaged, of another kind, without faces, without area, or has vertices
            that are not finite.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"a mesh is read from .glb, .gltf, .obj, .ply, got {path.name!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if not (size := path.stat().st_size):
        raise ValueError(f"{path} is empty")
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; files of up to {MOST_BYTES:,} are read")
    try:
        mesh = READERS[suffix](path)
        _check_extent(mesh)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return mesh if suffix == ".npz" or file_up(path, up) == "z" else _turned(mesh, FROM_Y_UP)


def save_mesh(path: str | os.PathLike[str], mesh: Mesh, up: Up = "auto") -> list[Path]:
    """Writes a mesh as .glb, .obj, .ply or .npz by the suffix, each file whole or not at all.

    An .obj with a texture comes with an .mtl and a .png file beside it, written first. A .ply file holds no texture:
    each vertex gets the color of the texture. A .npz file holds the mesh exactly, for `read_mesh`. Object and material
    have the file's name, or that of its run if the file is just "mesh".

    Args:
        up: the file's upward axis, as for `read_mesh`.

    Returns:
        the files that were written, the mesh itself first.

    Raises:
        ValueError: for another suffix, or a mesh that the format cannot hold.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS or suffix == ".gltf":
        raise ValueError(f"a mesh is written as .glb, .obj or .ply, got {suffix or 'no suffix'!r}")
    if suffix == ".glb" and up == "z":
        raise ValueError("glTF files are y up by definition; z up is for .obj and .ply")
    if mesh.uv is not None and not np.isfinite(mesh.uv).all():
        raise ValueError("the UV map has coordinates that are not finite (NaN or infinite)")
    if suffix == ".npz":
        _write_npz(path, mesh)
        return [path]
    if suffix in (".glb", ".obj") and (len(mesh.textures) > 1 or (mesh.textures and mesh.texture_of is not None)):
        raise ValueError(f"{suffix} files are written with one texture for all faces; write .ply with vertex colors")
    mesh = mesh if file_up(path, up) == "z" else _turned(mesh, TO_Y_UP)
    # The folder of a run ends in random digits; the same run gives the same file.
    name = re.sub(r"-[0-9a-f]{6}$", "", path.resolve().parent.name) if path.stem == "mesh" else path.stem
    return [path, *WRITERS[suffix](path, mesh, name or "mesh")]


def _turned(mesh: Mesh, axes: list[int]) -> Mesh:
    normals = None if mesh.normals is None else mesh.normals[:, axes]
    return replace(mesh, vertices=mesh.vertices[:, axes], normals=normals)


def _check_extent(mesh: Mesh) -> None:
    corners = mesh.vertices[np.unique(mesh.faces)]
    extent = float((corners.max(0) / 2 - corners.min(0) / 2).max() * 2)
    if not extent > 0:
        raise ValueError("the mesh has no extent, all its vertices lie at one place")
    if not (SMALLEST < extent < LARGEST and np.abs(corners).max() < LARGEST):
        raise ValueError(f"the mesh is {extent:.3g} units large; sizes from {SMALLEST:g} to {LARGEST:g} can be used")
    if not surface_area((mesh.vertices - corners[0]) / extent, mesh.faces).sum() > LEAST_AREA:
        raise ValueError("the mesh has no area, its faces are lines or points")


def _read_npz(path: Path) -> Mesh:
    file = read_npz(path)
    try:
        names = sorted((name for name in file if name.startswith("textures_")), key=lambda name: int(name[9:]))
        values: dict[str, Any] = {name: file[name] for name in file if name not in names}
        plain = {name: value.item() for name, value in values.items() if not value.ndim}
        wraps = tuple((u, v) for u, v in values.pop("wraps", np.zeros((0, 2))).tolist())
        return Mesh(**values | plain, wraps=wraps, textures=tuple(file[name] for name in names))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"cannot be read as a mesh: {str(error).splitlines()[0]}") from error


def _write_npz(path: Path, mesh: Mesh) -> None:
    content = {f"textures_{i}": texture for i, texture in enumerate(mesh.textures)}
    arrays = {
        field.name: getattr(mesh, field.name) for field in fields(mesh) if field.name not in ("textures", "wraps")
    }
    if mesh.wraps:
        arrays["wraps"] = np.array(mesh.wraps)
    with replacing(path) as draft:
        np.savez_compressed(draft, **content, **{name: value for name, value in arrays.items() if value is not None})


READERS = {
    ".glb": lambda path: joined(read_gltf(path)),
    ".gltf": lambda path: joined(read_gltf(path)),
    ".obj": read_obj,
    ".ply": read_ply,
    ".npz": _read_npz,
}
WRITERS = {".glb": write_glb, ".obj": write_obj, ".ply": write_ply}
