import subprocess
import sys

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.objectives import attach, sdi
from distill3d.priors import load_prior
from distill3d.types import Conditioning

TEXT = "a red cube, side view"


@pytest.fixture
def prior(toy):
    return load_prior(toy[1])


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_predict_is_the_network(prior, toy):
    pipeline, _ = toy
    x, steps = noise(3, 4, 8, 8), torch.tensor([981, 500, 0])
    text = prior.embed([TEXT, "", "cat"])
    with torch.no_grad():
        out = pipeline.unet(x, steps, text.hidden).sample
    if prior.kind == "v":
        bar = pipeline.scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
        out = bar.sqrt() * out + (1 - bar).sqrt() * x
    torch.testing.assert_close(prior.predict(x, steps / 1000, text), out, rtol=1e-5, atol=1e-5)


def test_embeddings_are_the_pipelines_and_cached(prior, toy):
    theirs, empty = toy[0].encode_prompt(TEXT, "cpu", 1, True)
    text = prior.embed([TEXT, "", TEXT])
    torch.testing.assert_close(text.hidden, torch.cat([theirs, empty, theirs]), rtol=1e-5, atol=1e-5)
    assert (theirs - empty).abs().max() > 0.1  # the toy text encoder does read
    prior.text_cache.free_encoders()
    torch.testing.assert_close(prior.embed([TEXT]).hidden, text[:1].hidden)
    assert not prior.text_cache.modules()  # nothing was loaded again: every text is encoded once


@pytest.mark.parametrize("steps", [4, 10])
def test_ddim_sampling_is_the_pipelines(prior, toy, steps):
    pipeline, _ = toy
    start, prompts = noise(2, 4, 8, 8), [TEXT, "cat"]
    options = {"latents": start, "num_inference_steps": steps, "guidance_scale": 5.0}
    latents = pipeline(prompts, output_type="latent", **options).images
    images = pipeline(prompts, output_type="pt", **options).images
    times = torch.cat([pipeline.scheduler.timesteps, torch.zeros(1)]) / 1000
    model = Guided(prior, Conditioning(prior.embed(prompts), prior.embed(["", ""])), 5.0)
    with torch.no_grad():
        ours = ddim.sample(model, start, prior.schedule, times)
        torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prior.decode(ours), images, rtol=1e-4, atol=1e-4)


def test_encode_is_the_autoencoder_in_the_schedules_unit(prior, toy):
    vae, images = toy[0].vae, noise(2, 3, 16, 16).sigmoid()
    with torch.no_grad():
        out = vae.encode(images * 2 - 1)
        mean = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
    z = prior.encode(images)
    torch.testing.assert_close(z, mean * vae.config.scaling_factor, rtol=1e-5, atol=1e-5)
    assert z.shape[1:] == prior.sample_shape and prior.image_size == 16
    drawn = prior.encode(images, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, z) == (not hasattr(out, "latent_dist"))
    pixels = prior.decode(z)
    assert pixels.shape == images.shape and pixels.min() >= 0 and pixels.max() <= 1


def test_encode_gradient_against_finite_differences(toy):
    prior = load_prior(toy[1], dtype=torch.float64)
    images = noise(1, 3, 16, 16, dtype=torch.float64).sigmoid().requires_grad_()
    weight, direction = noise(1, 4, 8, 8, dtype=torch.float64), noise(1, 3, 16, 16, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((prior.encode(images) * weight).sum(), images)
    h = 1e-6
    with torch.no_grad():
        ends = [(prior.encode(images + sign * h * direction) * weight).sum() for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_frozen_and_float32_outside_in_low_precision(toy):
    prior, exact = load_prior(toy[1], dtype=torch.bfloat16), load_prior(toy[1])
    prior.text_cache.encoders()
    parts = prior.modules()
    assert parts.keys() == {"network", "vae", "text_encoder"}
    for part in parts.values():
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert parts["network"].dtype == parts["text_encoder"].dtype == torch.bfloat16
    assert parts["vae"].dtype == torch.float32
    x, t = noise(1, 4, 8, 8), torch.tensor([0.5])
    eps = prior.predict(x, t, prior.embed([TEXT]))
    wanted = exact.predict(x, t, exact.embed([TEXT]))
    assert eps.dtype == prior.embed([TEXT]).hidden.dtype == torch.float32
    assert (eps - wanted).norm() < 0.05 * wanted.norm()


def test_sdi_reaches_the_pixels(prior):
    images = noise(2, 3, 16, 16).sigmoid().requires_grad_()
    x = prior.encode(images)
    conditioning = Conditioning(prior.embed([TEXT, "cat"]), prior.embed(["", ""]))
    out = sdi().guidance(x, prior, conditioning, step=0, total=10, generator=torch.Generator().manual_seed(0))
    attach(x, out.gradient).backward()
    assert out.nfe == 4 * 11
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0


def test_wrong_image_size_is_named(prior):
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\]"):
        prior.encode(torch.zeros(1, 3, 32, 32))


def test_importing_the_library_does_not_import_the_model_libraries():
    code = "import sys, distill3d, distill3d.priors, distill3d.objectives; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"diffusers", "transformers", "huggingface_hub"} & set(out.split())
