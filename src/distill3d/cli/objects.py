"""Commands about 3D objects: generate, resume, export, render."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distill3d.cli.shared import Run, ViewTexts, progress_bar
from distill3d.distill.mesh_recipes import from_mesh
from distill3d.distill.recipes import PRIORS, RECIPES, Recipe
from distill3d.prompts import read_prompts

SUFFIXES: dict[str, Literal["glb", "obj", "ply"]] = {".glb": "glb", ".obj": "obj", ".ply": "ply"}


@dataclass
class Generate(ViewTexts, Run):
    """Make a 3D object from a sentence.

    Writes a run folder with mesh.glb, turntable.mp4, preview.png, config.json and metrics.jsonl.
    """

    prompt: tyro.conf.Positional[str]
    """What to make, for instance "a red mushroom"; @FILE makes each line of a file."""
    method: str = "sdi"
    """Objective: sdi, sds, sjc, nfsd, csd, hifa, ism, mvdream, sds_bridge, vsd or esd."""
    prior: str | None = None
    """The frozen 2D model: toybox (bundled), a short name (see doctor), a folder, a .safetensors file, a hub id;
    default: the recipe's."""
    init: Path | None = None
    """A mesh (.glb, .gltf, .obj, .ply) to begin with: its shape and colors. The first step is then a later one
    (--sdi.start 0.6 unless you give another): the lower, the more of the mesh stays."""
    recipe: str = "laptop"
    """Named settings to start from."""
    settings: Annotated[
        tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="", help="single settings of the recipe")
    ] = field(default_factory=lambda: RECIPES["laptop"])


@dataclass
class Resume:
    """Continue a run from its last checkpoint."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""


@dataclass
class Export:
    """Write the mesh of a run again: textured, in another format or resolution."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    format: Literal["glb", "obj", "ply"] = "glb"
    """File format; obj brings a material and a PNG, ply has vertex colors only."""
    texture: int | None = None
    """Texels a side; default: what the run's recipe says. So for the next four."""
    faces: int | None = None
    """About how many triangles; the surface is simplified to that."""
    resolution: int | None = None
    """Lattice points a side for marching cubes."""
    level: float | None = None
    """Density at the surface; by default that with the outlines of the field's pictures."""
    fit: int | None = None
    """Steps in which vertices and texture are fitted to pictures of the field; 0: what was baked is kept."""
    vertex_colors: bool = False
    """Colors at the vertices instead of a texture."""
    out: Path | None = None
    """File to write; default: mesh.FORMAT in the run's folder."""


@dataclass
class Render:
    """Render a run again: a turntable video."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    size: int = 256
    """Pixels a side."""
    frames: int = 72
    """Pictures in one turn."""
    elevation: float = 15.0
    """Degrees above the horizon."""
    out: Path | None = None
    """File to write; default: turntable.mp4 in the run's folder."""


def run_generate(command: Generate) -> int:
    from distill3d.runs.objects import check_prompt, generate

    name = command.prior or PRIORS[command.recipe]
    prior, second, prompts = None, None, read_prompts(command.prompt)
    for prompt in prompts:  # a bad line is found before hours went into the lines above it
        check_prompt(prompt, name, command.force)
    for prompt in prompts:
        config = _config(replace(command, prompt=prompt), name)
        prior, second = config.load_prior(prior), config.load_second(second)
        with progress_bar(command.settings.steps, status=_filled) as on_step:
            result = generate(config, command.out, command.force, on_step, prior, second)
        if status := _report(result):
            return status
    return 0


def _config(command: Generate, prior: str) -> Any:
    from distill3d.runs.objects import Config

    recipe, usual = command.settings, RECIPES[command.recipe]
    times = ((r.sdi.start, r.sds.high, r.highest) for r in (recipe, usual))
    if command.init is not None and next(times) == next(times):  # who sets one of them knows better
        recipe = from_mesh(recipe)
    return Config(
        prompt=command.prompt, recipe=recipe, method=command.method, prior=prior,
        negative=command.negative, seed=command.seed, device=command.device,
        dtype=command.precision, prior_options=command.prior_options, views=command.views,
        init=None if command.init is None else str(command.init),
    )  # fmt: skip


def run_resume(command: Resume) -> int:
    from distill3d.runs.objects import read_config, resume

    with progress_bar(read_config(command.run).recipe.steps, status=_filled) as on_step:
        result = resume(command.run, on_step)
    return _report(result)


def run_export(command: Export) -> int:
    from distill3d.runs.objects import load_scene, read_config
    from distill3d.scenes.to_mesh import describe_file

    scene = load_scene(command.run)
    names = ("texture", "faces", "resolution", "level", "fit")
    given = {name: value for name in names if (value := getattr(command, name)) is not None}
    if unused := given.keys() - scene.export_settings:
        flags = ", ".join(f"--{name}" for name in sorted(unused))
        raise ValueError(f"{command.run} holds a {type(scene).__name__}, whose export does not use {flags}: remove it")
    options = replace(read_config(command.run).recipe.export, **given, format=command.format)
    if command.vertex_colors:
        options = replace(options, texture=None)
    folder = command.run
    if command.out is not None:
        folder, suffix = command.out.parent, command.out.suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(f"a mesh is written as .glb, .obj or .ply, got {suffix or 'no suffix'!r}")
        options = replace(options, name=command.out.stem, format=SUFFIXES[suffix])
    files = scene.export(folder, options)
    print(f"{files[0]}: {describe_file(files[0])}")
    for path in files[1:]:
        print(path)
    return 0


def run_render(command: Render) -> int:
    from distill3d.export.video import save_video, turntable_frames
    from distill3d.runs.objects import load_scene

    scene: Any = load_scene(command.run)
    path = command.out or command.run / "turntable.mp4"
    save_video(path, turntable_frames(scene, command.frames, command.size, command.elevation, background=0.9))
    print(path)
    return 0


def _filled(progress: Any) -> str:
    return f"filled {100 * progress.opacity:.0f} %"


def _report(result: Any) -> int:
    print(f"{result.steps} steps in {result.seconds:.0f} s; the files are in {result.folder}")
    for path in sorted(result.folder.iterdir()):
        if path.is_file():
            print(f"  {path}")
    if result.interrupted:
        print(f"interrupted; continue with: distill3d resume {result.folder}", file=sys.stderr)
    return 130 if result.interrupted else 0
