"""Mesh files: GLB, glTF, OBJ and PLY are read, GLB, OBJ and PLY are written, all as one `Mesh`.

A `Mesh` is z-up with the front towards +x and has sRGB colors. glTF is y-up with the front towards +z, its vertex and
base colors are linear and its textures sRGB: reader and writer convert. OBJ and PLY are read and written as they are.
A .npz file holds every array of a mesh exactly.
"""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distill3d.files import replacing
from distill3d.meshes.gltf import read_gltf
from distill3d.meshes.mesh import Mesh, joined, srgb_to_linear
from distill3d.meshes.obj import read_obj
from distill3d.meshes.ply import read_ply

if TYPE_CHECKING:
    pass

Up = Literal["auto", "y", "z"]
GLTF = (".glb", ".gltf")
TO_GLTF, FROM_GLTF = [1, 2, 0], [2, 0, 1]  # the world's (x, y, z) is (z, x, y) in glTF
# OpenGL's numbers for buffers, filters and wrap modes.
VERTICES, INDICES = 34962, 34963
LINEAR, MIPMAPPED, REPEAT, CLAMP = 9729, 9987, 10497, 33071


def read_mesh(path: str | os.PathLike[str], up: Up = "auto") -> Mesh:
    """Reads a mesh; the parts of a file are joined, each placed as the file's scene has it.

    The order of faces and of their corners is kept.

    Args:
        path: a .glb, .gltf, .obj, .ply or .npz file.
        up: the file's upward axis; "auto" is y for glTF and z for OBJ and PLY. With y up the front is +z.

    Raises:
        ValueError: if the file is missing, damaged, of another kind, without faces, without extent, or has vertices
            that are not finite.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"a mesh is read from .glb, .gltf, .obj, .ply, got {path.name!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        mesh = READERS[suffix](path)
        if not np.ptp(mesh.vertices[mesh.faces].reshape(-1, 3), axis=0).max() > 0:
            raise ValueError("the mesh has no extent, all its vertices lie at one place")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if suffix != ".npz" and (up == "y" or (up == "auto" and suffix in GLTF)):
        normals = None if mesh.normals is None else mesh.normals[:, FROM_GLTF]
        mesh = replace(mesh, vertices=mesh.vertices[:, FROM_GLTF], normals=normals)
    return mesh


def save_mesh(path: str | os.PathLike[str], mesh: Mesh) -> list[Path]:
    """Writes a mesh as .glb, .obj, .ply or .npz by the suffix, each file whole or not at all.

    An .obj with a texture comes with an .mtl and a .png file beside it, written first. A .ply file holds no texture:
    each vertex gets the color of the texture. A .npz file holds the mesh exactly, for `read_mesh`.

    Returns:
        the files that were written, the mesh itself first.

    Raises:
        ValueError: for another suffix, or a mesh that the format cannot hold.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"a mesh is written as .glb, .obj or .ply, got {suffix or 'no suffix'!r}")
    if mesh.uv is not None and not np.isfinite(mesh.uv).all():
        raise ValueError("the UV map has coordinates that are not finite (NaN or infinite)")
    if suffix in (".glb", ".obj") and (len(mesh.textures) > 1 or (mesh.textures and mesh.texture_of is not None)):
        raise ValueError(f"{suffix} files are written with one texture for all faces; write .ply with vertex colors")
    beside = WRITERS[suffix](path, mesh)
    return [path, *beside]


# Readers. Each returns the mesh in the file's own axes.


def _read_gltf(path: Path) -> Mesh:
    return joined(read_gltf(path))


def _read_npz(path: Path) -> Mesh:
    try:
        with np.load(path) as file:
            names = sorted((name for name in file if name.startswith("textures_")), key=lambda name: int(name[9:]))
            values: dict[str, Any] = {name: file[name] for name in file if name not in names}
            plain = {name: value.item() for name, value in values.items() if not value.ndim}
            wraps = tuple((u, v) for u, v in values.pop("wraps", np.zeros((0, 2))).tolist())
            return Mesh(**values | plain, wraps=wraps, textures=tuple(file[name] for name in names))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot be read as a mesh: {str(error).splitlines()[0]}") from error


# Writers. Each returns the files that it writes beside the mesh.


def _write_glb(path: Path, mesh: Mesh) -> list[Path]:
    """Binary glTF 2.0 with one matte material and normals.

    A vertex on a seam is written once for each of its places in the texture.
    """
    import trimesh
    from trimesh.exchange.gltf import export_glb
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    vertex, faces, uv = np.arange(len(mesh.vertices)), mesh.faces, None
    material = PBRMaterial(metallicFactor=0.0, roughnessFactor=0.9)
    if mesh.textures and mesh.uv is not None:
        vertex, place, faces = _split_seams(mesh)
        uv = mesh.uv[place]
        from PIL import Image

        material.baseColorTexture = Image.fromarray(mesh.textures[0])
    attributes = {}
    if mesh.vertex_colors is not None:
        # trimesh writes colors of 8 bits, too few for dark linear colors; `finish` makes a color of this attribute.
        rgba = np.insert(srgb_to_linear(mesh.vertex_colors[vertex]), 3, 1.0, axis=1)
        attributes["_COLOR_0"] = (rgba * 65535).round().astype("<u2")
    solid = trimesh.Trimesh(
        vertices=mesh.vertices[vertex][:, TO_GLTF],
        faces=faces,
        vertex_normals=mesh.vertex_normals()[vertex][:, TO_GLTF],
        visual=TextureVisuals(uv=uv, material=material),
        vertex_attributes=attributes,
        process=False,
    )

    def finish(tree: dict[str, Any]) -> None:
        tree["asset"]["generator"] = "distill3d"
        primitive = tree["meshes"][0]["primitives"][0]
        names = primitive["attributes"]
        if attributes:
            names["COLOR_0"] = names.pop("_COLOR_0")
            tree["accessors"][names["COLOR_0"]]["normalized"] = True
        for number in (*names.values(), primitive["indices"]):
            view = tree["bufferViews"][tree["accessors"][number]["bufferView"]]
            view["target"] = INDICES if number == primitive["indices"] else VERTICES
        if uv is not None:
            # A map of ours ends inside the texture; one that a mesh brought may repeat it.
            wrap = CLAMP if uv.min() >= 0 and uv.max() <= 1 else REPEAT
            tree["samplers"] = [{"magFilter": LINEAR, "minFilter": MIPMAPPED, "wrapS": wrap, "wrapT": wrap}]
            tree["textures"][0]["sampler"] = 0

    with replacing(path) as draft:
        draft.write_bytes(export_glb(trimesh.Scene(solid), include_normals=True, tree_postprocessor=finish))
    return []


def _write_obj(path: Path, mesh: Mesh) -> list[Path]:
    """Vertices on a seam stay one vertex with several texture coordinates, which trimesh would split."""
    from PIL import Image

    if not mesh.textures or mesh.uv is None or mesh.uv_faces is None:
        return _write_by_trimesh(path, mesh)
    stem = re.sub(r"\s+", "_", path.stem)  # many readers end a file's name at a space
    material, image = path.with_name(f"{stem}.mtl"), path.with_name(f"{stem}.png")
    corners = np.stack((mesh.faces, mesh.uv_faces, mesh.faces), axis=-1).reshape(-1, 9) + 1
    lines = [f"mtllib {material.name}", "usemtl surface"]
    lines += ["v {:.7g} {:.7g} {:.7g}".format(*row) for row in mesh.vertices.tolist()]
    lines += ["vt {:.7g} {:.7g}".format(*row) for row in mesh.uv.tolist()]
    lines += ["vn {:.4f} {:.4f} {:.4f}".format(*row) for row in mesh.vertex_normals().tolist()]
    lines += ["f {}/{}/{} {}/{}/{} {}/{}/{}".format(*row) for row in corners.tolist()]
    with replacing(image) as draft:
        Image.fromarray(mesh.textures[0]).save(draft)
    with replacing(material) as draft:
        draft.write_text(f"newmtl surface\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {image.name}\n")
    with replacing(path) as draft:
        draft.write_text("\n".join(lines) + "\n")
    return [material, image]


def _write_by_trimesh(path: Path, mesh: Mesh) -> list[Path]:
    """PLY, and OBJ without a texture: with the colors of the vertices if there are any."""
    import trimesh

    mesh = mesh.with_vertex_colors() if mesh.textures else mesh
    colors = None if mesh.vertex_colors is None else (mesh.vertex_colors * 255).round().astype(np.uint8)
    with replacing(path) as draft:
        trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colors, process=False).export(draft)
    return []


def _write_npz(path: Path, mesh: Mesh) -> list[Path]:
    content = {f"textures_{i}": texture for i, texture in enumerate(mesh.textures)}
    arrays = {
        field.name: getattr(mesh, field.name) for field in fields(mesh) if field.name not in ("textures", "wraps")
    }
    if mesh.wraps:
        arrays["wraps"] = np.array(mesh.wraps)
    with replacing(path) as draft:
        np.savez_compressed(draft, **content, **{name: value for name, value in arrays.items() if value is not None})
    return []


def _split_seams(mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For formats with one UV per vertex: indices [W] into vertices and into uv, and faces [F, 3]."""
    assert mesh.uv is not None and mesh.uv_faces is not None
    pair = mesh.faces * len(mesh.uv) + mesh.uv_faces
    kept, faces = np.unique(pair.reshape(-1), return_inverse=True)
    return kept // len(mesh.uv), kept % len(mesh.uv), faces.reshape(-1, 3)


READERS = {".glb": _read_gltf, ".gltf": _read_gltf, ".obj": read_obj, ".ply": read_ply, ".npz": _read_npz}
WRITERS = {".glb": _write_glb, ".obj": _write_obj, ".ply": _write_by_trimesh, ".npz": _write_npz}
