"""Every family of priors on the pretend accelerator, and in half precision on the CPU."""

from dataclasses import replace

import card
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill3d.distill.loop import optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import DISTILL, method_settings
from distill3d.objectives import attach, sdi, vsd
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.priors.student import Student
from distill3d.prompts import ViewPrompts
from distill3d.types import Conditioning

FAMILIES = ("zero-snr", "sdxl", "if", "sd3", "flux-dev")
MOST = 6  # waits of an SDI evaluation on two images: their times, their hops, the gradient's start


def evaluation(prior, device="cpu"):
    """Gradient of SDI on two images, and the denoised images, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, prior.image_size, prior.image_size, generator=generator).to(device).requires_grad_()
    conditioning = Conditioning(prior.embed(["a red cube", "a cat"]), prior.embed(["", ""]))
    x = prior.encode(images)
    with_noise = sdi(inversion_steps=3, eta=0.3)
    guidance = with_noise.guidance(x, prior, conditioning, step=0, total=2, generator=generator)
    attach(x, guidance.gradient).backward()
    return images.grad.cpu(), prior.decode(guidance.x0).cpu()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_on_a_device_what_it_computes_on_the_cpu(name, toys):
    toy, found = toys(name), []
    for device in ("cpu", card.DEVICE):
        with card.watch() as seen:
            prior = load_prior(toy.folder, device=device, options=PriorOptions(image_size=toy.size))
            prior.network.to(memory_format=torch.channels_last)  # as devices have it: another one rounds otherwise
            prior.embed(["a red cube", "a cat", ""])
            seen.take()
            found.append(evaluation(prior, device))
            waits = seen.take()
    assert sum(waits.values()) <= MOST + 3, waits  # and the images there and back
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["rfds", "flowdreamer"])
def test_a_method_for_flow_models_stays_on_the_device_and_waits_seldom(method, toys):
    with card.watch():
        prior = load_prior(toys("sd3").folder, device=card.DEVICE)
    recipe = replace(DISTILL, steps=3, objective=method_settings(method), scene=replace(DISTILL.scene, resolution=12))
    counts = []
    with card.watch() as seen:
        run = object_run(recipe, ViewPrompts("a cat"), prior)
        seen.take()
        optimize(run, range(recipe.steps), lambda progress: counts.append(sum(seen.take().values())))
    assert max(counts[1:]) <= 10


class Products(TorchDispatchMode):
    """Notes in which precision matrix products are computed, in and outside of some networks."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "_scaled_dot_product", "_thnn")

    def __init__(self, *networks, apart=()):
        """`apart` are modules in the networks that do not count as theirs."""
        super().__init__()
        self.inside, self.outside, self._depth = set(), set(), [0]
        for modules, step in ((networks, 1), (apart, -1000)):
            for module in modules:
                module.register_forward_pre_hook(lambda *_, step=step: self._depth.append(self._depth[-1] + step))
                module.register_forward_hook(lambda *_: self._depth.pop() and None)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        if name.startswith("_scaled_dot_product") or name in self.NAMES:
            dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()}
            (self.inside if self._depth[-1] > 0 else self.outside).update(dtypes)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_only_the_network_is(name, toys):
    toy = toys(name)
    prior = load_prior(toy.folder, dtype="bfloat16", options=PriorOptions(image_size=toy.size))
    prior.embed(["a red cube", "a cat", ""])
    with Products(prior.network) as found:
        evaluation(prior)
    assert found.inside == {torch.bfloat16}
    assert found.outside <= {torch.float32}  # the autoencoder, which a prior of pixels has not


def test_a_student_computes_in_half_precision_but_for_what_it_learns(kl_folder):
    pytest.importorskip("peft")
    prior = load_prior(kl_folder, dtype="bfloat16")
    student = Student(prior, torch.Generator().manual_seed(0))
    learned = [
        module for name, module in student.unet.named_modules() if name.split(".")[-2:-1] in (["lora_A"], ["lora_B"])
    ]
    x = torch.randn(2, *prior.sample_shape, generator=torch.Generator().manual_seed(1))
    conditioning = Conditioning(prior.embed(["a cat", "a cube"]), prior.embed(["", ""]))
    with Products(prior.network, student.unet, apart=[*learned, student.unet.class_embedding]) as found:
        generator = torch.Generator().manual_seed(0)
        vsd(student).guidance(x, prior, conditioning, step=0, total=1, generator=generator)
    assert found.inside == {torch.bfloat16} and found.outside == {torch.float32, torch.bfloat16}


def test_products_of_the_wrong_precision_are_found():
    """A float32 product hidden in a network of half precision, and the other way round."""

    class Widened(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)

    x, last = torch.ones(2, 4, dtype=torch.bfloat16), torch.nn.Linear(4, 4)
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), Widened(4, 4)).bfloat16()
    with Products(network) as found:
        last(network(x).float())
        last.bfloat16()(x)
    assert found.inside == found.outside == {torch.bfloat16, torch.float32}
    plain = torch.nn.Sequential(network[0])
    with Products(plain) as found:
        plain(x)
    assert found.inside == {torch.bfloat16} and not found.outside
