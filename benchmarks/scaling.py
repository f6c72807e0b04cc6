"""How time and memory grow with views, resolution, rows of a network call and cells of a bench: a figure and its table.

    python benchmarks/scaling.py [--picture docs/images/growth.png] [--cells 1,2,4,8]
        [--objects 1,2,4,8]

One thread; seconds are those of the CPU. Views and resolution: a step of recipe `distill` with the bundled prior, the
faster of two after one that does not count, and the peak memory of the process during it. Rows: network rows a second
against the rows of a call, of both bundled priors. Cells: a whole bench of so many small cells in one process.

Objects: the first steps of so many runs that share their network calls, for an object, of the two recipes. Recipe
`laptop` has 32 rows in a call already; the last column of the table of rows says what more rows can gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import queue
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from distill3d.bench.judging import Judges
from distill3d.bench.plots import COLORS, MARKERS, new_figure
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.run import run_bench
from distill3d.cameras import orbit
from distill3d.distill.loop import ObjectRun, optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import DISTILL, Recipe
from distill3d.evaluation.cost import Meter
from distill3d.objectives import SDS
from distill3d.priors.base import FrozenPrior
from distill3d.priors.loading import load_prior
from distill3d.priors.shared_calls import SharedCalls, evaluate
from distill3d.prompts import ViewPrompts
from distill3d.scenes.voxels import VoxelOptions
from distill3d.types import Condition
from distill3d.workers.turns import Turns

PROMPT = "a red mushroom"
STEPS = 20  # of objects that are made together
VIEWS, RESOLUTIONS, ROWS = (1, 2, 4, 8), (32, 48, 64, 96), (1, 2, 4, 8, 16, 32, 64, 128)
Point = tuple[int, float, float]  # the size, seconds of CPU, peak memory in GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="where the figure goes")
    parser.add_argument("--cells", default="1,2,4,8", help="sizes of the bench, separated by commas")
    parser.add_argument("--objects", default="1,2,4,8", help="objects at once, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prior, joint = (load_prior(name, dtype="auto") for name in ("toybox", "toybox-mv"))
    joint.join(16)
    bench(1, prior)  # the first loads what all need
    counts = tuple(map(int, arguments.objects.split(",")))
    together(2, prior, DISTILL)
    # In this order, because the peak of a process does not fall: the allocator keeps what the largest step took.
    panels = {
        "objects at once": table("objects at once", counts, lambda n: together(n, prior, DISTILL)),
        "cells of a bench": table("cells", tuple(map(int, arguments.cells.split(","))), lambda n: bench(n, prior)),
        "grid points a side": table("grid points a side", RESOLUTIONS, lambda n: step_of(at(n), prior)),
        "views of a step": table("views", VIEWS, lambda n: step_of(dataclasses.replace(DISTILL, views=n), prior)),
    }
    rates = {each.name: rows_a_second(each) for each in (prior, joint)}
    if arguments.picture is not None:
        draw(panels, rates, arguments.picture)


def at(resolution: int) -> Recipe:
    assert isinstance(DISTILL.scene, VoxelOptions)
    return dataclasses.replace(DISTILL, scene=dataclasses.replace(DISTILL.scene, resolution=resolution, refine=()))


def table(what: str, sizes: Sequence[int], measured: Callable[[int], tuple[float, float]]) -> list[Point]:
    print(f"\n| {what} | seconds of CPU | peak, GB |\n|---|---|---|")
    points = []
    for size in sizes:
        seconds, memory = measured(size)
        points.append((size, seconds, memory / 1e9))
        print(f"| {size} | {seconds:.2f} | {memory / 1e9:.2f} |", flush=True)
    return points


def step_of(recipe: Recipe, prior: FrozenPrior) -> tuple[float, float]:
    """Seconds of CPU and peak memory of a step in the middle of the run."""
    run = ObjectRun(recipe, ViewPrompts(PROMPT), prior)
    middle, spent = recipe.steps // 2, []
    with Meter() as meter:
        for step in range(middle, middle + 3):
            began = time.process_time()
            optimize(run, range(step, step + 1), lambda progress: None)
            spent.append(time.process_time() - began)
    return min(spent[1:]), meter.peak_memory


def together(count: int, prior: FrozenPrior, recipe: Recipe) -> tuple[float, float]:
    """Seconds of CPU for an object, and peak memory, of `STEPS` steps of so many objects that share network calls."""
    turns = Turns(evaluate)
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def make(seed: int) -> None:
        run = object_run(recipe, ViewPrompts(PROMPT), SharedCalls(turns, prior), seed)
        optimize(run, range(STEPS), lambda progress: None)
        ended.put(None)

    began = time.process_time()
    with Meter() as meter:
        turns.start([partial(make, seed) for seed in range(count)])
        for _ in range(count):
            ended.get()
    return (time.process_time() - began) / count, meter.peak_memory


def bench(cells: int, prior: FrozenPrior) -> tuple[float, float]:
    recipe = dataclasses.replace(at(16), steps=3, views=1, objective=SDS())
    protocol = Protocol((Variant("a", recipe),), (PROMPT,), tuple(range(cells)), prior=prior.name, views=2, size=16)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder, Meter() as meter:
        run_bench(Path(folder) / "bench", protocol, prior, Judges(), ("saturation",))
    return time.process_time() - began, meter.peak_memory


@torch.no_grad()
def rows_a_second(prior: FrozenPrior) -> dict[int, float]:
    """Network rows a second of the CPU at each size of a call that is whole groups of views."""
    print(f"\n| rows of a call, {prior.name} | rows a second | over those at 32 rows |\n|---|---|---|")
    found = {}
    for rows in (n for n in ROWS if n % prior.views == 0):
        x = torch.randn(rows, *prior.sample_shape, generator=torch.Generator().manual_seed(0))
        camera = orbit([360 * i / rows for i in range(rows)], 10.0, 2.85, 40.0).camera_to_world
        hidden = prior.embed([PROMPT]).hidden.expand(rows, -1, -1)
        condition = Condition(hidden, camera=camera if prior.camera_conditioned else None)
        spent = []
        for _ in range(4):
            began = time.process_time()
            prior.predict(x, torch.full((rows,), 0.5), condition)
            spent.append(time.process_time() - began)
        found[rows] = rows / min(spent[1:])
    for rows, rate in found.items():
        print(f"| {rows} | {rate:.0f} | {rate / found[32]:.2f} |", flush=True)
    return found


def draw(panels: dict[str, list[Point]], rates: dict[str, dict[int, float]], path: Path) -> None:
    """Seconds and memory of each panel, and the rows a second of the priors."""
    figure = new_figure(15.0, 2.8, dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    axes = figure.subplots(1, len(panels) + 1)
    for place, (name, points) in zip(axes, panels.items(), strict=False):
        sizes, seconds, memory = zip(*points, strict=True)
        place.plot(sizes, seconds, MARKERS[0] + "-", color=COLORS[5])
        place.set(xlabel=name, ylabel="seconds of CPU", ylim=(0, 1.1 * max(seconds)))
        other = place.twinx()
        other.plot(sizes, memory, MARKERS[1] + "--", color=COLORS[4])
        other.set(ylabel="peak memory, GB (dashed)", ylim=(0, 1.1 * max(memory)))
    for i, (name, found) in enumerate(rates.items()):
        axes[-1].plot([*found], [*found.values()], MARKERS[i] + "-", color=COLORS[5 - i], label=name)
    axes[-1].set(xlabel="rows of a network call", ylabel="rows a second", ylim=(0, None), xscale="log")
    axes[-1].legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
