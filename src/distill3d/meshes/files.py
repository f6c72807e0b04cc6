"""Meshes as files: GLB, OBJ with its material, PLY.

A mesh is in world space (z up, front +x) with sRGB colors until it is written. glTF wants y up, the front
towards +z and vertex colors that are linear (textures stay sRGB); the GLB writer converts, OBJ and PLY are
written as they are.
"""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from distill3d.files import replacing
from distill3d.meshes.texture import TexturedMesh, check_mesh, texture_colors

Mesh = trimesh.Trimesh | TexturedMesh
"""With vertex colors, or with a texture."""

SUFFIXES = (".glb", ".obj", ".ply")
# Numbers of OpenGL that glTF uses.
VERTICES, INDICES = 34962, 34963
UINT16, UINT32, FLOAT32 = 5123, 5125, 5126
LINEAR, MIPMAPPED, REPEAT, CLAMP = 9729, 9987, 10497, 33071


def save_mesh(path: str | os.PathLike[str], mesh: Mesh) -> list[Path]:
    """Writes a mesh as .glb, .obj or .ply by the suffix, each file whole or not at all.

    An .obj with a texture comes with an .mtl and a .png of its own name beside it, written before it. A .ply holds
    no texture: each vertex gets the color that the texture has there.

    Returns:
        the files that were written, the mesh itself first.

    Raises:
        ValueError: for another suffix, a mesh without faces or vertices that are no numbers.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"a mesh is written as .glb, .obj or .ply, got {suffix or 'no suffix'!r}")
    check_mesh(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    if suffix == ".obj" and isinstance(mesh, TexturedMesh):
        return _save_obj(path, mesh)
    with replacing(path) as draft:
        if suffix == ".glb":
            draft.write_bytes(glb_bytes(mesh))
        else:
            (with_vertex_colors(mesh) if isinstance(mesh, TexturedMesh) else mesh).export(draft)
    return [path]


def with_vertex_colors(mesh: TexturedMesh) -> trimesh.Trimesh:
    """The same surface, each vertex with the texture's mean color over the corners that it has."""
    color = texture_colors(mesh.texture, mesh.uv[mesh.uv_faces.reshape(-1)])
    total = np.zeros((len(mesh.vertices), 3))
    np.add.at(total, mesh.faces.reshape(-1), color)
    count = np.bincount(mesh.faces.reshape(-1), minlength=len(mesh.vertices)).clip(1)
    vertex_colors = (total / count[:, None]).round().astype(np.uint8)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=vertex_colors, process=False)


def glb_bytes(mesh: Mesh) -> bytes:
    """A mesh as binary glTF 2.0: one matt material, vertex normals, y up, a texture or linear vertex colors.

    A vertex on a seam of the UV map is written once for each of its places in the picture.
    """
    if isinstance(mesh, TexturedMesh):
        return _textured_glb(mesh)
    visual: Any = mesh.visual
    color = srgb_to_linear(np.asarray(visual.vertex_colors)[:, :3] / 255.0)
    # Sixteen bits, for eight are too few for dark linear colors; the fourth is alpha, and keeps 4-byte alignment.
    rgba = (np.concatenate((color, np.ones((len(color), 1))), axis=1) * 65535).round()
    file = _Glb()
    attributes = file.surface(np.asarray(mesh.vertices), vertex_normals(mesh))
    attributes["COLOR_0"] = file.accessor(rgba.astype("<u2"), "VEC4", UINT16, VERTICES, normalized=True)
    return file.bytes(attributes, np.asarray(mesh.faces), {})


def srgb_to_linear(color: np.ndarray) -> np.ndarray:
    """Light intensity in [0, 1] of sRGB-encoded values in [0, 1] (IEC 61966-2-1)."""
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def vertex_normals(mesh: Mesh) -> np.ndarray:
    """Unit normals [V, 3]; straight up where all faces of a vertex have no area."""
    if isinstance(mesh, TexturedMesh):
        solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        normal = np.array(solid.vertex_normals if mesh.normals is None else mesh.normals)
    else:
        normal = np.array(mesh.vertex_normals)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.where(length > 1e-6, normal / np.maximum(length, 1e-6), [0.0, 0.0, 1.0])


def split_seams(mesh: TexturedMesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What formats with one UV a vertex need: vertex [W] and place [W] of each written vertex, and faces [F, 3]."""
    pair = mesh.faces.astype(np.int64) * len(mesh.uv) + mesh.uv_faces
    kept, faces = np.unique(pair.reshape(-1), return_inverse=True)
    return kept // len(mesh.uv), kept % len(mesh.uv), faces.reshape(-1, 3)


def png_bytes(texture: np.ndarray) -> bytes:
    """A picture [H, W, 3] uint8 as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(texture).save(file, "PNG")
    return file.getvalue()


def _textured_glb(mesh: TexturedMesh) -> bytes:
    vertex, place, faces = split_seams(mesh)
    file = _Glb()
    attributes = file.surface(mesh.vertices[vertex], vertex_normals(mesh)[vertex])
    uv = np.stack((mesh.uv[:, 0], 1 - mesh.uv[:, 1]), axis=1)[place]  # glTF counts from the top
    attributes["TEXCOORD_0"] = file.accessor(uv.astype("<f4"), "VEC2", FLOAT32, VERTICES)
    # A map of ours ends inside the picture; one that a mesh brought may tile it.
    wrap = CLAMP if uv.min() >= 0 and uv.max() <= 1 else REPEAT
    picture = {
        "images": [{"bufferView": file.view(png_bytes(mesh.texture)), "mimeType": "image/png"}],
        "samplers": [{"magFilter": LINEAR, "minFilter": MIPMAPPED, "wrapS": wrap, "wrapT": wrap}],
        "textures": [{"source": 0, "sampler": 0}],
    }
    return file.bytes(attributes, faces, picture)


@dataclass(frozen=True)
class _Stored:
    content: bytes
    offset: int


class _Glb:
    """Collects the buffer of a GLB file and what points into it."""

    def __init__(self) -> None:
        self.parts: list[_Stored] = []
        self.views: list[dict[str, int]] = []
        self.accessors: list[dict[str, Any]] = []

    @property
    def length(self) -> int:
        return self.parts[-1].offset + len(self.parts[-1].content) if self.parts else 0

    def view(self, content: bytes, target: int | None = None) -> int:
        """Appends bytes (padded to four) and returns the number of their view."""
        self.views.append({"buffer": 0, "byteOffset": self.length, "byteLength": len(content)})
        if target is not None:
            self.views[-1]["target"] = target
        self.parts.append(_Stored(content + bytes(-len(content) % 4), self.length))
        return len(self.views) - 1

    def accessor(self, array: np.ndarray, kind: str, component: int, target: int, **more: Any) -> int:
        """Appends an array, an element a row, and returns the number of its accessor."""
        view = self.view(np.ascontiguousarray(array).tobytes(), target)
        entry = {"bufferView": view, "componentType": component, "count": len(array), "type": kind}
        self.accessors.append(entry | more)
        return len(self.accessors) - 1

    def surface(self, vertices: np.ndarray, normals: np.ndarray) -> dict[str, int]:
        """The attributes of position and normal, turned to glTF's axes."""
        to_gltf = [1, 2, 0]  # (x, y, z) -> (y, z, x): the world's z is glTF's y, its front +x is glTF's +z
        position = np.ascontiguousarray(vertices[:, to_gltf], dtype="<f4")
        bounds = {"min": position.min(0).tolist(), "max": position.max(0).tolist()}
        return {
            "POSITION": self.accessor(position, "VEC3", FLOAT32, VERTICES, **bounds),
            "NORMAL": self.accessor(normals[:, to_gltf].astype("<f4"), "VEC3", FLOAT32, VERTICES),
        }

    def bytes(self, attributes: dict[str, int], faces: np.ndarray, picture: dict[str, Any]) -> bytes:
        """The file: one mesh with one material, whose color is texture 0 if there is a picture."""
        index = self.accessor(faces.reshape(-1).astype("<u4"), "SCALAR", UINT32, INDICES)
        look: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 0.9}
        if picture:
            look["baseColorTexture"] = {"index": 0}
        document = {
            "asset": {"version": "2.0", "generator": "distill3d"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": attributes, "indices": index, "material": 0}]}],
            "materials": [{"pbrMetallicRoughness": look}],
            "buffers": [{"byteLength": self.length}],
            "bufferViews": self.views,
            "accessors": self.accessors,
        } | picture
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        chunks = _chunk(b"JSON", text) + _chunk(b"BIN\0", b"".join(part.content for part in self.parts))
        return b"glTF" + np.array([2, 12 + len(chunks)], "<u4").tobytes() + chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    return np.array(len(content), "<u4").tobytes() + kind + content


def _save_obj(path: Path, mesh: TexturedMesh) -> list[Path]:
    """The picture, the material that names it, and last the mesh that names the material."""
    stem = re.sub(r"\s+", "_", path.stem)  # many readers end a file's name at a space
    material, picture = path.with_name(f"{stem}.mtl"), path.with_name(f"{stem}.png")
    normals = vertex_normals(mesh)
    corners = np.stack((mesh.faces, mesh.uv_faces, mesh.faces), axis=-1).reshape(-1, 9) + 1
    lines = [f"mtllib {material.name}", "usemtl surface"]
    lines += ["v {:.7g} {:.7g} {:.7g}".format(*row) for row in mesh.vertices.tolist()]
    lines += ["vt {:.7g} {:.7g}".format(*row) for row in mesh.uv.tolist()]
    lines += ["vn {:.4f} {:.4f} {:.4f}".format(*row) for row in normals.tolist()]
    lines += ["f {}/{}/{} {}/{}/{} {}/{}/{}".format(*row) for row in corners.tolist()]
    with replacing(picture) as draft:
        draft.write_bytes(png_bytes(mesh.texture))
    with replacing(material) as draft:
        draft.write_text(f"newmtl surface\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {picture.name}\n")
    with replacing(path) as draft:
        draft.write_text("\n".join(lines) + "\n")
    return [path, material, picture]
