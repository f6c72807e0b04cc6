"""A run of splats, end to end."""

import pytest

from distill3d.cli import main as cli
from distill3d.export.splats import load_splats
from distill3d.runs.objects import load_scene

SMALL = ["--recipe", "splats", "--prior", "toybox", "--steps", "2", "--views", "1", "--frames", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    sizes = ["--scene.count", "50", "--sdi.inversion-steps", "2"]
    assert cli.run(["generate", "a red mushroom", *SMALL, *sizes, "--out", str(out)]) == 0
    return next(out.iterdir())


def test_a_run_of_splats_leaves_splats(run, tmp_path):
    assert {path.name for path in run.iterdir()} >= {"splats.ply", "preview.png", "turntable.mp4", "checkpoint"}
    assert not (run / "mesh.glb").exists()
    assert len(load_splats(run / "splats.ply")) == len(load_scene(run).means)
    assert cli.run(["export", str(run), "--format", "ply", "--out", str(tmp_path / "again.ply")]) == 0
    assert (tmp_path / "again.ply").read_bytes() == (run / "splats.ply").read_bytes()


def test_splats_are_no_glb(run, capsys):
    assert cli.run(["export", str(run)]) == 2
    assert "type --format ply" in capsys.readouterr().err
