"""A bench on a Ray cluster of two local nodes, against one process per core; a killed node, a killed driver.

    python benchmarks/cluster.py

Every case is the same command, `distill3d bench` on 12 small cells of the bundled prior, in a process of its own:

- `--workers 2`, and `--ray` on two nodes of one core each: seconds of the whole command, and the efficiency of Ray;
- the driver is killed (SIGKILL) after the second cell, and the same command is given again;
- a node joins after the first cell, and is killed after the fourth.

Tables, views, maps and models must be those of the first case, byte by byte. Needs two cores and the package ray; about
five minutes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
HEAD = {**NODE, "include_dashboard": False, "include_log_monitor": False}
BENCH = "bench --methods sdi,sds --seeds 0,1 --views 8 --metrics clip_score,sharpness,saturation,nfe,diverged"
PROMPTS = ("a red mushroom", "a blue car", "a yellow duck", "a green house", "a red apple")
COMPARED = ("views.png", "maps.npz", "mesh.glb", "turn.webp", "still.webp")
TABLES = ("table.md", "table.tex", "table.csv", "cells.csv")


def start(out: Path, asked: argparse.Namespace, *words: str) -> subprocess.Popen[bytes]:
    """The command of a case, in a process of its own; what it prints goes to a file beside its folder."""
    command = [
        *BENCH.split(),
        "--prompts",
        *PROMPTS[: asked.prompts],
        "--steps",
        str(asked.steps),
        "--out",
        str(out),
        *words,
    ]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "distill3d", *command], stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Waits for a command; its status must be 0."""
    if process.wait():
        raise SystemExit(f"{out.name} ended with status {process.returncode}:\n{out.with_suffix('.log').read_text()}")


def after_cells(process: subprocess.Popen[bytes], out: Path, cells: int, then: Callable[[], None]) -> None:
    """Does something as soon as so many cells are finished."""
    while len(list(out.glob("cells/*/cell.json"))) < cells:
        if process.poll() is not None:
            raise SystemExit(f"{out.name} ended too early:\n{out.with_suffix('.log').read_text()}")
        time.sleep(0.05)
    then()


def content(out: Path) -> dict[str, bytes]:
    """What must be the same in all cases."""
    files = [path for name in COMPARED for path in out.glob(f"cells/*/{name}")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in (*files, *(out / name for name in TABLES))}


def main() -> None:
    """Runs all cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each cell")
    parser.add_argument("--prompts", type=int, default=3, choices=range(1, len(PROMPTS) + 1))
    asked = parser.parse_args()
    cells = 2 * 2 * asked.prompts
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", RAY_TMPDIR=tempfile.gettempdir())
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="distill3d-") as folder:
        place = Path(folder)
        began = time.monotonic()
        finish(start(place / "processes", asked, "--workers", "2"), place / "processes")
        seconds = {"processes": time.monotonic() - began}
        expected = content(place / "processes")
        assert len(expected) == cells * len(COMPARED) + len(TABLES), sorted(expected)

        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
        second, nodes = cluster.add_node(**NODE), []
        ray = ("--ray", cluster.address)
        began = time.monotonic()
        finish(start(place / "ray", asked, *ray), place / "ray")
        seconds["ray"] = time.monotonic() - began

        out = place / "killed driver"
        driver = start(out, asked, *ray)
        after_cells(driver, out, 2, lambda: driver.send_signal(signal.SIGKILL))
        driver.wait()
        kept = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}
        assert 2 <= len(kept) < cells
        finish(start(out, asked, *ray), out)
        again = [path for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp]

        out = place / "killed node"
        cluster.remove_node(second)
        driver = start(out, asked, *ray)  # on the first node; a driver dies with the node that it belongs to
        after_cells(driver, out, 1, lambda: nodes.append(cluster.add_node(**NODE)))
        after_cells(driver, out, 4, lambda: cluster.remove_node(nodes.pop(), allow_graceful=False))
        finish(driver, out)
        cluster.shutdown()

        print(
            f"{cells} cells of {asked.steps} steps, seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
        )
        print(
            f"efficiency of Ray on two nodes against one process per core: {seconds['processes'] / seconds['ray']:.1%}"
        )
        print(f"killed driver: {len(kept)} cells were finished, {len(again)} of them were made again")
        wrong = []
        for name in ("ray", "killed driver", "killed node"):
            found = content(place / name)
            different = sorted(path for path in expected | found if expected.get(path) != found.get(path))
            print(f"{name}: {len(expected)} files compared, {len(different)} differ {different[:5]}")
            wrong += different
    sys.exit(bool(wrong or again))


if __name__ == "__main__":
    main()
