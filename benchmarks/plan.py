"""The plan's peak memory against that of the process, for configurations of all kinds, on the CPU.

    python benchmarks/plan.py [NAME ...]

Each configuration runs in a process of its own: three steps of the recipe (the first, the middle and the last, the
scene being as it is at the end), or only the first at true size, with few inversion steps, because a hop more needs no
more memory. Images are made whole.
Models of true size have random weights. Measured are the most bytes that torch's allocator had given out
at once (its profiler), with the weights, and the high-water mark of the process's resident memory, less what was
resident after the imports: it holds code that is loaded at its first use, too, about 0.25 GB. Prints one table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from true_size import build

from distill3d.distill.image_recipes import image_recipe
from distill3d.distill.loop import ObjectRun
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import DISTILL, LAPTOP, PAPER, SPLATS
from distill3d.evaluation.cost import peak_memory, reset_peak_memory
from distill3d.objectives import SDI
from distill3d.planning.plan import AnyConfig, planned_memory
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.runs.images import ImageConfig, finish, prepare
from distill3d.runs.objects import Config
from distill3d.scenes.gaussians import GaussianOptions

FEW = SDI(inversion_steps=1)
SD21 = Config("a red mushroom", replace(DISTILL, objective=FEW, views=1), prior="sd21", dtype="bfloat16")
GROWN = GaussianOptions(count=50_000)  # as many as recipe splats lets grow
CONFIGURATIONS: dict[str, AnyConfig] = {
    "distill, toybox": Config("a red mushroom", DISTILL, prior="toybox", dtype="float32"),
    "laptop, toybox-mv": Config("a red mushroom", LAPTOP, prior="toybox-mv", dtype="float32"),
    "splats, toybox": Config(
        "a red mushroom", replace(SPLATS, objective=FEW, scene=GROWN), prior="toybox", dtype="float32"
    ),
    "image with ddim, toybox": ImageConfig("a red mushroom", prior="toybox", dtype="float32"),
    "image with sdi, toybox": ImageConfig("a red mushroom", image_recipe("sdi"), prior="toybox", dtype="float32"),
    "distill, sd21": SD21,
    "distill, sd21, checkpointing": replace(SD21, prior_options=PriorOptions(checkpointing=True)),
    "paper, sd21": replace(SD21, recipe=replace(PAPER, objective=replace(FEW, inversion_scale=-7.5))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CONFIGURATIONS)}; default: all")
    parser.add_argument("--measure", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(*measured(CONFIGURATIONS[arguments.measure]))
        return
    print("| configuration | planned, MB | allocated, MB | ratio | resident, MB | ratio | CPU seconds of the plan |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.names or CONFIGURATIONS:
        began = time.process_time()
        expected = planned_memory(CONFIGURATIONS[name])
        seconds = time.process_time() - began
        command = [sys.executable, __file__, "--measure", name]
        words = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        cells = [f"{expected.peak / 1e6:.0f}"]
        for found in map(int, words):
            cells += [f"{found / 1e6:.0f}", f"{expected.peak / found:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def measured(config: AnyConfig) -> tuple[int, int]:
    """Bytes that torch allocates for some steps of a run, and by which the process grows."""
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    warnings.simplefilter("ignore")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    reset_peak_memory()
    if config.prior == "sd21":
        prior = build("sd21", "cpu", torch.bfloat16, config.prior_options.checkpointing)
    else:
        prior = load_prior(config.prior, config.device, config.dtype, config.prior_options)
    weights = sum(p.numel() * p.element_size() for module in prior.modules().values() for p in module.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        if isinstance(config, ImageConfig):
            finish(prepare(prior, [config.prompt], config.recipe, torch.Generator().manual_seed(config.seed)))
        else:
            run = object_run(config.recipe, config.prompts, prior, config.seed)
            take_steps(run, first_only=config.prior == "sd21")
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return weights + max(accumulate(changes)), peak_memory() - before


def take_steps(run: ObjectRun, first_only: bool) -> None:
    """The first, the middle and the last step, with the scene of the last one."""
    total = run.recipe.steps
    run.scene.adapt(total - 1, total, run.optimizer)
    for group in run.optimizer.param_groups:  # as after a step
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    for step in (0,) if first_only else (0, total // 2, total - 1):
        loss, _ = run.loss(step)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.optimizer.step()


if __name__ == "__main__":
    main()
