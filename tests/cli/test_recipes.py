"""`distill3d recipes`: what differs, and only that. That written recipes read back is in test_settings."""

import dataclasses
import os
import subprocess
import sys
import tomllib

import pytest

from distill3d.cli import main as cli
from distill3d.cli.recipes import rows, table
from distill3d.distill.recipes import DISTILL, PRIORS, RECIPES
from distill3d.runs.config import to_plain


def rows_of(text):
    return {line.split()[0]: line for line in text.splitlines()[1:]}


def test_it_shows_what_differs(capsys):
    assert cli.run(["recipes"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == list(RECIPES)
    found = rows_of(out)
    assert found["steps"].split()[1:] == [str(recipe.steps) for recipe in RECIPES.values()]
    assert found["prior"].split()[1:] == list(PRIORS.values())
    assert "scene.kind" in found and "adam_eps" in found and "supervision.prior" not in found
    assert cli.run(["recipes", "--all"]) == 0
    assert "supervision.prior" in rows_of(capsys.readouterr().out)


def test_a_recipe_differs_from_itself_in_nothing_and_from_a_change_in_that():
    mine = dict(rows(to_plain(DISTILL)))
    assert table({"a": mine, "b": mine}, everything=False) == ["  a  b"]
    changed = dataclasses.replace(DISTILL, objective=dataclasses.replace(DISTILL.objective, scale=3.0))
    other = dict(rows(to_plain(changed)))
    assert [line.split() for line in table({"a": mine, "b": other}, everything=False)[1:]] == [
        ["objective.scale", "7.5", "3"]
    ]


def test_a_weight_is_one_row():
    found = dict(rows(to_plain(DISTILL)))
    assert found["penalties.sparsity"] == "1 to 3 over 0.3 to 0.8" and found["penalties.smooth_color"] == "3"


@pytest.mark.parametrize("of", ["generate", "texture", "image"])
def test_every_recipe_is_written_as_toml(of, capsys):
    names = list(RECIPES) if of == "generate" else ["laptop", "paper"] if of == "texture" else ["ddim", "SDI", "vsd"]
    for name in names:
        assert cli.run(["recipes", name, "--of", of]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"# distill3d {of} --config FILE reads this.") and tomllib.loads(out)["recipe"]
    assert cli.run(["recipes", "soup", "--of", of]) == 2
    assert "unknown recipe 'soup'; allowed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("recipes --all | true; exit ${PIPESTATUS[0]}", 141, ""),  # as a program that the signal of the pipe ends
        ("--help | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("recipes > /dev/full", 2, "distill3d: No space left on device\n"),
        ("--version > /dev/full", 2, "distill3d: No space left on device\n"),
        ("recipes > /dev/full 2> /dev/full", 2, ""),
        ("recipes >&-", 0, ""),
        ("recipes soup 2>&-", 2, ""),
    ],
)
def test_output_that_cannot_be_written_ends_quietly(command, status, message):
    line = ["bash", "-c", f"{sys.executable} -m distill3d {command}"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (status, message)
