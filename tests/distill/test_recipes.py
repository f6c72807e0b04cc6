"""The paper's recipe constant by constant, and that a run of it has what the recipe says."""

import dataclasses

import pytest
import torch

from distill3d.distill.loop import ObjectRun, optimize
from distill3d.distill.recipes import PAPER, PRIORS, RECIPES, TUNED, from_mesh, method_settings
from distill3d.objectives import METHODS, SDI, SDS
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.render.volume import Sampling
from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import Config, read_config
from distill3d.scenes.background import LearnedBackground
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.hashgrid.layout import HashLayout


def test_the_papers_constants():
    """The 3D recipe of the SDI release (Lukoianov et al. 2024), as its configuration states it."""
    assert (PAPER.steps, PAPER.views, PAPER.perp_neg, PRIORS["paper"]) == (10000, 1, True, "sd21")
    scene = PAPER.scene
    assert isinstance(scene, HashOptions) and scene.half_size == 2
    assert scene.layout == HashLayout(levels=16, features=2, log2_table=19, coarsest=16, finest=4096)
    assert scene.first_levels == 8 and [scene.levels_at(s, 10000) for s in (2499, 2500, 2999, 3000)] == [8, 9, 9, 10]
    assert (scene.hidden, scene.sampling.samples) == (64, 512)
    assert (scene.blob, scene.blob_height, scene.blob_radius) == ("magic3d", 10, 0.5)
    assert (scene.occupancy_resolution, scene.occupancy_interval) == (32, 16)
    shading = PAPER.shading
    assert shading is not None and shading.albedo_until * PAPER.steps == 1000
    assert (1 - shading.textureless - shading.lambertian, shading.textureless, shading.lambertian) == pytest.approx(
        (0.7, 0.225, 0.075)
    )
    assert (shading.ambient, shading.diffuse, shading.jitter, shading.distance) == (0.1, 0.9, 1.0, (0.8, 1.5))
    cameras = PAPER.cameras
    assert (cameras.distance, cameras.fov, cameras.elevation) == ((1.5, 2.0), (40, 70), (-10, 45))
    assert (cameras.position_jitter, cameras.target_jitter, cameras.up_jitter) == (0.1, 0.2, 0.02)
    sdi = PAPER.objective
    assert isinstance(sdi, SDI)
    assert (sdi.scale, sdi.inversion_scale, sdi.inversion_steps, sdi.eta) == (7.5, -7.5, 10, 0.3)
    assert (sdi.start, sdi.stop) == (0.98, 0.25)
    background = PAPER.background
    assert isinstance(background, LearnedBackground) and (background.hidden, background.layers) == (16, 2)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("orientation", {0: 0.1, 10000: 0.1}),
        ("sparsity", {0: 0.15, 1500: 0.075, 3000: 0, 9999: 0}),
        ("opaque", {0: 0.1, 10000: 0.1}),
        ("z_variance", {0: 1, 10000: 1}),
        ("convexity", {0: 1, 2000: 0.55, 4000: 0.1, 9999: 0.1}),
        ("smooth_density", {0: 0, 9999: 0}),
        ("smooth_color", {0: 0, 9999: 0}),
    ],
)
def test_the_papers_penalties(name, at):
    schedule = getattr(PAPER.penalties, name)
    assert {step: schedule(step, PAPER.steps) for step in at} == pytest.approx(at)


def small():
    """The paper's recipe with a field of toy size."""
    layout = HashLayout(levels=4, log2_table=8, coarsest=4, finest=16)
    scene = dataclasses.replace(
        PAPER.scene, layout=layout, first_levels=2, occupancy_resolution=8, sampling=Sampling(24, checkpoint=True)
    )
    assert PAPER.shading is not None
    shading = dataclasses.replace(PAPER.shading, albedo_until=0.0, textureless=0.5, lambertian=0.5)
    return dataclasses.replace(PAPER, steps=3, scene=scene, shading=shading)


def test_a_run_of_the_papers_recipe_trains_what_it_says(kl_folder):
    run = ObjectRun(small(), ViewPrompts("a cat", perp_neg=True), load_prior(kl_folder), seed=1)
    groups = run.optimizer_at(0).param_groups
    assert [g["lr"] for g in groups] == pytest.approx([0.01, 0.001])  # field, background
    assert all(g["betas"] == (0.9, 0.99) and g["eps"] == 1e-15 for g in groups)
    assert [g["lr"] for g in run.optimizer_at(2).param_groups] == pytest.approx([0.01, 0.001])
    before = {name: value.detach().clone() for name, value in run.module.named_parameters()}
    reports = []
    optimize(run, range(2), reports.append)
    for name, value in run.module.named_parameters():
        assert bool(value.isfinite().all()) and not torch.equal(value, before[name]), name
    assert all(0 < r.opacity < 1 and r.penalty > 0 for r in reports)
    assert reports[0].nfe % 4 == 0  # Perp-Neg: four rows each
    cameras = run.recipe.cameras.sample(1, run.generator)
    terms = run.penalties(0, run.render(0, cameras), cameras)
    assert terms.keys() == {"orientation", "sparsity", "opaque", "z_variance", "convexity"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_is_read_as_it_was_written(name, tmp_path):
    for recipe in (RECIPES[name], from_mesh(dataclasses.replace(RECIPES[name], objective=METHODS["nfsd"]))):
        RunFolder(tmp_path).write_config("object", Config("a cat", recipe, views={"back": "its tail"}, seed=3))
        assert read_config(tmp_path) == Config("a cat", recipe, views={"back": "its tail"}, seed=3)


def test_names_of_methods_are_found_in_any_case():
    assert (
        method_settings("SDS-Bridge") == METHODS["sds_bridge"] and method_settings("HiFA", "paper") == METHODS["hifa"]
    )
    assert method_settings("sds") == TUNED["distill"]["sds"] == SDS(scale=30.0) != method_settings("sds", "paper")
    with pytest.raises(ValueError, match=r"unknown method 'magic'; allowed: .*sdi.*vsd"):
        method_settings("magic")


def test_weights_keep_to_fractions_of_the_run():
    """A longer run has the same schedule, stretched."""
    schedule = RECIPES["distill"].penalties.sparsity
    assert [schedule(step, 200) for step in (60, 110, 160)] == pytest.approx([1.0, 2.0, 3.0])
    assert [schedule(10 * step, 2000) for step in range(200)] == pytest.approx([schedule(s, 200) for s in range(200)])


@pytest.mark.parametrize(
    ("kind", "rows"), [("random", 2), ("inversion", 2 + 3), ("fixed_point", 2 + 10), ("descent", 2 + 10)]
)
def test_every_kind_of_noise_costs_what_it_should(kind, rows, mixture, counting, conditions, randn):
    """Two rows of guided prediction; one for each hop at scale 1 (t = 0.6, tau below 0.25); two for each iterate."""
    settings = SDI(inversion_scale=1.0, inversion_steps=4, eta=0.0, start=0.6, stop=0.6, noise=kind)
    prior, generator = counting(mixture), torch.Generator().manual_seed(0)
    conditioning = conditions(mixture, ["left"])
    x = randn(1, 2, 2, 2)
    guidance = settings.build(prior, 10, generator).guidance(
        x, prior, conditioning, step=1, total=10, generator=generator
    )
    assert guidance.nfe == sum(prior.calls) and rows - 1 <= guidance.nfe <= rows + 1
    torch.testing.assert_close(guidance.gradient, x - guidance.x0)  # the weight stays SDI's


def test_annealed_sds_goes_through_its_times(mixture, conditions, randn):
    conditioning, x = conditions(mixture, ["left"]), randn(1, 2, 2, 2)
    generator = torch.Generator().manual_seed(0)
    objective = SDS(low=0.25, high=0.98, anneal=True).build(mixture, 5, generator)
    times = [
        float(objective.guidance(x, mixture, conditioning, step=step, total=5, generator=generator).t)
        for step in range(5)
    ]
    assert times == pytest.approx([0.98, 0.7975, 0.615, 0.4325, 0.25])
