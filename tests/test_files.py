"""A file appears whole or not at all, and one process works in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill3d.files import locked, replacing


def test_what_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.txt").mkdir()
    for path, reason in (
        (tmp_path / "file" / "a.txt", "(File exists|Not a directory)"),
        (tmp_path / "folder.txt", "Is a directory"),
    ):
        with pytest.raises(OSError, match=rf"^cannot write {path}: {reason}$"), replacing(path) as draft:
            draft.write_text("x")
    with pytest.raises(OSError, match=r"No space left on device$"), replacing(tmp_path / "b.txt"):
        raise OSError(28, "No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.txt"]


def test_the_file_is_replaced_on_success_only(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with replacing(target) as draft:
        draft.write_text("one")
        assert draft.suffix == ".txt" and not target.exists()
    with pytest.raises(RuntimeError), replacing(target) as draft:
        draft.write_text("two")
        raise RuntimeError
    assert target.read_text() == "one"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    order, target = [], tmp_path / "a.txt"
    fsync = os.fsync

    def watched(descriptor):
        order.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with replacing(target) as draft:
        draft.write_text("one")
    assert order == [("a.txt", False), (tmp_path.name, True)]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_kept(tmp_path):
    code = "import os, sys, distill3d.files as f\nwith f.replacing(sys.argv[1] + '/a.txt') as draft:\n"
    code += "    draft.write_text('part'); print(flush=True); {}"
    with subprocess.Popen(
        [sys.executable, "-c", code.format("input()"), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as living:
        living.stdout.readline()
        subprocess.run(
            [sys.executable, "-c", code.format("os.kill(os.getpid(), 9)"), str(tmp_path)], capture_output=True
        )
        assert len(list(tmp_path.glob(".partial-*"))) == 2
        with replacing(tmp_path / "b.txt") as outer, replacing(tmp_path / "c.txt") as inner:
            outer.write_text("b")
            inner.write_text("c")
        assert len(list(tmp_path.glob(".partial-*"))) == 1
        living.communicate(b"\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.txt"]


def test_two_processes_do_not_share_a_folder(tmp_path):
    code = "import sys, pathlib, distill3d.files as f\nwith f.locked(pathlib.Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with locked(tmp_path):
        inside = subprocess.run(command, capture_output=True, text=True)
    assert inside.returncode == 1 and f"another process is at work in {tmp_path}" in inside.stderr
    with locked(tmp_path):  # given back
        pass
