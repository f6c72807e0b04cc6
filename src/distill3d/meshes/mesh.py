"""Meshes that users bring: GLB, glTF, OBJ and PLY become triangles in world space, with what color they have.

All parts of a file are put together, each moved to where the file's scene has it; the order of faces and of their
corners is kept. glTF is y-up with the front towards +z and is turned to the world's axes (z up, front +x); OBJ and
PLY are taken as z-up, which is how `mesh_files` writes them, unless told otherwise.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from distill3d.files import replacing
from distill3d.meshes.texture import TexturedMesh, check_mesh, texture_colors, unwrap
from distill3d.render.raster import rasterize_plane

Up = Literal["auto", "y", "z"]
SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
OWN_SUFFIX = ".npz"  # of what `save_arrays` writes
RADIUS = 0.9  # an object is fitted into the sphere of this radius about the origin
OVERLAP = 0.005  # share of a UV map's area that may be covered twice: islands may touch


@dataclass(frozen=True)
class Mesh:
    """Triangles in world axes (z up, front +x) and the file's own unit, with what a file says of their color."""

    vertices: np.ndarray  # [V, 3] float64
    faces: np.ndarray  # [F, 3] int64
    corner_colors: np.ndarray  # [F, 3, 3] sRGB in [0, 1]; a texture is multiplied by them
    colored: bool = False  # whether the file names any color
    normals: np.ndarray | None = None  # [V, 3] unit, where all parts bring them
    uv: np.ndarray | None = None  # [T, 2], (0, 0) the lower left of the picture, where all parts bring them
    uv_faces: np.ndarray | None = None  # [F, 3]
    textures: tuple[np.ndarray, ...] = ()  # pictures [H, W, 3] uint8, row 0 the top
    texture_of: np.ndarray | None = None  # [F] index into `textures`, -1 for none

    def colors(self, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """sRGB colors [N, 3] in [0, 1] at places on the surface: faces [N] and weights [N, 3] of their corners."""
        color = np.einsum("nc,ncr->nr", weights, self.corner_colors[face])
        if self.texture_of is None or self.uv is None or self.uv_faces is None:
            return color
        uv = np.einsum("nc,ncr->nr", weights, self.uv[self.uv_faces[face]])
        uv = np.where((uv < 0) | (uv > 1), uv % 1.0, uv)  # what lies outside repeats the picture
        for i, texture in enumerate(self.textures):
            chosen = self.texture_of[face] == i
            color[chosen] *= texture_colors(texture, uv[chosen]) / 255.0
        return color

    def sample(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Places evenly over the surface by area: faces [N] and weights [N, 3]."""
        rng = np.random.default_rng(seed)
        a, b, c = self.vertices[self.faces].transpose(1, 0, 2)
        area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
        face = np.searchsorted(area.cumsum(), (np.arange(count) + rng.random(count)) / count * area.sum())
        u, v = np.sqrt(rng.random(count)), rng.random(count)
        weights = np.stack((1 - u, u * (1 - v), u * v), axis=1)
        return face.clip(0, len(area) - 1), weights


@dataclass(frozen=True)
class Placement:
    """How a mesh in its own unit lies in the scene: scene = scale (point - center)."""

    center: np.ndarray  # [3]
    scale: float

    def to_scene(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 3] of the file in the scene's unit."""
        return (points - self.center) * self.scale

    def to_file(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 3] of the scene in the file's unit."""
        return points / self.scale + self.center


def place(mesh: Mesh, radius: float = RADIUS) -> Placement:
    """Centers a mesh by its bounding box and fits it into the sphere of `radius` world units about the origin."""
    used = mesh.vertices[np.unique(mesh.faces)]
    center = (used.min(0) + used.max(0)) / 2
    return Placement(center, radius / float(np.linalg.norm(used - center, axis=1).max()))


def placed(mesh: Mesh, placement: Placement | None = None) -> Mesh:
    """The mesh in the scene's unit."""
    return replace(mesh, vertices=(placement or place(mesh)).to_scene(mesh.vertices))


def read_mesh(path: str | os.PathLike[str], up: Up = "auto") -> Mesh:
    """Reads a mesh.

    Args:
        path: a .glb, .gltf, .obj or .ply file.
        up: the file's upward axis; "auto" is y for glTF and z for the others. With y the front is +z.

    Raises:
        ValueError: one line for each way in which a file is no mesh: missing, of another kind, damaged, without
            faces, with NaN vertices or without extent.
    """
    import trimesh

    path = Path(path)
    if path.suffix.lower() == OWN_SUFFIX:
        return _load_arrays(path)
    _check_file(path)
    try:
        scene: Any = trimesh.load_scene(path, process=False)
        parts = [_part(scene, node) for node in sorted(scene.graph.nodes_geometry)]
    except Exception as error:  # each reader has its own way to fail; all of them mean the file
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a mesh, it may be damaged or cut short: {told}") from error
    try:
        mesh = _joined([part for part in parts if part is not None], linear=path.suffix.lower() in (".glb", ".gltf"))
        check_mesh(mesh.vertices, mesh.faces)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not np.ptp(mesh.vertices[mesh.faces].reshape(-1, 3), axis=0).max() > 0:
        raise ValueError(f"{path}: the mesh has no extent, all its vertices lie at one place")
    if up == "y" or (up == "auto" and path.suffix.lower() in (".glb", ".gltf")):
        mesh = replace(mesh, vertices=mesh.vertices[:, [2, 0, 1]])
        if mesh.normals is not None:
            mesh = replace(mesh, normals=mesh.normals[:, [2, 0, 1]])
    return mesh


def save_arrays(path: str | os.PathLike[str], mesh: Mesh) -> None:
    """Writes all of a mesh, exactly, as a .npz file that `read_mesh` reads: a run's own copy of what it was given."""
    content: dict[str, Any] = {f"texture{i}": picture for i, picture in enumerate(mesh.textures)}
    for field in fields(mesh):
        value = getattr(mesh, field.name)
        if field.name != "textures" and value is not None:
            content[field.name] = value
    with replacing(path) as draft:
        np.savez_compressed(draft, **content)


def _load_arrays(path: Path) -> Mesh:
    try:
        with np.load(path) as file:
            content = dict(file)
        textures = tuple(
            content.pop(f"texture{i}")
            for i in range(sum(n.startswith("texture") for n in file.files) - ("texture_of" in file.files))
        )
        return Mesh(**content | {"textures": textures, "colored": bool(content["colored"])})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a mesh: {str(error).splitlines()[0]}") from error


def uv_problem(mesh: Mesh) -> str | None:
    """Why a mesh's UV map cannot hold a texture that is painted anew; None if it can."""
    if mesh.uv is None or mesh.uv_faces is None:
        return "it has none"
    corner = mesh.uv[mesh.uv_faces]
    if not np.isfinite(corner).all() or corner.min() < -1e-4 or corner.max() > 1 + 1e-4:
        return "it reaches beyond the picture"
    side, other = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    flat = np.abs(side[:, 0] * other[:, 1] - side[:, 1] * other[:, 0]) < 1e-12
    a, b, c = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if area[flat].sum() > 0.01 * area.sum():
        return "it leaves faces without any place in the picture"
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


def with_texture(mesh: Mesh, texture: np.ndarray, uv: np.ndarray, uv_faces: np.ndarray) -> TexturedMesh:
    """The same triangles with another texture [H, W, 3] uint8 and UV map."""
    return TexturedMesh(mesh.vertices, mesh.faces, uv, uv_faces, texture, mesh.normals)


def from_textured(mesh: TexturedMesh) -> Mesh:
    """A textured mesh as one that was read from a file."""
    white, first = np.ones((len(mesh.faces), 3, 3)), np.zeros(len(mesh.faces), np.int64)
    return Mesh(mesh.vertices, mesh.faces, white, True, mesh.normals, mesh.uv, mesh.uv_faces, (mesh.texture,), first)


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


def weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices at exactly one place become one: files split them at seams. Returns vertices and faces."""
    shared, of = np.unique(vertices, axis=0, return_inverse=True)
    return shared, of.reshape(-1)[faces]


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a mesh is read from {', '.join(SUFFIXES)}, got {path.name!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        head = file.read(8192)
    if not head:
        raise ValueError(f"{path} is empty")
    if path.suffix.lower() == ".ply":
        if not head.startswith(b"ply"):
            raise ValueError(f"{path} is no PLY file, whatever its name says")
        if b"f_dc_0" in head or b" scale_0" in head:
            raise ValueError(f"{path} holds Gaussian splats, not a mesh; a mesh has faces")


@dataclass(frozen=True)
class _Part:
    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray | None
    uv: np.ndarray | None
    texture: np.ndarray | None
    colors: np.ndarray | None  # [V, 3] in [0, 1], as the file has them
    base: np.ndarray  # [3] in [0, 1], as the file has it
    colored: bool


def _part(scene: Any, node: str) -> _Part | None:
    """One geometry of a trimesh scene in its place; None for what has no faces."""
    transform, name = scene.graph[node]
    solid = scene.geometry[name]
    if not len(getattr(solid, "faces", ())):
        return None
    had_normals = "vertex_normals" in solid._cache
    vertices, faces = np.asarray(solid.vertices, np.float64), np.asarray(solid.faces, np.int64)
    normals = np.asarray(solid.vertex_normals, np.float64) if had_normals else None
    if not np.array_equal(transform, np.eye(4)):
        vertices = vertices @ transform[:3, :3].T + transform[:3, 3]
        if np.linalg.det(transform[:3, :3]) < 0:
            faces = faces[:, ::-1]
        if normals is not None:
            normals = normals @ np.linalg.pinv(transform[:3, :3])
            normals = normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
    uv = getattr(solid.visual, "uv", None)
    texture, base = _material(getattr(solid.visual, "material", None))
    colors = _vertex_colors(solid.visual)
    known = texture is not None or colors is not None or base is not None
    return _Part(
        vertices, faces, normals, None if uv is None else np.asarray(uv, np.float64), texture, colors,
        np.ones(3) if base is None else base, known,
    )  # fmt: skip


def _vertex_colors(visual: Any) -> np.ndarray | None:
    """Colors [V, 3] in [0, 1], as the file has them; trimesh keeps those beside a material as an attribute."""
    if visual.kind in ("vertex", "face"):
        return np.asarray(visual.vertex_colors)[:, :3] / 255.0
    colors = getattr(visual, "vertex_attributes", {}).get("color")
    if colors is None:
        return None
    colors = np.asarray(colors)[:, :3]
    return colors / np.iinfo(colors.dtype).max if colors.dtype.kind in "ui" else colors


def _material(material: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Picture [H, W, 3] uint8 and base color [3] in [0, 1] of a trimesh material, None for what it lacks."""
    picture = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    base = getattr(material, "baseColorFactor", None)
    if base is None and picture is None:
        base = getattr(material, "diffuse", None)
    if base is not None:
        base = np.asarray(base)[:3]
        base = base / 255.0 if base.dtype.kind in "ui" else base
    return (None if picture is None else np.asarray(picture.convert("RGB"))), base


def _joined(parts: Sequence[_Part], linear: bool) -> Mesh:
    """All parts as one mesh; `linear` says that colors other than textures are intensities."""
    if not parts:
        raise ValueError("the mesh has no faces; a surface needs triangles (a cloud of points has none)")
    first = np.cumsum([0] + [len(part.vertices) for part in parts])
    tint = _linear_to_srgb if linear else np.asarray
    corners, textures, texture_of = [], [], []
    for part in parts:
        color = np.broadcast_to(part.base, part.vertices.shape) if part.colors is None else part.colors * part.base
        corners.append(tint(color)[part.faces])
        textured = part.texture is not None and part.uv is not None
        texture_of.append(np.full(len(part.faces), len(textures) if textured else -1))
        if textured:
            textures.append(part.texture)
    faces = np.concatenate([part.faces + start for part, start in zip(parts, first, strict=False)])
    normals, uv = ([getattr(part, name) for part in parts] for name in ("normals", "uv"))
    has_uv = any(part.uv is not None for part in parts)
    if has_uv:  # parts without a map are put beside the picture, so that the whole map does not count as usable
        uv = [np.full((len(part.vertices), 2), -1.0) if part.uv is None else part.uv for part in parts]
    return Mesh(
        vertices=np.concatenate([part.vertices for part in parts]),
        faces=faces,
        corner_colors=np.concatenate(corners),
        colored=any(part.colored for part in parts),
        normals=None if any(n is None for n in normals) else np.concatenate(normals),
        uv=np.concatenate(uv) if has_uv else None,
        uv_faces=faces if has_uv else None,
        textures=tuple(textures),
        texture_of=np.concatenate(texture_of) if textures else None,
    )


def _linear_to_srgb(color: np.ndarray) -> np.ndarray:
    """The inverse of `mesh_files.srgb_to_linear`."""
    color = np.clip(color, 0, 1)
    return np.where(color <= 0.0031308, 12.92 * color, 1.055 * color ** (1 / 2.4) - 0.055)
