"""Input of any size and kind ends in one line, and nothing in it reaches the terminal as a command."""

import json
import shutil
from pathlib import Path

import pytest

from distill3d.bench.cells import Outcome, read_outcome, write_outcome
from distill3d.cli import main as cli
from distill3d.distill.recipes import DISTILL
from distill3d.prompts import MAX_LENGTH, ViewPrompts, read_prompts
from distill3d.runs.config import from_plain
from distill3d.runs.objects import Config
from distill3d.scenes.voxels import VoxelOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one step."""
    from dataclasses import replace

    from distill3d.export.options import ExportOptions
    from distill3d.runs.objects import generate

    recipe = replace(DISTILL, steps=1, views=1, frames=1, render_size=8, scene=VoxelOptions(resolution=8))
    recipe = replace(recipe, export=ExportOptions(texture=None, resolution=8, fit=0))
    return generate(Config("a red mushroom", recipe), tmp_path_factory.mktemp("runs")).folder


def refused(capsys, *arguments):
    """The one line of a command that cannot be done."""
    assert cli.run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill3d: ") and error.count("\n") == 1 and len(error) < 400
    assert error[:-1].isprintable()
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0"], "the size must be 1 to 4096 pixels per side, got 0"),
        (["--size", "-5"], "the size must be 1 to 4096 pixels per side, got -5"),
        (["--size", "1000000"], "the size must be 1 to 4096 pixels per side, got 1000000"),
        (["--frames", "0"], "at least one view"),
        (["--frames", "100000000"], "at most 10000"),
        (["--elevation", "nan"], "elevation must lie in"),
    ],
)
def test_a_video_has_a_size_that_is_possible(arguments, message, run, tmp_path, capsys):
    assert message in refused(capsys, "render", str(run), "--out", str(tmp_path / "a.mp4"), *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a red mushroom " * 1000], "the prompt has 15,000 characters ('a red mushroom"),
        (["generate", "a red mushroom", "--negative", "x" * 5000], f"the limit is {MAX_LENGTH}"),
        (["generate", "a red mushroom", "--back", "x" * 5000], "the prompt of the back has 5,000"),
        (["generate", "a red mushroom", "--seed", "-1"], "the seed must be a whole number from 0"),
        (["image", "a red mushroom", "--seed", "99999999999999999999"], "2**63"),
        (["generate", "a red mushroom", "--steps", "99999999999"], "at most 10000000"),
        (["generate", "a red mushroom", "--views-per-step", "1000000"], "at most 10000000 and 10000"),
        (["generate", "a red mushroom", "--render-size", "1000000"], "8 to 4096 pixels"),
        (["generate", "a red mushroom", "--image-size", "1000000"], "at most 4096"),
        (["generate", "a red mushroom", "--set", "scene.resolution=100000"], "2 to 1024"),
        (["generate", "a red mushroom", "--learning-rate", "nan"], "finite number"),
        (["generate", "a red mushroom", "--learning-rate", "1e39"], "must lie in [0, 1,000,000]"),
        (["image", "a red mushroom", "--learning-rate", "1e39"], "must lie in (0, 1,000,000]"),
        (["generate", "a red mushroom", "--scale", "inf"], "finite number"),
        (["image", "a red mushroom", "--steps", "99999999999"], "at most 10000000"),
        (["generate", "@/dev/zero"], "/dev/zero has more than"),
        (["generate", "a red mushroom", "--config", "/dev/zero"], "/dev/zero has more than"),
        (["bench", "--prompts", "@/dev/zero"], "no prompt file /dev/zero"),
    ],
)
def test_what_is_too_large_is_refused_at_once(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


ESCAPE = "\x1b]0;title\x07\x1b[31m"


@pytest.mark.parametrize("word", ["a red \udcff mushroom", f"a red {ESCAPE}mushroom", "a\0b", "a \u202e mushroom"])
def test_an_argument_is_text(word, capsys):
    for line in (["generate", word], ["render", word], ["bench", "--prompts", word], ["image", "x", f"--out={word}"]):
        assert "arguments must be UTF-8 text without control characters" in refused(capsys, *line)


def test_a_prompt_is_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"a red car\na red {ESCAPE}mushroom\n")
    assert "the prompt holds the character '\\x1b'" in refused(capsys, "generate", f"@{tmp_path / 'a.txt'}")
    with pytest.raises(ValueError, match=r"'\\udcff', which is no text"):
        ViewPrompts("a \udcff cat")
    with pytest.raises(ValueError, match="has more than 1,048,576 bytes"):
        (tmp_path / "b.txt").write_text("a cat\n" * 200_000)
        read_prompts(f"@{tmp_path / 'b.txt'}")
    assert ViewPrompts("ein grünes Haus 日本 👩‍🚀\nand more").prompt


def test_nothing_in_a_file_reaches_the_terminal_as_a_command(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    for change in ({"kind": ESCAPE}, {"dtype": ESCAPE}, {"format": ESCAPE}, {ESCAPE: 1}, {"prompt": ESCAPE}):
        (folder / "config.json").write_text(json.dumps(content | change))
        assert ("x1b" in refused(capsys, "resume", str(folder))) or "format" in change
    (tmp_path / "a.obj").write_text(f"usemtl {ESCAPE}\nmtllib {ESCAPE}\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 {ESCAPE}\n")
    assert "x1b" in refused(capsys, "texture", str(tmp_path / "a.obj"), "a red car")
    shown = Path(tmp_path / f"m{ESCAPE}")
    shutil.copytree(run, shown)
    assert cli.run(["resume", str(run)]) == 0
    (run / f"x{ESCAPE}").write_text("")
    capsys.readouterr()
    assert cli.run(["resume", str(run)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_numbers_of_a_configuration_are_finite():
    for plain in ({"learning_rate": float("nan")}, {"decay": float("inf")}, {"steps": 2**70}):
        with pytest.raises(ValueError, match=r"a finite number is needed|below 2\*\*63 is needed"):
            from_plain(Config, {"prompt": "a car", "recipe": plain})


def test_every_changed_file_of_a_cell_is_told(tmp_path):
    outcome = Outcome("sds", "a", 0, 1, 1.0, 2, 3)
    (tmp_path / "views.png").write_bytes(b"abc")
    write_outcome(tmp_path, outcome)
    assert read_outcome(tmp_path) == outcome
    whole = (tmp_path / "cell.json").read_text()
    (tmp_path / "cell.json").write_text(whole.replace('"seconds": 1.0', '"seconds": 9.0'))
    with pytest.raises(ValueError, match="does not have the checksum that it states"):
        read_outcome(tmp_path)
    (tmp_path / "cell.json").write_text(whole)
    for change in ((tmp_path / "views.png").write_bytes, lambda _: (tmp_path / "views.png").unlink()):
        change(b"abd")
        with pytest.raises(ValueError, match=r"views\.png.*delete its folder to make the cell again"):
            read_outcome(tmp_path)


def test_a_run_whose_settings_were_changed_says_so(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace('"density_scale": 10.0', '"density_scale": 9.0'))
    assert cli.run(["render", str(folder), "--size", "16", "--frames", "1"]) == 0
    assert f"{folder / 'config.json'} was changed since the checkpoint" in capsys.readouterr().err


def test_a_cell_is_what_was_written(tmp_path):
    whole = {"variant": "sds", "prompt": "a", "seed": 0, "steps": 1, "seconds": 1.0, "nfe": 2, "peak_memory": 3}
    (tmp_path / "cell.json").write_text(json.dumps(whole))
    assert read_outcome(tmp_path).failure == ""
    for change in ({"steps": "1"}, {"seconds": float("nan")}, {"seed": None}, {"more": 1}, {"failure": ["x"]}):
        (tmp_path / "cell.json").write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=r"cell\.json is damaged"):
            read_outcome(tmp_path)
