"""`distill3d image` and `distill3d compare` as a user meets them, on a random prior of toy size."""

import csv

import numpy as np
import pytest
from PIL import Image

from distill3d.cli import main as cli


def test_image_writes_a_picture_and_says_where(kl_folder, tmp_path, capsys):
    flags = ["--prior", str(kl_folder), "--steps", "2", "--size", "32", "--out", str(tmp_path)]
    assert cli.run(["image", "a red dot", "--method", "sdi", *flags]) == 0
    (folder,) = tmp_path.iterdir()
    assert str(folder / "image.png") in capsys.readouterr().out.replace("\n", "")
    with Image.open(folder / "image.png") as picture:
        assert picture.size == (32, 32)


def test_compare_writes_one_picture_and_one_table(kl_folder, tmp_path, capsys):
    flags = ["--prior", str(kl_folder), "--steps", "3", "--scale", "2", "--out", str(tmp_path)]
    assert cli.run(["compare", "a red dot", "--methods", "ddim, sds,sdi_cached,sdi", *flags]) == 0
    (folder,) = tmp_path.iterdir()
    assert {p.name for p in folder.iterdir()} == {"config.json", "compare.png", "compare.csv"}
    with (folder / "compare.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["ddim", "sds", "sdi_cached", "sdi"]
    assert [rows[m]["nfe"] for m in ("ddim", "sds", "sdi_cached")] == ["6"] * 3  # two rows a step
    # sdi: two for its start; ten hops of an inversion at most, one at least, and the step itself, two rows each.
    assert 2 + 3 * 4 <= int(rows["sdi"]["nfe"]) <= 2 + 3 * 22
    assert all(row["steps"] == "3" and row["score"] == "" for row in rows.values())  # no evaluator here
    assert float(rows["ddim"]["sharpness"]) == 1.0
    for column in ("sharpness", "saturation"):
        assert float(rows["sdi_cached"][column]) == pytest.approx(float(rows["ddim"][column]), rel=1e-2)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*rows, "nfe", "saturation"))
    _check_sheet(folder / "compare.png", 4, 192)


def _check_sheet(path, pictures, side):
    """That many pictures side by side, and something written under each."""
    with Image.open(path) as sheet:
        width, height = sheet.size
        below = np.asarray(sheet.convert("L"))[side + 16 :]
    assert width >= pictures * side and height > side + 30
    columns = np.array_split(below, pictures, axis=1)
    assert all((column < 128).sum() > 50 for column in columns)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["image", ""], "prompt is empty"),
        (["image", "a red mushroom", "--method", "magic"], "allowed: ddim, sdi"),
        (["image", "a red mushroom", "--steps", "0"], "at least one step"),
        (["image", "a red mushroom", "--size", "-3"], "pixels a side, got -3"),
        (["image", "a red mushroom", "--scale", "much"], "--scale"),
        (["image", "a red mushroom", "--start", "fog"], "unknown start 'fog'"),
        (["image", "a red mushroom", "--prior", "nonsense"], "unknown prior 'nonsense'"),
        (["compare", "a red mushroom", "--methods", "ddim,magic"], "unknown method 'magic'"),
        (["compare", "a red mushroom", "--methods", ","], "at least one method"),
        (["paper", "table"], "table"),
        (["paper", "inversion", "--times", "90"], "give more steps"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_settings_that_only_the_prior_can_refuse_leave_no_folder(kl_folder, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    out = tmp_path / "runs"
    flags = ["--prior", str(kl_folder), "--out", str(out), "--method", "sds"]
    assert cli.run(["image", "a red dot", *flags, "--start", str(tmp_path / "text.png")]) == 2
    assert "cannot be read as a picture" in capsys.readouterr().err
    assert cli.run(["image", "a red dot", *flags, "--method", "sdi", "--eta", "2"]) == 2
    assert "eta" in capsys.readouterr().err
    assert not out.exists()
