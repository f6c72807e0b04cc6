"""Gaussian splats as PLY files, in the layout that splat viewers read (Kerbl et al. 2023).

One `vertex` element, binary little endian, float properties: x y z, nx ny nz (zeros), f_dc_0..2 (color =
0.5 + C0 f_dc, C0 the constant spherical harmonic), opacity (before a sigmoid), scale_0..2 (logarithms),
rot_0..3 (w, x, y, z).

Axes: the format names none. Files of the original hold the frame of their cameras, as a rule y down and z away
from the viewer, and splat viewers show y down as upright. `save_splats` therefore turns our z-up world: world +y
(the right of the front view) becomes +x, world -z becomes +y, and the front, world +x, becomes -z, where a viewer
that looks along z stands. `load_splats` turns it back. `axes="world"` writes and reads coordinates as they are,
for tools that expect z up.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distill3d.files import replacing
from distill3d.render.splat import Splats

Axes = Literal["viewer", "world"]
C0 = 0.5 / np.pi**0.5  # the spherical harmonic of degree 0
TO_VIEWER = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]])  # right, down, away

MEANS = ("x", "y", "z")
NORMALS = ("nx", "ny", "nz")
COLORS = ("f_dc_0", "f_dc_1", "f_dc_2")
SCALES = ("scale_0", "scale_1", "scale_2")
ROTATION = ("rot_0", "rot_1", "rot_2", "rot_3")
NEEDED = (*MEANS, *COLORS, "opacity", *SCALES, *ROTATION)
WRITTEN = (*MEANS, *NORMALS, *COLORS, "opacity", *SCALES, *ROTATION)
TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"}
TYPES |= {"double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
TYPES |= {"float32": "f4", "float64": "f8"}
MOST_HEADER = 1 << 16  # bytes


def save_splats(path: str | os.PathLike[str], splats: Splats, axes: Axes = "viewer") -> None:
    """Writes splats (colors [N, 3]) as .ply, whole or not at all; for `axes` see the top of this file.

    Raises:
        ValueError: for another suffix, no splats, or numbers that are not finite.
    """
    if Path(path).suffix.lower() != ".ply":
        raise ValueError(f"splats are written as .ply, got {str(path)!r}")
    if not len(splats):
        raise ValueError("there are no splats to be written")
    means, quaternions = splats.means.detach().cpu(), splats.quaternions.detach().cpu()
    if axes == "viewer":
        means, quaternions = _turned(means, quaternions, TO_VIEWER)
    columns = (
        means,
        torch.zeros_like(means),
        (splats.colors.detach().cpu() - 0.5) / C0,
        splats.opacities.detach().cpu()[:, None],
        splats.log_scales.detach().cpu(),
        torch.nn.functional.normalize(quaternions, dim=1),
    )
    table = torch.cat(columns, 1).numpy().astype("<f4")
    if not np.isfinite(table).all():
        raise ValueError("splats to be written must be finite")
    properties = "".join(f"property float {name}\n" for name in WRITTEN)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{properties}end_header\n"
    with replacing(path) as draft:
        draft.write_bytes(header.encode() + table.tobytes())


def load_splats(path: str | os.PathLike[str], axes: Axes = "viewer") -> Splats:
    """Reads splats from a PLY file, ours or any other of the same layout.

    Colors that depend on the view (f_rest_*) are left out, with a warning; colors may lie outside [0, 1].
    A scene is made of what is read by `Gaussians(options, splats=load_splats(path))`.

    Raises:
        ValueError: where the file is not there, is no PLY, holds something else (a mesh, plain points), is cut
            short, or has numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    content = path.read_bytes()
    layout, count, start, order = _header(path, content)
    missing = [name for name in NEEDED if name not in layout]
    if missing:
        raise ValueError(f"{path} holds no splats: its vertices have no {', '.join(missing)} (is it a mesh?)")
    kind = np.dtype([(name, order + code) for name, code in layout.items()])
    if len(content) < start + count * kind.itemsize:
        raise ValueError(f"{path} is cut short: {len(content)} bytes, {start + count * kind.itemsize} expected")
    table = np.frombuffer(content, kind, count, start)
    if any(name.startswith("f_rest_") and table[name].any() for name in layout):
        warnings.warn(f"{path}: the colors depend on the view; their mean (degree 0) is kept", stacklevel=2)

    def columns(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([table[name] for name in names], 1).astype(np.float32))

    means, quaternions = columns(*MEANS), columns(*ROTATION)
    if axes == "viewer":
        means, quaternions = _turned(means, quaternions, TO_VIEWER.T)
    colors = 0.5 + C0 * columns(*COLORS)
    splats = Splats(means, quaternions, columns(*SCALES), columns("opacity")[:, 0], colors)
    if not all(bool(value.isfinite().all()) for value in vars(splats).values()):
        raise ValueError(f"{path} holds splats with numbers that are not finite")
    return splats


def _header(path: Path, content: bytes) -> tuple[dict[str, str], int, int, str]:
    """Types of the properties by name, number of vertices, where they begin, and the order of bytes."""
    end = re.search(rb"end_header\r?\n", content[:MOST_HEADER])
    if not content.startswith(b"ply") or end is None:
        raise ValueError(f"{path} is no PLY file")
    lines = [line.split() for line in content[: end.start()].decode("ascii", "replace").splitlines()]
    form = next((line[1] for line in lines if line[:1] == ["format"] and len(line) > 1), "none")
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(form)
    if order is None:
        raise ValueError(f"{path} holds no splats: they are stored as binary, and its format is {form}")
    elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]]
    if not elements or lines[elements[0]][1:2] != ["vertex"] or not lines[elements[0]][-1].isdigit():
        raise ValueError(f"{path} holds no splats: its first element is not vertex")
    stop = elements[1] if len(elements) > 1 else len(lines)
    properties = [line for line in lines[elements[0] + 1 : stop] if line[:1] == ["property"]]
    if any(len(line) != 3 or line[1] not in TYPES for line in properties):
        raise ValueError(f"{path} holds no splats: its vertices have lists or unknown types")
    count = int(lines[elements[0]][-1])
    if not count:
        raise ValueError(f"{path} holds no splats: it has no vertices")
    return {name: TYPES[kind] for _, kind, name in properties}, count, end.end(), order


def _turned(means: Tensor, quaternions: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Splats turned by one of the two rotations of this file: means [N, 3] and quaternions [N, 4]."""
    trace = float(rotation.trace())
    w = 0.5 * (1 + trace) ** 0.5
    skew = rotation - rotation.T
    x, y, z = (float(v) / (4 * w) for v in (skew[2, 1], skew[0, 2], skew[1, 0]))
    # The product (w, x, y, z) q as a matrix.
    product = quaternions.new_tensor([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    return means @ rotation.to(means).T, quaternions @ product.T
