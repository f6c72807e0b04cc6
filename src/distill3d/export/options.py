"""What is written of a scene and how a field becomes a mesh: part of every recipe, and cheap to import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill3d.meshes.texture import check_texture_size

FIELD_SETTINGS = frozenset({"texture", "faces", "resolution", "level", "soften", "fit"})  # what fields use of these


@dataclass(frozen=True)
class ExportOptions:
    """How a field becomes a mesh. The defaults give a file of one to two megabytes in a few seconds."""

    texture: int | None = 1024  # texels per side; None colors the vertices instead
    faces: int = 20_000  # a surface with more is simplified to about this many
    resolution: int = 128  # lattice points per side for marching cubes
    level: float | None = None  # density at the surface, per world unit; None matches the field's outlines
    soften: float = 0.7  # lattice steps, see `extract_surface`
    fit: int = 50  # steps that fit a textured mesh to renderings of the field, see `fit_to_field`; 0 is off
    format: Literal["glb", "obj", "ply"] | None = None  # of the file; None is glb for meshes and ply for splats
    name: str | None = None  # of the file, without suffix; None is mesh or splats
    up: Literal["auto", "y", "z"] = "auto"  # of the file: that of the mesh a run began with, else y, and z for ply
    size: float | None = None  # longest side in meters; None keeps the scene's or the mesh's own unit
    pivot: Literal["center", "bottom"] | None = None  # what lies at the origin; None keeps the place

    def __post_init__(self) -> None:
        if self.texture is not None:
            check_texture_size(self.texture)
        if self.faces < 4:
            raise ValueError(f"a surface needs at least 4 faces, got {self.faces}; 20000 is usual")
        if not 8 <= self.resolution <= 512:  # 512 take about 3 GB
            raise ValueError(f"the resolution must be 8 to 512 points per side, got {self.resolution}; 128 is usual")
        if self.level is not None and not 0 < self.level < math.inf:
            raise ValueError(f"the level must be a finite density above 0, got {self.level}")
        if not 0 <= self.soften < math.inf:
            raise ValueError(f"soften must be 0 or more lattice steps, got {self.soften}")
        if self.size is not None and not 0 < self.size < math.inf:
            raise ValueError(f"the size must be a number of meters above 0, got {self.size}")
        if self.fit < 0:
            raise ValueError(f"fit must be 0 or more steps, got {self.fit}; 50 is usual, 0 is off")

    def mesh_path(self, folder: Path) -> Path:
        """The file that a mesh is written to."""
        return folder / f"{self.name or 'mesh'}.{self.format or 'glb'}"
