"""The command line as a user meets it: the whole path at reduced size, and every mistake in one line."""

import json
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
from distill3d.distill.recipes import RECIPES
from distill3d.runs.objects import Config, check_prompt, generate, read_config

TOYBOX = Path(str(resources.files("distill3d"))) / "assets" / "toybox"
SMALL = ["--steps", "8", "--views", "1", "--frames", "8", "--scene.resolution", "24", "--sdi.inversion-steps", "2",
         "--export.resolution", "48", "--export.fit", "2"]  # fmt: skip


def distill3d(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distill3d", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the real command, made once."""
    out = tmp_path_factory.mktemp("runs")
    done = distill3d("generate", "a red mushroom", "--out", str(out), "--seed", "3", *SMALL)
    assert done.returncode == 0, done.stderr
    (folder,) = out.iterdir()
    assert str(folder) in done.stdout
    return folder


def test_the_run_folder_is_complete(run):
    assert run.name.startswith("a-red-mushroom-")
    config = read_config(run)
    assert (config.prompt, config.seed, config.recipe.steps) == ("a red mushroom", 3, 8)
    assert config.recipe.scene.resolution == 24
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[0]["t"] == pytest.approx(config.recipe.sdi.start)
    assert lines[-1]["t"] == pytest.approx(config.recipe.sdi.stop)
    assert lines[-1]["nfe"] > lines[0]["nfe"] > 0


def test_the_mesh_opens_upright_and_closed(run):
    mesh = trimesh.load(run / "mesh.glb", force="mesh")
    assert len(mesh.faces) > 100 and np.isfinite(mesh.vertices).all()
    assert np.abs(mesh.vertices).max() <= 1.1
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # a GLB doubles vertices along the seams of its texture
    assert mesh.is_watertight and mesh.volume > 0


def test_the_video_and_the_picture_show_the_object(run):
    with av.open(str(run / "turntable.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (256, 256, 3)
    assert all(f.std() > 2 for f in frames)
    assert np.abs(frames[0].astype(float) - frames[2]).mean() > 0.1  # it turns
    with Image.open(run / "preview.png") as picture:
        assert picture.size[0] > 2 * picture.size[1] * 0.9 and picture.size[0] >= 4 * 256
        assert np.asarray(picture).std() > 2


def test_export_render_and_resume_start_from_the_run(run, tmp_path):
    assert cli.run(["export", str(run), "--format", "ply", "--resolution", "32", "--out", str(tmp_path / "m.ply")]) == 0
    assert len(trimesh.load(tmp_path / "m.ply").faces) > 100
    assert cli.run(["render", str(run), "--frames", "3", "--size", "64", "--out", str(tmp_path / "t.mp4")]) == 0
    with av.open(str(tmp_path / "t.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    config = read_config(run)
    again = generate(config, tmp_path)
    assert (again.folder / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert (again.folder / "mesh.glb").read_bytes() == (run / "mesh.glb").read_bytes()


def test_an_interrupted_run_writes_its_artifacts_and_continues_to_the_same_end(run, tmp_path):
    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    result = generate(read_config(run), tmp_path, on_step=stop)
    assert result.interrupted and result.steps == 4
    for name in ("mesh.glb", "turntable.mp4", "preview.png", "metrics.jsonl", "config.json"):
        assert (result.folder / name).stat().st_size > 0
    assert cli.run(["resume", str(result.folder)]) == 0
    ended = [json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ended == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate", "a red mushroom", "--seed", "abc"], "--seed takes a whole number, got 'abc'"),
        (["generate", "a red mushroom", "--prior", "nonsense"], "unknown prior 'nonsense'"),
        (["generate", "a red mushroom", "--method", "magic"], "allowed: sdi, sds"),
        (["generate", "a red mushroom", "--recipe", "soup"], f"allowed: {', '.join(RECIPES)}"),
        (["generate", "a red mushroom", "--steps", "0"], "at least one step"),
        (["generate", "a red mushroom", "--color", "3"], "--color"),
        (["generate"], "missing: What to make"),
        (["generate", "a red mushroom", "--steps"], "--steps takes a value, got none; see distill3d generate --help"),
        (["generate", "a red mushroom", "--export.texture", "big"], "takes a whole number or None, got 'big'"),
        (["generate", "a red mushroom", "--export.texture", "0"], "distill3d: a texture has 8 to 8192 texels a side"),
        (["generate", "a red mushroom", "--dtype", "fp8"], "--dtype cannot be 'fp8'; allowed: auto, float32,"),
        (["generate", "a red mushroom", "--methd", "sds"], "unknown: --methd sds; perhaps you mean --method"),
        (["genrate", "a red mushroom"], "perhaps you mean generate"),
        (["generate", "a red mushroom", "--cameras.distance", "1"], "--cameras.distance takes 2 values"),
        (["generate", "a red mushroom", "--cameras.fov", "3", "a"], "--cameras.fov takes other values, got '3', 'a'"),
        (["generate", "a red mushroom", "--penalties.opaque.start", "----5"], "got '----5'"),
        ([","], "unknown: a lone comma or an empty word; allowed: generate"),
        ([""], "unknown: a lone comma or an empty word; allowed: generate"),
        (["paper"], "which? table1, ism"),
        (["dance"], "unknown: dance; allowed: generate, "),
        (["resume", "/nowhere"], "no run"),
        (["export", "/nowhere"], "no run"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_folder_that_is_no_model_and_truncated_weights_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "runs")]
    assert cli.run(["generate", "a red mushroom", "--prior", str(tmp_path), *out]) == 2
    assert "no model_index.json" in capsys.readouterr().err
    broken = tmp_path / "model"
    shutil.copytree(TOYBOX, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert cli.run(["generate", "a red mushroom", "--prior", str(broken), *out]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert cli.run(["generate", "a red mushroom", "--out", str(tmp_path / "file" / "runs")]) == 2
    assert "choose another folder with --out" in capsys.readouterr().err


def test_a_prompt_beyond_the_bundled_prior_names_what_is_known(capsys):
    assert cli.run(["generate", "a corgi on the moon"]) == 2
    error = capsys.readouterr().err
    assert "mushroom" in error and "purple" in error and "--prior" in error and "--force" in error
    check_prompt("a corgi on the moon", "toybox", force=True)
    check_prompt("a corgi on the moon", "some/other-model")
    with pytest.warns(UserWarning, match="never read: shiny"):
        check_prompt("a shiny red car", "toybox")


def test_config_survives_its_file(tmp_path):
    from distill3d.runs.objects import write_config

    config = Config("a «red» mushroom", recipe=RECIPES["laptop"], seed=7)
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config


def test_help_names_every_command():
    done = distill3d("--help")
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert name in done.stdout
