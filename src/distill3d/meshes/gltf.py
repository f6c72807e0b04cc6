"""glTF 2.0 and GLB files, read after the specification of Khronos: what a viewer shows first, in the file's axes.

That is the default scene with its transforms, instances, skins and morph weights, and of the materials the base color
and the opacity. What cannot be read is refused, and what is left out is named in a warning.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from distill3d.meshes.gltf_file import MESHOPT, GltfFile, Json, decoder, fractions_of, open_gltf
from distill3d.meshes.images import read_image
from distill3d.meshes.mesh import AlphaMode, Mesh, Wrap, check_count, linear_to_srgb, srgb_to_linear
from distill3d.untrusted import MOST_PIXELS

WRAPS: dict[int, Wrap] = {10497: "repeat", 33071: "clamp", 33648: "mirror"}
TRIANGLES, STRIP, FAN = 4, 5, 6
DRACO, SPECULAR = "KHR_draco_mesh_compression", "KHR_materials_pbrSpecularGlossiness"
FORMATS = ("PNG", "JPEG", "WEBP")  # what glTF and its extension allow; other decoders stay out of reach
IMAGE_KINDS = ("EXT_texture_webp", "EXT_texture_avif", "MSFT_texture_dds", "KHR_texture_basisu")
INSTANCES, TRANSFORM = "EXT_mesh_gpu_instancing", "KHR_texture_transform"
READ = {
    DRACO,
    SPECULAR,
    INSTANCES,
    TRANSFORM,
    *MESHOPT,
    *IMAGE_KINDS,
    "KHR_mesh_quantization",
    "KHR_node_visibility",
}
# Extensions that do not touch geometry, base color or opacity.
NEUTRAL = {f"KHR_materials_{name}" for name in ("anisotropy", "clearcoat", "dispersion", "ior", "iridescence")} | {
    *(f"KHR_materials_{name}" for name in ("emissive_strength", "sheen", "specular", "unlit", "variants")),
    *("KHR_animation_pointer", "KHR_lights_punctual", "KHR_node_hoverability", "KHR_node_selectability"),
    *("KHR_xmp", "KHR_xmp_json_ld", "EXT_lights_image_based", "EXT_lights_ies", "KHR_audio_emitter", "MSFT_lod"),
}


def read_gltf(path: Path) -> list[Mesh]:
    """The primitives that have faces, in the order of the scene's nodes.

    Raises:
        ValueError: if the file is damaged, or needs something that cannot be read.
    """
    try:
        return list(_Scene(open_gltf(path)).parts())
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"this file cannot be read as a mesh, is it damaged? {what}") from error


class _Texture(NamedTuple):
    """A texture that a material uses; coordinates [u, v, 1] are multiplied by `transform` [2, 3]."""

    image: int
    wrap: tuple[Wrap, Wrap]
    uv: str  # the attribute
    transform: np.ndarray


class _Material(NamedTuple):
    factor: np.ndarray = np.ones(4)  # linear RGBA
    texture: _Texture | None = None
    alpha_mode: AlphaMode = "OPAQUE"
    alpha_cutoff: float = 0.5
    double_sided: bool = False


@dataclass
class _Scene:
    """What a file shows; images are read once."""

    file: GltfFile
    images: dict[int, np.ndarray | None] = field(default_factory=dict)
    tinted: dict[tuple[int, bytes, bool], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.document, self.name = self.file.document, self.file.path.name

    def parts(self) -> Iterator[Mesh]:
        """The primitives that have faces, where the scene has them."""
        self._check_extensions()
        worlds, order = self._worlds()
        nodes, meshes, omitted = self.document.get("nodes", []), self.document.get("meshes", []), 0
        total = 0
        for number in order:
            node = nodes[number]
            if "mesh" not in node:
                continue
            mesh = meshes[node["mesh"]]
            weights = node.get("weights", mesh.get("weights", []))
            for primitive in mesh["primitives"]:
                if primitive.get("mode", TRIANGLES) not in (TRIANGLES, STRIP, FAN):
                    omitted += 1
                    continue
                attributes, faces = self._geometry(primitive, weights)
                if not len(faces):
                    continue
                part = self._painted(attributes, faces, self._material(primitive.get("material")))
                if "skin" in node:
                    yield _moved(part, self._pose(node["skin"], attributes, worlds))
                    continue
                for local in self._instances(node):
                    check_count("faces", total := total + len(faces))
                    yield _moved(part, worlds[number] @ local)
        if omitted:
            warnings.warn(f"{self.name}: {omitted} primitives of points or lines are left out", stacklevel=1)

    def _check_extensions(self) -> None:
        unknown = sorted(set(self.document.get("extensionsRequired", [])) - READ - NEUTRAL)
        unknown = [name for name in unknown if not name.startswith("KHR_materials_")]  # the shape is there all the same
        if unknown:
            raise ValueError(f"the file requires {', '.join(unknown)}, which cannot be read")
        ignored = sorted(set(self.document.get("extensionsUsed", [])) - READ - NEUTRAL)
        if ignored:
            warnings.warn(f"{self.name}: {', '.join(ignored)} is ignored", stacklevel=1)
        glowing = [m for m in self.document.get("materials", []) if any(m.get("emissiveFactor", ()))]
        if glowing:
            warnings.warn(f"{self.name}: the light that {len(glowing)} materials emit is ignored", stacklevel=1)

    # Nodes.

    def _worlds(self) -> tuple[dict[int, np.ndarray], list[int]]:
        """World matrices [4, 4] of all nodes, and the nodes of the default scene that are visible, parents first."""
        nodes = self.document.get("nodes", [])
        children = {child for node in nodes for child in node.get("children", [])}
        roots = [i for i in range(len(nodes)) if i not in children]
        worlds = {i: world for i, world, _ in self._walk(roots)}
        scenes = self.document.get("scenes", [])
        if scenes:
            roots = scenes[self.document.get("scene", 0)].get("nodes", [])
        order = [i for i, _, visible in self._walk(roots) if visible]
        if len(set(order)) != len(order) or not worlds.keys() >= set(order):
            raise ValueError("the nodes of the glTF file do not form a tree")
        return worlds, order

    def _walk(self, roots: list[int]) -> Iterator[tuple[int, np.ndarray, bool]]:
        nodes, steps = self.document.get("nodes", []), 0
        stack = [(root, np.eye(4), True) for root in reversed(roots)]
        while stack:
            number, parent, visible = stack.pop()
            node, steps = nodes[number], steps + 1
            if steps > len(nodes):
                raise ValueError("the nodes of the glTF file do not form a tree")
            world = parent @ _matrix(node)
            visible = visible and node.get("extensions", {}).get("KHR_node_visibility", {}).get("visible", True)
            yield number, world, visible
            stack += [(child, world, visible) for child in reversed(node.get("children", []))]

    def _instances(self, node: Json) -> list[np.ndarray]:
        """Matrices [4, 4] of the instances of a node; without instancing it is one."""
        found = node.get("extensions", {}).get(INSTANCES, {}).get("attributes", {})
        values = {name: self.file.accessor(number) for name, number in found.items() if name in INSTANCE_KEYS}
        if not values:
            return [np.eye(4)]
        count = min(map(len, values.values()))
        return [_matrix({INSTANCE_KEYS[name]: value[i] for name, value in values.items()}) for i in range(count)]

    def _pose(self, number: int, attributes: dict[str, np.ndarray], worlds: dict[int, np.ndarray]) -> np.ndarray:
        """Matrices [V, 4, 4] of the vertices of a skinned mesh; the node's own transform does not count."""
        skin = self.document["skins"][number]
        joints = np.stack([worlds[joint] for joint in skin["joints"]])
        if "inverseBindMatrices" in skin:
            inverse = self.file.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).swapaxes(1, 2)  # by columns
            joints = joints @ inverse[: len(joints)]
        count = len(attributes["POSITION"])
        pose, total = np.zeros((count, 4, 4)), np.zeros(count)
        for name in sorted(name for name in attributes if name.startswith("JOINTS_")):
            indices, weights = attributes[name].astype(int), attributes[name.replace("JOINTS", "WEIGHTS")]
            total += weights.sum(1)
            for column in range(indices.shape[1]):
                pose += weights[:, column, None, None] * joints[indices[:, column]]
        bound = total > 1e-6
        return np.where(bound[:, None, None], pose / np.where(bound, total, 1)[:, None, None], joints[0])

    # Geometry.

    def _geometry(self, primitive: Json, weights: list[float]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Attributes [V, ...] with morph targets added, and faces [F, 3]."""
        mode, draco = primitive.get("mode", TRIANGLES), primitive.get("extensions", {}).get(DRACO)
        given, attributes, faces = primitive["attributes"], {}, None
        if draco is not None and (decoder("DracoPy") or not self._has_data(given["POSITION"])):
            attributes, faces = self._draco(draco, given)
        for name, number in given.items():
            if name not in attributes and name.split("_")[0] in ATTRIBUTES:
                attributes[name] = self.file.accessor(number, fractions=name.startswith("COLOR"))
        count = len(attributes["POSITION"])
        for name, value in attributes.items():
            if len(value) != count:
                raise ValueError(f"the attributes of a glTF mesh differ in length: {name} {len(value)}, not {count}")
        for weight, target in zip(weights, primitive.get("targets", []), strict=False):
            for name in target.keys() & attributes.keys():
                attributes[name] = attributes[name] + weight * self.file.accessor(target[name])
        if faces is None:
            index = np.arange(count)
            if "indices" in primitive:
                index = self.file.accessor(primitive["indices"])[:, 0].astype(np.int64)
            faces = _triangles(index, mode)
        if len(faces) and faces.max() >= count:
            raise ValueError(f"faces must be indices from 0 to {count - 1} into vertices, got up to {faces.max()}")
        return attributes, faces

    def _has_data(self, accessor: int) -> bool:
        return bool(self.document["accessors"][accessor].keys() & {"bufferView", "sparse"})

    def _draco(self, draco: Json, given: dict[str, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        module = decoder("DracoPy")
        if module is None:
            raise ValueError(f"the mesh is compressed with Draco ({DRACO}); to read it: pip install DracoPy")
        try:
            mesh = module.decode(self.file.view(draco["bufferView"]))
        except Exception as error:  # the decoder has errors of its own
            raise ValueError(f"the mesh is compressed with Draco ({DRACO}) and cannot be decoded: {error}") from error
        found = {attribute["unique_id"]: np.asarray(attribute["data"]) for attribute in mesh.attributes}
        accessors, count = self.document["accessors"], len(mesh.points)
        attributes = {
            name: fractions_of(
                found[number].reshape(count, -1),
                name.startswith("COLOR") or accessors[given[name]].get("normalized", False),
            )
            for name, number in draco["attributes"].items()
        }
        return attributes, np.asarray(mesh.faces, np.int64).reshape(-1, 3)

    # Materials.

    def _material(self, number: int | None) -> _Material:
        if number is None:
            return _Material()
        entry = self.document["materials"][number]
        base, factor, texture = entry.get("pbrMetallicRoughness", {}), "baseColorFactor", "baseColorTexture"
        if SPECULAR in entry.get("extensions", {}):
            base, factor, texture = entry["extensions"][SPECULAR], "diffuseFactor", "diffuseTexture"
        mode = entry.get("alphaMode", "OPAQUE")
        if mode not in ("OPAQUE", "MASK", "BLEND"):
            raise ValueError(f"alphaMode must be OPAQUE, MASK or BLEND, got {mode!r}")
        return _Material(
            factor=np.array(base.get(factor, [1.0] * 4), np.float64),
            texture=self._texture(base[texture]) if texture in base else None,
            alpha_mode=mode,
            alpha_cutoff=float(entry.get("alphaCutoff", 0.5)),
            double_sided=bool(entry.get("doubleSided", False)),
        )

    def _texture(self, info: Json) -> _Texture | None:
        """The texture, with the first of its images that can be decoded; None if there is none."""
        entry = self.document["textures"][info["index"]]
        others = [entry.get("extensions", {}).get(name, {}).get("source") for name in IMAGE_KINDS]
        sources = [source for source in (entry.get("source"), *others) if source is not None]
        image = next((source for source in sources if self._image(source) is not None), None)
        if image is None:
            return None
        sampler = self.document["samplers"][entry["sampler"]] if "sampler" in entry else {}
        change = info.get("extensions", {}).get(TRANSFORM, {})
        (x, y), turn, (sx, sy) = change.get("offset", (0, 0)), change.get("rotation", 0), change.get("scale", (1, 1))
        c, s = np.cos(turn), np.sin(turn)
        return _Texture(
            image=image,
            wrap=(WRAPS[sampler.get("wrapS", 10497)], WRAPS[sampler.get("wrapT", 10497)]),
            uv=f"TEXCOORD_{change.get('texCoord', info.get('texCoord', 0))}",
            transform=np.array([[c * sx, s * sy, x], [-s * sx, c * sy, y]]),
        )

    def _image(self, number: int) -> np.ndarray | None:
        """A image [H, W, 3 or 4] uint8 in sRGB; None, with a warning, if it cannot be read."""
        if number not in self.images:
            entry = self.document["images"][number]
            name = entry.get("uri", entry.get("name", f"image {number}"))
            name = f"image {number}" if name.startswith("data:") else unquote(name)
            try:
                data = self.file.resource(entry["uri"]) if "uri" in entry else self.file.view(entry["bufferView"])
                left = 4 * MOST_PIXELS - sum(image[..., 0].size for image in self.images.values() if image is not None)
                self.images[number] = read_image(io.BytesIO(data), FORMATS, min(left, MOST_PIXELS))
            except (ValueError, OSError) as error:
                self.images[number] = None
                kind = entry.get("mimeType", "")
                warnings.warn(f"{self.name}: the image {name!r} {kind} is left out: {error}", stacklevel=1)
        return self.images[number]

    def _tinted(self, number: int, factor: np.ndarray, alpha: bool) -> np.ndarray:
        """A image times a linear factor (RGBA), with its opacity or without."""
        key = (number, factor.tobytes(), alpha)
        if key not in self.tinted:
            image = self.images[number]
            assert image is not None
            self.tinted[key] = _times(
                image if alpha else image[:, :, :3], factor if alpha else np.append(factor[:3], 1)
            )
        return self.tinted[key]

    def _painted(self, attributes: dict[str, np.ndarray], faces: np.ndarray, material: _Material) -> Mesh:
        """A primitive in its own place with its colors."""
        vertices, texture, opaque = attributes["POSITION"], material.texture, material.alpha_mode == "OPAQUE"
        color = attributes.get("COLOR_0", np.ones((1, 4)))
        if color.shape[1] == 3:
            color = np.insert(color, 3, 1.0, axis=1)
        more: dict[str, Any] = {}
        if texture is not None and texture.uv in attributes:
            uv = np.insert(attributes[texture.uv], 2, 1.0, axis=1) @ texture.transform.T
            image = self._tinted(texture.image, material.factor, not opaque)
            more = {"textures": (image,), "wraps": (texture.wrap,)}
        else:
            uv, color = attributes.get("TEXCOORD_0"), color * material.factor
            if texture is not None:
                warnings.warn(f"{self.name}: a texture is left out, for there is no {texture.uv}", stacklevel=1)
        if uv is not None:
            more |= {"uv": np.stack((uv[:, 0], 1 - uv[:, 1]), axis=1), "uv_faces": faces}
        color = np.broadcast_to(color, (len(vertices), 4))
        return Mesh(
            vertices,
            faces,
            vertex_colors=linear_to_srgb(color[:, :3]),
            normals=attributes.get("NORMAL"),
            alpha=None if opaque else color[:, 3].clip(0, 1),
            alpha_mode=material.alpha_mode,
            alpha_cutoff=material.alpha_cutoff,
            double_sided=material.double_sided,
            **more,
        )


ATTRIBUTES = ("POSITION", "NORMAL", "TEXCOORD", "COLOR", "JOINTS", "WEIGHTS")
INSTANCE_KEYS = {"TRANSLATION": "translation", "ROTATION": "rotation", "SCALE": "scale"}


def _matrix(node: Json) -> np.ndarray:
    """The transform [4, 4] of a node: its matrix, given by columns, or translation, rotation (xyzw) and scale."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    matrix = np.eye(4)
    if "rotation" in node:
        q = np.array(node["rotation"], np.float64)
        x, y, z, w = q / max(np.linalg.norm(q), 1e-12)
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    matrix[:3, :3] *= np.array(node.get("scale", [1.0] * 3), np.float64)
    matrix[:3, 3] = node.get("translation", [0.0] * 3)
    return matrix


def _moved(part: Mesh, matrix: np.ndarray) -> Mesh:
    """A part under an affine map [4, 4], or one for each of its vertices [V, 4, 4]; a mirror turns the faces."""
    linear = matrix[..., :3, :3]
    vertices = np.einsum("...ij,...j->...i", linear, part.vertices) + matrix[..., :3, 3]
    first, second, third = np.moveaxis(linear, -1, 0)
    determinant = (first * np.cross(second, third)).sum(-1)
    normals, mirrored = part.normals, bool(np.median(determinant) < 0)
    if normals is not None:
        # The inverse transpose is the matrix of cofactors over the determinant.
        cofactors = np.stack((np.cross(second, third), np.cross(third, first), np.cross(first, second)), axis=-1)
        normals = np.einsum("...ij,...j->...i", cofactors, normals) * np.where(determinant < 0, -1, 1)[..., None]
        length = np.linalg.norm(normals, axis=1, keepdims=True)
        normals = normals / np.where(length > 0, length, 1)
    turned = [faces if faces is None or not mirrored else faces[:, ::-1] for faces in (part.faces, part.uv_faces)]
    values = {**vars(part), "vertices": vertices, "faces": turned[0], "uv_faces": turned[1], "normals": normals}
    return Mesh(**values)


def _triangles(index: np.ndarray, mode: int) -> np.ndarray:
    """Faces [F, 3] of the indices [N] of a list, strip or fan; a strip's faces without area join its pieces."""
    if mode == TRIANGLES:
        return index[: len(index) // 3 * 3].reshape(-1, 3)
    if len(index) < 3:
        return np.zeros((0, 3), np.int64)
    number = np.arange(len(index) - 2)
    if mode == FAN:
        return np.stack((index[1:-1], index[2:], np.broadcast_to(index[0], len(number))), axis=1)
    odd = number % 2
    faces = np.stack((index[number], index[number + 1 + odd], index[number + 2 - odd]), axis=1)
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)]


def _times(image: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """A image [H, W, C] in sRGB times a linear factor (RGBA)."""
    if (factor == 1).all():
        return image
    value = np.arange(256) / 255
    tables = [linear_to_srgb(srgb_to_linear(value) * f) for f in factor[:3]] + [(value * factor[3]).clip(0, 1)]
    channels = [
        (255 * table).round().astype(np.uint8)[image[:, :, i]] for i, table in enumerate(tables[: image.shape[2]])
    ]
    if image.shape[2] == 3 and factor[3] != 1:
        channels.append(np.full(image.shape[:2], round(255 * float(factor[3].clip(0, 1))), np.uint8))
    return np.stack(channels, axis=-1)
