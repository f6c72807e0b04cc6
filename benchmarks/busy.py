"""How the loop slows down on a busy machine: seconds with 0, 1 and 2 competing processes, for wait policies of OpenMP.

    python benchmarks/busy.py [--cores 2] [--repeat 3] [--policies default,passive,spin1000]

Each cell is a fresh process with the given environment that runs a short `laptop` loop (4 noise levels of 16 views
without a scene, then 12 steps with 2 more), bound to --cores cores together with competitors that only count. With n
competitors on c cores a loop of c threads can get c / (c + n) of the machine, so a policy degrades in proportion if its
time is at most (c + n) / c of that with none.

Threads that work together wait for each other some thousand times a second. A thread that waits spins at first; if the
one it waits for has no core because a competitor is on it, the spinning takes what is left. The wheels of torch bring
GNU's OpenMP (libgomp) on Linux and LLVM's (libomp) on macOS; both read OMP_WAIT_POLICY, once, when torch is imported.

    default    what the library does without a setting
    passive    OMP_WAIT_POLICY=passive: a thread that waits sleeps at once
    spin100, spin1000, spin10000
               GOMP_SPINCOUNT: how often it polls before it sleeps (libgomp only)
    one        OMP_NUM_THREADS=1: nothing waits

The rule for `WAITING` in `distill3d.cli.main`, written before the run: of the policies with all threads that cost at
most 10 % more than the default without competitors, the one with the smallest sum of the three times.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin{count}": {"GOMP_SPINCOUNT": str(count)} for count in (100, 1000, 10000)},
    "one": {"OMP_NUM_THREADS": "1"},
}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
LOADS = (0, 1, 2)
LOOP = """
import time, warnings
from dataclasses import replace
import torch
from distill3d.distill.loop import optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import LAPTOP
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
warnings.simplefilter("ignore")
recipe = replace(LAPTOP, steps=12, sampling=replace(LAPTOP.sampling, joint_levels=4, levels=2, hull=False))
run = object_run(recipe, ViewPrompts("a red mushroom"), load_prior("toybox-mv", dtype="auto"))
began, of_cpu = time.monotonic(), time.process_time()
optimize(run, range(recipe.steps), lambda progress: None)
print(time.monotonic() - began, time.process_time() - of_cpu, torch.get_num_threads())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each cell; the fastest counts")
    parser.add_argument("--policies", default=",".join(POLICIES), help="separated by commas")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, cores)  # the processes below inherit it
    print(f"{len(cores)} cores; seconds of the clock, and of the CPU in brackets")
    print("| policy | threads |" + "".join(f" {n} competitors |" for n in LOADS) + " 1 / 0 | 2 / 0 |")
    print("|" + "---|" * (len(LOADS) + 4))
    for name in arguments.policies.split(","):
        cells = []
        for load in LOADS:
            with competitors(load):
                cells.append(min(loop(POLICIES[name]) for _ in range(arguments.repeat)))
        columns = [f"{seconds:.1f} ({of_cpu:.1f})" for seconds, of_cpu, _ in cells]
        slower = [f"{cell[0] / cells[0][0]:.2f}" for cell in cells[1:]]
        print(f"| {name} | {cells[0][2]:.0f} | " + " | ".join([*columns, *slower]) + " |", flush=True)
    proportion = [f"{(len(cores) + load) / len(cores):.2f}" for load in LOADS[1:]]
    print("| in proportion | | | | | " + " | ".join(proportion) + " |")


def loop(environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds of the clock and of the CPU of one loop in a process of its own, and its threads."""
    own = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    done = subprocess.run([sys.executable, "-c", LOOP], env=own, check=True, capture_output=True, text=True)
    seconds, of_cpu, threads = map(float, done.stdout.split()[-3:])
    return seconds, of_cpu, threads


@contextlib.contextmanager
def competitors(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
