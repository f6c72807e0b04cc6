"""Kills runs at their file operations, fills their disk, makes it read-only; then lets them go on.

    python benchmarks/kill.py

Every case is a command of distill3d in a process of its own, forked from one that has loaded everything. An audit hook
counts the file operations in the case's folder. Just before one of them the process sends itself SIGKILL, SIGTERM or
SIGHUP, or the disk becomes read-only. At least half of the kills are within the writing of a checkpoint; there is one
after every step. Afterwards

- the last checkpoint must be the one that was completed last, or the one that was being written;
- `distill3d resume` (for image, export and bench the same command) must end well, and its results must be those of an
  undisturbed run, byte by byte;
- nothing unfinished may be left.

Full and read-only disks are a small tmpfs, which takes root; without it these cases are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import trimesh

from distill3d.cli import main as cli
from distill3d.priors import loading
from distill3d.priors.options import PriorOptions
from distill3d.runs import folder as folders
from distill3d.runs import images, objects
from distill3d.runs.checkpoint import has_checkpoint, read_state

PROMPT = "a red mushroom"
PRIOR = "--prior toybox --dtype float32 --image-size 16 --steps 2"
SMALL = (
    f"{PRIOR} --views-per-step 1 --render-size 16 --frames 2 --set export.texture=32 --set objective.inversion_steps=1"
)
VOXELS = "--set scene.resolution=12 --set export.resolution=16 --set export.fit=0 --set export.level=1"
BENCH = "--views 2 --view-size 16 --metrics nfe --methods sdi,sds"
BENCH += " --set scene.resolution=12 --set views=1 --set render_size=16"
COMPARED = ("scene.safetensors", "mesh.glb", "splats.ply", "image.png", "mesh.obj", "views.png", "maps.npz")
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir")
ELSEWHERE = "type  distill3d resume "  # what a run says whose own folder cannot be written


class Kind(NamedTuple):
    """A command, what it is given before --out, and how many of its runs are killed."""

    name: str
    words: list[str]
    kills: int
    out: str = "."  # in the folder of the case

    def command(self, case: Path) -> list[str]:
        """The command line for a case."""
        return [*self.words, "--out", str(case / self.out)]

    @property
    def resumes(self) -> bool:
        """Whether its runs have checkpoints that `distill3d resume` continues."""
        return self.name in ("generate", "splats", "texture")


class Run(NamedTuple):
    """How a process ended."""

    status: int  # negative after a signal
    printed: str
    operations: list[bool]  # whether each was part of the writing of a checkpoint
    saved: int  # steps in the last complete checkpoint; -1 before the first


def kinds(ball: Path, made: Path) -> list[Kind]:
    """The commands: of a mesh, and of a finished run to export."""
    return [
        Kind("generate", ["generate", PROMPT, "--recipe", "distill", *SMALL.split(), *VOXELS.split()], 40),
        Kind("splats", ["generate", PROMPT, "--recipe", "splats", *SMALL.split(), "--set", "scene.count=50"], 80),
        Kind("texture", ["texture", str(ball), PROMPT, *SMALL.split()], 20),
        Kind("image", ["image", PROMPT, *PRIOR.split()], 30),
        Kind("export", ["export", str(made)], 20, "mesh.obj"),
        Kind("bench", ["bench", "--prompts", PROMPT, *PRIOR.split(), *BENCH.split()], 10, "bench"),
    ]


def run(arguments: Sequence[str], case: Path, act: Callable[[], None] | None = None, at: int = -1) -> Run:
    """Runs a command in a fork of this process, which calls `act` just before its file operation number `at`."""
    shared, printed = mmap.mmap(-1, 1 << 16), case.with_suffix(".txt")
    shared[:8] = struct.pack("ii", -1, 0)
    process = os.fork()
    if not process:
        with printed.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        _count_operations(shared, str(case), act, at)
        try:
            cli.main(arguments)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    saved, count = struct.unpack("ii", shared[:8])
    return Run(status, printed.read_text(errors="replace"), [bool(part) for part in shared[8 : 8 + count]], saved)


def _count_operations(shared: mmap.mmap, case: str, act: Callable[[], None] | None, at: int) -> None:
    """Counts into `shared`: the step of the last checkpoint, the number of operations, and one byte for each."""
    writing, count, original = False, 0, folders.save_checkpoint

    def save(folder, run, step, *rest):
        nonlocal writing
        writing = True
        original(folder, run, step, *rest)
        writing = False
        if str(folder).startswith(case):  # else it is kept elsewhere
            shared[:4] = struct.pack("i", step)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        path = str(arguments[0]) if event in OPERATIONS else "/"
        if path.startswith("/") and not path.startswith(case):  # what rmtree removes has no folder before its name
            return
        shared[8 + count] = writing
        count += 1
        shared[4:8] = struct.pack("i", count)
        if count == at + 1 and act is not None:
            act()

    folders.save_checkpoint, folders.CHECKPOINT_SECONDS, objects.TURNTABLE_SIZE = save, -1.0, 32
    sys.addaudithook(hook)


def emptied(case: Path) -> Path:
    """The folder of a case, empty."""
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    return case


def results(case: Path) -> dict[str, bytes]:
    """The files that a kill must not change, by name, in a bench by object and name."""
    found = (path for path in case.rglob("*") if path.name in COMPARED)
    return {f"{path.parent.name if 'bench' in path.parts else ''}/{path.name}": path.read_bytes() for path in found}


def check(kind: Kind, case: Path, ended: Run, whole: dict[str, bytes], expected: Sequence[int]) -> list[str]:
    """Continues a case; returns what is wrong."""
    wrong = [] if ended.status in expected else [f"status {ended.status}"]
    found = next((path.parent for path in case.glob("*/config.json")), None) if kind.resumes else None
    if found is not None:
        step = read_state(found / "checkpoint").step if has_checkpoint(found / "checkpoint") else -1
        wrong += [] if ended.saved <= step <= ended.saved + 1 else [f"step {step} kept, {ended.saved} was written"]
    kept = Path(ended.printed.split(ELSEWHERE)[1].split("\n")[0]) if ELSEWHERE in ended.printed else case
    if not kept.is_relative_to(case):  # the folder itself is where a run without artifacts is kept
        again, name = run(["resume", str(kept)], kept.parent), "/scene.safetensors"  # in mesh.glb is its folder's name
        if again.status or results(kept)[name] != whole[name]:
            wrong.append(f"kept elsewhere: status {again.status}: {again.printed[-1500:]}")
        shutil.rmtree(kept)
    if found is None and kind.name not in ("export", "bench"):
        emptied(case)  # nothing was computed, or an image was
    after = run(kind.command(case) if found is None else ["resume", str(found)], case)
    if after.status or "damaged" in after.printed:
        wrong.append(f"going on: status {after.status}: {after.printed[-1500:]}")
    new = results(case)
    wrong += [f"another {name}" for name in new.keys() | whole.keys() if new.get(name) != whole.get(name)]
    left = [path for path in case.rglob("*") if path.name.startswith((".partial-", "checkpoint."))]
    wrong += [f"left: {path}" for path in (*left, *case.glob("bench/work"))]
    return [*wrong, ended.printed[-1500:]] if wrong or "Traceback" in ended.printed else []


def reference(kind: Kind, case: Path) -> tuple[dict[str, bytes], list[bool]]:
    """Results and operations of an undisturbed run."""
    ended = run(kind.command(emptied(case)), case)
    assert ended.status == 0 and results(case), ended.printed
    return results(case), ended.operations


def kills(kind: Kind, place: Path, number: int, generator: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Kills of one command: where, and what is wrong, of each."""
    case = place / kind.name
    whole, operations = reference(kind, case)
    parts = {part: [i for i, one in enumerate(operations) if one == part] for part in (True, False)}
    for k in range(number):
        inside = bool(parts[True]) and k % 4 < 3  # two commands have no checkpoint
        sent = {5: signal.SIGTERM, 6: signal.SIGHUP}.get(k % 7, signal.SIGKILL)
        at, kill = generator.choice(parts[inside]), lambda sent=sent: os.kill(os.getpid(), sent)
        ended = run(kind.command(emptied(case)), case, kill, at)
        wrong = check(kind, case, ended, whole, [-sent if sent == signal.SIGKILL else 128 + sent])
        yield f"{sent.name}, {'within' if inside else 'outside of'} a checkpoint", wrong
    shutil.rmtree(case)


def disks(kind: Kind, disk: Path, number: int, generator: random.Random) -> Iterator[tuple[str, list[str]]]:
    """As many full disks, with more and more space, and read-only ones."""
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    try:
        case, filler = disk / "case", disk / "filler"
        whole, operations = reference(kind, case)
        used = sum(path.stat().st_size for path in case.rglob("*") if path.is_file())
        for k in range(number):
            free = shutil.disk_usage(emptied(case).parent).free
            filler.write_bytes(bytes(max(free - round(1.6 * used * (k + 0.5) / number), 0)))
            ended = run(kind.command(case), case)
            filler.unlink()
            yield "full disk", check(kind, case, ended, whole, (0, 2))
            at, mounts = generator.randrange(len(operations)), Path("/proc/mounts").read_text()
            ended = run(kind.command(emptied(case)), case, functools.partial(_make_read_only, disk), at)
            if Path("/proc/mounts").read_text() != mounts:
                subprocess.run(["umount", disk], check=True)
            yield "read-only disk", check(kind, case, ended, whole, (0, 2))
    finally:
        subprocess.run(["umount", "-R", disk], check=True)


def _make_read_only(disk: Path) -> None:
    """Puts a read-only view of the disk over it; files that are open already stay writable."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def main() -> None:
    """Runs the campaign and prints its table; status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the kills")
    parser.add_argument("--disks", type=int, default=20, help="cases of a full and of a read-only disk each")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other threads
    generator, began, failures = random.Random(0), time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        place, ball, made = Path(name), Path(name) / "ball.ply", Path(name) / "made"
        tempfile.tempdir = str(emptied(place / "elsewhere"))
        trimesh.creation.icosphere(subdivisions=1, radius=0.6).export(ball)
        loading.load_prior = images.load_prior = objects.load_prior = functools.cache(loading.load_prior)
        loading.load_prior("toybox", "cpu", "float32", PriorOptions(image_size=16))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for kind in kinds(ball, made):  # in this process, so that the forks have everything imported
                assert cli.run(kind.command(emptied(place / kind.name))) == 0
                if not made.exists():
                    next((place / kind.name).iterdir()).rename(made)
        gc.freeze()
        campaigns = [(k, kills(k, place, round(k.kills * options.share), generator)) for k in kinds(ball, made)]
        if os.geteuid() == 0:
            campaigns.append(
                (kinds(ball, made)[1], disks(kinds(ball, made)[1], place / "disk", options.disks, generator))
            )
        else:
            print("full and read-only disks are left out: they take root")
        print("| command | what | cases | wrong |\n|---|---|---|---|")
        for kind, campaign in campaigns:
            cases, bad = Counter[str](), Counter[str]()
            for what, wrong in campaign:
                cases[what] += 1
                bad[what] += bool(wrong)
                print(*(f"{kind.name}, {what}: {line}\n" for line in wrong), end="", file=sys.stderr, flush=True)
            for what in sorted(cases):
                print(f"| {kind.name} | {what} | {cases[what]} | {bad[what]} |", flush=True)
            failures += bad.total()
    print(f"{time.monotonic() - began:.0f} s, {failures} wrong")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
