"""On which machines the cells of a bench, or the objects of a prompt file, are made: flags, and the executor."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distill3d.cli.shared import Float, Name, duration
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


def generate_many(config: Config, prompts: Sequence[str], out: Path | str, machines: Machines, retries: int) -> int:
    """Makes an object for each prompt on these machines, unless it is there; returns the exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from distill3d.runs.many import generate_all

    executor, configs = machines.executor(config.device), [replace(config, prompt=prompt) for prompt in prompts]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar, at_work, objects = Bar(*columns, console=Console(stderr=True), transient=True), dict[str, int](), 0
    all_objects, steps = bar.add_task("objects", total=len(set(prompts))), bar.add_task("steps")

    def on_step(config: Config, progress: Progress) -> None:
        bar.start()
        at_work[config.prompt] = progress.step + 1
        total = len(at_work) * config.recipe.steps
        bar.update(steps, completed=sum(at_work.values()), total=total, description=f"{len(at_work)} at work")

    try:
        for made, folder, ending in generate_all(configs, out, executor, retries=retries, on_step=on_step):
            bar.advance(all_objects)
            at_work.pop(made.prompt, None)
            objects += bool(ending.files)
            end = ending.failure or ("" if ending.files else "no mesh") or duration(ending.seconds)
            print(f"{printable(made.prompt)} | {end} | {printable(folder)}")
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
