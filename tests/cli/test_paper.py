"""`distill3d paper` as a user types it, on a random model of toy size: each experiment ends and leaves its files."""

import json

import pytest

from distill3d.cli import main as cli
from distill3d.cli.bench import Judging
from distill3d.cli.paper import Cfg, Inversion, Paper, Scope, TwoD
from distill3d.cli.shared import Model, command_line

TABLES = {"table.md", "table.tex", "table.csv"}
SMALL = {
    "table1": (["--methods", "sdi,sds", "--budget", "nfe"], {"SDS", "SDI"}),
    "ism": (["--metrics", "saturation"], {"ISM", "SDI"}),
    "ablation": ([], {"SDS, 8 px", "+ 16 px", "+ annealed t", "+ scale and weight of SDI", "+ DDIM inversion (SDI)"}),
    "noise": (
        ["--metrics", "saturation"],
        {
            "random noise",
            "fixed point, Anderson",
            "sign descent",
            "continuation in the scale",
            "CFG++",
            "gradient descent",
            "DDIM inversion (SDI)",
        },
    ),
    "surface": (
        ["--metrics", "saturation"],
        {
            *("random noise", "random, guidance of SDI", "constant noise", "cached per azimuth"),
            *("on the surface (CFD)", "on the surface, written back"),
            *("inversion at nominal guidance", "DDIM inversion (SDI)", "sampling loop"),
        },
    ),
    "cfg": (["--scales", "0", "7.5"], {"SDS, scale 0", "SDS, scale 7.5", "SDI, scale 0", "SDI, scale 7.5"}),
    "diversity": (["--seeds", "0,1"], {"SDS", "SDI"}),
}


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "dog.txt").write_text("a dog\n")
    return tmp_path


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_on_objects_leaves_its_files(name, prompts, kl_folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(prompts)
    own, variants = SMALL[name]
    usual = ["--prior", str(kl_folder), "--prompts", "dog.txt", "--steps", "2", "--views", "2"]
    assert cli.run(["paper", name, *usual, *own]) == 0
    out = prompts / f"paper-{name}"
    files = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    assert files == {f"{name}.png", f"{name}.md", "bench.json", "cells", "cells.csv", "report.html"} | TABLES
    settings = json.loads((out / "bench.json").read_text())["variants"]
    assert set(settings) == variants and next(iter(settings.values()))["recipe"]["steps"] == 2
    assert len(list((out / "cells").iterdir())) == len(variants) * (2 if name == "diversity" else 1)
    text = (out / f"{name}.md").read_text()
    for part in (str(kl_folder), "Prompts: a dog.", "Seeds: 0", f"distill3d paper {name} --prompts dog.txt"):
        assert part in text
    assert f"{name}.png" in capsys.readouterr().out
    assert image_width(out / f"{name}.png") == 2160  # 7.2 inches at 300 dots


def test_2d_leaves_its_files(prompts, kl_folder, capsys):
    pytest.importorskip("matplotlib")
    out = prompts / "flat"
    usual = ["--prior", str(kl_folder), "--prompts", str(prompts / "dog.txt")]
    assert cli.run(["paper", "2d", *usual, "--steps", "2", "--out", str(out)]) == 0
    files = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    assert files == {"2d.png", "2d.md", "images", "images.csv"} | TABLES
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| SDI, cached noise "))
    assert float(row.split("|")[2].strip(" *")) == 0.0  # as printed, the distance to DDIM
    assert image_width(out / "2d.png") == 2160


def test_a_dollar_in_a_prompt_is_a_dollar(prompts, kl_folder):
    pytest.importorskip("matplotlib")
    (prompts / "dollars.txt").write_text("a $5 bill\na 100% real $1 coin\na $_$ hat\n")
    usual = ["--prior", str(kl_folder), "--prompts", str(prompts / "dollars.txt"), "--steps", "1", "--views", "2"]
    assert cli.run(["paper", "ism", *usual, "--metrics", "saturation", "--out", str(prompts / "ism")]) == 0
    assert (prompts / "ism" / "ism.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["table1", "--methods", "sds,magic"], "unknown method 'magic'"),
        (["table1", "--budget", "lots"], "the budget must be steps, nfe or a number"),
        (["ism", "--steps", "0"], "at least one step"),
        (["ism", "--prompts", "empty.txt"], "contains no prompt"),
        (["ism", "--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (["ism", "--seeds", "a,b"], "--seeds needs integers"),
        (["ism", "--recipe", "soup"], "unknown recipe 'soup'"),
        (["ism", "--prior", "nonsense"], "unknown prior 'nonsense'"),
        (["ism", "--out", "dog.txt"], "cannot write to dog.txt"),
        (["ablation", "--views", "0"], "at least 2 views"),
        (["ablation", "--metrics", "beauty"], "unknown metric 'beauty'"),
        (["ablation", "--evaluator", "nowhere"], "nowhere"),
        (["cfg", "--scales", "7.5", "7.5"], "is given twice"),
        (["cfg", "--scales", "nan"], "finite"),
        (["diversity", "--prior", "toybox"], "does not know any object in 'a dog'"),
        (["2d", "--steps", "0"], "at least one step"),
        (["2d", "--scale", "nan"], "finite"),
        (["2d", "--prompts", "empty.txt"], "contains no prompt"),
        (["2d", "--out", "dog.txt"], "cannot write to dog.txt"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments, expected, prompts, kl_folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(prompts)
    before = sorted(prompts.iterdir())
    usual = {"--prior": str(kl_folder), "--prompts": "dog.txt"}
    given = [word for flag, value in usual.items() if flag not in arguments for word in (flag, value)]
    assert cli.run(["paper", *arguments, *(given if len(arguments) > 1 else [])]) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("distill3d: ")]
    assert len(lines) == 1 and expected in lines[0] and "Traceback" not in error
    assert sorted(prompts.iterdir()) == before  # nothing half-made


def test_full_is_the_papers_size():
    """What is asked for, up to the prior, which is not at hand."""
    from distill3d.bench.paper.experiments import EXPERIMENTS
    from distill3d.distill.recipes import PAPER

    for name in EXPERIMENTS:
        protocol, setting = cli.parse(["paper", name, "--full"]).experiment.protocol()
        found = (protocol.prior, setting.name, protocol.views, len(protocol.prompts))
        assert found == ("sd21", "paper", 50, 43)
        assert setting.recipe.steps == (5000 if name == "ism" else 10000)
        assert {variant.recipe.steps for variant in protocol.variants} == {setting.recipe.steps}
        assert setting.recipe.scene == PAPER.scene


def test_the_command_line_that_repeats_an_experiment():
    paper = ["distill3d", "paper"]
    assert command_line([*paper, "cfg"], Cfg()) == "distill3d paper cfg"
    model = Model(vae="taesd", image_size=64, lora=("a", "b"))
    changed = Cfg(Scope(full=True), Judging(view_size=32), model, scales=(1.0, 5.0))
    assert cli.parse(command_line([*paper, "cfg"], changed).split()[1:]) == Paper(changed)
    two = TwoD(scale=2.0, force=True)
    assert cli.parse(command_line([*paper, "2d"], two).split()[1:]) == Paper(two)
    assert command_line([*paper, "inversion"], Inversion(("a red dot", "cat"), scales=(2.0,), force=True)) == (
        "distill3d paper inversion --prompts 'a red dot' cat --scales 2.0 --force"
    )


def image_width(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.size[0]
