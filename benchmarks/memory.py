"""Peak memory of one SDI step at a model's true size, on the CPU: which part of the step needs how much.

    python benchmarks/memory.py [--model sd21] [--dtype bfloat16] [--checkpointing] [--inversion-steps 2]

A picture of the model's size is encoded, SDI asks for its gradient, and the gradient goes back to the pixels. The
peak is that of the process (getrusage), after each part, so the last line is the peak of the step. One hop of the
inversion needs what the tenth needs: few are enough to measure memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from true_size import MODELS, build

from distill3d.objectives import attach, sdi
from distill3d.types import Conditioning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd21")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--inversion-steps", type=int, default=2)
    arguments = parser.parse_args()

    began = time.monotonic()

    def report(part: str) -> None:
        nonlocal began
        print(f"| {part} | {time.monotonic() - began:.1f} | {peak():.2f} |", flush=True)
        began = time.monotonic()

    print("| part | seconds | peak so far, GB |\n|---|---|---|")
    report("imports")
    prior = build(arguments.model, "cpu", getattr(torch, arguments.dtype), arguments.checkpointing)
    conditioning = Conditioning(prior.embed(["a prompt"]), prior.embed([""]))
    report(f"weights ({parameters(prior) / 1e6:.0f} M parameters)")
    size = prior.image_size
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = prior.encode(images)
    report(f"encoding a picture of {size} px, for its gradient")
    objective = sdi(inversion_steps=arguments.inversion_steps)
    guidance = objective.guidance(x, prior, conditioning, step=0, total=10, generator=torch.Generator().manual_seed(0))
    report(f"SDI: {guidance.nfe} network rows")
    attach(x, guidance.gradient).backward()
    report("gradient through the encoder")
    assert images.grad is not None and bool(images.grad.isfinite().all())


def peak() -> float:
    """Peak resident memory of this process in GB (kilobytes on Linux, bytes on macOS)."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value / 1e9 if sys.platform == "darwin" else value * 1024 / 1e9


def parameters(prior) -> int:
    return sum(p.numel() for module in prior.modules().values() for p in module.parameters())


if __name__ == "__main__":
    main()
