"""`distill3d bench` as a user types it: errors are one line, what is asked for is there."""

import dataclasses
import json
import shlex

import pytest

from distill3d.bench.prompts import prompt_list
from distill3d.cli import main as cli
from distill3d.cli.shared import command_line
from distill3d.distill.recipes import DISTILL
from distill3d.objectives import METHODS


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n   \n\n")
    (tmp_path / "long.txt").write_text("a cat\n\n" + "very " * 4000 + "long\n")
    (tmp_path / "dog.txt").write_text("a dog\n")
    (tmp_path / "pets").write_text("a dog\na cat\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--metrics", "clip_score,beauty"], "unknown metric 'beauty'; allowed: "),
        (["--metrics", ""], "--metrics needs names"),
        (["--methods", "sdi,magic"], f"unknown method 'magic'; allowed: {', '.join(METHODS)}"),
        (["--methods", "sdi,,sds"], "--methods needs names"),
        (["--methods", "sdi,SDI"], "method sdi is given twice"),
        (["--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["--prompts", "@nowhere"], "no prompt file nowhere"),
        (["--prompts", "empty.txt"], "contains no prompt"),
        (["--prompts", "blank.txt"], "contains no prompt"),
        (["--prompts", "long.txt"], "a line of 20004 characters"),
        (["--prompts", "dog.txt", "--prior", "toybox"], "does not know any object in 'a dog'"),
        (["--prompts", "a red car", "a dog", "--prior", "toybox"], "does not know any object in 'a dog'"),
        (["--seeds", "a,b"], "--seeds needs integers"),
        (["--seeds", ""], "--seeds needs integers"),
        (["--seeds", "0", "0"], "seed 0 is given twice"),
        (["--views", "0"], "at least 2 views"),
        (["--views", "-3"], "at least 2 views"),
        (["--view-size", "0"], "views of 0 pixels"),
        (["--image-size", "0"], "at least 8 pixels, got 0"),
        (["--budget", "lots"], "the budget must be steps, nfe or a number"),
        (["--steps", "0"], "at least one step"),
        (["--set", "sdi.scal=3"], "unknown setting 'sdi.scal'; did you mean"),
        (["--recipe", "soup"], "unknown recipe 'soup'"),
        (["--evaluator", "nowhere"], "nowhere"),
        (["--reference", "nowhere"], "nowhere"),
        (["--out", "dog.txt"], "cannot write to dog.txt"),
        (["--out", "."], "is not a bench folder"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments, expected, prompts, kl_folder, monkeypatch, capsys):
    monkeypatch.chdir(prompts)
    before = sorted(prompts.iterdir())
    usual = {"--prior": str(kl_folder), "--prompts": "dog.txt", "--out": "new"}
    given = [word for flag, value in usual.items() if flag not in arguments for word in (flag, value)]
    assert cli.run(["bench", *given, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("distill3d: ")]
    assert len(lines) == 1 and expected in lines[0] and "Traceback" not in error
    assert sorted(prompts.iterdir()) == before  # nothing half-made


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dog.txt"], ("a dog",)),
        (["@dog.txt"], ("a dog",)),
        (["pets"], ("a dog", "a cat")),
        (["a red mushroom"], ("a red mushroom",)),
        (["a big, red mushroom", "pets", "a dog"], ("a big, red mushroom", "a dog", "a cat")),
        (["43"], prompt_list("43")),
        (["toybox"], prompt_list("toybox")),
        ([], prompt_list("toybox")),
        (["--prior", "sd21"], prompt_list("43")),
    ],
)
def test_prompts_are_files_lists_or_themselves(words, expected, prompts, monkeypatch):
    monkeypatch.chdir(prompts)
    flags = ["--prompts", *words] if words and words[0] != "--prior" else words
    assert cli.parse(["bench", *flags]).protocol().prompts == expected


@pytest.mark.parametrize("flags", ["--methods SDS,Ism --seeds 0,2", "--methods SDS Ism --seeds 0 2"])
def test_lists_take_commas_and_spaces(flags):
    protocol = cli.parse(["bench", *flags.split(), "--views", "9"]).protocol()
    assert (protocol.names, protocol.seeds, protocol.views) == (("sds", "ism"), (0, 2), 9)
    assert all(dataclasses.replace(v.recipe, objective=DISTILL.objective) == DISTILL for v in protocol.variants)


def test_the_command_line_that_repeats_a_bench():
    words = ["--methods", "sdi", "ism", "--prompts", "a red car", "--views", "9", "--lora", "a", "--lora", "b"]
    command = cli.parse(["bench", *words, "--out", "elsewhere", "--offload", "--set", "steps=3", "--set", "views=1"])
    typed = command_line(["distill3d", "bench"], command)
    assert typed.startswith("distill3d bench --methods sdi ism --prompts 'a red car' ") and "elsewhere" not in typed
    assert cli.parse(shlex.split(typed)[1:]) == dataclasses.replace(command, out=cli.parse(["bench"]).out)


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


def test_a_bench_without_any_object_has_a_status_of_its_own(kl_folder, tmp_path, capsys):
    words = ["--methods", "sds", "--prompts", "a cat", "--views", "2", "--view-size", "16", "--metrics", "saturation"]
    empty = ("views=1", "scene.resolution=12", "scene.blob_radius=0.01", "scene.blob_floor=40.0")
    words += ["--steps", "1", "--prior", str(kl_folder), *(word for change in empty for word in ("--set", change))]
    assert cli.run(["bench", *words, "--out", str(tmp_path / "bench")]) == 4
    assert f"distill3d: no object was made: {tmp_path / 'bench' / 'cells.csv'} says why" in capsys.readouterr().err
