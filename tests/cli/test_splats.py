"""A run of splats, end to end."""

import pytest

from distill3d.cli import main as cli
from distill3d.export.splats import load_splats
from distill3d.runs.objects import load_scene

SMALL = ["--recipe", "Splats", "--prior", "toybox", "--steps", "2", "--views-per-step", "1", "--frames", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    sizes = ["--set", "scene.count=50", "--set", "objective.inversion_steps=2"]
    assert cli.run(["generate", "a red mushroom", *SMALL, *sizes, "--out", str(out)]) == 0
    return next(out.iterdir())


def test_a_run_of_splats_leaves_splats(run, tmp_path):
    assert {path.name for path in run.iterdir()} >= {"splats.ply", "preview.png", "turntable.mp4", "checkpoint"}
    assert not (run / "mesh.glb").exists()
    assert len(load_splats(run / "splats.ply")) == len(load_scene(run).means)
    for flags in (["--format", "ply"], []):
        assert cli.run(["export", str(run), *flags, "--out", str(tmp_path / "again.ply")]) == 0
        assert (tmp_path / "again.ply").read_bytes() == (run / "splats.ply").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "glb"], "--format ply"),
        (["--out", "splats.glb"], "--format ply"),
        (["--texture-size", "64", "--faces", "9"], "the export of a Gaussians does not use --texture-size, --faces"),
    ],
)
def test_splats_have_no_surface(flags, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["export", str(run), *flags]) == 2
    assert message in capsys.readouterr().err
    assert cli.run(["refine", str(run)]) == 2
    assert "has no mesh.glb to refine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
