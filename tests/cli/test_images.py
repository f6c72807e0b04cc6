"""`distill3d image` and `distill3d compare` as a user meets them, on a random prior of toy size."""

import csv

import numpy as np
import pytest
from PIL import Image

from distill3d.cli import main as cli


def test_image_writes_an_image_and_says_where(kl_folder, tmp_path, capsys):
    flags = ["--prior", str(kl_folder), "--steps", "2", "--size", "32", "--out", str(tmp_path)]
    assert cli.run(["image", "a red dot", "--method", "SDI", *flags]) == 0
    (folder,) = tmp_path.iterdir()
    printed = capsys.readouterr().out
    assert str(folder / "image.png") in printed.replace("\n", "") and printed.startswith("2 steps in ")
    assert " NFE: " in printed
    with Image.open(folder / "image.png") as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("name", ["car.png", "car.jpg", "new/car.webp"])
def test_out_may_be_an_image_file(name, kl_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--prior", str(kl_folder), "--steps", "1", "--out", name]
    assert cli.run(["image", "a red dot", *flags]) == 0
    assert name in capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()  # with its configuration
    with Image.open(tmp_path / name) as image, Image.open(run / "image.png") as same:
        assert image.size == same.size and image.format == {"png": "PNG", "jpg": "JPEG", "ebp": "WEBP"}[name[-3:]]
        assert image.format != "PNG" or np.array_equal(np.asarray(image), np.asarray(same))


def test_compare_writes_one_image_and_one_table(kl_folder, tmp_path, capsys):
    flags = ["--prior", str(kl_folder), "--steps", "3", "--scale", "2", "--out", str(tmp_path)]
    assert cli.run(["compare", "a red dot", "--methods", "ddim, SDS,sdi-cached,sdi", *flags]) == 0
    (folder,) = tmp_path.iterdir()
    assert {p.name for p in folder.iterdir()} == {"config.json", "compare.png", "compare.csv"}
    with (folder / "compare.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["ddim", "sds", "sdi_cached", "sdi"]
    assert [rows[m]["nfe"] for m in ("ddim", "sds", "sdi_cached")] == ["6"] * 3  # two rows a step
    # sdi: two for its start; one to ten hops of an inversion, a row each, and two rows for the step itself.
    assert 2 + 3 * 3 <= int(rows["sdi"]["nfe"]) <= 2 + 3 * 12
    assert all(row["steps"] == "3" and row["score"] == "" for row in rows.values())  # no evaluator here
    assert float(rows["ddim"]["sharpness"]) == 1.0
    for column in ("sharpness", "saturation"):
        assert float(rows["sdi_cached"][column]) == pytest.approx(float(rows["ddim"][column]), rel=1e-2)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*rows, "NFE", "saturation"))
    _check_sheet(folder / "compare.png", 4, 192)


def test_the_sheet_of_compare_may_be_a_file(kl_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--prior", str(kl_folder), "--steps", "1", "--methods", "ddim,sds", "--out", "sheet.png"]
    assert cli.run(["compare", "a red dot", *flags]) == 0
    _check_sheet(tmp_path / "sheet.png", 2, 192)


def _check_sheet(path, images, side):
    """That many images side by side, and something written under each."""
    with Image.open(path) as sheet:
        width, height = sheet.size
        below = np.asarray(sheet.convert("L"))[side + 16 :]
    assert width >= images * side and height > side + 30
    columns = np.array_split(below, images, axis=1)
    assert all((column < 128).sum() > 50 for column in columns)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["image", ""], "prompt is empty"),
        (["image", "a red mushroom", "--method", "magic"], "allowed: ddim, sdi"),
        (["image", "a red mushroom", "--steps", "0"], "at least one step"),
        (["image", "a red mushroom", "--size", "-3"], "pixels per side, got -3"),
        (["image", "a red mushroom", "--method", "sds", "--start", "fog"], "unknown start 'fog'"),
        (["image", "a red mushroom", "--start", "gray"], "DDIM starts from noise"),
        (["image", "a red mushroom", "--space", "air"], "recipe.space"),
        (["image", "a red mushroom", "--prior", "nonsense"], "unknown prior 'nonsense'"),
        (["image", "a red mushroom", "--out", "car.fbx"], "images are written as .png, .jpg, .jpeg, .webp"),
        (["image", "@{prompts}", "--out", "car.png"], "2 images cannot be written to one file"),
        (["compare", "a red mushroom", "--methods", "ddim,magic"], "unknown method 'magic'"),
        (["compare", "a red mushroom", "--methods", ","], "--methods needs names separated by commas"),
        (["compare", "a red mushroom", "--set", "nfsd.steps=3"], "unknown setting 'nfsd.steps'"),
        (["paper", "inversion", "--times", "90"], "give more steps"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments, expected, tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path_factory.mktemp("prompts") / "two.txt"
    prompts.write_text("a red mushroom\na blue car\n")
    assert cli.run([word.replace("{prompts}", str(prompts)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_settings_that_only_the_prior_can_refuse_leave_no_folder(kl_folder, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    out = tmp_path / "runs"
    flags = ["--prior", str(kl_folder), "--out", str(out), "--method", "sds"]
    assert cli.run(["image", "a red dot", *flags, "--start", str(tmp_path / "text.png")]) == 2
    assert "cannot be read as an image" in capsys.readouterr().err
    assert cli.run(["image", "a red dot", *flags, "--method", "sdi", "--set", "objective.eta=2"]) == 2
    assert "eta" in capsys.readouterr().err
    assert not out.exists()
