"""Commands that write the files of a run again: export, render."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from distill3d.cli.shared import File, Flag, Float, Int, Pivot, Run, UpAxis, busy, run_folder

MeshFormat = Literal["glb", "obj", "ply"]
MESH_FORMATS: dict[str, MeshFormat] = {".glb": "glb", ".obj": "obj", ".ply": "ply"}


@dataclass(frozen=True)
class Export:
    """Write the mesh of a run again: with another texture, format or resolution."""

    folder: Run
    """The run's folder."""
    format: Annotated[MeshFormat | None, arg(help_behavior_hint="", metavar="{glb,obj,ply}")] = None
    """obj comes with a material and a PNG, ply has vertex colors only. Default: as --out, else glb (ply for splats)."""
    texture_size: Int = None
    """Texels per side; default, as for the next four: that of the run's configuration."""
    faces: Int = None
    """Triangles, at most about."""
    resolution: Int = None
    """Grid points per side for marching cubes."""
    level: Float = None
    """Density at the surface; default: the one whose outlines fit the renderings best."""
    fit: Int = None
    """Steps in which vertices and texture are fitted to renderings of the scene; 0 is off."""
    vertex_colors: Flag = False
    """Vertex colors instead of a texture."""
    up: UpAxis = None
    """Upward axis of an OBJ or PLY file: y (default of OBJ) or z (default of PLY); a mesh of yours keeps its own."""
    size: Float = None
    """Longest side in meters; default: the unit of the scene, or of the mesh that was textured."""
    pivot: Pivot = None
    """What lies at the origin: center or bottom; default: what lay there."""
    out: File = None
    """File to write, .glb, .obj or .ply; default: mesh.FORMAT in the run's folder."""

    def run(self) -> int:
        """Writes the files; returns the exit status."""
        from distill3d.runs.objects import load_scene, read_config
        from distill3d.scenes.mesh import MeshScene
        from distill3d.scenes.to_mesh import describe_file

        folder, format = self._target()
        scene = load_scene(run_folder(self.folder))
        names = ("texture_size", "faces", "resolution", "level", "fit")
        given = {name.removesuffix("_size"): x for name in names if (x := getattr(self, name)) is not None}
        if unused := given.keys() - scene.export_settings:
            flags = ", ".join(f"--{name}" for name in names if name.removesuffix("_size") in unused)
            raise ValueError(f"the export of a {type(scene).__name__} does not use {flags.replace('_', '-')}")
        if self.vertex_colors:
            given["texture"] = None
        name = None if self.out is None else self.out.stem
        given |= {name: x for name in ("up", "size", "pivot") if (x := getattr(self, name)) is not None}
        options = replace(read_config(self.folder).recipe.export, **given, format=format, name=name)
        with busy("writing files"):
            first, *others = scene.export(folder, options)
        up = (
            scene.options.up if self.up is None and isinstance(scene, MeshScene) and first.suffix != ".glb" else self.up
        )
        print(f"{first}: {describe_file(first, up or 'auto')}", *others, sep="\n")
        return 0

    def _target(self) -> tuple[Path, MeshFormat | None]:
        """The folder to write to and the format, checked before any work is done."""
        if self.out is None:
            return self.folder, self.format
        format = MESH_FORMATS.get(self.out.suffix.lower())
        if format is None:
            raise ValueError(f"meshes are written as .glb, .obj or .ply, got --out {self.out}")
        if self.format not in (None, format):
            raise ValueError(f"--format {self.format} does not match --out {self.out}: leave out --format")
        return self.out.parent, format


@dataclass(frozen=True)
class Render:
    """Render a run again, as a turntable video."""

    folder: Run
    """The run's folder."""
    size: int = 256
    """Pixels per side."""
    frames: int = 72
    """Frames in one turn."""
    elevation: float = 15.0
    """Degrees above the horizon."""
    device: Annotated[str, arg(metavar="NAME")] = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    out: File = None
    """The .mp4 file to write; default: turntable.mp4 in the run's folder."""

    def run(self) -> int:
        """Writes the video; returns the exit status."""
        from distill3d.export.video import save_video, turntable_frames
        from distill3d.runs.objects import load_scene

        path = self.folder / "turntable.mp4" if self.out is None else self.out
        if path.suffix.lower() != ".mp4":
            raise ValueError(f"--out must end in .mp4, got {path}")
        scene = load_scene(run_folder(self.folder), device=self.device)
        save_video(path, turntable_frames(scene, self.frames, self.size, self.elevation))
        print(path)
        return 0
