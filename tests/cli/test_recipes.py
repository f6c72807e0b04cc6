"""`distill3d recipes`: what differs, and only that."""

import dataclasses

from distill3d.cli import main as cli
from distill3d.cli.recipes import settings, table
from distill3d.distill.recipes import LAPTOP, PRIORS, RECIPES


def rows_of(text):
    return {line.split()[0]: line for line in text.splitlines()[1:]}


def test_it_shows_what_differs(capsys):
    assert cli.run(["recipes"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == list(RECIPES)
    rows = rows_of(out)
    assert rows["steps"].split()[1:] == [str(recipe.steps) for recipe in RECIPES.values()]
    assert rows["prior"].split()[1:] == list(PRIORS.values())
    assert "scene" in rows and "adam-eps" in rows and "supervision.kind" not in rows
    assert cli.run(["recipes", "--all"]) == 0
    assert "supervision.kind" in rows_of(capsys.readouterr().out)


def test_a_recipe_differs_from_itself_in_nothing_and_from_a_change_in_that():
    mine = settings(LAPTOP)
    assert table({"a": mine, "b": mine}, everything=False) == [f"{'':0}  a  b".rstrip()]
    other = settings(dataclasses.replace(LAPTOP, sdi=dataclasses.replace(LAPTOP.sdi, scale=3.0)))
    assert [line.split() for line in table({"a": mine, "b": other}, everything=False)[1:]] == [
        ["sdi.scale", "7.5", "3"]
    ]


def test_every_setting_is_a_flag_of_generate(capsys):
    assert cli.run(["generate", "--help"]) == 0
    told = "".join(capsys.readouterr().out.split())
    missing = [name for name in settings(LAPTOP) if f"--{name}" not in told and name not in ("scene", "background")]
    assert missing in ([], ["shading"])
