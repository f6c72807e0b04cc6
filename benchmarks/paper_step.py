"""One step of `--recipe paper` at full size on the CPU: seconds and peak memory of each part.

    python benchmarks/paper_step.py [--step 0] [--dtype bfloat16] [--inversion-steps 10]

The recipe's hash field is rendered at 512 px with normals, encoded, SDI with Perp-Neg asks a Stable Diffusion 2.1-base
of random weights for its gradient, and the gradient and the recipe's regularizers go back to field and background. The
peak is that of the process (getrusage) after each part, so the last line is the peak of the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from memory import peak
from true_size import build

from distill3d.distill.loop import ObjectRun
from distill3d.distill.recipes import PAPER
from distill3d.distill.supervision import condition_views
from distill3d.objectives import SDI, attach
from distill3d.prompts import ViewPrompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=0, help="which step: t, levels and shading follow it")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--inversion-steps", type=int, default=10)
    arguments = parser.parse_args()
    assert isinstance(PAPER.objective, SDI)
    objective = dataclasses.replace(PAPER.objective, inversion_steps=arguments.inversion_steps)
    recipe = dataclasses.replace(PAPER, objective=objective)

    began = time.monotonic(), time.process_time()

    def report(part: str) -> None:
        nonlocal began
        now = time.monotonic(), time.process_time()
        seconds, of_cpu = (b - a for a, b in zip(began, now, strict=True))
        print(f"| {part} | {seconds:.1f} | {of_cpu:.1f} | {peak():.2f} |", flush=True)
        began = time.monotonic(), time.process_time()

    print("| part | seconds | seconds of CPU | peak so far, GB |\n|---|---|---|---|")
    prior = build("sd21", "cpu", getattr(torch, arguments.dtype))
    report("weights of the prior")
    run = ObjectRun(recipe, ViewPrompts("a prompt", perp_neg=True), prior)
    parameters = sum(p.numel() for p in run.module.parameters())
    report(f"field and background ({parameters / 1e6:.1f} M parameters)")
    optimizer = run.optimizer_at(arguments.step)
    report("occupancy")
    cameras = recipe.cameras.sample(recipe.views, run.generator)
    rendering = run.render(arguments.step, cameras)
    conditioning = condition_views(run.prompts, prior, rendering, cameras)
    report(f"rendering {prior.image_size} px, {100 * float(rendering.opacity.detach().mean()):.0f} % opaque")
    x = prior.encode(rendering.rgb)
    report("encoding the picture, for its gradient")
    guidance = run.objective.guidance(
        x, prior, conditioning, step=arguments.step, total=recipe.steps, generator=run.generator
    )
    report(f"SDI at t = {float(guidance.t.mean()):.2f}: {guidance.nfe} network rows")
    loss = attach(x, guidance.gradient) + sum(run.penalties(arguments.step, rendering, cameras).values())
    loss.backward()
    report("gradient through encoder and renderer, regularizers")
    optimizer.step()
    report("Adam")
    assert all(bool(p.isfinite().all()) for p in run.module.parameters())


if __name__ == "__main__":
    main()
