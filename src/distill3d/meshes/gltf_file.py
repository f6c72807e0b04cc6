"""The container of glTF 2.0: JSON, buffers, their compression by meshopt, and accessors."""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from distill3d.meshes.mesh import check_count

TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")
Json = dict[str, Any]


def open_gltf(path: Path) -> GltfFile:
    """Opens a .glb or .gltf file.

    Raises:
        ValueError: if it is cut short, or no glTF 2.
    """
    data, binary = path.read_bytes(), b""
    if data[:4] == b"glTF":
        version, length = struct.unpack_from("<II", data, 4)
        if version != 2:
            raise ValueError(f"this is a file of glTF {version}; only glTF 2 is read")
        if length > len(data):
            raise ValueError(f"this file cannot be read as a mesh: it is cut short, {len(data)} of {length} bytes")
        at, chunks = 12, {}
        while at + 8 <= length:
            size, kind = struct.unpack_from("<I4s", data, at)
            chunks.setdefault(kind, data[at + 8 : at + 8 + size])
            at += 8 + size
        data, binary = chunks.get(b"JSON", b""), chunks.get(b"BIN\0", b"")
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"this is not a glTF file: {error}") from error
    version = str(document.get("asset", {}).get("version", ""))
    if version.split(".")[0] != "2":
        raise ValueError(f"this is a file of glTF {version or 'without version'}; only glTF 2 is read")
    return GltfFile(path, document, binary)


@dataclass
class GltfFile:
    """A document with its buffers, which are read once."""

    path: Path
    document: Json
    binary: bytes
    views: dict[int, bytes] = field(default_factory=dict)
    buffers: dict[int, bytes] = field(default_factory=dict)

    def accessor(self, number: int, fractions: bool = False) -> np.ndarray:
        """The values [N, C] of an accessor as float64; integers become fractions if it is normalized, or always."""
        entry = self.document["accessors"][number]
        kind, columns, count = np.dtype(TYPES[entry["componentType"]]), COLUMNS[entry["type"]], entry["count"]
        check_count("values", count)
        values = np.zeros((count, columns), kind)
        if "bufferView" in entry:
            values = self._rows(entry["bufferView"], entry.get("byteOffset", 0), kind, columns, count)
        if sparse := entry.get("sparse"):
            index, value, changed = sparse["indices"], sparse["values"], sparse["count"]
            width = np.dtype(TYPES[index["componentType"]])
            rows = self._rows(index["bufferView"], index.get("byteOffset", 0), width, 1, changed)[:, 0]
            values[rows] = self._rows(value["bufferView"], value.get("byteOffset", 0), kind, columns, changed)
        return fractions_of(values, fractions or entry.get("normalized", False))

    def _rows(self, view: int, offset: int, kind: np.dtype, columns: int, count: int) -> np.ndarray:
        data, width = self.view(view), kind.itemsize * columns
        stride = self.document["bufferViews"][view].get("byteStride") or width
        if count and offset + stride * (count - 1) + width > len(data):
            raise ValueError(
                "this file cannot be read as a mesh, is it cut short? An accessor reaches beyond its buffer"
            )
        return np.ndarray((count, columns), kind, data, offset, (stride, kind.itemsize)).copy()

    def view(self, number: int) -> bytes:
        """The bytes of a buffer view, decompressed."""
        if number not in self.views:
            entry = self.document["bufferViews"][number]
            packed = next((e for name in MESHOPT if (e := entry.get("extensions", {}).get(name))), None)
            if packed and not decoder("meshoptimizer") and not self._is_fallback(entry["buffer"]):
                packed = None  # there is a plain copy
            data = self._slice(packed or entry)
            self.views[number] = _decompressed(packed, data) if packed else data
        return self.views[number]

    def _is_fallback(self, buffer: int) -> bool:
        entry = self.document["buffers"][buffer]
        marked = any(entry.get("extensions", {}).get(name, {}).get("fallback") for name in MESHOPT)
        return marked or ("uri" not in entry and buffer > 0)

    def _slice(self, entry: Json) -> bytes:
        buffer, offset, length = self._buffer(entry["buffer"]), entry.get("byteOffset", 0), entry["byteLength"]
        if offset < 0 or offset + length > len(buffer):
            raise ValueError("this file cannot be read as a mesh, is it cut short? A view reaches beyond its buffer")
        return buffer[offset : offset + length]

    def _buffer(self, number: int) -> bytes:
        if number not in self.buffers:
            uri = self.document["buffers"][number].get("uri")
            self.buffers[number] = self.binary if uri is None else self.resource(uri)
        return self.buffers[number]

    def resource(self, uri: str) -> bytes:
        """What a URI names: data in itself, or a file beside this one.

        Raises:
            ValueError: if it cannot be read.
        """
        if uri.startswith("data:"):
            head, _, body = uri.partition(",")
            try:
                if not head.endswith(";base64"):
                    return unquote_to_bytes(body)
                text = unquote(body)
                return base64.b64decode(text + "=" * (-len(text) % 4))
            except binascii.Error as error:
                raise ValueError(f"the data in the glTF file is damaged ({error})") from error
        for name in (unquote(uri), uri, unquote(uri).replace("\\", "/")):
            if (file := self.path.parent / name).is_file():
                return file.read_bytes()
        raise ValueError(f"there is no file {unquote(uri)!r}, which {self.path.name} names")


def fractions_of(values: np.ndarray, normalized: bool) -> np.ndarray:
    """Values as float64; normalized integers become fractions of the largest value."""
    if not normalized or values.dtype.kind not in "iu":
        return values.astype(np.float64)
    return np.maximum(values / np.iinfo(values.dtype).max, -1.0)


def _decompressed(packed: Json, data: bytes) -> bytes:
    """A buffer view that meshoptimizer compressed."""
    module, mode, filter = decoder("meshoptimizer"), packed["mode"], packed.get("filter", "NONE")
    if module is None:
        raise ValueError(f"the mesh is compressed with meshopt ({MESHOPT[0]}); to read it: pip install meshoptimizer")
    count, stride = packed["count"], packed["byteStride"]
    check_count("values", count)
    try:
        if mode != "ATTRIBUTES":
            decode = {"TRIANGLES": module.decode_index_buffer, "INDICES": module.decode_index_sequence}[mode]
            return decode(count, 4, data).astype(f"<u{stride}").tobytes()
        values = module.decode_vertex_buffer(count, stride, data, np.dtype((np.void, stride))).view(np.uint8)
        if filter != "NONE":
            names = {"OCTAHEDRAL": "oct", "QUATERNION": "quat", "EXPONENTIAL": "exp"}
            values = getattr(module, f"decode_filter_{names[filter]}")(values, count, stride)
        return values.tobytes()
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the mesh is compressed with meshopt ({mode}, {filter}) and cannot be decoded") from error


def decoder(name: str) -> Any:
    """An optional decoder; None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
