"""Whether memory grows from object to object: 50 generates in one process, and a bench of 200 cells.

    python benchmarks/growth.py [--generates 50] [--cells 200]

Prints the resident memory after every tenth object, and its slope with the standard error of a least-squares line. The
first 20 objects are left out of the line: libraries, caches and the allocator's pools fill up there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from distill3d.bench.judging import Judges
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.run import Listeners, run_bench
from distill3d.cli import main as cli
from distill3d.distill.recipes import DISTILL
from distill3d.objectives import SDS
from distill3d.priors.loading import load_prior

SMALL = ["--recipe", "distill", "--method", "sds", "--steps", "3", "--views-per-step", "1", "--frames", "8"]
SMALL += ["--set", "scene.resolution=16", "--set", "export.resolution=24", "--set", "export.fit=1"]
SMALL += ["--texture-size", "64"]
EVERY, WARMUP = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generates", type=int, default=50)
    parser.add_argument("--cells", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slope("generate", generates(arguments.generates, Path(folder) / "runs"))
        slope("bench", cells(arguments.cells, Path(folder) / "bench"))


def generates(count: int, out: Path) -> list[int]:
    """The resident memory in bytes after each of so many runs of the command generate."""
    found = []
    for seed in range(count):
        with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
            status = cli.run(["generate", "a red mushroom", "--seed", str(seed), "--out", str(out), *SMALL])
        if status not in (0, 4):  # so small a run may end without a mesh
            sys.exit(status)
        note(found)
    return found


def cells(count: int, out: Path) -> list[int]:
    """The resident memory in bytes after each cell of a bench."""
    scene = dataclasses.replace(DISTILL.scene, resolution=16)
    recipe = dataclasses.replace(DISTILL, steps=1, views=1, scene=scene, objective=SDS())
    variants = (Variant("a", recipe), Variant("b", recipe))
    protocol = Protocol(variants, ("a red mushroom",), tuple(range(count // 2)), prior="toybox", views=2, size=16)
    found: list[int] = []
    listeners = Listeners(on_cell=lambda task, outcome, made: note(found))
    run_bench(out, protocol, load_prior("toybox"), Judges(), ("saturation",), listeners=listeners)
    return found


def note(found: list[int]) -> None:
    """Appends the resident memory of this process in bytes, without what is only waiting to be collected."""
    gc.collect()
    found.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    if len(found) % EVERY == 0:
        print(f"after {len(found)}: {found[-1] / 2**20:.1f} MiB", flush=True)


def slope(name: str, memory: list[int]) -> None:
    """Prints how much memory grows with each object."""
    y = np.array(memory[WARMUP:]) / 2**10
    if len(y) > 2:
        line, covariance = np.polyfit(np.arange(len(y)), y, 1, cov=True)
        print(f"{name}: {line[0]:.1f} +- {covariance[0, 0] ** 0.5:.1f} KiB per object", flush=True)


if __name__ == "__main__":
    main()
