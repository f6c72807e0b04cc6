"""`distill3d bench` as a user types it: mistakes are one line, what is asked for is there."""

import json

import pytest

from distill3d.cli import main as cli
from distill3d.distill.recipes import LAPTOP, METHODS


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n   \n\n")
    (tmp_path / "long.txt").write_text("a cat\n\n" + "very " * 4000 + "long\n")
    (tmp_path / "dog.txt").write_text("a dog\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--metrics", "clip_score,beauty"], "unknown metric 'beauty'; allowed: "),
        (["--metrics", ""], "--metrics is a list"),
        (["--methods", "sdi,magic"], f"unknown method 'magic'; allowed: {', '.join(METHODS)}"),
        (["--methods", "sdi,,sds"], "--methods is a list"),
        (["--methods", "sdi,sdi"], "method sdi is given twice"),
        (["--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--prompts", "blank.txt"], "holds no prompt"),
        (["--prompts", "long.txt"], "a line of 20004 characters"),
        (["--prompts", "dog.txt", "--prior", "toybox"], "knows no object in 'a dog'"),
        (["--seeds", "a,b"], "--seeds is a list of whole numbers"),
        (["--seeds", ""], "--seeds is a list of whole numbers"),
        (["--seeds", "0,0"], "seed 0 is given twice"),
        (["--views", "0"], "at least 2 views"),
        (["--views", "-3"], "at least 2 views"),
        (["--budget", "lots"], "the budget must be steps, nfe or a number"),
        (["--recipe.steps", "0"], "at least one step"),
        (["--recipe", "soup"], "unknown recipe 'soup'"),
        (["--evaluator", "nowhere"], "no evaluator in nowhere"),
        (["--reference", "nowhere"], "no pictures in nowhere"),
        (["--out", "dog.txt"], "cannot write to dog.txt"),
        (["--out", "."], "holds no bench"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, told, prompts, kl_folder, monkeypatch, capsys):
    monkeypatch.chdir(prompts)
    before = sorted(prompts.iterdir())
    usual = {"--prior": str(kl_folder), "--prompts": "dog.txt", "--out": "new"}
    given = [word for flag, value in usual.items() if flag not in arguments for word in (flag, value)]
    assert cli.run(["bench", *given, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("distill3d: ")]
    assert len(lines) == 1 and told in lines[0] and "Traceback" not in error
    assert sorted(prompts.iterdir()) == before  # nothing half-made


def test_recipe_settings_have_their_prefix():
    command = cli.parse(["bench", "--views", "9", "--recipe.views", "3", "--recipe.scene.resolution", "20"])
    assert (command.views, command.settings.views, command.settings.scene.resolution) == (9, 3, 20)
    assert command.settings.cameras == LAPTOP.cameras


def test_a_bench_of_another_version_is_left_alone(prompts, kl_folder, capsys):
    out = prompts / "old"
    (out / "cells" / "x").mkdir(parents=True)
    (out / "cells" / "x" / "cell.json").write_text("{}")
    old = {"format": 1, "version": "0.0.1", "conditions": {}, "variants": {}}
    (out / "bench.json").write_text(json.dumps(old))
    arguments = ["bench", "--prior", str(kl_folder), "--prompts", str(prompts / "dog.txt"), "--out", str(out)]
    assert cli.run(arguments) == 2
    assert "was begun by distill3d 0.0.1" in capsys.readouterr().err
    assert json.loads((out / "bench.json").read_text()) == old and (out / "cells" / "x" / "cell.json").is_file()
