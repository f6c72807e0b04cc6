"""Which memory format is faster on the CPU: seconds of a network call in both, taking turns in one process.

    python benchmarks/memory_format.py [--models toybox,toybox-mv,sd21] [--dtypes float32,bfloat16] [--rows 8,32]

UNets: seconds of CPU of one call, with one thread, for the bundled priors and for Stable Diffusion 2.1-base with random
weights (one row of 64 x 64 latents, whatever --rows says). Autoencoders (float32): encoding with its gradient, and
decoding. The smallest of --pairs calls counts, after one that does not. A ratio below 1 means that the plain format is
faster; priors/components/layout.py has the rule that follows from the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from true_size import build

from distill3d.cameras import orbit
from distill3d.priors.base import FrozenPrior
from distill3d.priors.components.autoencoder import Autoencoder
from distill3d.priors.loading import load_prior
from distill3d.types import Condition

FORMATS = (torch.contiguous_format, torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="toybox,toybox-mv,sd21")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rows", default="8,32")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | rows | plain, s | channels_last, s | ratio |\n|---|---|---|---|---|")
    for model in arguments.models.split(","):
        for dtype in arguments.dtypes.split(","):
            precision = getattr(torch, dtype)
            prior = build(model, "cpu", precision) if model == "sd21" else load_prior(model, dtype=dtype)
            for rows in (1,) if model == "sd21" else map(int, arguments.rows.split(",")):
                line(f"UNet of {model}, {dtype}", rows, arguments.pairs, unet_call(prior, rows))
        if isinstance(prior.codec, Autoencoder):
            images = 1 if model == "sd21" else 16
            line(f"encoder of {model}, with gradient", images, arguments.pairs, encoder_call(prior, images))
            line(f"decoder of {model}", images, arguments.pairs, decoder_call(prior, images))


Call = Callable[[torch.memory_format], Callable[[], object]]  # brings weights into a format -> what is measured


def unet_call(prior: FrozenPrior, rows: int) -> Call:
    x = torch.randn(rows, *prior.sample_shape, generator=torch.Generator().manual_seed(0))
    hidden = prior.embed(["a prompt"]).hidden.expand(rows, -1, -1)
    camera = orbit([360 * i / rows for i in range(rows)], 10.0, 2.85, 40.0).camera_to_world
    condition = Condition(hidden, camera=camera if prior.camera_conditioned else None)

    def prepared(memory_format: torch.memory_format) -> Callable[[], object]:
        prior.memory_format = memory_format
        nn.Module.to(prior.network, memory_format=memory_format)  # type: ignore[call-overload]
        return torch.no_grad()(lambda: prior.predict(x, torch.full((rows,), 0.5), condition))

    return prepared


def encoder_call(prior: FrozenPrior, count: int) -> Call:
    images = torch.rand(count, 3, prior.image_size, prior.image_size, generator=torch.Generator().manual_seed(0))
    return in_format(prior, lambda: prior.encode(images.requires_grad_()).sum().backward())


def decoder_call(prior: FrozenPrior, count: int) -> Call:
    x = torch.randn(count, *prior.sample_shape, generator=torch.Generator().manual_seed(0))
    return in_format(prior, torch.no_grad()(lambda: prior.decode(x)))


def in_format(prior: FrozenPrior, call: Callable[[], object]) -> Call:
    def prepared(memory_format: torch.memory_format) -> Callable[[], object]:
        assert isinstance(prior.codec, Autoencoder)
        prior.codec.memory_format = memory_format
        nn.Module.to(prior.codec.vae, memory_format=memory_format)  # type: ignore[call-overload]
        return call

    return prepared


def line(name: str, rows: int, pairs: int, call: Call) -> None:
    best = dict.fromkeys(FORMATS, float("inf"))
    for pair in range(pairs + 1):
        for memory_format in FORMATS:
            measured = call(memory_format)
            began = time.process_time()
            measured()
            if pair:
                best[memory_format] = min(best[memory_format], time.process_time() - began)
    plain, other = best.values()
    print(f"| {name} | {rows} | {plain:.3f} | {other:.3f} | {plain / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()
