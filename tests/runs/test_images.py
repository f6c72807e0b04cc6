"""2D runs on a random prior of toy size: the theorem on a network, seeds, costs, starts and run folders."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from PIL import Image

from distill3d.distill.image_recipes import DDIM, IMAGE_METHODS, ImageRecipe, image_recipe
from distill3d.objectives import SDI, SDS, SDICached
from distill3d.priors.loading import load_prior
from distill3d.runs.folder import RunFolder
from distill3d.runs.images import ImageConfig, generate_image, make_images, prepare, read_image
from distill3d.runs.objects import resume


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(kl_folder)


def made(prior, method, seed=0, prompts=("a red dot",), scale=None, **settings):
    recipe = dataclasses.replace(image_recipe(method), **{"steps": 4, **settings})
    if scale is not None:
        recipe = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, scale=scale))
    generator = torch.Generator().manual_seed(seed)
    return make_images(prior, prompts, recipe, generator)


@pytest.mark.parametrize("method", ["sdi_cached", "cfd"])
@pytest.mark.parametrize(("scale", "steps"), [(1.0, 1), (5.0, 10), (0.0, 3)])
def test_cached_and_constant_kappa_are_the_ddim_sampler(prior, method, scale, steps):
    prompts = ("a red dot", "a blue cat")
    ddim = made(prior, "ddim", scale=scale, steps=steps, prompts=prompts)
    sdi = made(prior, method, scale=scale, steps=steps, prompts=prompts)
    assert (sdi.x - ddim.x).norm() < 1e-4 * ddim.x.norm()  # float32, through ten network calls
    torch.testing.assert_close(sdi.images, ddim.images, atol=1e-4, rtol=0)
    assert sdi.nfe == ddim.nfe == steps * len(prompts) * (2 if scale == 5 else 1)


@pytest.mark.parametrize(
    ("method", "scale", "steps"), [("sdi_cached", 1.0, 25), ("sdi_cached", 7.5, 10), ("cfd", 7.5, 10)]
)
def test_cached_and_constant_kappa_are_the_ddim_sampler_of_the_bundled_prior(method, scale, steps):
    bundled, prompts = load_prior("toybox"), ("a red mushroom, front view", "a blue car", "a yellow duck")
    ddim = made(bundled, "ddim", scale=scale, steps=steps, prompts=prompts)
    sdi = made(bundled, method, scale=scale, steps=steps, prompts=prompts)
    assert (sdi.x - ddim.x).norm() < 1e-4 * ddim.x.norm()


def test_nfe_counts_the_rows_that_the_network_was_shown(prior, counting):
    for method in ("ddim", "sds", "sdi"):
        watched = counting(prior)
        done = made(watched, method, steps=3)
        assert done.steps == 3 and done.nfe == sum(watched.calls)


@pytest.mark.parametrize("method", ["ddim", "sds", "sdi"])
def test_the_same_seed_gives_the_same_image(prior, method):
    one, again, other = (made(prior, method, seed).images for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.* teach the student little")
@pytest.mark.filterwarnings("ignore:toy reads the first")  # the negative words of NFSD, letter by letter
@pytest.mark.parametrize("method", [n for n in IMAGE_METHODS if n not in ("rfds", "flowdreamer")])  # for flow models
def test_every_method_makes_an_image(prior, method):
    if method in ("vsd", "esd"):
        pytest.importorskip("peft")
    done = made(prior, method, steps=2)
    assert done.images.shape == (1, 3, prior.image_size, prior.image_size)
    assert bool(done.images.isfinite().all()) and done.images.min() >= 0 and done.images.max() <= 1
    assert done.nfe > 0 and not done.x.requires_grad and not done.images.requires_grad


def test_without_a_learning_rate_the_whole_target_is_taken(prior):
    def fresh():
        recipe = ImageRecipe(steps=1, objective=SDICached(5.0), rate=None)
        return prepare(prior, ["a red dot", "a blue cat"], recipe, torch.Generator().manual_seed(0))

    run, other = fresh(), fresh()
    run.run(lambda progress: None)
    target = other.objective.guidance(other.x(), prior, other.conditioning, step=0, total=1, generator=other.generator)
    torch.testing.assert_close(run.x(), target.x0)


def test_projection_makes_the_latents_those_of_an_image(prior):
    recipe = ImageRecipe(steps=1, objective=SDS(), project=True)
    run = prepare(prior, ["a red dot"], recipe, torch.Generator().manual_seed(0))
    free = run.x().clone()
    with torch.no_grad():
        run.scene.project()
        torch.testing.assert_close(run.scene.render().rgb, prior.encode(prior.decode(free)))


def test_pixels_move_and_stay_in_range(prior):
    done = made(prior, "sds", space="pixels", start="gray", rate=0.4)
    assert float((done.images - 0.5).abs().max()) > 0.4  # four steps of Adam, 0.4 each: some reach the border
    assert done.images.min() >= 0 and done.images.max() <= 1


def test_a_run_can_start_from_an_image(prior, tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    run = prepare(
        prior,
        ["a red dot"],
        ImageRecipe(steps=1, objective=SDS(), start=str(tmp_path / "red.png")),
        torch.Generator(),
    )
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(read_image(tmp_path / "red.png", 16), red)
    torch.testing.assert_close(run.x(), prior.encode(red))


def test_an_interrupted_run_leaves_the_image_it_has(prior):
    def stop(progress):
        if progress.step == 1:
            raise KeyboardInterrupt

    for method in ("ddim", "sds"):
        recipe = dataclasses.replace(image_recipe(method), steps=5)
        done = make_images(prior, ["a red dot"], recipe, torch.Generator().manual_seed(0), on_step=stop)
        assert done.interrupted == signal.SIGINT and done.steps == 2 and done.nfe == 4
        assert bool(done.images.isfinite().all())


def test_an_image_whose_folder_was_removed_says_so(prior, tmp_path):
    config = ImageConfig("a red dot", dataclasses.replace(image_recipe("ddim"), steps=2), prior="own", dtype="float32")
    with pytest.raises(FileNotFoundError, match="the run folder was removed"):
        generate_image(config, tmp_path / "runs", prior=prior, on_step=lambda _: shutil.rmtree(tmp_path / "runs", True))
    assert not list(tmp_path.iterdir())


def test_the_run_folder_holds_everything(kl_folder, tmp_path):
    recipe = dataclasses.replace(image_recipe("sdi"), steps=3)
    config = ImageConfig("a red dot/../x", recipe, prior=str(kl_folder), seed=5, dtype="float32")
    result = generate_image(config, tmp_path, size=40)
    assert result.folder.parent == tmp_path and result.folder.name.startswith("a-red-dot-x-")
    assert {p.name for p in result.folder.iterdir()} == {"config.json", "metrics.jsonl", "image.png"}
    content = json.loads((result.folder / "config.json").read_text())
    assert (content["kind"], content["seed"], content["recipe"]["steps"]) == ("image", 5, 3) and content["versions"]
    assert RunFolder(result.folder).read_config("image", ImageConfig) == config
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[-1]["nfe"] == result.made.nfe
    with Image.open(result.image) as image:
        assert image.size == (40, 40)
    with pytest.raises(ValueError, match="a run of kind 'image'; this needs one of kind 'object'"):
        resume(result.folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: ImageRecipe(steps=0), "at least one step, and at most 10000000, got 0"),
        (lambda: ImageRecipe(rate=-1.0), "must lie in .0, 1,000,000., got -1"),
        (lambda: ImageRecipe(objective=SDI(scale=float("nan"))), "scale must be a finite number"),
        (lambda: DDIM(start=1.5), "0 <= stop <= start <= 1"),
        (lambda: ImageRecipe(space="pixels", rate=None), "need a learning rate"),
        (lambda: ImageRecipe(space="pixels", project=True), "only latents can be projected"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings()


def test_an_unknown_start_is_refused_before_the_first_step(prior):
    recipe = ImageRecipe(objective=SDS(), start="nowhere.png")
    with pytest.raises(ValueError, match=r"unknown start 'nowhere.png': allowed are zero, gray"):
        prepare(prior, ["a red dot"], recipe, torch.Generator())
