"""The paper's experiments as values: what each compares has the paper's settings, and defaults end in time."""

import dataclasses

import pytest

from distill3d.bench.paper.experiments import (
    EXPERIMENTS,
    SCALES,
    VIEWS,
    Setting,
    ablation,
    caption,
    guidance_scales,
    list_prompts,
    methods_of,
    minutes,
    render_size,
    scale_of,
    spread,
)
from distill3d.bench.prompts import prompt_list
from distill3d.bench.protocol import Protocol, Variant
from distill3d.distill.recipes import DISTILL, PAPER
from distill3d.objectives import CFD, ESD, METHODS, SDI, SDS, VSD, SDICached
from distill3d.objectives.settings import SOLVERS

DISTILL_SETTING, PAPER_SETTING = Setting("distill"), Setting("paper")


def changed(before: Variant, after: Variant) -> set[str]:
    """The fields in which two variants differ, of the recipe and of the objective's settings."""
    found = set()
    for field in dataclasses.fields(before.recipe):
        one, other = getattr(before.recipe, field.name), getattr(after.recipe, field.name)
        if one != other and field.name == "objective" and type(one) is type(other):
            found |= {f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)}
        elif one != other:
            found.add(field.name)
    return found


def test_the_main_table_has_the_papers_methods_and_scales():
    variants = EXPERIMENTS["table1"].make(PAPER_SETTING, 512)
    assert [v.name for v in variants] == ["SDS", "SJC", "VSD", "ESD", "HiFA", "SDI"]
    by_name = {v.name: v.recipe.objective for v in variants}
    assert by_name["SDS"] == SDS(scale=100, low=0.02, high=0.98, anneal=False)
    assert by_name["SJC"].scale == by_name["HiFA"].scale == 100
    assert isinstance(by_name["VSD"], VSD) and isinstance(by_name["ESD"], ESD)
    assert by_name["VSD"].scale == by_name["ESD"].scale == 7.5
    assert variants[-1].recipe == PAPER and by_name["SDI"].scale == 7.5 == -by_name["SDI"].inversion_scale
    assert {v.recipe.steps for v in variants} == {10000}
    # Published with the guidance scale of SDS, SJC and HiFA follow it where a recipe has its own.
    assert {v.recipe.objective.scale for v in methods_of(["sds", "sjc", "hifa"], DISTILL_SETTING)} == {30.0}


def test_ism_is_compared_at_as_many_steps():
    ism, sdi = EXPERIMENTS["ism"].make(Setting("paper", EXPERIMENTS["ism"].full_steps), 512)
    assert (ism.recipe.objective, ism.recipe.steps, sdi.recipe.steps) == (METHODS["ism"], 5000, 5000)
    assert sdi.recipe == dataclasses.replace(PAPER, steps=5000)


@pytest.mark.parametrize(("setting", "size", "low"), [(PAPER_SETTING, 512, 64), (DISTILL_SETTING, 64, 32)])
def test_each_link_of_the_ablation_changes_what_it_says(setting, size, low):
    chain = ablation(setting, size)
    objectives = [v.recipe.objective for v in chain]
    assert list(map(type, objectives)) == [SDS, SDS, SDS, SDI, SDI] and chain[0].name == f"SDS, {low} px"
    assert chain[0].recipe.render_size == low and chain[4].recipe == setting.recipe
    assert changed(chain[0], chain[1]) == {"render_size"}
    assert changed(chain[1], chain[2]) == {"low", "anneal"}
    assert (objectives[2].high, objectives[2].low) == (
        setting.sdi.start,
        setting.sdi.stop,
    )  # the times of the last link
    assert changed(chain[2], chain[3]) == {"objective"}
    assert changed(chain[3], chain[4]) == {"noise"} and objectives[3].noise == "random"
    with pytest.raises(ValueError, match="at least 16"):
        render_size(8)


def test_the_ways_to_find_the_noise_differ_in_nothing_else():
    variants = EXPERIMENTS["noise"].make(DISTILL_SETTING, 64)
    assert {type(v.recipe.objective) for v in variants} == {SDI} and variants[-1].recipe == DISTILL
    assert {v.recipe.objective.noise for v in variants} == {"inversion", "random", *SOLVERS}
    assert all(changed(v, variants[-1]) == {"noise"} for v in variants[:-1] if v.name != "CFG++")
    (plus,) = (v for v in variants if v.name == "CFG++")
    assert changed(plus, variants[-1]) == {"noise", "scale"} and plus.recipe.objective.scale == 0.6


def test_noise_on_the_surface_is_compared_at_one_scale_and_at_the_times_of_sdi():
    variants = {v.name: v for v in EXPERIMENTS["surface"].make(DISTILL_SETTING, 64)}
    sdi = variants["DDIM inversion (SDI)"]
    published = dataclasses.replace(DISTILL.objective, nominal=False)
    assert sdi.recipe == dataclasses.replace(DISTILL, objective=published)
    assert changed(variants["inversion at nominal guidance"], sdi) == {"nominal"}
    assert changed(variants["random noise"], sdi) == {"noise"}
    # What an inversion of five steps makes of the scale, and random noise at that scale.
    assert changed(variants["random, guidance of SDI"], variants["random noise"]) == {"scale"}
    assert variants["random, guidance of SDI"].recipe.objective.scale == pytest.approx((7.5 - 0.4) / 0.6)
    loop = variants.pop("sampling loop").recipe
    assert loop.objective == CFD(7.5) and loop.sampling is not None and loop.steps == DISTILL.steps
    assert (loop.sampling.start, loop.sampling.joint_levels) == (DISTILL.objective.start, 0)
    stays = [v for v in variants.values() if not isinstance(v.recipe.objective, SDI)]
    assert {(type(v.recipe.objective), v.recipe.objective.noise) for v in stays} == {
        (CFD, "constant"), (CFD, "surface"), (SDICached, "camera"), (SDICached, "surface")
    }  # fmt: skip
    for variant in stays:
        objective, times = variant.recipe.objective, (DISTILL.objective.start, DISTILL.objective.stop)
        assert changed(variant, sdi) == {"objective"}
        assert (objective.scale, objective.start, objective.stop) == (7.5, *times)


def test_guidance_scales_go_from_1_to_100():
    assert min(SCALES) == 1 and max(SCALES) == 100
    for setting in (PAPER_SETTING, DISTILL_SETTING):
        variants = guidance_scales(setting)
        assert [scale_of(v) for v in variants] == [*SCALES, *SCALES]
        assert {type(v.recipe.objective) for v in variants} == {SDS, SDI}
        assert len({v.name for v in variants}) == len(variants)
    inverted = [v.recipe.objective.inversion_scale for v in guidance_scales(PAPER_SETTING)[len(SCALES) :]]
    assert inverted == [-scale for scale in SCALES]
    sdi = guidance_scales(DISTILL_SETTING)[len(SCALES) :]
    assert {v.recipe.objective.inversion_scale for v in sdi} == {DISTILL_SETTING.sdi.inversion_scale}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_defaults_end_within_40_minutes(name, mixture):
    """By what steps and network evaluations cost on one core; the second core is the reserve."""
    experiment = EXPERIMENTS[name]
    prompts, seeds = spread(prompt_list("toybox"), experiment.prompts), tuple(range(experiment.seeds))
    protocol = Protocol(experiment.make(DISTILL_SETTING, 64), prompts, seeds, views=VIEWS)
    assert len(prompts) > 2 or len(seeds) > 2
    assert 5 < minutes(protocol, mixture) < 40


def test_what_a_caption_states():
    protocol = Protocol(methods_of(["sds", "sdi"], DISTILL_SETTING), prompt_list("43"), (3, 5), prior="sd21", views=50)
    text = caption(EXPERIMENTS["table1"], protocol, "distill", "distill3d paper table1 --prior sd21")
    for words in ("sd21", "Recipe distill, 200 steps", "and 31 more", "Seeds: 3, 5.", "50 views",
                 "Made by: distill3d paper table1 --prior sd21"):  # fmt: skip
        assert words in text
    assert list_prompts(["a", "b"]) == "Prompts: a; b."
    assert spread("abcdef", 3) == ("a", "c", "e") and spread("ab", 9) == ("a", "b")
