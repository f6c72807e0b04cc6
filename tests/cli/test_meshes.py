"""texture, refine and generate --init as a user meets them, with few steps of the bundled prior."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import trimesh

from distill3d.cli import main as cli
from distill3d.distill.recipes import DISTILL, LAPTOP_TEXTURE, PAPER, TEXTURE_RECIPES, from_mesh, refinement
from distill3d.export.options import ExportOptions
from distill3d.meshes.files import read_mesh, save_mesh
from distill3d.meshes.mesh import RADIUS, Mesh, placed, rotated
from distill3d.objectives import METHODS, SDI
from distill3d.runs.objects import Config, generate, load_scene, read_config, render_views, resume
from distill3d.scenes.mesh import MeshOptions, MeshScene

FEW = ["--steps", "2", "--views-per-step", "1", "--frames", "2", "--texture-size", "128", "--set",
       "objective.inversion_steps=2"]  # fmt: skip


@pytest.fixture
def ball(tmp_path):
    """A gray ball far from the origin, as a file."""
    solid = trimesh.creation.icosphere(2, radius=5.0).apply_translation([10, 0, 3])
    vertices = np.array(solid.vertices)
    save_mesh(tmp_path / "ball.glb", Mesh(vertices, np.array(solid.faces), np.full_like(vertices, 0.4)))
    return tmp_path / "ball.glb"


def only_run(folder):
    (run,) = [path for path in folder.iterdir() if (path / "config.json").is_file()]
    return run


def corners(path):
    mesh = read_mesh(path)
    return mesh.vertices[mesh.faces]


def small(path, **changes):
    scene = MeshOptions(mesh=str(path), levels=(8, 16))
    base = dataclasses.replace(
        LAPTOP_TEXTURE, steps=4, views=1, frames=2, scene=scene, objective=SDI(inversion_steps=2),
        export=ExportOptions(texture=64),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_texture_paints_and_leaves_the_geometry_alone(ball, tmp_path, capsys):
    assert cli.run(["texture", str(ball), "a red apple", "--out", str(tmp_path / "runs"), *FEW]) == 0
    printed = capsys.readouterr().out
    assert "making a UV map for ball.glb: it has none" in printed and "2 steps in " in printed
    run = only_run(tmp_path / "runs")
    assert {"mesh.glb", "preview.png", "turntable.mp4", "metrics.jsonl", "source.npz"} <= {
        p.name for p in run.iterdir()
    }
    np.testing.assert_allclose(corners(run / "mesh.glb"), corners(ball), atol=1e-5)
    found = read_mesh(run / "mesh.glb")
    assert found.textures[0].shape == (128, 128, 3) and np.ptp(found.textures[0].astype(int)) > 5
    assert cli.run(["export", str(run), "--format", "obj"]) == 0
    np.testing.assert_allclose(corners(run / "mesh.obj"), corners(ball), atol=1e-4)
    target = tmp_path / "b.ply"
    capsys.readouterr()
    assert cli.run(["export", str(run), "--out", str(target), "--size", "2", "--pivot", "bottom"]) == 0
    assert "y up, 2 x 2 x 2 (width x depth x height), origin at its bottom" in capsys.readouterr().out
    vertices = trimesh.load(target, process=False).vertices  # in the axes of the mesh that was given, y up
    np.testing.assert_allclose([vertices.min(0), vertices.max(0)], [[-1, 0, -1], [1, 2, 1]], atol=1e-3)
    for wrong in (["--out", str(ball / "x.glb")], ["--out", str(tmp_path)], ["--size", "0"], ["--up", "z"]):
        assert cli.run(["export", str(run), *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("distill3d: ") and error.count("\n") == 1


def test_a_stopped_run_goes_on_to_the_same_end_wherever_its_folder_is(ball, kl_folder, tmp_path):
    def stop(progress):
        if progress.step == 1:
            raise KeyboardInterrupt

    config = Config("a cat", small(ball), prior=str(kl_folder))
    whole = generate(config, tmp_path)
    part = generate(config, tmp_path, on_step=stop)
    assert part.interrupted and read_config(part.folder).recipe.scene.mesh.endswith("source.npz")
    assert json.loads((part.folder / "config.json").read_text())["recipe"]["scene"]["mesh"] == "source.npz"
    ball.unlink()
    moved = part.folder.rename(tmp_path / "elsewhere")
    resume(moved)
    assert torch.equal(render_views(load_scene(moved), 2, 32), render_views(load_scene(whole.folder), 2, 32))


def test_refine_moves_texture_and_surface_of_a_run(ball, kl_folder, tmp_path, capsys):
    run = generate(Config("a cat", small(ball), prior=str(kl_folder)), tmp_path / "runs").folder
    options = ["--steps", "2", "--texture-size", "64", "--move", "0.3", "--out", str(tmp_path / "refined")]
    assert cli.run(["refine", str(run), *options, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "peak memory:" in planned and "in 2 steps" in planned and not (tmp_path / "refined").exists()
    assert cli.run(["refine", str(run), *options]) == 0
    refined = only_run(tmp_path / "refined")
    before, after = corners(run / "mesh.glb"), corners(refined / "mesh.glb")
    assert before.shape == after.shape
    change = np.abs(after - before).max()
    assert 1e-4 < change < 1.0  # in the run's own unit, of a ball of radius 5
    assert read_config(refined).prompt == "a cat"


def test_refine_prints_the_path_as_it_was_typed(ball, kl_folder, tmp_path, capsys, monkeypatch):
    run = generate(Config("a cat", small(ball), prior=str(kl_folder)), tmp_path / "runs").folder
    flags = ["--steps", "1", "--texture-size", "64"]
    for place, typed, printed in (
        (tmp_path, f"runs/{run.name}", "runs/"),
        (run.parent, run.name, ""),
        (run, ".", "../"),
        (tmp_path, str(run), f"{run.parent}/"),
    ):
        monkeypatch.chdir(place)
        capsys.readouterr()
        assert cli.run(["refine", typed, *flags]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith("/mesh.glb"))
        assert re.fullmatch(rf"  {re.escape(printed)}a-cat-[^/]+/mesh.glb", line), (typed, line)


def test_a_run_without_a_mesh_says_so_and_has_a_status_of_its_own(tmp_path, capsys):
    flags = ["--steps", "1", "--views-per-step", "1", "--frames", "2", "--out", str(tmp_path)]
    low = ["--set", "export.level=1e6", "--set", "export.resolution=8", "--set", "scene.resolution=8"]
    assert cli.run(["generate", "a red mushroom", "--method", "sdi", *flags, *low]) == 4
    error = capsys.readouterr().err
    assert error.count("warning: no mesh written: nothing to export") == 1 and "has no mesh" in error
    (folder,) = tmp_path.iterdir()
    assert cli.run(["export", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill3d: nothing to export") and error.count("\n") == 1

    (tmp_path / "prompts.txt").write_text("a red mushroom\na blue car\n")
    assert cli.run(["generate", f"@{tmp_path / 'prompts.txt'}", "--method", "sdi", *flags, *low]) == 4
    assert len(list(tmp_path.glob("a-blue-car-*"))) == 1  # the first one without a mesh does not end the list


def test_the_mesh_to_begin_with_can_be_turned(ball):
    config = cli.parse(["generate", "a cat", "--init", str(ball), "--up", "z", "--turn", "90"]).config()
    assert (config.init_up, config.init_turn) == ("z", 90.0)
    with pytest.raises(ValueError, match="pass --init FILE"):
        cli.parse(["generate", "a cat", "--turn", "90"]).config()
    mesh = read_mesh(ball)
    turned = rotated(replace_vertices(mesh), 90)
    np.testing.assert_allclose(turned.vertices[0], [-2, 1, 3], atol=1e-12)


def replace_vertices(mesh):
    return dataclasses.replace(mesh, vertices=np.concatenate(([[1.0, 2, 3]], mesh.vertices[1:])))


def test_refinement_begins_with_the_colors_that_are_there():
    recipe = refinement(LAPTOP_TEXTURE, 5, 0.05, 0.1)
    assert recipe.scene.colors and recipe.scene.move == 0.1
    assert recipe.objective.start == 0.05 >= recipe.objective.stop
    assert from_mesh(DISTILL).objective.start == 0.6
    assert all(isinstance(r.scene, MeshOptions) for r in TEXTURE_RECIPES.values())


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"vsd", "esd", "rfds", "flowdreamer"}))
def test_no_method_looks_at_times_above_the_start(name, mixture):
    """The lower the start, the less a mesh is changed: that is for every method."""
    recipe = dataclasses.replace(LAPTOP_TEXTURE, objective=METHODS[name])
    generator = torch.Generator().manual_seed(0)
    objective = refinement(recipe, 60, 0.3, 0.03).objective.build(mixture, 60, generator)
    times = torch.cat([objective.timesteps(step, 60, 4 * objective.views, generator) for step in range(0, 60, 5)])
    assert 0.05 < times.max() <= 0.3


def test_a_mesh_to_be_painted_or_begun_with_is_seen_whole():
    for recipe in (*TEXTURE_RECIPES.values(), DISTILL):
        assert recipe.cameras.visible_radius == pytest.approx(RADIUS, rel=0.02)
    assert PAPER.cameras.visible_radius < 0.6  # so meshes are made smaller there


def test_generate_begins_with_the_mesh(ball, kl_folder, tmp_path):
    scene = dataclasses.replace(DISTILL.scene, resolution=64, refine=())
    recipe = dataclasses.replace(DISTILL, steps=1, views=1, frames=2, scene=scene, learning_rate=1e-6)
    recipe = dataclasses.replace(recipe, export=ExportOptions(texture=64, resolution=32, fit=0))
    run = generate(Config("a cat", recipe, prior=str(kl_folder), init=str(ball)), tmp_path).folder
    wanted = render_views(MeshScene(placed(read_mesh(ball)), MeshOptions(colors=True)), 2, 48)
    found = render_views(load_scene(run), 2, 48)
    assert -10 * float((found - wanted).square().mean().log10()) > 25
    assert read_config(run).init == str(ball)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.glb", "a red apple"], "there is no file nothing.glb"),
        (["{ball}", "a red spoon"], "the bundled prior does not know any object"),
        (["{ball}", "a red apple", "--texture-size", "0"], "a texture must have 8 to 8192 texels"),
        (["{ball}", "a red apple", "--method", "magic"], "unknown method 'magic'"),
        (["{ball}", "a red apple", "--recipe", "splats"], "unknown recipe 'splats'; allowed: laptop, paper"),
        (["{ball}", "a red apple", "--out", "apple.glb"], "--out is the folder for run folders, got apple.glb"),
        (["a red apple", "{ball}"], 'MESH comes before PROMPT: distill3d texture {ball} "a red apple"'),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(arguments, message, ball, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["texture", *(word.format(ball=ball) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill3d: ") and message.format(ball=ball) in error
    assert list(tmp_path.iterdir()) == [ball]


def test_a_run_without_a_mesh_cannot_be_refined(ball, kl_folder, tmp_path, capsys):
    run = generate(Config("a cat", small(ball, steps=1), prior=str(kl_folder)), tmp_path).folder
    (run / "mesh.glb").unlink()
    assert cli.run(["refine", str(run)]) == 2
    assert f"has no mesh.glb to refine; write one with: distill3d export {run}" in capsys.readouterr().err
