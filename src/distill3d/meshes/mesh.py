"""The triangle mesh that readers return, scenes are made of and writers take, and where it lies in a scene."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

Wrap = Literal["repeat", "mirror", "clamp"]
AlphaMode = Literal["OPAQUE", "MASK", "BLEND"]
REPEATED: tuple[Wrap, Wrap] = ("repeat", "repeat")

MOST = 20_000_000  # vertices, and faces, of a mesh: some gigabytes of memory while it is read
RADIUS = 0.9  # an object is fitted into the sphere of this radius about the origin


def check_count(what: str, count: int) -> None:
    """Raises ValueError for more than `MOST` vertices, faces or values."""
    if not 0 <= count <= MOST:
        raise ValueError(f"the mesh has {count:,} {what}; meshes of up to {MOST:,} are read")


@dataclass(frozen=True)
class Mesh:
    """Triangles in world axes (z up, front +x) with their color: vertex colors, textures, or the product of both.

    A vertex on a seam of the UV map has one place in space and several in the texture; `faces` and `uv_faces` index
    them separately. Without vertex colors and textures the surface is white.

    Attributes:
        vertices: float64, in the file's or the scene's unit.
        faces: int64 indices into `vertices`, counter-clockwise seen from outside.
        vertex_colors: sRGB in [0, 1].
        normals: unit vectors that came with the mesh; None if they follow from the faces.
        uv: texture coordinates, (0, 0) is the lower left corner of the texture and (1, 1) the upper right.
        uv_faces: int64 indices into `uv`.
        textures: sRGB images, row 0 is the top; a fourth channel is opacity.
        texture_of: index into `textures` of each face, -1 for none; None if all faces have the first texture.
        wraps: how each texture continues along u and v outside of [0, 1]; without them all repeat.
        alpha: opacity of the vertices in [0, 1], which multiplies that of the textures; None is opaque.
        alpha_mode: as in glTF: OPAQUE ignores opacity, MASK shows what reaches `alpha_cutoff`, BLEND is translucent.
        alpha_cutoff: of MASK, in [0, 1].
        double_sided: whether the backs of the faces are seen.

    Raises:
        ValueError: for no faces, vertices that are not finite, indices out of range, or shapes that do not match.
    """

    vertices: Float[np.ndarray, "v 3"]
    faces: Int[np.ndarray, "f 3"]
    vertex_colors: Float[np.ndarray, "v 3"] | None = None
    normals: Float[np.ndarray, "v 3"] | None = None
    uv: Float[np.ndarray, "t 2"] | None = None
    uv_faces: Int[np.ndarray, "f 3"] | None = None
    textures: tuple[UInt8[np.ndarray, "_ _ _"], ...] = ()
    texture_of: Int[np.ndarray, " f"] | None = None
    wraps: tuple[tuple[Wrap, Wrap], ...] = ()
    alpha: Float[np.ndarray, " v"] | None = None
    alpha_mode: AlphaMode = "OPAQUE"
    alpha_cutoff: float = 0.5
    double_sided: bool = False

    def __post_init__(self) -> None:
        vertices, faces = self.vertices, self.faces
        check_count("vertices", len(vertices))
        check_count("faces", len(faces))
        if vertices.dtype.kind != "f" or faces.dtype.kind not in "iu":
            raise ValueError(f"vertices must be floats and faces integers, got {vertices.dtype} and {faces.dtype}")
        if vertices.ndim != 2 or vertices.shape[1] != 3:
            raise ValueError(f"vertices must be [V, 3], got {list(vertices.shape)}")
        if not len(faces):
            raise ValueError("the mesh has no faces; a surface needs triangles, a point cloud has none")
        if faces.ndim != 2 or faces.shape[1] != 3:
            raise ValueError(f"faces must be triangles [F, 3], got {list(faces.shape)}")
        if faces.min() < 0 or faces.max() >= len(vertices):
            found = f"{faces.min()} to {faces.max()}"
            raise ValueError(f"faces must be indices from 0 to {len(vertices) - 1} into vertices, got {found}")
        wrong = ~np.isfinite(vertices).all(1)
        if wrong.any():
            raise ValueError(f"{int(wrong.sum())} of {len(vertices)} vertices are not finite (NaN or infinite)")
        self._check_colors()

    def _check_colors(self) -> None:
        for name in ("vertex_colors", "normals"):
            value = getattr(self, name)
            if value is not None and value.shape != self.vertices.shape:
                raise ValueError(f"{name} must be [V, 3] with V = {len(self.vertices)}, got {list(value.shape)}")
        if (self.uv is None) != (self.uv_faces is None) or (self.textures and self.uv is None):
            raise ValueError("a texture needs a UV map, and a UV map both uv [T, 2] and uv_faces [F, 3]")
        if self.uv is not None and self.uv_faces is not None:
            if self.uv_faces.shape != self.faces.shape or self.uv.ndim != 2 or self.uv.shape[1] != 2:
                raise ValueError(
                    f"a UV map must be uv [T, 2] and uv_faces [F, 3] with F = {len(self.faces)}, got "
                    f"{list(self.uv.shape)} and {list(self.uv_faces.shape)}"
                )
            if self.uv_faces.min() < 0 or self.uv_faces.max() >= len(self.uv):
                raise ValueError(f"uv_faces must be indices from 0 to {len(self.uv) - 1} into uv")
        for texture in self.textures:
            if texture.ndim != 3 or texture.shape[2] not in (3, 4) or not texture.size:
                raise ValueError(f"a texture must be [H, W, 3] or [H, W, 4], got {list(texture.shape)}")
        if self.wraps and len(self.wraps) != len(self.textures):
            raise ValueError(f"wraps must be one pair for each of {len(self.textures)} textures, got {len(self.wraps)}")
        if self.alpha is not None and self.alpha.shape != self.vertices.shape[:1]:
            raise ValueError(f"alpha must be [V] with V = {len(self.vertices)}, got {list(self.alpha.shape)}")
        if self.texture_of is not None and not self.texture_of.max() < max(1, len(self.textures)):
            raise ValueError(f"texture_of must be below {len(self.textures)}, the number of textures")

    def vertex_normals(self) -> Float[np.ndarray, "v 3"]:
        """Unit normals: the mesh's own, else those of its faces weighted by angle; straight up where there are none."""
        import trimesh

        normal = self.normals
        if normal is None:
            # In a unit of its own: trimesh takes tiny faces for lines.
            center, extent = self.vertices[self.faces[0, 0]], float(np.ptp(self.vertices, axis=0).max()) or 1.0
            normal = trimesh.Trimesh((self.vertices - center) / extent, self.faces, process=False).vertex_normals
        length = np.linalg.norm(normal, axis=1, keepdims=True)
        return np.where(length > 1e-6, normal / np.maximum(length, 1e-6), [0.0, 0.0, 1.0])

    def colors(self, face: Int[np.ndarray, " n"], weights: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """sRGB colors in [0, 1] at points on the surface, given by face and barycentric weights."""
        if self.vertex_colors is None:
            color = np.ones((len(face), 3))
        else:
            color = np.einsum("nc,ncr->nr", weights, self.vertex_colors[self.faces[face]])
        return color * self._texels(face, weights)[:, :3]

    def opacity(self, face: Int[np.ndarray, " n"], weights: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """Opacity in [0, 1] at points on the surface as `colors` takes them; 1 where `alpha_mode` ignores it."""
        if self.alpha_mode == "OPAQUE":
            return np.ones(len(face))
        alpha = self._texels(face, weights)[:, 3]
        return alpha if self.alpha is None else alpha * (weights * self.alpha[self.faces[face]]).sum(1)

    def _texels(self, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """RGBA in [0, 1] of the textures at points on the surface, white where there are none."""
        rgba = np.ones((len(face), 4))
        if not self.textures:
            return rgba
        assert self.uv is not None and self.uv_faces is not None
        uv = np.einsum("nc,ncr->nr", weights, self.uv[self.uv_faces[face]])
        texture_of = np.zeros(len(self.faces), np.int64) if self.texture_of is None else self.texture_of
        wraps = self.wraps or (REPEATED,) * len(self.textures)
        for i, (texture, wrap) in enumerate(zip(self.textures, wraps, strict=True)):
            chosen = texture_of[face] == i
            inside = np.stack([wrapped(x, kind) for x, kind in zip(uv[chosen].T, wrap, strict=True)], axis=1)
            rgba[chosen, : texture.shape[2]] = sample_texture(texture, inside) / 255.0
        return rgba

    def corner_colors(self) -> Float[np.ndarray, "f 3 3"]:
        """sRGB colors in [0, 1] at the three corners of each face."""
        face = np.repeat(np.arange(len(self.faces)), 3)
        return self.colors(face, np.tile(np.eye(3), (len(self.faces), 1))).reshape(-1, 3, 3)

    def sample(self, count: int, seed: int = 0) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
        """`count` points spread evenly over the surface: faces and barycentric weights."""
        rng = np.random.default_rng(seed)
        draws = rng.random((3, count))
        draws[0] = (np.arange(count) + draws[0]) / count
        return sample_surface(self.vertices, self.faces, draws)

    def with_texture(
        self, texture: UInt8[np.ndarray, "_ _ _"], uv: Float[np.ndarray, "t 2"], uv_faces: Int[np.ndarray, "f 3"]
    ) -> Mesh:
        """The same surface, colored by this texture alone."""
        of_faces = dict(vertex_colors=None, alpha=None, texture_of=None, wraps=())
        return replace(self, uv=uv, uv_faces=uv_faces, textures=(texture,), **of_faces)

    def with_vertex_colors(self) -> Mesh:
        """The same surface without textures; each vertex has the mean color of its corners."""
        corners, count = self.faces.reshape(-1), np.bincount(self.faces.reshape(-1), minlength=len(self.vertices))
        face, weights = np.repeat(np.arange(len(self.faces)), 3), np.tile(np.eye(3), (len(self.faces), 1))
        total = np.zeros((len(self.vertices), 4))
        np.add.at(total, corners, np.c_[self.colors(face, weights), self.opacity(face, weights)])
        mean = total / count.clip(1)[:, None]
        bare = dict(uv=None, uv_faces=None, textures=(), texture_of=None, wraps=())
        alpha = None if self.alpha_mode == "OPAQUE" else mean[:, 3]
        return replace(self, vertex_colors=mean[:, :3], alpha=alpha, **bare)


@dataclass(frozen=True)
class Placement:
    """How a mesh in the unit of its file lies in the scene: scene = scale (point - center)."""

    center: Float[np.ndarray, 3]
    scale: float

    def to_scene(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Points of the file in world units of the scene."""
        return (points - self.center) * self.scale

    def to_file(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Points of the scene in the unit of the file."""
        return points / self.scale + self.center


def place(mesh: Mesh, radius: float = RADIUS) -> Placement:
    """Centers a mesh by its bounding box and fits it into the sphere of `radius` world units about the origin."""
    used = mesh.vertices[np.unique(mesh.faces)]
    center = used.min(0) / 2 + used.max(0) / 2
    return Placement(center, radius / float(np.linalg.norm(used - center, axis=1).max()))


def placed(mesh: Mesh, placement: Placement | None = None) -> Mesh:
    """The mesh in world units of the scene, by default with `place`."""
    return replace(mesh, vertices=(placement or place(mesh)).to_scene(mesh.vertices))


def joined(parts: Sequence[Mesh]) -> Mesh:
    """All parts as one mesh, in their order. Faces whose UV coordinates are not finite lose their texture.

    It has normals if all parts have finite ones. One alpha mode holds for all: the strongest of theirs, with the
    opacity of the other parts adapted. Double-sided is what is so in any part.

    Raises:
        ValueError: for no parts.
    """
    if not parts:
        raise ValueError("the mesh has no faces; a surface needs triangles, a point cloud has none")
    offsets = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    corners = np.cumsum([0] + [0 if part.uv is None else len(part.uv) for part in parts])
    modes = {part.alpha_mode for part in parts}
    mode: AlphaMode = "BLEND" if "BLEND" in modes else "MASK" if "MASK" in modes else "OPAQUE"
    cutoffs = {part.alpha_cutoff for part in parts if part.alpha_mode == "MASK"}
    cutoff = cutoffs.pop() if len(cutoffs) == 1 else 0.5
    parts = [_with_alpha(part, mode, cutoff) for part in parts]
    uv = uv_faces = texture_of = None
    keys: dict[tuple[int, tuple[Wrap, Wrap]], tuple[int, np.ndarray]] = {}  # parts share images
    if any(part.uv is not None for part in parts):
        # Parts without UV coordinates get a place outside of the texture, which `uv_problem` finds.
        uv = np.concatenate([*(part.uv for part in parts if part.uv is not None), np.full((1, 2), -1.0)])
        uv_faces = np.concatenate(
            [
                np.full(part.faces.shape, corners[-1]) if part.uv_faces is None else part.uv_faces + first
                for part, first in zip(parts, corners, strict=False)
            ]
        )
        texture_of = np.concatenate([_numbered(part, keys) for part in parts])
        finite = np.asarray(np.isfinite(uv).all(1))
        if lost := int((~finite[uv_faces].all(1)).sum()):
            warnings.warn(
                f"{lost} faces have UV coordinates that are not finite; their texture is left out", stacklevel=1
            )
            texture_of[~finite[uv_faces].all(1)] = -1
            uv[~finite] = -1.0
        uv = uv if (uv_faces == corners[-1]).any() else uv[:-1]
    colors = [np.ones_like(p.vertices) if p.vertex_colors is None else p.vertex_colors for p in parts]
    alpha = [np.ones(len(p.vertices)) if p.alpha is None else p.alpha for p in parts]
    if lost := sum(int((~np.isfinite(color).all(1)).sum()) for color in colors):
        warnings.warn(f"{lost} vertices have colors that are not finite; they are taken as white", stacklevel=1)
        colors = [np.where(np.isfinite(color).all(1, keepdims=True), color, 1.0) for color in colors]
    normals = [part.normals for part in parts if part.normals is not None and np.isfinite(part.normals).all()]
    return Mesh(
        vertices=np.concatenate([part.vertices for part in parts]),
        faces=np.concatenate([part.faces + first for part, first in zip(parts, offsets, strict=True)]),
        vertex_colors=None if all(np.allclose(color, 1) for color in colors) else np.concatenate(colors),
        normals=np.concatenate(normals) if len(normals) == len(parts) else None,
        uv=uv,
        uv_faces=uv_faces,
        textures=tuple(texture for _, texture in keys.values()),
        texture_of=texture_of if keys and texture_of is not None and texture_of.any() else None,
        wraps=tuple(wrap for _, wrap in keys),
        alpha=None if all((a == 1).all() for a in alpha) else np.concatenate(alpha),
        alpha_mode=mode,
        alpha_cutoff=cutoff,
        double_sided=any(part.double_sided for part in parts),
    )


def _numbered(part: Mesh, keys: dict[tuple[int, tuple[Wrap, Wrap]], tuple[int, np.ndarray]]) -> np.ndarray:
    """`texture_of` of a part with the numbers of the joined mesh; new textures are added to `keys`."""
    if not part.textures:
        return np.full(len(part.faces), -1)
    wraps = part.wraps or (REPEATED,) * len(part.textures)
    entries = zip(part.textures, wraps, strict=True)
    number = np.array([keys.setdefault((id(t), wrap), (len(keys), t))[0] for t, wrap in entries] + [-1])
    return number[np.zeros(len(part.faces), np.int64) if part.texture_of is None else part.texture_of]


def _with_alpha(part: Mesh, mode: AlphaMode, cutoff: float) -> Mesh:
    """A part of the same look under another alpha mode."""
    if mode == part.alpha_mode and (mode != "MASK" or part.alpha_cutoff == cutoff):
        return part
    if part.alpha_mode == "OPAQUE":
        textures = tuple(np.ascontiguousarray(t[:, :, :3]) if t.shape[2] == 4 else t for t in part.textures)
        return replace(part, alpha=None, textures=textures, alpha_mode=mode, alpha_cutoff=cutoff)
    # A mask keeps its outline: opacity is shifted so that the part's cutoff falls on the new one.
    factor = cutoff / max(part.alpha_cutoff, 1e-6)
    alpha = np.ones(len(part.vertices)) if part.alpha is None else part.alpha
    return replace(part, alpha=alpha * factor, alpha_mode=mode, alpha_cutoff=cutoff)


def wrapped(x: Float[np.ndarray, " n"], wrap: Wrap) -> Float[np.ndarray, " n"]:
    """Texture coordinates along one axis in [0, 1]; what lies there already keeps its place."""
    if wrap == "clamp":
        return x.clip(0, 1)
    outside = (x < 0) | (x > 1)
    return np.where(outside, x % 1.0 if wrap == "repeat" else 1 - np.abs(x % 2.0 - 1), x)


def srgb_to_linear(color: np.ndarray) -> np.ndarray:
    """Light intensity in [0, 1] of sRGB-encoded values in [0, 1] (IEC 61966-2-1)."""
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(color: np.ndarray) -> np.ndarray:
    """sRGB-encoded values in [0, 1] of light intensity, which is clipped to [0, 1]; inverts `srgb_to_linear`."""
    color = np.clip(color, 0, 1)
    return np.where(color <= 0.0031308, 12.92 * color, 1.055 * color ** (1 / 2.4) - 0.055)


def resized(mesh: Mesh, size: float | None = None, pivot: Literal["center", "bottom"] | None = None) -> Mesh:
    """The mesh with its longest side `size` long, and its center or the middle of its bottom at the origin.

    Without a pivot it is scaled about the origin; without both it is the same mesh.
    """
    used = mesh.vertices[np.unique(mesh.faces)]
    low, high = used.min(0), used.max(0)
    origin = np.zeros(3) if pivot is None else low / 2 + high / 2
    if pivot == "bottom":
        origin[2] = low[2]
    scale = 1.0 if size is None else size / float((high - low).max())
    return replace(mesh, vertices=(mesh.vertices - origin) * scale)


def rotated(mesh: Mesh, degrees: float) -> Mesh:
    """The mesh turned about the vertical axis, counter-clockwise as seen from above."""
    turn = rotation_about_z(degrees).T
    return replace(mesh, vertices=mesh.vertices @ turn, normals=None if mesh.normals is None else mesh.normals @ turn)


def rotation_about_z(degrees: float) -> Float[np.ndarray, "3 3"]:
    """The matrix of a turn, counter-clockwise as seen from above."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def weld(
    vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"]
) -> tuple[Float[np.ndarray, "w 3"], Int[np.ndarray, "f 3"]]:
    """Merges vertices with equal coordinates, which files split at seams. Returns vertices and faces."""
    merged, index = np.unique(vertices, axis=0, return_inverse=True)
    return merged, index.reshape(-1)[faces]


def faces_per_edge(mesh: Mesh) -> Int[np.ndarray, " e"]:
    """How many faces meet at each edge of the welded mesh; a closed surface has two at every edge."""
    _, faces = weld(mesh.vertices, mesh.faces)
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return np.unique(edges, axis=0, return_counts=True)[1]


def surface_area(vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, " f"]:
    """The area of each face."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def sample_surface(
    vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"], draws: Float[np.ndarray, "3 n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
    """Maps uniform numbers in [0, 1) to points that are uniform by area on a surface.

    Args:
        draws: the first row chooses the face along the cumulative area, the others the point inside it. Evenly spaced
            numbers in the first row give each face its fraction of the points, plus or minus one.

    Returns:
        faces and barycentric weights.
    """
    area = surface_area(vertices, faces)
    face = np.searchsorted(area.cumsum(), draws[0] * area.sum())
    u, v = np.sqrt(draws[1]), draws[2]
    return face.clip(0, len(area) - 1), np.stack((1 - u, u * (1 - v), u * v), axis=1)


def sample_texture(texture: np.ndarray, uv: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n c"]:
    """Bilinear samples of a texture [H, W, C] in its own unit; beyond the edges the outermost texels continue."""
    height, width = texture.shape[:2]
    x = (uv[:, 0] * width - 0.5).clip(0, width - 1)
    y = ((1 - uv[:, 1]) * height - 0.5).clip(0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    upper = texture[top, left] * (1 - fx) + texture[top, right] * fx
    return upper * (1 - fy) + (texture[bottom, left] * (1 - fx) + texture[bottom, right] * fx) * fy
