"""Commands about 3D objects: generate, resume, export, render."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from distill3d.cli.settings import Tree, layered, nested, read_file
from distill3d.cli.shared import (
    RUNS,
    File,
    Flag,
    Float,
    Int,
    Model,
    Name,
    Pivot,
    Prompt,
    Run,
    Settings,
    Texts,
    UpAxis,
    busy,
    duration,
    is_file_name,
    progress_bar,
    run_folder,
)
from distill3d.untrusted import printable

if TYPE_CHECKING:
    from distill3d.cli.meshes import Texture
    from distill3d.distill.loop import OnStep, Progress
    from distill3d.distill.recipes import Recipe
    from distill3d.runs.objects import Config, Result

MeshFormat = Literal["glb", "obj", "ply"]
MESH_FORMATS: dict[str, MeshFormat] = {".glb": "glb", ".obj": "obj", ".ply": "ply"}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well, and how long. The defaults are those of the recipe."""

    recipe: Name = None
    """Named settings to start from: laptop (default), distill (default with --method, --init, --perp-neg or another
    prior), paper or splats; see distill3d recipes."""
    method: Name = None
    """Objective: sdi (default), sds, sjc, nfsd, csd, hifa, ism, mvdream, sds_bridge, vsd, esd, dsd, asd, sctd, bsd,
    sdi_cached or cfd; rfds and flowdreamer for flow models."""
    scale: Float = None
    """Guidance scale of the objective."""
    steps: Int = None
    """Optimization steps."""
    views_per_step: Int = None
    """Rendered views per step."""
    learning_rate: Float = None
    """Learning rate of Adam."""
    render_size: Int = None
    """Pixels per side of the rendered views, which are then resized to the prior's image size."""
    perp_neg: Flag = False
    """Use Perp-Neg, against faces on all sides (the Janus problem)."""
    no_perp_neg: Flag = False
    """Do not use Perp-Neg."""
    retries: int = 0
    """How often a run that diverges goes on from its last checkpoint with another seed."""

    def changes(self) -> dict[str, object]:
        """The settings that these flags change, by path; None changes nothing.

        `method` is for `object_config`, `retries` for `generate`.
        """
        if self.perp_neg and self.no_perp_neg:
            raise ValueError("--perp-neg and --no-perp-neg exclude each other")
        return {
            "recipe.objective.scale": self.scale,
            "recipe.steps": self.steps,
            "recipe.views": self.views_per_step,
            "recipe.learning_rate": self.learning_rate,
            "recipe.render_size": self.render_size,
            "recipe.perp_neg": self.perp_neg if self.perp_neg or self.no_perp_neg else None,
        }


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where to, and what is written."""

    out: Path = RUNS
    """Folder in which the run's folder is made."""
    force: Flag = False
    """Run even if the bundled prior does not know what the prompt names."""
    frames: Int = None
    """Frames of the turntable video."""
    texture_size: Int = None
    """Texels per side of the mesh's texture."""

    def changes(self) -> dict[str, object]:
        """The settings that these flags change, by path; None changes nothing."""
        return {"recipe.frames": self.frames, "recipe.export.texture": self.texture_size}

    def check(self) -> None:
        """Raises ValueError where --out is a file."""
        if is_file_name(self.out):
            raise ValueError(
                f"--out is the folder for run folders, got {self.out}; to write a run's mesh to a file, type: "
                f"distill3d export RUN --out FILE.glb (or .obj, .ply)"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectTexts(Texts):
    """What to make."""

    init: File = None
    """A mesh (.glb, .gltf, .obj, .ply) to start from, shape and colors; times then begin at 0.6 of the schedule."""
    up: UpAxis = None
    """Upward axis of --init; default: y for glTF and OBJ, z for PLY."""
    turn: Float = None
    """Degrees to turn --init, counterclockwise seen from above, so that its front faces +x (+z with y up)."""

    def changes(self) -> dict[str, object]:
        """See `Texts`."""
        if self.init is None and not (self.up is None and self.turn is None):
            raise ValueError("--up and --turn are about the mesh of --init: pass --init FILE, too")
        return {**super().changes(), "init_up": self.up, "init_turn": self.turn}


@dataclass(frozen=True, kw_only=True)
class ObjectOutput(Output):
    """Where to, and what is written."""

    faces: Int = None
    """Triangles of the mesh, at most about."""

    def changes(self) -> dict[str, object]:
        """See `Output`."""
        return {**super().changes(), "recipe.export.faces": self.faces}


@dataclass(frozen=True)
class Generate:
    """Make a 3D object from a prompt.

    Writes a run folder with mesh.glb, turntable.mp4, preview.png, config.json and metrics.jsonl.
    """

    prompt: Prompt
    """What to make, such as "a red mushroom"; @FILE makes each line of a file."""
    texts: Annotated[ObjectTexts, arg(name="prompt")] = field(default_factory=ObjectTexts)
    quality: Quality = field(default_factory=Quality)
    model: Model = field(default_factory=Model)
    output: ObjectOutput = field(default_factory=ObjectOutput)
    other: Settings = field(default_factory=Settings)

    def config(self) -> Config:
        """The configuration of the run, with the prompt as typed."""
        from distill3d.distill.recipes import PRIORS, RECIPES

        return object_config(self, RECIPES, PRIORS, {}, self.texts.init)

    def run(self) -> int:
        """Makes an object for each prompt; returns the exit status."""
        from distill3d.prompts import read_prompts
        from distill3d.runs.objects import check_prompt, generate, load_priors

        self.output.check()
        config, prompts = self.config(), read_prompts(self.prompt)
        for prompt in prompts:  # a wrong line is found before hours went into the lines above it
            check_prompt(prompt, config.prior, self.output.force)
        prior = second = None
        for prompt in prompts:
            config = replace(config, prompt=prompt)
            prior, second = load_priors(config, prior, second)
            with object_bar(config.recipe.steps, "distilling") as on_step:
                result = generate(
                    config, self.output.out, retries=self.quality.retries, on_step=on_step, prior=prior, second=second
                )
            if status := report(result):
                return status
        return 0


@dataclass(frozen=True)
class Resume:
    """Continue a run from its last checkpoint."""

    folder: Run
    """The run's folder."""
    device: Name = None
    """Where to compute: cpu, cuda, cuda:1, mps; default: where the run was."""
    retries: int = 0
    """How often a run that diverges goes on from its last checkpoint with another seed."""

    def run(self) -> int:
        """Takes the steps that are missing; returns the exit status."""
        from distill3d.runs.objects import read_config, resume

        with object_bar(read_config(run_folder(self.folder)).recipe.steps, "distilling") as on_step:
            result = resume(self.folder, on_step, device=self.device, retries=self.retries)
        return report(result)


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


def object_config(
    command: Generate | Texture,
    recipes: Mapping[str, Recipe],
    priors: Mapping[str, str],
    more: Mapping[str, object],
    init: Path | None = None,
) -> Config:
    """The configuration that a command line describes.

    Args:
        recipes, priors: those that --recipe names, and the prior of each.
        more: settings of the command's own flags, by path.
        init: a mesh to start from, which limits the times of the objective.

    Raises:
        ValueError: for names and settings that do not exist, and values out of range.
    """
    from distill3d.distill.recipes import from_mesh
    from distill3d.runs.config import from_plain, to_plain
    from distill3d.runs.objects import Config

    file = read_file(command.other.config)
    prior, quality = command.model.prior or file.get("prior"), command.quality
    distilled = (
        quality.method or init or quality.perp_neg or quality.render_size or prior not in (None, priors["laptop"])
    )
    base = base_recipe(quality.recipe, file, recipes, "distill" if distilled and "distill" in recipes else "laptop")
    plain = layered(to_plain(Config(command.prompt, recipe=recipes[base], prior=priors[base])), file)
    groups = (command.texts, command.model, command.quality, command.output)
    flags = {path: value for group in groups for path, value in group.changes().items()}
    if command.quality.method is not None:
        objective = plain_method(command.quality.method, base)
        if objective["kind"] != plain["recipe"]["objective"]["kind"]:
            flags = {"recipe.objective": objective, **flags}
    plain = layered(plain, nested({**flags, **more}))
    if init is not None:
        config = from_plain(Config, plain)
        plain = to_plain(replace(config, recipe=from_mesh(config.recipe), init=str(init)))
    return from_plain(Config, layered(plain, assignments=command.other.set))


def base_recipe(name: str | None, file: Tree, recipes: Mapping[str, Recipe], default: str) -> str:
    """The name of the recipe to start from: that of --recipe, else the file's "base" (which is removed), else default.

    Raises:
        ValueError: for an unknown one.
    """
    base = str(file.pop("base", default))
    base = (name or base).lower()
    if base not in recipes:
        raise ValueError(f"unknown recipe {base!r}; allowed: {', '.join(recipes)}")
    return base


def plain_method(name: str, recipe: str) -> Tree:
    """The settings of a method for a recipe as plain values; ValueError for an unknown name."""
    from distill3d.distill.recipes import RECIPES, method_settings
    from distill3d.runs.config import to_plain

    return to_plain(replace(RECIPES[recipe], objective=method_settings(name, recipe)))["objective"]


@contextlib.contextmanager
def object_bar(total: int, name: str) -> Iterator[OnStep]:
    """The progress bar of a run of an object; after the last step it says that files are written."""
    with progress_bar(total, name) as show:

        def on_step(progress: Progress) -> None:
            last = progress.step + 1 == total
            show(progress, "writing files" if last else f"opacity {progress.opacity:.2f}")

        yield on_step


def report(result: Result) -> int:
    """Prints what a run made and how long it took; returns the exit status."""
    print(
        f"{result.steps} steps in {duration(result.seconds)} with {result.nfe:,} NFE, "
        f"files in {duration(result.export_seconds)}:"
    )
    for path in sorted(result.folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            print(f"  {printable(str(path))}")
    if result.interrupted:
        print(f"interrupted; continue with: distill3d resume {shlex.quote(str(result.folder))}", file=sys.stderr)
        return 128 + result.interrupted
    if not result.files:
        print(f"distill3d: {result.folder} has no mesh", file=sys.stderr)
        return 4
    return 0
