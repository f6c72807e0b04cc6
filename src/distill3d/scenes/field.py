"""What all fields have in common: values at every point, and a surface that becomes a mesh."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from distill3d.export.options import FIELD_SETTINGS, ExportOptions
from distill3d.render.volume import FieldValues
from distill3d.types import Scene


class FieldScene(Scene, Protocol):
    """A scene with a density and a color at every point, which can be exported as a mesh.

    A field of your own, `class MyField(nn.Module, FieldScene)`, defines `render`, `query` and `half_size`.
    """

    export_settings = FIELD_SETTINGS

    @property
    @abstractmethod
    def half_size(self) -> float:
        """Nothing lies outside [-half_size, half_size]^3, world units."""
        ...

    @abstractmethod
    def query(self, points: Float[Tensor, "n 3"], normals: bool = False) -> FieldValues:
        """Density [N], color [N, 3] in [0, 1] and, if requested, outward unit normals [N, 3]."""
        ...

    def export(self, folder: Path, options: ExportOptions) -> list[Path]:
        """Writes the surface as mesh.glb, or as `options` name it; ValueError where the field is empty."""
        from distill3d.meshes.files import save_mesh
        from distill3d.meshes.mesh import resized
        from distill3d.scenes.to_mesh import field_to_mesh

        mesh = resized(field_to_mesh(self, options), options.size, options.pivot)
        return save_mesh(options.mesh_path(folder), mesh, options.up)
