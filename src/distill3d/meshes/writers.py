"""GLB, OBJ and PLY files of a mesh that is given in the file's axes."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from distill3d.files import replacing
from distill3d.meshes.mesh import Mesh, srgb_to_linear

# OpenGL's numbers for buffers, component types, filters and wrap modes.
VERTICES, INDICES = 34962, 34963
SHORT, INTEGER, FLOAT = 5123, 5125, 5126
LINEAR, MIPMAPPED = 9729, 9987
WRAP_MODES = {"repeat": 10497, "clamp": 33071, "mirror": 33648}
FAR = 8.0  # farther from the origin than so many times its extent, a mesh is written about its own center
COMMON = (1e-3, 1e4)  # extents that are written as they are


def frame(mesh: Mesh) -> tuple[np.ndarray, float]:
    """Center [3] and unit in which 32 bits hold the vertices well; the origin and 1 for meshes of a common size.

    The unit is a power of two, so that a division by it is exact.
    """
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    extent = float((high - low).max())
    far = float(np.abs(mesh.vertices).max()) > FAR * extent
    unit = 1.0 if COMMON[0] <= extent <= COMMON[1] or not extent else 2.0 ** round(math.log2(extent))
    return (low / 2 + high / 2 if far else np.zeros(3)), unit


def write_glb(path: Path, mesh: Mesh, name: str) -> list[Path]:
    """Binary glTF 2.0 with one matte material and normals; what is far away, tiny or huge gets a node transform.

    A vertex on a seam is written once for each of its places in the texture.
    """
    from PIL import Image

    vertex, faces, place = np.arange(len(mesh.vertices)), mesh.faces, None
    if mesh.textures and mesh.uv is not None:
        vertex, place, faces = _split_seams(mesh)
    center, unit = frame(mesh)
    normals = mesh.vertex_normals()[vertex]
    arrays: dict[str, np.ndarray] = {
        "POSITION": ((mesh.vertices[vertex] - center) / unit).astype("<f4"),
        "NORMAL": (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype("<f4"),
    }
    colors = _linear_colors(mesh, vertex)
    if colors is not None:
        arrays["COLOR_0"] = colors
    material = _material(mesh, name)
    node: dict[str, Any] = {"name": name, "mesh": 0}
    if center.any():
        node["translation"] = center.tolist()
    if unit != 1:
        node["scale"] = [unit] * 3
    tree: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "distill3d"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [node],
        "materials": [material],
        "accessors": [],
        "bufferViews": [],
    }
    blob = bytearray()

    def view(data: bytes, **more: int) -> int:
        tree["bufferViews"].append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(data), **more})
        blob.extend(data + bytes(-len(data) % 4))
        return len(tree["bufferViews"]) - 1

    def accessor(values: np.ndarray, target: int, **more: Any) -> int:
        kind = {"<f4": FLOAT, "<u2": SHORT, "<u4": INTEGER}[values.dtype.str]
        form = "SCALAR" if values.ndim == 1 else f"VEC{values.shape[1]}"
        entry = {"bufferView": view(values.tobytes(), target=target), "componentType": kind, "count": len(values)}
        tree["accessors"].append({**entry, "type": form, **more})
        return len(tree["accessors"]) - 1

    if place is not None and mesh.uv is not None:
        uv = mesh.uv[place]
        arrays["TEXCOORD_0"] = np.stack((uv[:, 0], 1 - uv[:, 1]), axis=1).astype("<f4")
        image = io.BytesIO()
        Image.fromarray(mesh.textures[0]).save(image, "PNG")
        tree["images"] = [{"name": name, "mimeType": "image/png", "bufferView": view(image.getvalue())}]
        # A map of ours ends inside the texture; one that a mesh brought may repeat it.
        ends = "clamp" if uv.min() >= 0 and uv.max() <= 1 else "repeat"
        wrap_s, wrap_t = (WRAP_MODES[wrap] for wrap in (mesh.wraps[0] if mesh.wraps else (ends, ends)))
        tree["samplers"] = [{"magFilter": LINEAR, "minFilter": MIPMAPPED, "wrapS": wrap_s, "wrapT": wrap_t}]
        tree["textures"] = [{"source": 0, "sampler": 0}]
        material["pbrMetallicRoughness"]["baseColorTexture"] = {"index": 0}
    attributes = {}
    for key, values in arrays.items():
        more = {"min": values.min(0).tolist(), "max": values.max(0).tolist()} if key == "POSITION" else {}
        attributes[key] = accessor(values, VERTICES, **more, **({"normalized": True} if key == "COLOR_0" else {}))
    primitive = {"attributes": attributes, "indices": accessor(faces.reshape(-1).astype("<u4"), INDICES), "material": 0}
    tree |= {"meshes": [{"name": name, "primitives": [primitive]}], "buffers": [{"byteLength": len(blob)}]}
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<4sIII4s", b"glTF", 2, 28 + len(text) + len(blob), len(text), b"JSON")
    with replacing(path) as draft:
        draft.write_bytes(head + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob)
    return []


def _material(mesh: Mesh, name: str) -> dict[str, Any]:
    """A matte material of glTF, without its texture."""
    material: dict[str, Any] = {"name": name, "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 0.9}}
    if mesh.alpha_mode != "OPAQUE":
        material["alphaMode"] = mesh.alpha_mode
    if mesh.alpha_mode == "MASK":
        material["alphaCutoff"] = mesh.alpha_cutoff
    if mesh.double_sided:
        material["doubleSided"] = True
    return material


def _linear_colors(mesh: Mesh, vertex: np.ndarray) -> np.ndarray | None:
    """Linear RGBA [N, 4], uint16, of the vertices with these indices [N]; None for a mesh without colors or opacity."""
    alpha = None if mesh.alpha_mode == "OPAQUE" else mesh.alpha
    if mesh.vertex_colors is None and alpha is None:
        return None
    colors = np.ones((len(vertex), 4))
    if mesh.vertex_colors is not None:
        colors[:, :3] = srgb_to_linear(mesh.vertex_colors[vertex])
    if alpha is not None:
        colors[:, 3] = alpha[vertex].clip(0, 1)
    return (colors * 65535).round().astype("<u2")  # 8 bits are too few for dark linear colors


def write_obj(path: Path, mesh: Mesh, name: str) -> list[Path]:
    """Vertices on a seam stay one vertex with several texture coordinates; colors of vertices follow their place."""
    from PIL import Image

    textured = bool(mesh.textures) and mesh.uv is not None and mesh.uv_faces is not None
    name = re.sub(r"\s+", "_", name)  # many readers end a name at a space
    colors = mesh.vertex_colors if not textured else None
    digits = decimals(mesh)
    lines = [f"# {len(mesh.vertices)} vertices, {len(mesh.faces)} faces", f"o {name}"]
    row = f"v {{:.{digits}g}} {{:.{digits}g}} {{:.{digits}g}}"
    if colors is None:
        lines += [row.format(*point) for point in mesh.vertices.tolist()]
    else:
        pairs = zip(mesh.vertices.tolist(), colors.tolist(), strict=True)
        lines += [row.format(*point) + " {:.4f} {:.4f} {:.4f}".format(*color) for point, color in pairs]
    beside: list[Path] = []
    if textured and mesh.uv is not None and mesh.uv_faces is not None:
        stem = re.sub(r"\s+", "_", path.stem)
        beside = [path.with_name(f"{stem}.mtl"), path.with_name(f"{stem}.png")]
        lines[1:1] = [f"mtllib {beside[0].name}"]
        lines += ["vt {:.7g} {:.7g}".format(*point) for point in mesh.uv.tolist()]
        lines += ["vn {:.4f} {:.4f} {:.4f}".format(*normal) for normal in mesh.vertex_normals().tolist()]
        corners = np.stack((mesh.faces, mesh.uv_faces, mesh.faces), axis=-1).reshape(-1, 9) + 1
        lines += [f"usemtl {name}"]
        lines += ["f {}/{}/{} {}/{}/{} {}/{}/{}".format(*face) for face in corners.tolist()]
        material = f"newmtl {name}\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {beside[1].name}\n"
        if mesh.textures[0].shape[2] == 4:
            material += f"map_d {beside[1].name}\n"
        with replacing(beside[1]) as draft:
            Image.fromarray(mesh.textures[0]).save(draft)
        with replacing(beside[0]) as draft:
            draft.write_text(material)
    else:
        lines += ["f {} {} {}".format(*face) for face in (mesh.faces + 1).tolist()]
    with replacing(path) as draft:
        draft.write_text("\n".join(lines) + "\n")
    return beside


def decimals(mesh: Mesh) -> int:
    """Significant digits that hold coordinates to a ten-millionth of the extent, 7 or more."""
    extent = float(np.ptp(mesh.vertices, axis=0).max())
    ratio = float(np.abs(mesh.vertices).max()) / extent if extent else 1.0
    return min(17, 7 + max(0, math.ceil(math.log10(max(ratio, 1.0)))))


def write_ply(path: Path, mesh: Mesh, name: str) -> list[Path]:
    """Binary, with the colors of the vertices if there are any; a mesh far from the origin in 64 bits."""
    from plyfile import PlyData, PlyElement

    mesh = mesh.with_vertex_colors() if mesh.textures else mesh
    center, unit = frame(mesh)
    columns = [(axis, "<f8" if center.any() or unit != 1 else "<f4") for axis in "xyz"]
    values = [*mesh.vertices.T]
    if mesh.vertex_colors is not None:
        rgb = (mesh.vertex_colors.clip(0, 1) * 255).round().astype(np.uint8)
        columns += [(channel, "u1") for channel in ("red", "green", "blue")]
        values += [*rgb.T]
        if mesh.alpha is not None:
            columns.append(("alpha", "u1"))
            values.append((mesh.alpha.clip(0, 1) * 255).round().astype(np.uint8))
    vertices = np.empty(len(mesh.vertices), columns)
    for (column, _), value in zip(columns, values, strict=True):
        vertices[column] = value
    faces = np.empty(len(mesh.faces), [("vertex_indices", "<i4", (3,))])
    faces["vertex_indices"] = mesh.faces
    elements = [PlyElement.describe(vertices, "vertex"), PlyElement.describe(faces, "face")]
    with replacing(path) as draft:
        PlyData(elements, byte_order="<", comments=[name]).write(draft)
    return []


def _split_seams(mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For formats with one UV per vertex: indices [W] into vertices and into uv, and faces [F, 3]."""
    assert mesh.uv is not None and mesh.uv_faces is not None
    pair = mesh.faces * len(mesh.uv) + mesh.uv_faces
    kept, faces = np.unique(pair.reshape(-1), return_inverse=True)
    return kept // len(mesh.uv), kept % len(mesh.uv), faces.reshape(-1, 3)
