"""Help, version, and what tyro says about a wrong command line."""

import re
import subprocess
import sys

import pytest

from distill3d.cli import main as cli
from distill3d.distill.recipes import RECIPES
from distill3d.objectives import METHODS
from distill3d.priors.components.hub import SHORT_NAMES

MOST_FLAGS = 43


def said(capsys, *arguments):
    """The exit status of a command line, and its output in one line without frames."""
    status = cli.run(list(arguments))
    printed = "".join(capsys.readouterr())
    return status, re.sub(r"[\s│╭╮╰╯─]+", " ", printed)


def flags(text):
    return re.findall(r"^[│ ] (?:-\w, )?--(\w[\w-]*)", text, re.MULTILINE)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_command_has_more_flags_than_a_person_reads(command, capsys):
    assert cli.run([command, "--help"]) == 0
    found = flags(capsys.readouterr().out)
    assert "help" in found and len(found) == len(set(found)), found
    assert len(found) <= MOST_FLAGS


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("view", ["RUN"]),
        ("export", ["RUN", "--format", "obj"]),
        ("texture", ["MESH", "a hat"]),
        ("recipes", ["laptop"]),
    ],
)
@pytest.mark.parametrize("help", ["--help", "-h"])
def test_help_is_the_same_behind_the_arguments(command, given, help, capsys):
    assert said(capsys, command, *given, help) == said(capsys, command, "--help")


def test_an_experiment_of_the_paper_has_a_help_of_its_own(capsys):
    assert "distill3d paper table1 [-h]" in said(capsys, "paper", "table1", "--help")[1]


def test_flags_of_generate_are_grouped_as_a_person_thinks(capsys):
    assert cli.run(["generate", "--help"]) == 0
    groups = re.findall(r"^\W*([a-z]+) options\W*$", capsys.readouterr().out, re.MULTILINE)
    assert groups == ["prompt", "quality", "model", "output", "machines", "viewer", "other"]


def test_help_names_every_command_and_shows_its_first_sentence(capsys):
    status, text = said(capsys, "--help")
    assert status == 0
    for name, kind in cli.COMMANDS.items():
        first = re.sub(r"\s+", " ", kind.__doc__.partition("\n")[0])
        assert f"• {name} {first}" in text


def test_help_names_the_recipes_methods_and_priors_that_there_are(capsys):
    _, text = said(capsys, "generate", "--help")
    for name in (*RECIPES, *METHODS, "toybox"):
        assert re.search(rf"\b{name}\b", text)
    assert {"sd15", "sd21", "sdxl"} <= set(SHORT_NAMES)  # those that the help has as examples


def test_help_needs_nothing_but_the_package():
    """Nothing heavy is imported before a command runs."""
    heavy = {"diffusers", "transformers", "scipy", "trimesh", "av", "matplotlib", "safetensors", "jinja2", "cattrs"}
    script = "import sys; from distill3d.cli import main; main.run(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.splitlines()[-1].split())


def test_the_module_is_the_command():
    from distill3d import __version__

    done = subprocess.run([sys.executable, "-m", "distill3d", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"distill3d {__version__}\n")


def test_completion_for_a_shell(capsys):
    assert cli.run(["--tyro-print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "generate" in script and "--learning-rate" in script


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["generate", "a red mushroom", "--seed", "abc"], ("Error parsing --seed", "'abc'")),
        (["generate", "a red mushroom", "--scale", "much"], ("Error parsing --scale", "'much'")),
        (["generate", "a red mushroom", "--steps"], ("Missing value", "--steps")),
        (["generate", "a red mushroom", "--dtype", "fp8"], ("'fp8'", "--dtype", "bfloat16")),
        (["generate", "a red mushroom", "--color", "3"], ("Unrecognized", "--color")),
        (["generate", "a red mushroom", "--step", "3"], ("--step", "Perhaps you meant: --steps")),
        (["generate", "a red mushroom", "--methd", "sds"], ("--methd", "Perhaps you meant: --method")),
        (["generate"], ("PROMPT",)),
        (["resume"], ("RUN",)),
        (["generate", "--prompt", "a red mushroom"], ('the prompt needs no flag: distill3d generate "a red',)),
        (["image", "--prompt=a red mushroom"], ('the prompt needs no flag: distill3d image "a red',)),
        (["dance"], ("dance", "generate, texture")),
        ([""], ("generate, texture",)),
        ([], ("generate, texture",)),
        (["paper"], ("table1, ism",)),
        (["paper", "table"], ("table1, ism",)),
    ],
)
def test_what_cannot_be_parsed_is_explained(arguments, parts, capsys):
    status, text = said(capsys, *arguments)
    assert status == 2 and "Traceback" not in text
    for part in parts:
        assert part in text


def test_the_wait_policy_is_the_users_where_there_is_one():
    for own in ({}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"}):
        environment = dict(own)
        cli.choose_wait_policy(environment)
        assert environment == (own or {"GOMP_SPINCOUNT": "1000"})  # as benchmarks/busy.py found
