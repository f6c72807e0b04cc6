"""From a density field to a coloured mesh, and to GLB, OBJ or PLY.

A mesh is in world space (z up, front +x) with sRGB vertex colours until it is written. glTF wants y up, the front
towards +z and linear colours; the GLB writer converts, OBJ and PLY are written as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from skimage.measure import marching_cubes
from torch import Tensor
from trimesh.visual import ColorVisuals

from distill3d.files import replacing

Query = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


@torch.no_grad()
def extract_mesh(
    query: Query,
    level: float = 10.0,
    resolution: int = 128,
    half_size: float = 1.0,
    smooth: int = 0,
    min_share: float = 0.02,
) -> trimesh.Trimesh:
    """The surface of a field at a density, coloured by the field.

    Args:
        query: maps points [N, 3] to density [N], colour [N, 3] in [0, 1] and something ignored, such as
            `VoxelField.query`.
        level: density per world unit at the surface; 1 / level is how deep one sees into the object.
        resolution: lattice points a side of [-half_size, half_size]^3. Anything that reaches the box is closed
            just outside it.
        smooth: rounds of Taubin smoothing, which takes the stairs away and keeps the volume.
        min_share: connected parts with less than this share of the largest part's area are dropped as floaters.

    Raises:
        ValueError: where no point reaches the level.
    """
    if level <= 0 or resolution < 2:
        raise ValueError(f"level must be above 0 and resolution at least 2, got {level} and {resolution}")
    axis = torch.linspace(-half_size, half_size, resolution)
    lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)
    density = torch.cat([query(part)[0] for part in lattice.split(1 << 18)])
    highest = float(density.max())
    if not highest > level:
        raise ValueError(f"nothing to export: the density reaches {highest:.3g}, the surface level is {level:.3g}")
    # The density jumps over orders of magnitude at a surface; its clamped logarithm is what interpolates evenly.
    value = (density.clamp_min(1e-12).log() - math.log(level)).clamp(-3, 3).view([resolution] * 3)
    padded = np.pad(value.numpy(), 1, constant_values=-3.0)
    spacing = 2 * half_size / (resolution - 1)
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="ascent")
    mesh = trimesh.Trimesh((vertices - 1) * spacing - half_size, faces, process=True)
    mesh = _without_floaters(mesh, min_share)
    if smooth:
        trimesh.smoothing.filter_taubin(mesh, iterations=smooth)
    if mesh.volume < 0:
        mesh.invert()
    inside = torch.from_numpy(np.ascontiguousarray(mesh.vertices, dtype=np.float32)).clamp(-half_size, half_size)
    colour = torch.cat([query(part)[1] for part in inside.split(1 << 18)]).clamp(0, 1)
    mesh.visual = ColorVisuals(mesh, vertex_colors=(colour.numpy() * 255).round().astype(np.uint8))
    return mesh


def save_mesh(path: str | os.PathLike[str], mesh: trimesh.Trimesh) -> None:
    """Writes a mesh as .glb, .obj or .ply by the suffix, whole or not at all.

    Raises:
        ValueError: for another suffix or a mesh without faces.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".glb", ".obj", ".ply"):
        raise ValueError(f"a mesh is written as .glb, .obj or .ply, got {suffix or 'no suffix'!r}")
    if not len(mesh.faces):
        raise ValueError("a mesh to be written needs faces, got none")
    with replacing(path) as draft:
        if suffix == ".glb":
            draft.write_bytes(glb_bytes(mesh))
        else:
            mesh.export(draft)


def glb_bytes(mesh: trimesh.Trimesh) -> bytes:
    """A mesh as binary glTF 2.0: one matt material, vertex normals, linear vertex colours, y up."""
    to_gltf = [1, 2, 0]  # (x, y, z) -> (y, z, x): the world's z is glTF's y, its front +x is glTF's +z
    position = np.ascontiguousarray(mesh.vertices[:, to_gltf], dtype="<f4")
    normal = np.ascontiguousarray(_vertex_normals(mesh)[:, to_gltf], dtype="<f4")
    visual: Any = mesh.visual
    colour = srgb_to_linear(np.asarray(visual.vertex_colors)[:, :3] / 255.0)
    # Sixteen bits, for eight are too few for dark linear colours; the fourth is alpha, and keeps 4-byte alignment.
    rgba = np.concatenate((colour, np.ones((len(colour), 1))), axis=1)
    rgba = np.ascontiguousarray((rgba * 65535).round(), dtype="<u2")
    index = np.ascontiguousarray(mesh.faces.reshape(-1), dtype="<u4")

    parts = [(position, 34962, 5126, "VEC3"), (normal, 34962, 5126, "VEC3"), (rgba, 34962, 5123, "VEC4")]
    parts.append((index, 34963, 5125, "SCALAR"))
    views, accessors, offset = [], [], 0
    for i, (array, target, component, kind) in enumerate(parts):
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": array.nbytes, "target": target})
        accessors.append({"bufferView": i, "componentType": component, "count": len(array), "type": kind})
        offset += array.nbytes
    accessors[0] |= {"min": position.min(0).tolist(), "max": position.max(0).tolist()}
    accessors[2]["normalized"] = True
    surface = {"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}, "indices": 3, "material": 0}
    document = {
        "asset": {"version": "2.0", "generator": "distill3d"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [surface]}],
        "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 0.9}}],
        "buffers": [{"byteLength": offset}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(array.tobytes() for array, *_ in parts)
    chunks = _chunk(b"JSON", text) + _chunk(b"BIN\0", binary)
    return b"glTF" + np.array([2, 12 + len(chunks)], "<u4").tobytes() + chunks


def srgb_to_linear(colour: np.ndarray) -> np.ndarray:
    """Light intensity in [0, 1] of sRGB-encoded values in [0, 1] (IEC 61966-2-1)."""
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return np.array(len(content), "<u4").tobytes() + kind + content


def _vertex_normals(mesh: trimesh.Trimesh) -> np.ndarray:
    """Unit normals [V, 3]; straight up where all faces of a vertex have no area."""
    normal = np.array(mesh.vertex_normals)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.where(length > 1e-6, normal / np.maximum(length, 1e-6), [0.0, 0.0, 1.0])


def _without_floaters(mesh: trimesh.Trimesh, min_share: float) -> trimesh.Trimesh:
    """The parts whose area is at least `min_share` of the largest one's."""
    labels = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    area = np.bincount(labels, weights=mesh.area_faces)
    mesh.update_faces((area >= min_share * area.max())[labels])
    mesh.remove_unreferenced_vertices()
    return mesh
