"""The viewer on the command line: what is wrong with an address is said in one line, before any work."""

import socket
import subprocess
import sys

import pytest

from distill3d.cli import main as cli
from distill3d.runs.folder import RunFolder
from distill3d.runs.images import ImageConfig
from distill3d.runs.objects import Config

GENERATE = ("generate", "a red mushroom", "--view")


def fails(capsys, *arguments):
    """The one line that is printed for an error of the user's."""
    assert cli.run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill3d: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("0.0.0.0:8080", "can be reached by others"),
        ("localhost", "must be PORT, HOST:PORT or TOKEN@HOST:PORT"),
        ("short@0.0.0.0:8080", "at least 8 letters"),
    ],
)
def test_a_wrong_address_is_one_line(where, reason, tmp_path, capsys):
    for command in (GENERATE, ("resume", str(tmp_path), "--view"), ("view", str(tmp_path), "--at")):
        RunFolder(tmp_path).write_config("object", Config("a red mushroom"))
        assert reason in fails(capsys, *command, where)


def test_the_address_may_be_left_out():
    words = ["generate", "a red mushroom"]
    assert [cli.parse([*words, *more]).viewing.view for more in ([], ["--view"], ["--view", "81", "--force"])] == [
        None,
        "127.0.0.1:8080",
        "81",
    ]


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    pytest.importorskip("viser")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fails(capsys, *GENERATE, str(port), "--out", str(tmp_path / "runs"))
    assert f"port {port} is in use" in error and not (tmp_path / "runs").exists()


def test_without_viser_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)  # as Python marks a module that cannot be imported
    error = fails(capsys, *GENERATE, "0", "--out", str(tmp_path / "runs"))
    assert error == "distill3d: the viewer needs viser: type pip install 'distill3d[viewer]'\n"


def test_what_is_not_a_run_is_one_line(tmp_path, capsys):
    assert "not a run folder" in fails(capsys, "view", str(tmp_path))
    assert "not a run folder" in fails(capsys, "view", str(tmp_path / "nowhere"))
    RunFolder(tmp_path).write_config("image", ImageConfig("a ball"))
    assert "is a run of kind 'image'" in fails(capsys, "view", str(tmp_path))
    assert "pass " + str(tmp_path) in fails(capsys, "view", str(tmp_path / "config.json"))


def test_the_package_and_a_run_without_a_viewer_need_no_viser():
    script = "import distill3d.cli.viewing, distill3d.runs.objects, sys; print('viser' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
