"""One SDI step at a model's true size on a GPU: time and memory by part, against what the card can compute.

    python benchmarks/gpu.py --model sd21 [--dtype bfloat16] [--compile] [--checkpointing] [--views 1]

The limit is not the data sheet's: it is the rate of a large matrix product measured on this card, in the network's
precision. `share` is the arithmetic of a part (counted by torch) over its time and that rate. Prints one table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from true_size import MODELS, build

from distill3d.objectives import attach, sdi
from distill3d.types import Conditioning

REPEATS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd21")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if not torch.cuda.is_available():
        parser.error("no CUDA device here: this benchmark is for GPUs")

    prior = build(arguments.model, device, dtype, arguments.checkpointing)
    if arguments.compile:
        prior.network.compile()
    b, size = arguments.views, prior.image_size
    conditioning = Conditioning(prior.embed(["a prompt"] * b), prior.embed([""] * b))
    text = conditioning.positive
    images = torch.rand(b, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    x_t, t = torch.randn(b, *prior.sample_shape, device=device), torch.full((b,), 0.5, device=device)
    objective, generator = sdi(), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def network() -> object:
        return prior.predict(x_t, t, text)

    def encoder() -> object:
        images.grad = None
        return prior.encode(images).square().mean().backward()

    def step() -> object:
        images.grad = None
        x = prior.encode(images)
        guidance = objective.guidance(x, prior, conditioning, step=0, total=10000, generator=generator)
        attach(x, guidance.gradient).backward()
        return guidance.nfe

    limits = {"network": matmul_rate(device, dtype), "encoder": matmul_rate(device, torch.float32)}
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.model}, {arguments.dtype}, {b} view(s)"
    )
    print(f"matrix products: {limits['network']:.0f} TFLOP/s here, {limits['encoder']:.0f} in float32\n")
    print("| part | ms | peak, GB | TFLOP | share of the limit |\n|---|---|---|---|---|")
    for name, call in (("network", network), ("encoder", encoder), ("step", step)):
        counter = FlopCounterMode(display=False)
        with counter:
            call()
        work = counter.get_total_flops() / 1e12
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(call)
        memory = torch.cuda.max_memory_allocated() / 1e9
        share = f"{100 * work / seconds / limits[name]:.0f} %" if name in limits else ""
        print(f"| {name} | {1000 * seconds:.1f} | {memory:.2f} | {work:.2f} | {share} |", flush=True)
    print(f"\nnetwork rows in the step: {step()}")


def timed(call: Callable[[], object]) -> float:
    """Median seconds of a call."""
    seconds = []
    for repeat in range(REPEATS + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if repeat >= 2:  # the first ones choose kernels and compile
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def matmul_rate(device: str, dtype: torch.dtype, n: int = 8192) -> float:
    """TFLOP/s of a product of two n x n matrices."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / timed(lambda: a @ a) / 1e12


if __name__ == "__main__":
    main()
