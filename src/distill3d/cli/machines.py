"""On which machines the cells of a bench, or the objects of a prompt file, are made: flags, and the executor."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill3d.cli.shared import Float, Int, Name, duration
from distill3d.untrusted import printable

if TYPE_CHECKING:
    from distill3d.distill.loop import Progress
    from distill3d.runs.objects import Config
    from distill3d.workers.executor import Executor


@dataclass(frozen=True, kw_only=True)
class Machines:
    """On which machines."""

    workers: int = 1
    """Processes of this machine that make objects at the same time, each with its share of the cores."""
    ray: Name = None
    """Make objects on a Ray cluster: auto (the one of this machine), or the address of its head node, HOST:6379."""

    @property
    def many(self) -> bool:
        """Whether more than this process is asked for."""
        return self.workers != 1 or self.ray is not None

    def share(self, device: str) -> float:
        """GPUs for one object at a time, with --ray."""
        return float(device.startswith("cuda"))

    def executor(self, device: str) -> Executor:
        """What makes the objects; for Ray, joined to the cluster.

        Raises:
            ValueError: for flags that exclude each other or are out of range, and a cluster that cannot be reached.
            ImportError: where Ray is not installed.
        """
        from distill3d.workers.executor import HERE

        if self.ray is not None and self.workers != 1:
            raise ValueError("--ray and --workers exclude each other: --ray uses all that the cluster has room for")
        share = self.share(device)
        if self.ray is not None:
            from distill3d.workers.ray_cluster import RayCluster, connect

            cluster = RayCluster(self.ray, share)
            connect(self.ray)
            return cluster
        if self.workers == 1:
            return HERE
        from distill3d.workers.processes import Processes

        return Processes(self.workers, _visible_gpus() if device == "cuda" else ())

    def device_here(self, device: str) -> str:
        """Where this process loads the prior to check the settings: a head node may have no GPU."""
        import torch

        return "cpu" if self.ray is not None and device.startswith("cuda") and not torch.cuda.is_available() else device


@dataclass(frozen=True, kw_only=True)
class CellMachines(Machines):
    """On which machines."""

    gpus_per_cell: Float = None
    """With --ray: GPUs for one object at a time; 0.25: four objects share one. Default: 1 with --device cuda."""

    def share(self, device: str) -> float:
        """See `Machines`."""
        if self.gpus_per_cell is None:
            return super().share(device)
        if self.ray is None:
            raise ValueError("--gpus-per-cell is for --ray; without it all workers of this machine share its GPUs")
        if device.startswith("cuda") and not self.gpus_per_cell:
            raise ValueError("--device cuda needs GPUs: pass --gpus-per-cell 1, or a fraction such as 0.25")
        return self.gpus_per_cell


@dataclass(frozen=True, kw_only=True)
class ObjectMachines(Machines):
    """On which machines."""

    at_once: Int = None
    """Objects of @FILE that are made together and share network calls; default: with a bundled prior as many as fill a
    call, else 1."""

    def objects_at_once(self, config: Config) -> int:
        """How many objects this process makes together.

        Raises:
            ValueError: for --at-once with --workers or --ray, and with a method that trains a network.
        """
        from distill3d.runs.many import objects_at_once, shares_calls

        if self.at_once is None:
            return 1 if self.many else objects_at_once(config)
        if self.many:
            raise ValueError("--at-once is for the objects of one process: not for --workers and --ray")
        if self.at_once > 1 and not shares_calls(config):
            raise ValueError(
                "vsd and esd train a network for each object, so they cannot share its calls: leave --at-once out"
            )
        return self.at_once


def generate_many(
    config: Config, prompts: Sequence[str], out: Path | str, machines: ObjectMachines, retries: int
) -> int:
    """Makes an object for each prompt on these machines, unless it is there; returns the exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from distill3d.priors.shared_calls import SharedCalls, evaluate
    from distill3d.runs.many import generate_all, unshared
    from distill3d.workers.together import Together
    from distill3d.workers.turns import Turns

    executor, share = machines.executor(config.device), unshared
    if (count := machines.objects_at_once(config)) != 1:
        turns = Turns(evaluate)
        executor, share = Together(turns, count), partial(SharedCalls, turns)
    configs, began = [replace(config, prompt=prompt) for prompt in prompts], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar, at_work, objects = Bar(*columns, console=Console(stderr=True), transient=True), dict[str, int](), 0
    all_objects, steps = bar.add_task("objects", total=len(set(prompts))), bar.add_task("steps")

    def on_step(config: Config, progress: Progress) -> None:
        bar.start()
        at_work[config.prompt] = progress.step + 1
        total = len(at_work) * config.recipe.steps
        bar.update(steps, completed=sum(at_work.values()), total=total, description=f"{len(at_work)} at work")

    try:
        for made, folder, ending in generate_all(configs, out, executor, retries=retries, on_step=on_step, share=share):
            bar.advance(all_objects)
            at_work.pop(made.prompt, None)
            objects += bool(ending.files)
            end = ending.failure or ("" if ending.files else "no mesh") or "done"
            print(f"{printable(made.prompt)} | {end} after {duration(time.monotonic() - began)} | {printable(folder)}")
    except KeyboardInterrupt:
        print("type the same command again to continue", file=sys.stderr)
        raise
    finally:
        if bar.live.is_started:
            bar.stop()
    if not objects:
        print(f"distill3d: no object was made in {shlex.quote(str(out))}", file=sys.stderr)
        return 4
    return 0


def _visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    import os

    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))
