"""Each family against diffusers' own pipeline: what its denoising loop computes, and the image it ends with."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided, guided_prediction
from distill3d.diffusion.schedule import Flow, coefficients, to_eps
from distill3d.distill.image_recipes import image_recipe
from distill3d.distill.loop import ObjectRun, optimize
from distill3d.distill.recipes import DISTILL
from distill3d.objectives import attach, sdi
from distill3d.priors import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.prompts import ViewPrompts
from distill3d.runs.images import make_images
from distill3d.scenes.voxels import VoxelOptions
from distill3d.types import Conditioning

NAMES = ["zero-snr", "sdxl", "if", "sd3", "sd3-without-t5", "flux-dev", "flux-schnell"]
PROMPTS = ["a red cube, side view", "a cat"]
every_family = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def load(toys):
    def load(name, **options):
        toy = toys(name)
        return load_prior(toy.folder, options=PriorOptions(image_size=toy.size, **options))

    return load


def conditioning_of(prior):
    return Conditioning(prior.embed(PROMPTS), prior.embed([""] * 2))


def run_pipeline(toy, steps, scale):
    """The pipeline's image, and for each step (time, sample, guided model output)."""
    pipeline, seen = toy.pipeline, []
    if "Flux" in toy.name:
        options = {"height": toy.size, "width": toy.size, "true_cfg_scale": scale, "negative_prompt": [""] * 2}
    else:
        options = {"guidance_scale": scale}
    if toy.name == "IFPipeline":
        options["clean_caption"] = False
    step = type(pipeline.scheduler).step

    def watched(output, t, sample, **more):
        tensors = (output, sample)
        if "Flux" in toy.name:
            tensors = (pipeline._unpack_latents(x, toy.size, toy.size, pipeline.vae_scale_factor) for x in tensors)
        seen.append((float(t), *(x.clone() for x in tensors)))
        return step(pipeline.scheduler, output, t, sample, **more)

    pipeline.scheduler.step = watched
    try:
        images = pipeline(
            PROMPTS, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt", **options
        ).images
    finally:
        del pipeline.scheduler.step
    if toy.name == "IFPipeline":
        images = (images / 2 + 0.5).clamp(0, 1)
    return images, seen


def times_of(prior, seen):
    """The times of the steps as the prior counts them, float64, and 0 at the end."""
    if isinstance(prior.schedule, Flow):
        sigma = torch.tensor([t / 1000 for t, _, _ in seen], dtype=torch.float64)
        times = prior.schedule.time(2 * ((1 - sigma) / sigma).log())
    else:
        times = torch.tensor([t / 1000 for t, _, _ in seen], dtype=torch.float64)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


@every_family
@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["plain", "guided"])
def test_predict_is_what_the_denoising_loop_computes(toys, load, name, scale):
    prior = load(name)
    _, seen = run_pipeline(toys(name), 5, scale)
    compared = 0
    for t, (_, output, sample) in zip(times_of(prior, seen), seen, strict=False):
        if t == 1.0:
            continue  # pure noise: no schedule of ours reaches it, because eps and x0 could not be distinguished
        t = t.expand(2)
        with torch.no_grad():
            eps, rows = guided_prediction(prior, sample, t, conditioning_of(prior), scale)
        theirs = to_eps(prior.kind, output.double(), sample.double(), *coefficients(prior.schedule, t, sample.double()))
        torch.testing.assert_close(eps, theirs.float(), rtol=1e-5, atol=1e-5 * max(1.0, scale))
        assert rows == (2 if scale == 1 else 4)
        compared += 1
    assert compared >= 4


@every_family
def test_sampling_is_the_pipelines_to_the_last_pixel(toys, load, name):
    prior = load(name)
    images, seen = run_pipeline(toys(name), 5, 4.0)
    model = Guided(prior, conditioning_of(prior), 4.0)
    with torch.no_grad():
        ours = ddim.sample(model, seen[0][2], prior.schedule, times_of(prior, seen))
        ours = prior.decode(ours)
    # Flows are kept 1e-4 away from both ends of time; a level of an 8-bit image is 4e-3.
    torch.testing.assert_close(ours, images, rtol=0, atol=1.5e-3)
    assert images.std() > 0.05  # there is something to see


@every_family
def test_conditions_reach_the_network(load, name):
    prior = load(name)
    x = torch.randn(1, *prior.sample_shape, generator=torch.Generator().manual_seed(0))
    e = [prior.predict(x, torch.tensor([0.5]), prior.embed([text])) for text in ("a cat", "a red cube")]
    assert (e[0] - e[1]).abs().max() > 1e-4


@every_family
def test_batch_of_times_is_one_by_one(load, name):
    prior, t = load(name), torch.tensor([0.9, 0.35])
    x = torch.randn(2, *prior.sample_shape, generator=torch.Generator().manual_seed(0))
    text = prior.embed(PROMPTS)
    both = prior.predict(x, t, text)
    each = [prior.predict(x[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-4, atol=1e-5)


@every_family
def test_encode_undoes_what_decode_does_to_the_unit(load, name):
    """Latents come in the schedule's unit: scale and shift of the autoencoder are applied, and undone."""
    prior = load(name)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = prior.encode(images)
    if name == "if":
        torch.testing.assert_close(prior.decode(x), images)
        return
    vae = prior.modules()["vae"]
    z = x / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    torch.testing.assert_close(z, vae.encode(images * 2 - 1).latent_dist.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prior.decode(x), (vae.decode(z).sample / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_stays_inside(toys, load, name, dtype):
    exact, toy = load(name), toys(name)
    prior = load_prior(toy.folder, dtype=dtype, options=PriorOptions(image_size=toy.size))
    x = torch.randn(2, *prior.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 0.8])
    eps, wanted = prior.predict(x, t, prior.embed(PROMPTS)), exact.predict(x, t, exact.embed(PROMPTS))
    assert eps.dtype == torch.float32 and prior.embed(PROMPTS).hidden.dtype == torch.float32
    assert (eps - wanted).norm() < 0.1 * wanted.norm()
    for part, module in prior.modules().items():
        assert next(module.parameters()).dtype == (torch.float32 if part == "vae" else dtype)


@every_family
def test_the_gradient_reaches_the_pixels(load, name):
    prior = load(name)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = prior.encode(images)
    out = sdi(inversion_steps=3).guidance(
        x, prior, conditioning_of(prior), step=0, total=10, generator=torch.Generator().manual_seed(0)
    )
    attach(x, out.gradient).backward()
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0


@every_family
def test_a_prediction_without_gradients_is_the_same_and_may_take_part_in_one(load, name):
    prior = load(name)
    x = torch.randn(2, *prior.sample_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.tensor([0.5, 0.8])
    with torch.no_grad():
        eps = prior.predict(x, t, prior.embed(PROMPTS))
    torch.testing.assert_close(eps, prior.predict(x, t, prior.embed(PROMPTS)), rtol=1e-4, atol=1e-4)
    (x * eps).sum().backward()
    assert torch.equal(x.grad, eps)


@every_family
@pytest.mark.parametrize("method", ["ddim", "sds", "sdi"])
def test_distills_an_image(load, name, method):
    prior = load(name)
    recipe = dataclasses.replace(image_recipe(method), steps=2)
    made = make_images(prior, ["a red cube"], recipe, torch.Generator().manual_seed(0))
    assert made.steps == 2 and made.images.shape == (1, 3, 16, 16) and made.images.isfinite().all()


@pytest.mark.filterwarnings("ignore:.* teach the student little")
def test_vsd_trains_a_student_of_sdxl(load):
    pytest.importorskip("peft")
    prior = load("sdxl")
    recipe = dataclasses.replace(image_recipe("vsd"), steps=2)
    made = make_images(prior, ["a red cube"], recipe, torch.Generator().manual_seed(0))
    assert made.images.isfinite().all()


def test_the_shift_of_sd3_follows_the_number_of_its_tokens(toys, tmp_path):
    toy = toys("sd3")
    folder = shutil.copytree(toy.folder, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"use_dynamic_shifting": True, "base_image_seq_len": 4}
    file.write_text(json.dumps(config | {"max_image_seq_len": 64}))
    prior = load_prior(folder)
    tokens = (prior.sample_shape[-1] // 2) ** 2  # patches of 2 x 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 4) / 60
    assert tokens > 4 and prior.schedule.shift == pytest.approx(math.exp(mu))


@pytest.mark.parametrize("name", ["if", "sd3", "flux-schnell"])
def test_families_without_a_student_say_so(load, name):
    prior = load(name)
    with pytest.raises(ValueError, match="trains a student, which needs a latent diffusion model with a UNet"):
        make_images(prior, ["a red cube"], image_recipe("vsd"), torch.Generator())


@every_family
def test_distills_an_object(load, name):
    prior = load(name)
    recipe = dataclasses.replace(DISTILL, steps=2, views=1, scene=VoxelOptions(resolution=16))
    run = ObjectRun(recipe, ViewPrompts("a red cube"), prior)
    before, losses = run.scene.raw.detach().clone(), []
    optimize(run, range(2), lambda progress: losses.append(progress.loss))
    assert len(losses) == 2 and all(0 < loss < 1e6 for loss in losses)
    assert (run.scene.raw.detach() - before).abs().max() > 0
