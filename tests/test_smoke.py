"""One pass through the program: what runs first on other versions of Python and of the libraries."""

from importlib import resources
from pathlib import Path

from PIL import Image

from distill3d.cli import main as cli
from distill3d.meshes.files import read_mesh

TOYBOX = str(Path(str(resources.files("distill3d"))) / "assets" / "toybox")
SCENE = ["--recipe", "distill", "--steps", "1", "--set", "scene.resolution=16"]
EXPORT = ["--set", "objective.inversion_steps=1", "--texture-size", "64"]
EXPORT += ["--set", "export.resolution=24", "--set", "export.fit=0"]


def test_every_part_works(tmp_path, capsys):
    runs, bench = tmp_path / "runs", tmp_path / "bench"
    generate = ["generate", "a red mushroom", "--prior", TOYBOX, "--views-per-step", "1", "--frames", "8"]
    assert cli.run([*generate, *SCENE, *EXPORT, "--out", str(runs)]) == 0
    (run,) = runs.iterdir()
    assert (run / "turntable.mp4").stat().st_size and Image.open(run / "preview.png").size[0] > 64
    whole = len(read_mesh(run / "mesh.glb").faces)
    for name in ("a.obj", "a.ply"):
        assert cli.run(["export", str(run), "--out", str(tmp_path / name)]) == 0
        assert len(read_mesh(tmp_path / name).faces) == whole
    assert cli.run(["resume", str(run)]) == 0
    assert cli.run(["image", "a red mushroom", "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    small = ["--methods", "sds", "--prompts", "a red mushroom", "--views", "2", "--view-size", "32"]
    assert cli.run(["bench", *small, *SCENE, "--out", str(bench)]) == 0
    assert "sds" in (bench / "table.md").read_text() and (bench / "report.html").stat().st_size > 100_000
    assert "Traceback" not in capsys.readouterr().err
