"""A disk that fills up, at several moments of several commands: one line, and a status that is not 0."""

import os
import shutil
import subprocess

import pytest

from distill3d.cli import main as cli

SMALL = ["--steps", "2", "--views-per-step", "1", "--frames", "8", "--set", "scene.resolution=12"]
BENCH = ["--methods", "sds", "--prompts", "a cat", "--views", "2", "--view-size", "16", "--metrics", "saturation"]
COMMANDS = {
    "image": (["image", "a dot", "--steps", "2"], (4, 8)),
    "generate": (["generate", "a cat", "--method", "sds", *SMALL], (8, 60, 160)),
    "bench": (["bench", *BENCH, "--steps", "1", "--set", "scene.resolution=12", "--set", "views=1"], (8, 60)),
}


@pytest.fixture
def disk(tmp_path):
    """disk(kilobytes): the folder of an empty disk of this size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes):
        subprocess.run(["umount", place], capture_output=True, check=False)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], check=True)
        return place

    try:
        mount(4)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a tmpfs, which only root may mount")
    yield mount
    subprocess.run(["umount", place], capture_output=True, check=False)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a tmpfs")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_said(command, disk, kl_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where a run that cannot be saved is kept
    words, sizes = COMMANDS[command]
    for size in sizes:
        place = disk(size)
        assert cli.run([*words, "--prior", str(kl_folder), "--out", str(place / "out")]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distill3d: ")]
        assert len(lines) == 1 and "No space left on device" in lines[0] and str(place) in lines[0], (size, lines)
    for kept in tmp_path.glob("distill3d-*"):
        shutil.rmtree(kept)
