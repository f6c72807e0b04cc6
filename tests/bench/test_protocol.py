"""Lists of prompts, budgets, and the folder that belongs to one protocol."""

import dataclasses
import json

import pytest

from distill3d.bench.budget import nfe_of_a_step, with_budget
from distill3d.bench.prompts import prompt_list, toybox_prompts
from distill3d.bench.protocol import Protocol, Variant, open_folder
from distill3d.distill.loop import ObjectRun, optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import DISTILL, Supervision, ViewSampling
from distill3d.distill.regularizers import WeightSchedule
from distill3d.files import locked
from distill3d.objectives import CFD, METHODS, SDI
from distill3d.priors.loading import load_prior
from distill3d.runs.objects import Config, load_priors
from distill3d.toybox.captions import KIND_NAMES, held_out_pairs, read_prompt

SMALL = dataclasses.replace(
    DISTILL, steps=4, views=1, scene=dataclasses.replace(DISTILL.scene, resolution=12), objective=SDI(inversion_steps=3)
)


def small(method):
    return dataclasses.replace(SMALL, objective=METHODS[method])


def protocol(**changes):
    variants = (Variant("sdi", SMALL), Variant("sds", small("sds")))
    return dataclasses.replace(Protocol(variants, ("a cat", "a dog"), (0, 1)), **changes)


def test_the_shipped_lists():
    assert len(prompt_list("43")) == 43 and "a DSLR photo of a corgi sneezing" in prompt_list("43")
    assert len(prompt_list("toybox")) == len(KIND_NAMES) == 24
    for prompt, unseen in toybox_prompts():
        reading = read_prompt(prompt)
        assert ((reading.kind, reading.color) in held_out_pairs()) == unseen and not reading.unknown


def test_a_file_of_prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n  a cat  \n\n# a comment\na dog\na cat\n")
    assert prompt_list(str(file)) == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no prompt file"), ("", "no prompt"), ("\n \n", "no prompt"), ("x" * 9999, "too long")],
)
def test_a_wrong_file_is_one_line(content, message, tmp_path):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        prompt_list(str(file))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_each_cell_has_a_folder_of_its_own():
    many = protocol(prompts=("a cat", "a  cat", "A CAT!", "猫", "犬", "x" * 250, "x" * 249), seeds=(0, 1, -1))
    names = [task.folder for task in many.tasks()]
    assert len(set(names)) == len(names) == 7 * 3 * 2
    assert all(name.strip("-") == name and name.replace("-", "").isalnum() and len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"seeds": (1, 1)}, "seed 1 is given twice"),
        ({"views": 0}, "at least 2 views"),
        ({"variants": ()}, "at least one method"),
    ],
)
def test_an_impossible_protocol_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        protocol(**changes)


def test_a_folder_takes_more_work_but_no_other_conditions(tmp_path):
    open_folder(tmp_path, protocol())
    open_folder(tmp_path, protocol())
    open_folder(tmp_path, protocol(prompts=("a cow",), seeds=(5,), variants=(Variant("ism", small("ism")),)))
    assert set(json.loads((tmp_path / "bench.json").read_text())["variants"]) == {"sdi", "sds", "ism"}
    before = (tmp_path / "bench.json").read_bytes()
    for changes, message in (
        ({"views": 20}, "views was 50, is 20"),
        ({"variants": (Variant("sdi", dataclasses.replace(SMALL, steps=200)),)}, "sdi.recipe.steps was 4, is 200"),
        ({"prior": "sd15"}, 'prior was "toybox", is "sd15"'),
    ):
        with pytest.raises(ValueError, match=message):
            open_folder(tmp_path, protocol(**changes))
    assert (tmp_path / "bench.json").read_bytes() == before


def test_another_version_and_other_files_are_left_alone(tmp_path):
    out = tmp_path / "bench"
    open_folder(out, protocol())
    content = json.loads((out / "bench.json").read_text())
    (out / "bench.json").write_text(json.dumps({**content, "version": "0.0.1"}))
    with pytest.raises(ValueError, match=r"begun by distill3d 0\.0\.1"):
        open_folder(out, protocol())
    (out / "bench.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        open_folder(out, protocol())
    with pytest.raises(ValueError, match="not a bench folder"):
        open_folder(tmp_path, protocol())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        open_folder(tmp_path / "file", protocol())


@pytest.mark.filterwarnings("ignore:.* teach the student little")
@pytest.mark.parametrize("method", ["sds", "sdi", "ism", "nfsd", "vsd", "esd"])
def test_the_price_of_a_step_is_that_of_a_real_run(method, kl_folder):
    """For methods that invert to one row a step: their random times may or may not need another hop."""
    if method in ("vsd", "esd"):
        pytest.importorskip("peft")
    prior, recipe = load_prior(str(kl_folder)), dataclasses.replace(small(method), steps=12)
    config, progress = Config("a cat", recipe, prior=str(kl_folder)), []
    optimize(ObjectRun(recipe, config.prompts, load_priors(config, prior)[0]), range(12), progress.append)
    price = nfe_of_a_step(Variant(method, recipe), prior)
    assert price == pytest.approx(progress[-1].nfe / 12, abs=1.0 if method in ("sdi", "ism") else 1e-9)


def test_the_price_includes_the_second_objective(kl_folder):
    supervision = Supervision(weight=WeightSchedule(0.0, 1.0, 0.5, 0.5))
    recipe = dataclasses.replace(small("sds"), steps=4, supervision=supervision)
    config, progress = Config("a cat", recipe, prior=str(kl_folder)), []
    prior, _ = load_priors(config)
    optimize(ObjectRun(recipe, config.prompts, prior), range(4), progress.append)
    assert nfe_of_a_step(Variant("both", recipe), prior) == progress[-1].nfe / 4


def test_the_price_of_sampled_views_is_that_of_a_real_run(kl_folder):
    """All views at each noise level; more steps would not take more, so they have no budget of NFE."""
    sampling = ViewSampling(rings=((3, 15.0, 0.0),), group=1, joint_levels=0, hull=False, levels=2)
    recipe = dataclasses.replace(small("sds"), objective=CFD(), steps=4, sampling=sampling)
    config, progress = Config("a cat", recipe, prior=str(kl_folder)), []
    prior, _ = load_priors(config)
    optimize(object_run(recipe, config.prompts, prior), range(4), progress.append)
    variant = Variant("sampled", recipe)
    assert nfe_of_a_step(variant, prior) == progress[-1].nfe / 4
    with pytest.raises(ValueError, match="use --budget steps"):
        with_budget([variant], "nfe", prior)


def test_a_budget_of_nfe_gives_each_its_steps(kl_folder):
    prior = load_prior(str(kl_folder))
    variants = protocol().variants
    assert with_budget(variants, "steps", prior) == variants
    sdi, sds = with_budget(variants, "nfe", prior)
    price = nfe_of_a_step(variants[0], prior)
    assert sdi.recipe.steps == 4 and sds.recipe.steps == int(4 * price / 2)  # SDS: two evaluations per step and view
    assert [v.recipe.steps for v in with_budget(variants, "40", prior)] == [int(40 / price), 20]
    for wrong, message in (("many", "the budget must"), ("0", "the budget must"), ("1", "too few")):
        with pytest.raises(ValueError, match=message):
            with_budget(variants, wrong, prior)


def test_a_bench_that_is_refused_changes_nothing(tmp_path):
    """A second bench on a folder that is in use, and one with other conditions."""
    with locked(tmp_path):
        open_folder(tmp_path, protocol())
        before = (tmp_path / "bench.json").read_bytes()
        with pytest.raises(ValueError, match="another process is at work"), locked(tmp_path):
            open_folder(tmp_path, protocol(variants=(Variant("new", SMALL),)))
    assert (tmp_path / "bench.json").read_bytes() == before
