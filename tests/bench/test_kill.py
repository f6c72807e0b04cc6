"""kill -9 in the middle of a bench, and the same command again."""

import os
import signal
import subprocess
import sys
import time

from distill3d.cli import main as cli

CHANGES = ("views=1", "scene.resolution=12", "sdi.inversion_steps=2")
SETTINGS = ["--methods", "sdi,sds", "--seeds", "0,1", "--views", "4", "--metrics", "saturation,nfe,diverged"]
SETTINGS += ["--steps", "3", "--view-size", "16", *(word for change in CHANGES for word in ("--set", change))]


def test_finished_cells_are_kept_and_the_result_is_that_of_an_uninterrupted_bench(kl_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    arguments = ["bench", "--prior", str(kl_folder), "--prompts", str(prompts), *SETTINGS]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(
        [sys.executable, "-m", "distill3d", *arguments, "--out", str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 300
        while len(finished(killed)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    kept = finished(killed)
    assert 2 <= len(kept) < 8, "it was to be killed in the middle"

    assert cli.run([*arguments, "--out", str(killed)]) == 0
    assert kept.items() <= finished(killed).items() and len(finished(killed)) == 8
    assert cli.run([*arguments, "--out", str(whole)]) == 0
    for cell in (whole / "cells").iterdir():
        for name in ("views.png", "maps.npz", "turn.webp"):
            assert (killed / "cells" / cell.name / name).read_bytes() == (cell / name).read_bytes()
    for name in ("table.md", "table.tex", "table.csv", "cells.csv"):
        assert (killed / name).read_text() == (whole / name).read_text()
    assert not (killed / "work").exists()
    capsys.readouterr()

    stamps = finished(whole)
    assert cli.run([*arguments, "--out", str(whole), "--views", "6"]) == 2
    assert "views was 4, is 6" in capsys.readouterr().err and finished(whole) == stamps


def finished(out):
    """Finished cells, and when they were."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}
