"""Whole runs on a pretend accelerator: no operation mixes devices, and how often a step waits has a limit.

`pytest -s tests/test_device.py` prints the table of waits in docs/gpu.md.
"""

from dataclasses import replace

import card
import pytest
import torch
import trimesh
from safetensors.torch import save_file

from distill3d.bench.judging import Judges
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.run import run_bench
from distill3d.cameras import turntable
from distill3d.distill.image_recipes import image_recipe
from distill3d.distill.loop import ObjectRun, optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import (
    DISTILL,
    LAPTOP,
    LAPTOP_TEXTURE,
    PAPER,
    PAPER_TEXTURE,
    SPLATS,
    method_settings,
    refinement,
)
from distill3d.evaluation.evaluator import load_evaluator
from distill3d.export.options import ExportOptions
from distill3d.objectives import CFD, METHODS, SDI, SDS
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.prompts import ViewPrompts
from distill3d.render.volume import Sampling
from distill3d.runs.images import make_images
from distill3d.runs.objects import Config, generate, load_scene, resume
from distill3d.scenes.gaussians import Densification
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.hashgrid.layout import HashLayout

MOST = 10  # waits in a step

SMALL = {
    "laptop": replace(
        LAPTOP,
        steps=8,
        scene=replace(LAPTOP.scene, resolution=12),
        # The images of a random model show no object, and so no hull.
        sampling=replace(
            LAPTOP.sampling, rings=((4, 10.0, 0.0), (4, 30.0, 45.0)), group=8, joint_levels=2, levels=2, hull=False
        ),
    ),
    "distill": replace(DISTILL, steps=2, scene=replace(DISTILL.scene, resolution=12)),
    "paper": replace(
        PAPER,
        steps=2,
        objective=replace(PAPER.objective, inversion_steps=4),
        # Normals and lit views from the first step, and samples enough for two chunks of the backward pass.
        shading=replace(PAPER.shading, albedo_until=0.0, textureless=0.5, lambertian=0.5),
        scene=HashOptions(
            HashLayout(levels=4, log2_table=8, finest=32),
            hidden=8,
            occupancy_resolution=4,
            sampling=Sampling(samples=32, points=2**11, checkpoint=True),
        ),
    ),
}


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    path = tmp_path_factory.mktemp("ball") / "ball.obj"
    trimesh.creation.icosphere(1).export(path)
    return str(path)


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(kl_folder, device=card.DEVICE)


@pytest.fixture(scope="module")
def views_prior(views_folder):
    return load_prior(views_folder, device=card.DEVICE)


def waits(recipe, prior) -> tuple[ObjectRun, list[int]]:
    """A run, and the waits of each of its steps; raises RuntimeError where it mixes devices."""
    found = []
    with card.watch() as seen:
        run = object_run(recipe, ViewPrompts("a cat", perp_neg=recipe.perp_neg), prior)
        seen.take()
        optimize(run, range(recipe.steps), lambda progress: found.append(seen.take()))
    return run, [sum(step.values()) for step in found]


def report(name: str, counts: list[int]) -> None:
    print(f"{name:>20} {counts}")


@pytest.mark.parametrize("name", ["distill", "paper"])
def test_a_step_of_a_recipe_waits_seldom(name, prior):
    _, counts = waits(SMALL[name], prior)
    report(name, counts)
    assert max(counts[1:]) <= MOST and counts[0] <= MOST + 1  # the first one updates the occupancy


def test_the_sampling_loop_waits_seldom(views_prior):
    recipe = SMALL["laptop"]
    run, counts = waits(recipe, views_prior)
    report("laptop", counts)
    begins = [step == 0 or run.level_at(step) != run.level_at(step - 1) for step in range(recipe.steps)]
    fits = [count for count, first in zip(counts, begins, strict=True) if not first]
    levels = [count - max(fits) for count, first in zip(counts, begins, strict=True) if first]
    assert max(fits) <= MOST and max(levels) <= MOST
    _, more = waits(replace(recipe, sampling=replace(recipe.sampling, joint_levels=4)), views_prior)
    assert more[0] - counts[0] <= 2 * MOST  # two levels without a scene


@pytest.mark.parametrize(
    "method",
    [SDI(inversion_steps=4), SDS(), CFD(noise="constant"), CFD(noise="surface")],
    ids=["SDI", "SDS", "CFD, one noise", "CFD, on the surface"],
)
def test_a_step_of_a_method_waits_seldom(method, prior):
    _, counts = waits(replace(SMALL["distill"], objective=method), prior)
    report(type(method).__name__, counts)
    assert max(counts[1:]) <= MOST


UNSUITED = ("rfds", "flowdreamer")  # for flow models: tests/priors/test_device_families.py


@pytest.mark.filterwarnings("ignore:.* teach the student little")
@pytest.mark.filterwarnings("ignore:toy reads the first")  # the negative words of NFSD, letter by letter
@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*UNSUITED, "sdi", "sds")])
def test_every_method_stays_on_the_device_and_waits_seldom(method, prior):
    if method in ("vsd", "esd"):
        pytest.importorskip("peft")
    _, counts = waits(replace(SMALL["distill"], steps=2, objective=method_settings(method)), prior)
    report(method, counts)
    assert counts[1] <= MOST  # the first one draws what stays, and DSD simulates its trajectories


def test_splats_wait_seldom(prior):
    growing = Densification(start=0.0, every=2)
    scene = replace(SPLATS.scene, count=60, densification=growing)
    _, counts = waits(replace(SPLATS, steps=4, scene=scene, objective=SDI(inversion_steps=2)), prior)
    report("splats", counts)
    assert counts[1] <= MOST and counts[3] <= MOST  # in others splats are added and removed
    assert max(counts) <= 2 * MOST


@pytest.mark.parametrize("kind", ["laptop", "paper", "refine"])
def test_textures_wait_seldom(kind, ball, prior):
    recipe = PAPER_TEXTURE if kind == "paper" else LAPTOP_TEXTURE
    scene = replace(recipe.scene, mesh=ball, levels=(8, 16), shape_levels=(4, 8))
    recipe = replace(recipe, steps=2, scene=scene, objective=SDI(inversion_steps=2))
    _, counts = waits(refinement(recipe, 2, 0.5, 0.1) if kind == "refine" else recipe, prior)
    report(f"texture, {kind}", counts)
    assert counts[1] <= MOST  # the first one finds neighbors on the surface


def test_a_controlnet_and_lora_stay_on_the_device(kl_folder, controlnet, tmp_path):
    pytest.importorskip("peft")
    names = [name for name, _ in load_prior(kl_folder).network.named_modules() if name.endswith("attn1.to_q")]
    ones = {f"unet.{name}.lora_{part}.weight": torch.ones(1, 32).mT if part == "B" else torch.ones(1, 32)
            for name in names for part in "AB"}  # fmt: skip
    save_file({name: value.contiguous() for name, value in ones.items()}, tmp_path / "style.safetensors")
    options = PriorOptions(controlnet=str(controlnet), control="normal", lora=(str(tmp_path / "style.safetensors"),))
    with card.watch():
        prior = load_prior(kl_folder, device=card.DEVICE, options=options)
    assert prior.control == "normal"
    recipe = replace(SMALL["distill"], objective=SDI(inversion_steps=2), perp_neg=True)
    run, counts = waits(recipe, prior)
    assert run.scene.raw.isfinite().all() and max(counts[1:]) <= 2 * MOST


@pytest.mark.parametrize("method", ["ddim", "sdi", "sdi_cached", "cfd"])
def test_images_stay_on_the_device(method, prior):
    recipe = replace(image_recipe(method), steps=2)
    with card.watch():
        made = make_images(prior, ["a cat", "a hat"], recipe, torch.Generator().manual_seed(0))
    assert made.images.device == card.DEVICE and made.images.isfinite().all()


def test_a_run_is_interrupted_resumed_exported_and_rendered_on_the_device(kl_folder, tmp_path):
    def stop(progress):
        if progress.step == 0:
            raise KeyboardInterrupt

    recipe = replace(
        SMALL["distill"], frames=2, objective=CFD(noise="surface"), export=ExportOptions(64, resolution=24, fit=1)
    )
    config = Config("a cat", recipe, prior=str(kl_folder), dtype="float32", device=str(card.DEVICE))
    with card.watch():
        part = generate(config, tmp_path, on_step=stop)
        whole = resume(part.folder)
        scene = load_scene(part.folder, device=str(card.DEVICE))
        views = turntable(2).to(card.DEVICE)
        rendering = scene.render(views, 8, torch.zeros(2, 3, device=card.DEVICE), normals=True)
    assert part.interrupted and whole.steps == recipe.steps and whole.mesh is not None and whole.mesh.is_file()
    assert rendering.rgb.device == card.DEVICE and rendering.normal is not None


def test_a_bench_and_its_judge_stay_on_the_device(kl_folder, prior, tmp_path):
    recipe = replace(SMALL["distill"], steps=1, views=1, objective=SDS())
    protocol = Protocol((Variant("SDS", recipe),), ("a cat",), prior=str(kl_folder), views=2, size=16)
    with card.watch():
        found = run_bench(tmp_path, protocol, prior, Judges(), ("saturation", "nfe"))
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        judge = load_evaluator("toybox", device=card.DEVICE)
        similar = judge.embed_images(images) @ judge.embed_texts(["a red duck"]).T
    assert len(found.cells) == 1 and found.report.is_file() and similar.isfinite().all()
