"""Wavefront OBJ files with their materials, in the file's axes and colors."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill3d.meshes.images import find_file, read_image
from distill3d.meshes.mesh import Mesh, Wrap, joined
from distill3d.meshes.polygons import triangulate

OMITTED = {"l": "lines", "p": "points", "curv": "curves", "curv2": "curves", "surf": "free-form surfaces"}
# Options of a map and the most values that follow each.
OPTIONS = {"-blendu": 1, "-blendv": 1, "-boost": 1, "-bm": 1, "-cc": 1, "-clamp": 1, "-imfchan": 1, "-mm": 2, "-o": 3}
OPTIONS |= {"-s": 3, "-t": 3, "-texres": 1, "-type": 1, "-colorspace": 1}
VERTICES = {"v": 0, "vt": 1, "vn": 2}


@dataclass
class _Material:
    color: tuple[float, ...] = (1.0, 1.0, 1.0)  # Kd, beside a image without meaning
    opacity: float = 1.0
    image: np.ndarray | None = None
    file: Path | None = None  # of the image
    mask: str = ""  # a image of the opacity
    wrap: Wrap = "repeat"
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Lines:
    """What stands in a file: values of v, vt and vn, and polygons with the index of each corner into these."""

    values: tuple[list[list[str]], list[list[str]], list[list[str]]] = field(default_factory=lambda: ([], [], []))
    polygons: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)
    material: list[str] = field(default_factory=list)  # of each polygon
    libraries: list[str] = field(default_factory=list)
    omitted: set[str] = field(default_factory=set)


def read_obj(path: Path) -> Mesh:
    """The faces of an OBJ file in their order.

    A vertex with several normals or materials becomes several. Images that are missing, and what is no surface, are
    named in a warning.

    Raises:
        ValueError: if it is damaged or has no faces.
    """
    lines = _read_lines(path)
    if lines.omitted:
        warnings.warn(f"{path.name}: {', '.join(sorted(lines.omitted))} are left out", stacklevel=1)
    if not lines.polygons:
        raise ValueError("the mesh has no faces; a surface needs triangles, a point cloud has none")
    vertices, uv, normals = (_table(rows, name) for rows, name in zip(lines.values, VERTICES, strict=True))
    xyz, colors = vertices[:, :3], None
    if vertices.shape[1] >= 6:  # x y z r g b, or x y z w r g b
        colors = vertices[:, -3:] / (255 if vertices[:, -3:].max() > 1 else 1)
    faces, source, corner = triangulate(xyz, [polygon[0] for polygon in lines.polygons])
    uv_faces, normal_faces = (_corners(lines.polygons, kind, source, corner) for kind in (1, 2))
    if faces.max() >= len(xyz):
        number = faces.max() + 1
        raise ValueError(f"this file cannot be read as a mesh: it has {len(xyz)} vertices, a face has number {number}")
    for index, table, what in ((uv_faces, uv, "texture coordinates"), (normal_faces, normals, "normals")):
        if (lost := index >= len(table)).any():
            warnings.warn(f"{path.name}: {int(lost.any(1).sum())} faces name {what} that are not there", stacklevel=1)
            index[lost] = -1
    materials = _materials(path, lines.libraries)
    names = np.array(lines.material, object)[source]
    if missing := sorted({name for name in set(lines.material) if name and name not in materials}):
        warnings.warn(f"{path.name}: no material file has {', '.join(map(repr, missing))}", stacklevel=1)
    parts, order = [], []
    for name in dict.fromkeys(lines.material):
        chosen = np.flatnonzero(names == name)
        if len(chosen):
            order.append(chosen)
            given = (xyz, colors, normals, uv)
            parts.append(_part(given, faces[chosen], uv_faces[chosen], normal_faces[chosen], materials.get(name)))
    mesh, back = joined(parts), np.argsort(np.concatenate(order))
    names = ("faces", "uv_faces", "texture_of")
    per_face = {name: value[back] for name in names if (value := getattr(mesh, name)) is not None}
    return replace(mesh, **per_face)


def _part(
    given: tuple, faces: np.ndarray, uv_faces: np.ndarray, normal_faces: np.ndarray, material: _Material | None
) -> Mesh:
    """The faces of one material."""
    vertices, colors, normals, uv = given
    material = material or _Material()
    smooth = (normal_faces >= 0).all()
    pair = np.stack((faces.reshape(-1), normal_faces.reshape(-1) if smooth else faces.reshape(-1)), axis=1)
    kept, index = np.unique(pair, axis=0, return_inverse=True)
    more: dict[str, Any] = {}
    if (uv_faces >= 0).any():
        places = np.concatenate((uv[:, :2] * material.scale + material.offset, [[-1.0, -1.0]]))  # the last is no place
        more = {"uv": places, "uv_faces": np.where(uv_faces < 0, len(uv), uv_faces)}
        if material.image is not None:
            more |= {"textures": (material.image,), "wraps": ((material.wrap,) * 2,)}
            more["texture_of"] = np.where((uv_faces >= 0).all(1), 0, -1)
    color = np.ones((len(kept), 3)) if colors is None else colors[kept[:, 0]]
    translucent = material.opacity < 1 or (material.image is not None and material.image.shape[2] == 4)
    return Mesh(
        vertices[kept[:, 0]],
        index.reshape(-1, 3),
        vertex_colors=color if material.image is not None else color * material.color,
        normals=normals[kept[:, 1], :3] if smooth else None,
        alpha=np.full(len(kept), material.opacity) if translucent else None,
        alpha_mode="BLEND" if translucent else "OPAQUE",
        **more,
    )


def _corners(polygons: list, kind: int, source: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Indices [F, 3] of one kind at the corners of the triangles; -1 where there are none."""
    flat = [polygon[kind] or [-1] * len(polygon[0]) for polygon in polygons]
    first = np.cumsum([0] + [len(row) for row in flat[:-1]])
    return np.array([index for row in flat for index in row], np.int64)[first[source][:, None] + corner]


def _table(rows: list[list[str]], name: str) -> np.ndarray:
    """Values [N, C] as float64; missing ones at the end of a row are 0, or for colors 1."""
    width, least = max(map(len, rows), default=2), 1 if name == "vt" else 3
    if any(len(row) < least for row in rows):
        raise ValueError(f"this file cannot be read as a mesh: a line {name!r} has less than {least} numbers")
    fill = "1" if name == "v" else "0"
    try:
        table = np.array([row + [fill] * (width - len(row)) for row in rows], np.float64)
    except ValueError as error:
        raise ValueError(f"this file cannot be read as a mesh: {error}") from error
    return np.insert(table, 1, 0.0, axis=1) if name == "vt" and width == 1 else table.reshape(-1, width)


def _statements(path: Path) -> Iterator[list[str]]:
    """The words of each line, without comments; a backslash at its end continues a line."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    for line in re.sub(r"\\[ \t]*\r?\n", " ", text).splitlines():
        words = re.sub(r"(^|\s)#.*", "", line).split(maxsplit=1)
        if words:
            yield [*words, ""] if len(words) == 1 else words


def _read_lines(path: Path) -> _Lines:
    lines, name = _Lines(), ""
    for number, (key, rest) in enumerate(_statements(path), 1):
        if key in VERTICES:
            lines.values[VERTICES[key]].append(rest.split())
        elif key in ("f", "fo"):
            words = rest.split()
            try:
                polygon = _polygon(words, [len(rows) for rows in lines.values])
            except (ValueError, IndexError) as error:
                raise ValueError(f"this file cannot be read as a mesh: face {rest!r} ({error})") from error
            if len(words) < 3:
                lines.omitted.add("faces of less than three corners")
                continue
            lines.polygons.append(polygon)
            lines.material.append(name)
        elif key == "usemtl":
            name = rest.strip()
        elif key == "mtllib":
            lines.libraries.append(rest.strip())
        elif key in OMITTED:
            lines.omitted.add(OMITTED[key])
        elif number == 1 and not key.isascii():
            raise ValueError("this is not an OBJ file, although its name ends in .obj")
    return lines


def _polygon(words: list[str], counts: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Indices from 0 of the corners "v", "v/vt", "v//vn" or "v/vt/vn"; negative ones count from the last line above."""
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for word in words:
        for kind, text in enumerate(word.split("/")):
            if text:
                index = int(text)
                if index == 0 or index < -counts[kind]:
                    raise ValueError(f"there is no index {index}")
                found[kind].append(index - 1 if index > 0 else counts[kind] + index)
    v, vt, vn = found
    # A face has all texture coordinates, and all normals, or none.
    return v, vt if len(vt) == len(v) else [], vn if len(vn) == len(v) else []


def _materials(path: Path, libraries: list[str]) -> dict[str, _Material]:
    """The materials of all libraries that a file names, by name."""
    materials: dict[str, _Material] = {}
    images: dict[Path, np.ndarray | None] = {}
    for line in dict.fromkeys(libraries):
        whole = find_file(path.parent, line)
        for name in [line] if whole else _words(line):
            if library := whole or find_file(path.parent, name):
                for material, value in _read_library(library, images).items():
                    materials.setdefault(material, value)
            else:
                warnings.warn(f"{path.name}: there is no material file {name!r}", stacklevel=1)
    return materials


def _read_library(path: Path, images: dict[Path, np.ndarray | None]) -> dict[str, _Material]:
    materials: dict[str, _Material] = {}
    material = _Material()
    for key, rest in _statements(path):
        lower = key.lower()
        try:
            if lower == "newmtl":
                material = materials[rest.strip()] = _Material()
            elif lower == "kd" and rest.split()[0] not in ("spectral", "xyz"):
                material.color = tuple((list(map(float, rest.split())) * 3)[:3])
            elif lower in ("d", "tr"):
                value = float(rest.split()[-1])
                value = value if lower == "d" else 1 - value
                material.opacity = (
                    value if 0 < value < 1 else 1.0
                )  # some write the opposite: nothing is quite invisible
            elif lower == "map_d":
                material.mask = rest.strip()
            elif lower == "map_kd":
                _add_image(material, path, rest, images)
        except (ValueError, IndexError):
            warnings.warn(f"{path.name}: the line {key} {rest.strip()!r} cannot be read", stacklevel=1)
    for material in materials.values():
        if material.mask and (material.file is None or find_file(path.parent, material.mask) != material.file):
            warnings.warn(f"{path.name}: the opacity in {material.mask!r} is left out", stacklevel=1)
            material.mask = ""
        if material.image is not None and not material.mask:  # many images carry something else there
            material.image = material.image[:, :, :3]
    return materials


def _add_image(material: _Material, path: Path, rest: str, images: dict[Path, np.ndarray | None]) -> None:
    """Reads a line such as "-s 2 2 1 -clamp on my image.png"."""
    words, at = rest.split(), 0
    while at < len(words) and words[at].lower() in OPTIONS:
        option, most, values = words[at].lower(), OPTIONS[words[at].lower()], []
        at += 1
        while at < len(words) - 1 and len(values) < most and (most == 1 or _is_number(words[at])):
            values.append(words[at])
            at += 1
        numbers = [float(value) for value in values if _is_number(value)]
        if option == "-clamp":
            material.wrap = "clamp" if values == ["on"] else "repeat"
        elif option == "-s" and numbers:
            material.scale = (numbers[0], numbers[1] if len(numbers) > 1 else 1.0)
        elif option == "-o" and numbers:
            material.offset = (numbers[0], numbers[1] if len(numbers) > 1 else 0.0)
        elif option == "-mm" and numbers[:2] not in ([0.0], [0.0, 1.0]):
            warnings.warn(f"{path.name}: the option -mm of a image is ignored", stacklevel=1)
    name = rest.split(maxsplit=at)[at].strip()
    file = find_file(path.parent, name)
    if file is None:
        warnings.warn(f"{path.name}: there is no image {name!r}", stacklevel=1)
        return
    if file not in images:
        try:
            images[file] = read_image(file)
        except ValueError as error:
            images[file] = None
            warnings.warn(f"{path.name}: the image {name!r} is left out: {error}", stacklevel=1)
    material.image, material.file = images[file], file


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _words(line: str) -> list[str]:
    """Words with quotes as in a shell."""
    try:
        return shlex.split(line.replace("\\", "/"))
    except ValueError:
        return line.split()
