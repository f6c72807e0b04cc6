"""2D runs on a random prior of toy size: the theorem on a network, seeds, costs, starts and run folders."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from distill3d.distill.image_recipes import PICTURE_METHODS, PictureRecipe, picture_recipe
from distill3d.runs.images import PictureConfig, draw_picture, paint, prepare, read_picture, text_conditioning
from distill3d.priors.loading import load_prior


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(kl_folder)


def painted(prior, method, seed=0, prompts=("a red dot",), **settings):
    recipe = dataclasses.replace(picture_recipe(method), **{"steps": 4, **settings})
    generator = torch.Generator().manual_seed(seed)
    return paint(prior, text_conditioning(prior, list(prompts)), method, recipe, generator)


@pytest.mark.parametrize(("scale", "steps"), [(1.0, 1), (5.0, 10), (0.0, 3)])
def test_cached_kappa_is_the_ddim_sampler(prior, scale, steps):
    prompts = ("a red dot", "a blue cat")
    ddim = painted(prior, "ddim", scale=scale, steps=steps, prompts=prompts)
    sdi = painted(prior, "sdi_cached", scale=scale, steps=steps, prompts=prompts)
    assert (sdi.x - ddim.x).norm() < 1e-4 * ddim.x.norm()  # float32, through ten network calls
    torch.testing.assert_close(sdi.images, ddim.images, atol=1e-4, rtol=0)
    assert sdi.nfe == ddim.nfe == steps * len(prompts) * (2 if scale == 5 else 1)


@pytest.mark.parametrize(("scale", "steps"), [(1.0, 25), (7.5, 10)])
def test_cached_kappa_is_the_ddim_sampler_of_the_bundled_prior(scale, steps):
    bundled, prompts = load_prior("toybox"), ("a red mushroom, front view", "a blue car", "a yellow duck")
    ddim = painted(bundled, "ddim", scale=scale, steps=steps, prompts=prompts)
    sdi = painted(bundled, "sdi_cached", scale=scale, steps=steps, prompts=prompts)
    assert (sdi.x - ddim.x).norm() < 1e-4 * ddim.x.norm()


def test_nfe_counts_the_rows_that_the_network_was_shown(prior, counting):
    for method in ("ddim", "sds", "sdi"):
        watched = counting(prior)
        done = painted(watched, method, steps=3)
        assert done.steps == 3 and done.nfe == sum(watched.calls)


@pytest.mark.parametrize("method", ["ddim", "sds", "sdi"])
def test_the_same_seed_gives_the_same_picture(prior, method):
    one, again, other = (painted(prior, method, seed).images for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:toy reads the first")  # the negative words of NFSD, letter by letter
@pytest.mark.parametrize("method", PICTURE_METHODS)
def test_every_method_makes_a_picture(prior, method):
    if method in ("vsd", "esd"):
        pytest.importorskip("peft")
    done = painted(prior, method, steps=2)
    assert done.images.shape == (1, 3, prior.image_size, prior.image_size)
    assert bool(done.images.isfinite().all()) and done.images.min() >= 0 and done.images.max() <= 1
    assert done.nfe > 0 and not done.x.requires_grad and not done.images.requires_grad


def test_a_rate_of_zero_takes_the_target_whole(prior):
    def fresh():
        recipe = PictureRecipe(steps=1, scale=5.0, rate=0.0)
        conditioning = text_conditioning(prior, ["a red dot", "a blue cat"])
        return prepare(prior, conditioning, "sdi_cached", recipe, torch.Generator().manual_seed(0))

    run, other = fresh(), fresh()
    run.run(lambda progress: None)
    target = other.objective.guidance(other.x(), prior, other.conditioning, step=0, total=1, generator=other.generator)
    torch.testing.assert_close(run.x(), target.x0)


def test_projection_makes_the_latents_those_of_a_picture(prior):
    conditioning = text_conditioning(prior, ["a red dot"])
    recipe = PictureRecipe(steps=1, project=True)
    run = prepare(prior, conditioning, "sds", recipe, torch.Generator().manual_seed(0))
    free = run.x().clone()
    with torch.no_grad():
        rendering, _ = run.views(0)
        torch.testing.assert_close(rendering.rgb, prior.encode(prior.decode(free)))


def test_pixels_move_and_stay_in_range(prior):
    done = painted(prior, "sds", space="pixels", start="gray", rate=0.4)
    assert float((done.images - 0.5).abs().max()) > 0.4  # four steps of Adam, 0.4 each: some reach the border
    assert done.images.min() >= 0 and done.images.max() <= 1


def test_a_run_can_start_from_a_picture(prior, tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    run = prepare(
        prior,
        text_conditioning(prior, ["a red dot"]),
        "sds",
        PictureRecipe(steps=1, start=str(tmp_path / "red.png")),
        torch.Generator(),
    )
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(read_picture(tmp_path / "red.png", 16), red)
    torch.testing.assert_close(run.x(), prior.encode(red))


def test_an_interrupted_run_leaves_the_picture_it_has(prior):
    def stop(progress):
        if progress.step == 1:
            raise KeyboardInterrupt

    for method in ("ddim", "sds"):
        recipe = dataclasses.replace(picture_recipe(method), steps=5)
        conditioning = text_conditioning(prior, ["a red dot"])
        done = paint(prior, conditioning, method, recipe, torch.Generator().manual_seed(0), stop)
        assert done.interrupted and done.steps == 2 and done.nfe == 4
        assert bool(done.images.isfinite().all())


def test_the_run_folder_holds_everything(kl_folder, tmp_path):
    recipe = dataclasses.replace(picture_recipe("sdi"), steps=3)
    config = PictureConfig("a red dot/../x", "sdi", recipe, prior=str(kl_folder), seed=5)
    result = draw_picture(config, tmp_path, size=40)
    assert result.folder.parent == tmp_path and result.folder.name.startswith("a-red-dot-x-")
    assert {p.name for p in result.folder.iterdir()} == {"config.json", "metrics.jsonl", "image.png"}
    content = json.loads((result.folder / "config.json").read_text())
    assert (content["method"], content["seed"], content["recipe"]["steps"]) == ("sdi", 5, 3)
    assert PictureRecipe(**content["recipe"]) == recipe and content["versions"]
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[-1]["nfe"] == result.painting.nfe
    with Image.open(result.picture) as picture:
        assert picture.size == (40, 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"rate": -1.0}, "positive, got -1"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"first": 1.5}, "0 <= last <= first <= 1"),
        ({"space": "pixels", "rate": 0.0}, "rate above 0"),
        ({"space": "pixels", "project": True}, "for latents"),
        ({"start": "nowhere.png"}, "unknown start 'nowhere.png'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PictureRecipe(**settings)
