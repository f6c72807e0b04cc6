"""The command line as a user meets it: a whole run at reduced size, and every error in one line."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import av
import numpy as np
import pytest
import trimesh
from PIL import Image

from distill3d.cli import main as cli
from distill3d.cli.objects import object_bar
from distill3d.distill.divergence import Diverged
from distill3d.distill.loop import Progress
from distill3d.distill.recipes import RECIPES
from distill3d.interrupts import Interrupted
from distill3d.runs.objects import check_prompt, generate, read_config

TOYBOX = Path(str(resources.files("distill3d"))) / "assets" / "toybox"
SMALL = ["--recipe", "distill", "--steps", "8", "--views-per-step", "1", "--frames", "8"]
SMALL += ["--set", "scene.resolution=24", "--set", "objective.inversion_steps=2"]
SMALL += ["--set", "export.resolution=48", "--set", "export.fit=2"]


def distill3d(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distill3d", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The finished process of the real command, run once, and its run folder."""
    out = tmp_path_factory.mktemp("runs")
    process = distill3d("generate", "a red mushroom", "--out", str(out), "--seed", "3", *SMALL)
    assert process.returncode == 0, process.stderr
    (folder,) = out.iterdir()
    return process, folder


@pytest.fixture(scope="module")
def run(done) -> Path:
    return done[1]


def fails(capsys, *arguments):
    """The one line that is printed for an error of the user's."""
    assert cli.run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill3d: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_by_default_views_of_the_multi_view_prior_are_sampled(tmp_path):
    small = ["--steps", "6", "--frames", "2", "--set", "scene.resolution=24", "--set", "sampling.joint_levels=8"]
    small += ["--set", "sampling.levels=2", "--set", "export.resolution=32", "--set", "export.fit=1"]
    process = distill3d("generate", "a red mushroom", "--out", str(tmp_path), *small)
    assert process.returncode == 0, process.stderr
    (folder,) = tmp_path.iterdir()
    config = read_config(folder)
    assert config.prior == "toybox-mv" and config.recipe.sampling.levels == 2
    times = [json.loads(line)["t"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert times[:2] == [0.0, 0.0] and times[2] == pytest.approx(0.98 * 0.6) and (folder / "mesh.glb").stat().st_size


def test_the_run_folder_is_complete(run):
    assert run.name.startswith("a-red-mushroom-")
    config = read_config(run)
    assert (config.prompt, config.seed, config.recipe.steps) == ("a red mushroom", 3, 8)
    assert config.recipe.scene.resolution == 24
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[0]["t"] == pytest.approx(config.recipe.objective.start)
    assert lines[-1]["t"] == pytest.approx(config.recipe.objective.stop)
    assert lines[-1]["nfe"] > lines[0]["nfe"] > 0


def test_the_summary_names_steps_times_evaluations_and_files(done):
    process, run = done
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    summary, *files = process.stdout.splitlines()
    found = re.fullmatch(r"8 steps in (.*) with ([\d,]+) NFE, files in (.*):", summary)
    assert found and int(found[2].replace(",", "")) == last["nfe"]
    assert f"{found[1]}, left" in " ".join(process.stderr.split())  # the bar shows the same time
    names = {"config.json", "mesh.glb", "metrics.jsonl", "preview.png", "turntable.mp4"}
    assert {Path(file.strip()) for file in files} == {run / name for name in names}


def test_the_mesh_opens_upright_and_closed(run):
    mesh = trimesh.load(run / "mesh.glb", force="mesh")
    assert len(mesh.faces) > 100 and np.isfinite(mesh.vertices).all()
    assert np.abs(mesh.vertices).max() <= 1.1
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # a GLB doubles vertices along the seams of its texture
    assert mesh.is_watertight and mesh.volume > 0


def test_the_video_and_the_image_show_the_object(run):
    with av.open(str(run / "turntable.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (256, 256, 3)
    assert all(f.std() > 2 for f in frames)
    assert np.abs(frames[0].astype(float) - frames[2]).mean() > 0.1  # it turns
    with Image.open(run / "preview.png") as image:
        assert image.size[0] > 2 * image.size[1] * 0.9 and image.size[0] >= 4 * 256
        assert np.asarray(image).std() > 2


def test_export_render_and_resume_start_from_the_run(run, tmp_path, capsys):
    assert cli.run(["export", str(run), "--resolution", "32", "--out", str(tmp_path / "m.ply")]) == 0
    faces = len(trimesh.load(tmp_path / "m.ply").faces)
    assert faces > 100 and f"{tmp_path / 'm.ply'}: " in capsys.readouterr().out
    assert cli.run(["export", str(run), "--format", "obj", "--texture-size", "64"]) == 0
    assert len(trimesh.load(run / "mesh.obj").faces) > 100
    files = {str(run / name) for name in ("mesh.obj", "mesh.mtl", "mesh.png")}
    assert files == {line.split(":")[0] for line in capsys.readouterr().out.splitlines()}
    for file in files:
        Path(file).unlink()
    assert (
        cli.run(
            ["render", str(run), "--frames", "3", "--size", "64", "--device", "cpu", "--out", str(tmp_path / "t.mp4")]
        )
        == 0
    )
    with av.open(str(tmp_path / "t.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    config = read_config(run)
    again = generate(config, tmp_path)
    steps = [[json.loads(line) | {"seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
             for folder in (again.folder, run)]  # fmt: skip
    assert steps[0] == steps[1]
    assert (again.folder / "mesh.glb").read_bytes() == (run / "mesh.glb").read_bytes()


def test_an_interrupted_run_writes_its_artifacts_and_continues_to_the_same_end(run, tmp_path, capsys):
    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    result = generate(read_config(run), tmp_path, on_step=stop)
    assert result.interrupted and result.steps == 4
    for name in ("mesh.glb", "turntable.mp4", "preview.png", "metrics.jsonl", "config.json"):
        assert (result.folder / name).stat().st_size > 0
    assert cli.run(["resume", str(result.folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("8 steps in ")
    ended = [json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ended == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate", "a red mushroom", "--prior", "nonsense"], "unknown prior 'nonsense'"),
        (["generate", "a red mushroom", "--method", "magic"], "allowed: sdi, sds"),
        (["generate", "a red mushroom", "--recipe", "soup"], f"allowed: {', '.join(RECIPES)}"),
        (["generate", "a red mushroom", "--steps", "0"], "at least one step"),
        (["generate", "a red mushroom", "--texture-size", "0"], "8 to 8192 texels"),
        (["generate", "a red mushroom", "--set", "cameras.distance=1"], "recipe.cameras.distance"),
        (["generate", "a red mushroom", "--set", "stepz=1"], "did you mean steps"),
        (["generate", "a red mushroom", "--device", "tpu"], "cannot compute on 'tpu'"),
        (["generate", "a red mushroom", "--device", "cuda:77"], "cannot compute on 'cuda:77'"),
        (["generate", "a red mushroom", "--out", "mush.glb"], "distill3d export RUN --out FILE.glb"),
        (["generate", "a red mushroom", "--out", "thing.fbx"], "--out is the folder for run folders, got thing.fbx"),
        (["resume", "/nowhere"], "/nowhere is not a run folder"),
        (["export", "/nowhere"], "/nowhere is not a run folder"),
        (["export", "/nowhere", "--out", "thing.fbx"], "meshes are written as .glb, .obj or .ply, got --out thing.fbx"),
        (["export", "/nowhere", "--out", "thing"], "meshes are written as .glb, .obj or .ply, got --out thing"),
        (["export", "/nowhere", "--out", "a.ply", "--format", "glb"], "--format glb does not match --out a.ply"),
        (["render", "/nowhere", "--out", "thing.gif"], "--out must end in .mp4, got thing.gif"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("command", ["resume", "export", "render", "refine"])
def test_a_file_in_place_of_its_run_folder_is_explained(command, run, capsys):
    assert f"mesh.glb is a file: pass {run}" in fails(capsys, command, str(run / "mesh.glb"))


@pytest.mark.parametrize("command", ["resume", "export", "render", "refine"])
def test_a_run_of_another_kind_is_explained(command, kl_folder, tmp_path, capsys):
    flags = ["--prior", str(kl_folder), "--steps", "1", "--out", str(tmp_path)]
    assert cli.run(["image", "a dot", *flags]) == 0
    capsys.readouterr()
    (image,) = tmp_path.iterdir()
    assert "is a run of kind 'image'; this needs one of kind 'object'" in fails(capsys, command, str(image))


def test_a_folder_that_is_no_model_and_truncated_weights_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "runs")]
    assert "no model_index.json" in fails(capsys, "generate", "a red mushroom", "--prior", str(tmp_path), *out)
    broken = tmp_path / "model"
    shutil.copytree(TOYBOX, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "damaged" in fails(capsys, "generate", "a red mushroom", "--prior", str(broken), *out)
    assert not (tmp_path / "runs").exists()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    error = fails(capsys, "generate", "a red mushroom", "--out", str(tmp_path / "file" / "runs"))
    assert "choose another folder with --out" in error


def test_a_prompt_beyond_the_bundled_prior_names_what_is_known(capsys):
    assert cli.run(["generate", "a corgi on the moon"]) == 2
    error = capsys.readouterr().err
    assert "mushroom" in error and "purple" in error and "--prior" in error and "--force" in error
    check_prompt("a corgi on the moon", "toybox", force=True)
    check_prompt("a corgi on the moon", "some/other-model")
    with pytest.warns(UserWarning, match="does not know these words and will ignore them: shiny"):
        check_prompt("a shiny red car", "toybox")


@dataclasses.dataclass(frozen=True)
class Raising:
    """A command that ends with an error."""

    error: BaseException

    def run(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("too big"), 2, "distill3d: too big\n"),
        (OSError(28, "No space left on device", "a.glb"), 2, "distill3d: a.glb: No space left on device\n"),
        (OSError("cannot write a.glb: Is a directory"), 2, "distill3d: cannot write a.glb: Is a directory\n"),
        (ImportError("VSD needs peft"), 2, "distill3d: VSD needs peft\n"),
        (KeyboardInterrupt(), 130, "distill3d: interrupted\n"),
        (Interrupted(15), 143, "distill3d: interrupted\n"),
        (Diverged(4, "the loss"), 3, "distill3d: the run diverged in step 4 the loss is not finite: try"),
    ],
)
def test_how_a_command_may_end(error, status, line, monkeypatch, capsys):
    monkeypatch.setattr(cli, "parse", lambda argv: Raising(error))
    assert cli.run(["generate"]) == status
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes do not match"), ImportError("x", name="distill3d.types"), KeyError("x"), ArithmeticError()],
)
def test_an_error_of_the_program_is_not_hidden(error, monkeypatch):
    monkeypatch.setattr(cli, "parse", lambda argv: Raising(error))
    with pytest.raises(type(error)):
        cli.run(["generate"])


def test_the_bar_says_which_file_was_being_made_when_an_error_came(capsys):
    with pytest.raises(OSError, match="full"), object_bar(9, "distilling") as callbacks:
        callbacks["on_step"](Progress(step=3, t=0.5, loss=0.25, penalty=0.0, opacity=0.3, nfe=8))
        callbacks["on_file"]("3D file")
        raise OSError("full")
    said = capsys.readouterr().err
    assert "4/9" in said and "writing 3D file" in said and "loss" not in said


def test_files_of_a_run_without_a_step_left_are_named_too(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with object_bar(9, "distilling") as callbacks:
        callbacks["on_file"]("preview and turntable")
        callbacks["on_file"]("3D file")
    said = capsys.readouterr().err
    assert 0 < said.find("writing preview and turntable") < said.find("writing 3D file") and "0/9" not in said
