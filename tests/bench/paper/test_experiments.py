"""The paper's experiments as values: what each compares has the paper's settings, and defaults end in time."""

import dataclasses
from typing import get_args

import pytest

from distill3d.bench.budget import with_steps
from distill3d.bench.paper.experiments import (
    EXPERIMENTS,
    SCALES,
    VIEWS,
    ablation,
    caption,
    guidance_scales,
    methods_of,
    minutes,
    render_size,
    scale_of,
    spread,
    told_prompts,
)
from distill3d.bench.prompts import prompt_list
from distill3d.bench.protocol import Protocol, Variant
from distill3d.distill.recipes import LAPTOP, PAPER, SDI, SDS, Noise


def changed(before: Variant, after: Variant) -> set[str]:
    """The fields in which two variants differ, of the recipe and of the method's settings."""
    found = {"method"} if before.method != after.method else set()
    for field in dataclasses.fields(before.recipe):
        one, other = getattr(before.recipe, field.name), getattr(after.recipe, field.name)
        if one != other and isinstance(one, SDI | SDS):
            found |= {f"{field.name}.{f.name}" for f in dataclasses.fields(one)
                      if getattr(one, f.name) != getattr(other, f.name)}  # fmt: skip
        elif one != other:
            found.add(field.name)
    return found


def test_the_main_table_has_the_papers_methods_and_scales():
    variants = EXPERIMENTS["table1"].make(PAPER, 512)
    assert [v.name for v in variants] == ["SDS", "SJC", "VSD", "ESD", "HiFA", "SDI"]
    by_name = {v.name: v.recipe for v in variants}
    assert by_name["SDS"].sds == SDS(scale=100, low=0.02, high=0.98, anneal=False)
    assert by_name["SJC"].scale == by_name["HiFA"].scale == 100
    assert by_name["VSD"].scale is by_name["ESD"].scale is None  # their own, 7.5
    assert by_name["SDI"] == PAPER and PAPER.sdi.scale == 7.5 == -PAPER.sdi.inversion_scale
    assert {v.recipe.steps for v in variants} == {10000}
    assert methods_of(["hifa"], dataclasses.replace(LAPTOP, scale=3.0))[0].recipe.scale == 3  # a user's own stays


def test_ism_is_compared_at_as_many_steps():
    ism, sdi = EXPERIMENTS["ism"].make(with_steps(PAPER, EXPERIMENTS["ism"].full_steps or 0), 512)
    assert (ism.method, sdi.method, ism.recipe.steps, sdi.recipe.steps) == ("ism", "sdi", 5000, 5000)


@pytest.mark.parametrize(("recipe", "size", "low"), [(PAPER, 512, 64), (LAPTOP, 64, 32)])
def test_each_link_of_the_ablation_changes_what_it_says(recipe, size, low):
    chain = ablation(recipe, size)
    assert [v.method for v in chain] == ["sds", "sds", "sds", "sdi", "sdi"] and chain[0].name == f"SDS, {low} px"
    assert chain[0].recipe.render_size == low and chain[1].recipe == chain[4].recipe == recipe
    assert changed(chain[0], chain[1]) == {"render_size"}
    assert changed(chain[1], chain[2]) == {"sds.low", "sds.anneal"}
    annealed = chain[2].recipe.sds
    assert (annealed.high, annealed.low) == (recipe.sdi.start, recipe.sdi.stop)  # the times of the last link
    assert changed(chain[3], chain[4]) == {"sdi.noise"} and chain[3].recipe.sdi.noise == "random"
    with pytest.raises(ValueError, match="at least 16"):
        render_size(8)


def test_the_ways_to_find_the_noise_differ_in_nothing_else():
    variants = EXPERIMENTS["noise"].make(LAPTOP, 64)
    assert {v.method for v in variants} == {"sdi"} and variants[-1].recipe == LAPTOP
    assert {v.recipe.sdi.noise for v in variants} == set(get_args(Noise))
    assert all(changed(v, variants[-1]) == {"sdi.noise"} for v in variants[:-1])


def test_guidance_scales_go_from_1_to_100():
    assert min(SCALES) == 1 and max(SCALES) == 100
    for recipe in (PAPER, LAPTOP):
        variants = guidance_scales(recipe)
        assert [scale_of(v) for v in variants] == [*SCALES, *SCALES]
        assert {v.method for v in variants} == {"sds", "sdi"} and len({v.name for v in variants}) == len(variants)
    inverted = [v.recipe.sdi.inversion_scale for v in guidance_scales(PAPER) if v.method == "sdi"]
    assert inverted == [-scale for scale in SCALES]
    assert {v.recipe.sdi.inversion_scale for v in guidance_scales(LAPTOP)} == {LAPTOP.sdi.inversion_scale}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_defaults_end_within_40_minutes(name, mixture):
    """By what steps and rows cost on one core; the second core is the reserve."""
    experiment = EXPERIMENTS[name]
    prompts, seeds = spread(prompt_list("toybox"), experiment.prompts), tuple(range(experiment.seeds))
    protocol = Protocol(experiment.make(LAPTOP, 64), prompts, seeds, views=VIEWS)
    assert len(prompts) > 2 or len(seeds) > 2
    assert 5 < minutes(protocol, mixture) < 40


def test_what_a_caption_states():
    protocol = Protocol(methods_of(["sds", "sdi"], LAPTOP), prompt_list("43"), (3, 5), prior="sd21", views=50)
    text = caption(EXPERIMENTS["table1"], protocol, "laptop", "distill3d paper table1 --prior sd21")
    for told in ("sd21", "Recipe laptop, 200 steps", "and 31 more", "Seeds: 3, 5.", "50 views",
                 "Made by: distill3d paper table1 --prior sd21"):  # fmt: skip
        assert told in text
    assert told_prompts(["a", "b"]) == "Prompts: a; b."
    assert spread("abcdef", 3) == ("a", "c", "e") and spread("ab", 9) == ("a", "b")
