"""The examples, run at toy size: each does what its first line says, and fits on a screen."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import trimesh

from distill3d.distill.recipes import DISTILL, LAPTOP_TEXTURE
from distill3d.export.options import ExportOptions

SMALL = dict(
    steps=2, views=1, frames=2, export=ExportOptions(texture=64, resolution=24, fit=0),
)  # fmt: skip
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "sdi_in_your_own_trainer.ipynb"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


def test_every_example_is_tested():
    tests = Path(__file__).read_text()
    assert len(NAMES) == 9 and all(f'load("{name}")' in tests for name in NAMES)


@pytest.mark.parametrize(("steps", "scale"), [(25, 7.5), (5, 0.0)])
def test_sdi_is_ddim(steps, scale):
    assert load("01_sdi_is_ddim").theorem(steps, scale) < 1e-9


def test_closed_forms():
    # Rounding, then what is stated to be approximate: the start of a walk above zero noise, and sampling error.
    tolerances = {"exact inversion": 1e-4, "not zero": 1e-4, "mean gradient": 5e-3, "standard deviation": 5e-3}
    rows = load("08_closed_forms").rows()
    assert len(rows) == 6
    for what, expected, computed in rows:
        tolerance = next((value for key, value in tolerances.items() if key in what), 2e-6)
        assert abs(expected - computed) <= tolerance, what


@pytest.mark.parametrize(("steps", "scale"), [(25, 7.5), (5, 0.0)])
def test_constant_noise_is_ddim(steps, scale):
    cfd, whole_steps = load("09_constant_noise").differences(scale, steps)
    assert cfd < 1e-10 and whole_steps > 0.05


def test_own_training_loop():
    brightness = load("02_own_training_loop").main(steps=3)
    assert len(brightness) == 3 and brightness[0] != brightness[-1]


def test_own_objective_and_reading_its_run(tmp_path):
    result = load("03_own_objective").main(dataclasses.replace(DISTILL, **SMALL), str(tmp_path))
    assert result.steps == 2 and (result.folder / "turntable.mp4").is_file()


def test_own_scene():
    scene = load("04_own_scene").main(steps=2)
    assert bool((scene.colors != 0).any()) and bool(scene.positions.isfinite().all())


def test_images(tmp_path):
    files = load("05_images").main(str(tmp_path), steps=3)
    assert all(Path(file).is_file() for file in files)


def test_texturing_a_mesh_and_reading_the_run(tmp_path, capsys):
    trimesh.creation.icosphere(subdivisions=2, radius=0.6).export(tmp_path / "ball.glb")
    recipe = dataclasses.replace(LAPTOP_TEXTURE, **SMALL)
    result = load("06_texture_a_mesh").main(str(tmp_path / "ball.glb"), "a red apple", recipe, str(tmp_path))
    assert result.mesh is not None and result.mesh.name == "mesh.glb"
    moved = tmp_path / "elsewhere"
    shutil.move(result.folder, moved)
    summary = load("07_read_a_run").main(str(moved))
    assert summary["nfe"] > 0 and 0.05 < summary["opacity"] < 0.9 and "'a red apple'" in capsys.readouterr().out


def test_the_notebook_runs_from_top_to_bottom():
    """In a kernel of its own, with few steps, as Jupyter runs it."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    loop = next(cell for cell in notebook.cells if "steps = 40" in cell.source)
    loop.source = loop.source.replace("steps = 40", "steps = 3")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in shown if o.get("name") == "stderr" and "TqdmWarning" not in o.text]  # no ipywidgets
    assert sum("image/png" in o.get("data", {}) for o in shown) == 2
    printed = "".join(output.text for output in notebook.cells[-2].outputs)
    assert all(f"{name}: " in printed for name in ("sds", "ism", "cfd"))


def test_the_notebook_is_stored_without_outputs_but_for_a_small_picture():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert len(outputs) == 1 and list(outputs[0]["data"]) == ["image/jpeg"]
    assert NOTEBOOK.stat().st_size < 30_000
    assert all(cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
