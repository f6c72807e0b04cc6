"""Gaussian splats as PLY files, in the layout that splat viewers read (Kerbl et al. 2023).

One `vertex` element, binary little endian, float properties: x y z, nx ny nz (zeros), f_dc_0..2 (color =
0.5 + C0 f_dc, C0 the constant spherical harmonic), opacity (before a sigmoid), scale_0..2 (logarithms),
rot_0..3 (w, x, y, z).

Axes: the format names none. Files of the original implementation hold the frame of their cameras, usually y down and
z away from the viewer, and splat viewers show y down as upright. `save_splats` therefore turns the z-up world: world
+y (the right of the front view) becomes +x, world -z becomes +y, and the front, world +x, becomes -z, where a viewer
that looks along z is. `load_splats` turns it back. `axes="world"` writes and reads coordinates as they are, for tools
that expect z up.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from plyfile import PlyData, PlyElement, PlyElementParseError, PlyHeaderParseError
from torch import Tensor

from distill3d.files import replacing
from distill3d.render.splat import Splats

Axes = Literal["viewer", "world"]
C0 = 0.5 / np.pi**0.5  # the spherical harmonic of degree 0
TO_VIEWER = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]])  # rows: right, down, away

MEANS = ("x", "y", "z")
NORMALS = ("nx", "ny", "nz")
COLORS = ("f_dc_0", "f_dc_1", "f_dc_2")
SCALES = ("scale_0", "scale_1", "scale_2")
ROTATION = ("rot_0", "rot_1", "rot_2", "rot_3")
REQUIRED = (*MEANS, *COLORS, "opacity", *SCALES, *ROTATION)
WRITTEN = (*MEANS, *NORMALS, *COLORS, "opacity", *SCALES, *ROTATION)


def save_splats(path: str | os.PathLike[str], splats: Splats, axes: Axes = "viewer") -> None:
    """Writes splats (colors [N, 3]) as .ply, whole or not at all; for `axes` see the top of this file.

    Raises:
        ValueError: for another suffix, no splats, or values that are not finite.
    """
    if Path(path).suffix.lower() != ".ply":
        raise ValueError(f"splats are written as .ply, got {str(path)!r}")
    if not len(splats):
        raise ValueError("there are no splats to write")
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
        raise ValueError("splats to be written must be finite, got NaN or infinite values")
    rows = table.view([(name, "<f4") for name in WRITTEN])[:, 0]
    with replacing(path) as draft:
        PlyData([PlyElement.describe(rows, "vertex")], byte_order="<").write(draft)


def load_splats(path: str | os.PathLike[str], axes: Axes = "viewer") -> Splats:
    """Reads splats from a PLY file, ours or any other of the same layout, as text or binary.

    Colors that depend on the view (f_rest_*) are dropped, with a warning; colors may lie outside [0, 1]. For a scene
    of the splats: `Gaussians(options, splats=load_splats(path))`.

    Raises:
        ValueError: if the file is missing, not a PLY file, cut short, holds something else (a mesh, a point cloud), or
            has values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        data = PlyData.read(path)
    except PlyElementParseError as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error
    except (PlyHeaderParseError, ValueError) as error:  # ValueError: bytes that are not text
        raise ValueError(f"{path} is not a PLY file: {error}") from error
    vertex = next((element for element in data.elements if element.name == "vertex"), None)
    names = () if vertex is None else tuple(prop.name for prop in vertex.properties)
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ValueError(f"{path} holds no splats: its vertices have no {', '.join(missing)} (is it a mesh?)")
    if vertex is None or not vertex.count:
        raise ValueError(f"{path} holds no splats: it has no vertices")
    if any(name.startswith("f_rest_") and vertex[name].any() for name in names):
        warnings.warn(f"{path}: the colors depend on the view; their mean (degree 0) is kept", stacklevel=1)

    def columns(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([vertex[name] for name in names], 1).astype(np.float32))

    means, quaternions = columns(*MEANS), columns(*ROTATION)
    if axes == "viewer":
        means, quaternions = _turned(means, quaternions, TO_VIEWER.T)
    colors = 0.5 + C0 * columns(*COLORS)
    splats = Splats(means, quaternions, columns(*SCALES), columns("opacity")[:, 0], colors)
    if not all(bool(value.isfinite().all()) for value in vars(splats).values()):
        raise ValueError(f"{path} holds splats with NaN or infinite values")
    return splats


def _turned(
    means: Float[Tensor, "n 3"], quaternions: Float[Tensor, "n 4"], rotation: Float[Tensor, "3 3"]
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 4"]]:
    """Means and quaternions turned by a rotation of less than 180 degrees."""
    trace = float(rotation.trace())
    w = 0.5 * (1 + trace) ** 0.5
    skew = rotation - rotation.T
    x, y, z = (float(v) / (4 * w) for v in (skew[2, 1], skew[0, 2], skew[1, 0]))
    # The product (w, x, y, z) q as a matrix.
    product = quaternions.new_tensor([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    return means @ rotation.to(means).T, quaternions @ product.T
