"""The second objective, on the shape alone, and runs on priors that see several views at once."""

import dataclasses
import json

import pytest
import torch

from distill3d.cameras import CameraSampler, orbit
from distill3d.diffusion.schedule import Cosine
from distill3d.distill.image_recipes import ImageRecipe
from distill3d.distill.loop import ObjectRun, optimize
from distill3d.distill.recipes import DISTILL, Recipe, Supervision
from distill3d.distill.regularizers import WeightSchedule
from distill3d.distill.supervision import GeometryObjective, condition_views, noise_texels
from distill3d.export.options import ExportOptions
from distill3d.objectives import CFD, METHODS, SDI, SDS, VSD, attach
from distill3d.priors import load_prior
from distill3d.priors.mixture import MixturePrior
from distill3d.priors.options import PriorOptions
from distill3d.prompts import ViewPrompts
from distill3d.render.maps import geometry_image
from distill3d.render.texels import Texels, of_depth
from distill3d.render.volume import Sampling
from distill3d.runs.images import prepare
from distill3d.runs.objects import Config, generate, load_priors, load_scene, read_config, resume
from distill3d.scenes.voxels import VoxelField, VoxelOptions

SMALL = dataclasses.replace(
    DISTILL, steps=3, frames=2, scene=dataclasses.replace(DISTILL.scene, resolution=12, refine=()),
    objective=SDI(inversion_steps=2), export=ExportOptions(texture=64, resolution=32, fit=0),
)  # fmt: skip
ON = WeightSchedule(1.0, 1.0)
KINDS = ["normal", "depth"]


def test_noise_on_the_surface_asks_the_scene_first_and_then_the_depth():
    small = Small("normal")
    rendering = small.field.render(small.cameras, 10, torch.full((2, 3), 0.5, dtype=torch.float64))
    own = Texels(9, torch.arange(3), torch.arange(3))

    def texels(frame):
        return noise_texels(frame, small.field, rendering, small.cameras, small.prior)

    assert texels("image") is None
    assert texels("constant").count == 100 and texels("camera").count == 3200
    depth, expected = texels("surface"), of_depth(rendering, small.cameras, 10, 10)
    assert depth.count == expected.count and torch.equal(depth.texel, expected.texel) and len(depth.texel) > 100
    small.field.noise_texels = lambda cameras, height, width: own
    assert texels("surface") is own


def test_the_second_objective_has_no_noise_on_the_object():
    with pytest.raises(ValueError, match="no noise on the object: choose another method than cfd or sdi_cached"):
        Small("normal", objective=CFD(noise="surface"))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def supervised(**settings):
    return dataclasses.replace(SMALL, supervision=Supervision(**({"weight": ON} | settings)))


def seed(value=0):
    return torch.Generator().manual_seed(value)


class Small:
    """A field in float64 without shortcuts, two cameras, and an analytic prior of pictures of the same size."""

    def __init__(self, kind, size=10, **settings):
        options = VoxelOptions(resolution=5, blob_radius=0.8, sampling=Sampling(24, 0.0, 0.0), occupancy_threshold=0.0)
        self.field = VoxelField(options).double().eval()
        self.field.raw.data += 0.3 * torch.randn(self.field.raw.shape, generator=seed(1), dtype=torch.float64)
        self.field.update_occupancy()
        self.cameras = orbit(torch.tensor([20.0, 140.0], dtype=torch.float64), 15.0, 2.6, 40.0)
        means = torch.rand(2, 3, size, size, generator=seed(2), dtype=torch.float64)
        texts = {f"a hat, {kind} map, {d} view": [0] for d in ("front", "side", "back", "overhead")}
        self.prior = MixturePrior(means, 0.5, conditions=texts, schedule=Cosine())
        supervision = Supervision(kind=kind, **({"weight": ON} | settings))
        recipe = Recipe(steps=10, supervision=supervision, cameras=CameraSampler())
        self.shape = GeometryObjective(recipe, ViewPrompts("a hat"), self.prior)
        self.size, self.kind = size, kind

    def render(self):
        background = torch.zeros(2, 3, dtype=torch.float64)
        return self.field.render(self.cameras, self.size, background, normals=self.kind == "normal")

    def loss(self, step=3):
        return self.shape.loss(step, self.render(), self.cameras, seed())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [SDS(), SDI(inversion_steps=3)], ids=["sds", "sdi"])
def test_the_gradient_reaches_the_density_and_is_that_of_the_image(kind, objective):
    """By finite differences of <image, g> / numel, g being the objective's gradient on the image."""
    small = Small(kind, objective=objective, weight=WeightSchedule(2.0, 2.0))
    loss, rows = small.loss()
    (gradient,) = torch.autograd.grad(loss, small.field.raw)
    assert (gradient[..., 1:] == 0).all() and gradient[..., 0].abs().max() > 1e-6  # no color is in it

    def image():
        return geometry_image(small.render(), small.cameras.camera_to_world, kind)

    with torch.no_grad():
        conditioning = small.shape.prompts.conditioning(
            small.cameras.azimuth, small.cameras.elevation, small.prior.embed
        )
        out = small.shape.objective.guidance(image(), small.prior, conditioning, step=3, total=10, generator=seed())
    assert rows == out.nfe
    torch.testing.assert_close(loss.detach(), 2 * attach(image(), out.gradient).detach())
    for k in range(3):
        way = 1e-6 * torch.randn(small.field.raw.shape, generator=seed(10 + k), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                small.field.raw += sign * way
                values.append(2 * (image() * out.gradient).sum() / out.gradient.numel())
                small.field.raw -= sign * way
        torch.testing.assert_close((values[0] - values[1]) / 2, (gradient * way).sum(), rtol=1e-3, atol=1e-13)


def test_the_loss_is_proportional_to_its_weight_and_nothing_is_drawn_without():
    one, two = (Small("depth", weight=WeightSchedule(w, w)) for w in (1.0, 2.0))
    torch.testing.assert_close(two.loss()[0], 2 * one.loss()[0])
    late = Small("depth", weight=WeightSchedule(0.0, 1.0, 0.5, 0.5))
    generator = seed()
    before = generator.get_state()
    loss, rows = late.shape.loss(4, late.render(), late.cameras, generator)
    assert loss == 0 and rows == 0 and torch.equal(generator.get_state(), before)
    assert not late.shape.needs_normals(4)
    assert late.shape.loss(5, late.render(), late.cameras, generator)[1] > 0


def test_an_image_of_another_size_is_resized():
    small = Small("normal")
    small.size = 16
    assert small.loss()[0].isfinite() and small.prior.image_size == 10


def fields(recipe, prior, steps, second=None):
    """The field after some steps of a run, and what was reported."""
    run = ObjectRun(recipe, ViewPrompts("a cube"), prior, 0, second)
    reports = []
    optimize(run, range(steps), reports.append)
    return run.scene.raw.detach(), reports


def test_until_its_weight_rises_a_run_is_bit_for_bit_the_run_without(kl_folder):
    prior = load_prior(kl_folder)
    late = supervised(weight=WeightSchedule(0.0, 1.0, 2 / 3, 2 / 3))
    (plain, before), (same, after) = (fields(r, prior, 2) for r in (SMALL, late))
    assert torch.equal(plain, same) and before == after
    (plain, before), (other, after) = (fields(r, prior, 3) for r in (SMALL, late))
    assert not torch.equal(plain, other)
    assert after[2].shape > 0 == before[2].shape and after[2].nfe > before[2].nfe
    assert after[2].loss == before[2].loss  # the first objective does not see the second one's draws


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_repeats_itself(kl_folder, kind):
    prior = load_prior(kl_folder)
    (a, first), (b, second) = (fields(supervised(kind=kind), prior, 2) for _ in range(2))
    assert torch.equal(a, b) and first == second
    assert not torch.equal(a, fields(SMALL, prior, 2)[0])


@pytest.mark.parametrize("control", KINDS)
def test_a_prior_of_its_own_is_conditioned_on_what_is_rendered(kl_folder, controlnet, control):
    plain, steered = (load_prior(kl_folder, options=PriorOptions(controlnet=c, control=control))
                      for c in (None, str(controlnet)))  # fmt: skip
    recipe = supervised(kind="depth")
    a, b = (fields(recipe, plain, 1, second)[1][0] for second in (None, steered))
    assert a.loss == b.loss and a.shape != b.shape


def test_a_supervised_run_is_written_read_and_continued(kl_folder, controlnet, tmp_path):
    options = PriorOptions(controlnet=str(controlnet), control="normal", control_scale=0.5)
    recipe = supervised(weight=WeightSchedule(0.5, 1.0, 0, 2 / 3), objective=SDS(20.0), options=options)
    recipe = dataclasses.replace(recipe, objective=METHODS["sds"])

    def stop(progress):
        if progress.step == 0:
            raise KeyboardInterrupt

    config = Config("a cat", recipe, prior=str(kl_folder), dtype="float32")
    part = generate(config, tmp_path, on_step=stop)
    assert part.interrupted and part.steps == 1 and read_config(part.folder) == config
    resume(part.folder)
    prior, second = load_priors(config)
    whole = ObjectRun(recipe, config.prompts, prior, second=second)
    reports = []
    optimize(whole, range(3), lambda progress: reports.append(dataclasses.asdict(progress)))
    assert [line | {"seconds": 0.0} for line in lines(part.folder)] == reports and all(
        line["shape"] > 0 for line in reports
    )
    assert torch.equal(load_scene(part.folder).raw, whole.scene.raw)


def test_a_run_on_a_multi_view_prior_is_made_of_quadruples(views_folder):
    cameras = dataclasses.replace(SMALL.cameras, orthogonal=True)
    recipe = dataclasses.replace(supervised(), views=4, cameras=cameras)
    prior = load_prior(views_folder)
    recipe = dataclasses.replace(recipe, objective=METHODS["mvdream"])
    run = ObjectRun(recipe, ViewPrompts("a cube"), prior)
    cameras = recipe.cameras.sample(4, run.generator)
    conditioning = condition_views(run.prompts, prior, run.render(0, cameras), cameras)
    assert run.geometry is not None and run.objective.views == run.geometry.objective.views == 4
    assert torch.equal(conditioning.positive.camera, cameras.camera_to_world)
    assert torch.equal(conditioning.positive.hidden, prior.embed(["a cube"] * 4).hidden)  # no direction words
    for objective in (METHODS["mvdream"], SDI(inversion_steps=2)):
        run = ObjectRun(dataclasses.replace(recipe, objective=objective), ViewPrompts("a cube"), prior)
        before = run.scene.raw.detach().clone()
        optimize(run, range(2), lambda progress: None)
        assert run.scene.raw.isfinite().all() and not torch.equal(run.scene.raw, before)


def test_mistakes_are_named(views_folder):
    prior, prompts = load_prior(views_folder), ViewPrompts("a cube")
    four = dataclasses.replace(SMALL, cameras=dataclasses.replace(SMALL.cameras, orthogonal=True), views=4)
    for recipe, match in (
        (SMALL, "sees four views 90 degrees apart; pass --set cameras.orthogonal=true"),
        (dataclasses.replace(four, views=6), "--views-per-step must be a multiple, got 6"),
        (dataclasses.replace(four, perp_neg=True), "does not support Perp-Neg; pass --set recipe.perp_neg=false"),
        (dataclasses.replace(four, objective=VSD()), "camera"),
    ):
        with pytest.raises(ValueError, match=match):
            ObjectRun(recipe, prompts, prior)
    with pytest.raises(ValueError, match="second objective cannot train a student, got VSD"):
        Supervision(objective=VSD())
    with pytest.raises(ValueError, match="at least 0"):
        Supervision(weight=WeightSchedule(-1.0, 0.0))


def test_sds_bridge_goes_from_its_source_text_to_its_target_text(kl_folder):
    """In 3D with direction words after the target's, in 2D without: else it would be CSD under another name."""
    prior, bridge = load_prior(kl_folder), METHODS["sds_bridge"]
    run = ObjectRun(dataclasses.replace(SMALL, objective=bridge), ViewPrompts("a cat", "a dog"), prior)
    target, source = "a cat" + bridge.target_suffix, "a cat" + bridge.source_suffix
    assert run.prompts.text("front") == f"{target}, front view" and run.prompts.negative == source
    image = prepare(prior, ["a cat"], ImageRecipe(objective=bridge), seed())
    assert torch.equal(image.conditioning.positive.hidden, prior.embed([target]).hidden)
    assert torch.equal(image.conditioning.negative.hidden, prior.embed([source]).hidden)
    assert not torch.equal(prior.embed([target]).hidden, prior.embed([source]).hidden)
