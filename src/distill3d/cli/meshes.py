"""Commands about meshes: texture paints one that is brought, refine goes on with a run's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from distill3d.cli.objects import _filled, _report
from distill3d.cli.shared import Machine, Run, ViewTexts, progress_bar
from distill3d.distill.mesh_recipes import TEXTURE_RECIPES, refinement
from distill3d.distill.recipes import PRIORS, Recipe
from distill3d.scenes.gaussians import GaussianOptions
from distill3d.scenes.mesh import MeshOptions


@dataclass
class Texture(ViewTexts, Run):
    """Paint a mesh from a sentence; its geometry stays as it is.

    Writes a run folder with mesh.glb, turntable.mp4, preview.png, config.json and metrics.jsonl. The mesh's own UV map
    is kept where it can hold a texture (inside the picture, no overlaps), else a new one is made.
    """

    mesh: tyro.conf.Positional[Path]
    """The mesh: a .glb, .gltf, .obj or .ply file."""
    prompt: tyro.conf.Positional[str]
    """What it is, for instance "a red chair"."""
    texture_size: int = 1024
    """Texels a side of the texture."""
    up: Literal["auto", "y", "z"] = "auto"
    """The file's upward axis; auto is y for glTF and z for OBJ and PLY."""
    turn: float = 0.0
    """Degrees to turn the mesh (counter-clockwise from above), so that its front looks along +x (+z in glTF)."""
    keep_colors: bool = False
    """Begin with the colors of the file instead of gray; --sdi.start 0.6 keeps more of them."""
    method: str = "sdi"
    """Objective, as for generate."""
    prior: str | None = None
    """The frozen 2D model, as for generate; default: the recipe's."""
    recipe: str = "laptop"
    """Named settings to start from."""
    settings: Annotated[
        tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="", help="single settings of the recipe")
    ] = field(default_factory=lambda: TEXTURE_RECIPES["laptop"])


@dataclass
class Refine(Machine):
    """Go on with a run's mesh: its texture and its surface follow the same prompt, and a run folder is made anew."""

    run: tyro.conf.Positional[Path]
    """The run's folder; its mesh.glb is where this begins."""
    steps: int = 60
    """Updates."""
    start: float = 0.5
    """Time of the first step, 0 to 1: the lower, the less changes."""
    move: float = 0.03
    """How fast the surface moves, relative to the colors; 0 leaves it alone."""
    texture_size: int = 1024
    """Texels a side of the texture."""
    seed: int = 0
    """Seed of all randomness."""
    out: Path | None = None
    """Folder in which the new run's folder is made; default: the one that holds the run."""


def run_texture(command: Texture) -> int:
    """Paints, and says where the files lie."""
    from distill3d.meshes.files import read_mesh
    from distill3d.meshes.texture import uv_problem
    from distill3d.runs.objects import Config, check_prompt, generate

    name = command.prior or PRIORS[command.recipe]
    check_prompt(command.prompt, name, command.force)
    recipe = command.settings
    assert isinstance(recipe.scene, MeshOptions)
    scene = dataclasses.replace(
        recipe.scene, mesh=str(command.mesh), up=command.up, turn=command.turn, colors=command.keep_colors
    )
    recipe = dataclasses.replace(
        recipe, scene=scene, export=dataclasses.replace(recipe.export, texture=command.texture_size)
    )
    if problem := uv_problem(read_mesh(command.mesh, command.up)):
        print(f"a UV map is made for {command.mesh.name}: {problem}")
    config = Config(
        prompt=command.prompt, recipe=recipe, method=command.method, prior=name,
        negative=command.negative, seed=command.seed, device=command.device,
        dtype=command.precision, prior_options=command.prior_options, views=command.views,
    )  # fmt: skip
    with progress_bar(recipe.steps, name="painting", status=_filled) as on_step:
        result: Any = generate(config, command.out, command.force, on_step)
    return _report(result)


def run_refine(command: Refine) -> int:
    """Refines, and says where the files lie."""
    from distill3d.runs.objects import generate, read_config

    config = read_config(command.run)
    mesh = command.run / "mesh.glb"
    if isinstance(config.recipe.scene, GaussianOptions):
        raise ValueError(f"{command.run} holds splats, which have no surface to refine; fields and meshes have")
    if not mesh.is_file():
        raise ValueError(f"{command.run} has no mesh.glb to refine; make one with: distill3d export {command.run}")
    base = config.recipe
    if not isinstance(base.scene, MeshOptions):
        base = TEXTURE_RECIPES["laptop" if config.prior == "toybox" else "paper"]
    recipe = refinement(base, command.steps, command.start, command.move)
    assert isinstance(recipe.scene, MeshOptions)
    scene = dataclasses.replace(recipe.scene, mesh=str(mesh), up="auto")
    export = dataclasses.replace(recipe.export, texture=command.texture_size)
    config = dataclasses.replace(
        config, recipe=dataclasses.replace(recipe, scene=scene, export=export), seed=command.seed,
        device=command.device, dtype=command.precision, init=None,
    )  # fmt: skip
    with progress_bar(recipe.steps, name="refining", status=_filled) as on_step:
        result: Any = generate(config, command.out or command.run.resolve().parent, True, on_step)
    return _report(result)
