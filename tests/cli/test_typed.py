"""From the configuration of a run back to what to type: the command describes the same object."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest

import distill3d as d3d
from distill3d.cli import main as cli
from distill3d.cli.typed import typed
from distill3d.distill.recipes import DISTILL, TEXTURE_RECIPES, refinement
from distill3d.meshes.files import save_mesh
from distill3d.meshes.mesh import Mesh
from distill3d.runs.config import resolved, to_plain
from distill3d.runs.objects import Config

LINES = [
    'generate "a red mushroom"',
    'generate "a blue car" --seed 3 --method sds --steps 100',
    'generate "a hat" --recipe paper --set perp_neg=false',
    'generate "a hat" --negative "ugly; bad" --front "it\'s a face" --scale 5.0 --prior sd15',
    'generate "a red mushroom" --faces 500 --set scene.resolution=32 --set penalties.opaque.end=0.5',
    'generate "a red hat" --recipe splats --learning-rate 0.1',
    'generate "a hat" --method sds_bridge --perp-neg --frames 9',
    'generate "a hat" --recipe laptop --method sdi_cached',
    'generate "a hat" --set sampling=none',
    "generate \"a hat\" --lora a.safetensors:0.5 --lora b.safetensors --set 'cameras.elevation=[0.0, 10.0]'",
    'generate "a hat" --prior sd15 --vae taesd --image-size 256 --controlnet FOLDER --control normal --offload',
    'generate "a hat" --init a.glb --up z --turn 90.0',
    'texture MESH "a red chair"',
    'texture MESH "a red chair" --up z --turn 90.0 --keep-colors --steps 9 --texture-size 512',
]


def described(line):
    """The configuration of a command line."""
    return resolved(cli.parse(shlex.split(line.removeprefix("distill3d "))).config())


@pytest.mark.parametrize("line", LINES)
def test_a_command_comes_back_as_short_as_it_was(line):
    found = typed(described(line), Path("RUN"))
    assert to_plain(described(found)) == to_plain(described(line))
    assert sorted(shlex.split(found)[1:]) == sorted(shlex.split(line))


def test_no_command_makes_a_run_with_an_objective_of_your_own():
    assert typed(Config("a hat", dataclasses.replace(DISTILL, objective=d3d.sdi())), Path("some run")) == ""


def test_a_refined_mesh_is_refined_again():
    recipe = refinement(TEXTURE_RECIPES["laptop"], 30, 0.4, 0.03)
    scene = dataclasses.replace(recipe.scene, mesh="source.npz", up="y")
    config = Config("a hat", dataclasses.replace(recipe, scene=scene), prior="toybox", seed=2)
    assert typed(config, Path("x")) == "distill3d refine RUN --steps 30 --start 0.4 --seed 2"


@pytest.mark.parametrize("file", ["a.glb", "a.gltf", "a.obj", "a.ply"])
@pytest.mark.parametrize("given", ["", " --up auto", " --up y", " --up z"])
def test_the_upward_axis_of_a_start_is_shown_where_its_file_means_another(file, given):
    usual = "z" if file == "a.ply" else "y"
    shown = given if given and given.split()[1] not in ("auto", usual) else ""
    found = typed(described(f'generate "a hat" --init {file}{given}'), Path("RUN"))
    assert found == f"distill3d generate 'a hat' --init {file}{shown}"


@pytest.mark.parametrize(("name", "flags"), [("hat.glb", ""), ("hat.obj", ""), ("hat.ply", " --up z")])
def test_a_textured_mesh_is_described_by_what_differs_from_a_mesh_with_y_up(name, flags, tmp_path):
    save_mesh(tmp_path / name, Mesh(np.eye(3), np.array([[0, 1, 2]])))
    config = described(f'texture {tmp_path / name} "a hat"')
    kept = dataclasses.replace(
        config, recipe=dataclasses.replace(config.recipe, scene=config.recipe.scene.with_own_files(tmp_path))
    )
    assert typed(kept, tmp_path) == f"distill3d texture MESH 'a hat'{flags}"
