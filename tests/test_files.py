"""A file appears whole or not at all."""

import pytest

from distill3d.files import replacing


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
