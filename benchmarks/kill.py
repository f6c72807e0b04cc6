"""Kills runs at file operations, fills their disk, takes away their right to write; then lets them go on.

    python benchmarks/kill.py

Every case is a command of distill3d in a process of its own, forked from one that has loaded everything. An audit hook
counts the file operations below the case's folder, and at one of them the process sends itself SIGKILL (or SIGTERM,
SIGHUP), or the disk becomes read-only. Half of the kills are at operations of the writing of a checkpoint, which is
written after every step. Afterwards

- the last checkpoint must be the one that was completed last, or the one that was being written;
- `distill3d resume` (for image, export and bench the same command) must end well, and its results must be those of an
  undisturbed run bit for bit;
- nothing unfinished may be left.

The cases of full and read-only disks are on a small tmpfs, which takes root.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import trimesh

from distill3d.cli import main as cli
from distill3d.priors import loading
from distill3d.priors.options import PriorOptions
from distill3d.runs import folder as folders
from distill3d.runs import images, objects
from distill3d.runs.checkpoint import has_checkpoint, read_state

PRIOR = ["--prior", "toybox", "--dtype", "float32", "--image-size", "32"]
SMALL = [*PRIOR, "--steps", "2", "--views-per-step", "1", "--render-size", "16", "--frames", "2"]
SMALL += ["--set", "objective.inversion_steps=1", "--set", "export.texture=32"]
VOXELS = ["--recipe", "distill", "--set", "scene.resolution=12", "--set", "export.resolution=16"]
VOXELS += ["--set", "export.fit=0", "--set", "export.level=1"]
BENCH = ["--steps", "2", "--views", "2", "--view-size", "16", "--metrics", "nfe", "--methods", "sdi,sds"]
BENCH += [word for change in ("scene.resolution=12", "views=1", "render_size=16") for word in ("--set", change)]
PROMPT = "a red mushroom"
COMPARED = ("scene.safetensors", "mesh.glb", "splats.ply", "image.png", "mesh.obj", "views.png", "maps.npz")
FEW_MB = 4  # size of the small disk


@dataclass(frozen=True)
class Kind:
    """A command, and how many of its runs are killed."""

    name: str
    command: Callable[[Path], list[str]]  # for a folder of the case
    kills: int


@dataclass(frozen=True)
class Run:
    """How a process ended: its status, negative after a signal, what it printed, and what it counted."""

    status: int
    printed: str
    operations: tuple[bool, ...]  # whether each was part of the writing of a checkpoint
    saved: int  # steps in the last complete checkpoint; -1 before the first


def kinds(ball: Path, made: Path) -> list[Kind]:
    """The commands; `made` is a finished run to export."""
    return [
        Kind("generate", lambda case: ["generate", PROMPT, *SMALL, *VOXELS, "--out", str(case)], 80),
        Kind(
            "splats",
            lambda case: [
                "generate",
                PROMPT,
                "--recipe",
                "splats",
                *SMALL,
                "--set",
                "scene.count=50",
                "--out",
                str(case),
            ],
            40,
        ),
        Kind("texture", lambda case: ["texture", str(ball), PROMPT, *SMALL, "--out", str(case)], 40),
        Kind("image", lambda case: ["image", PROMPT, *PRIOR, "--steps", "2", "--out", str(case)], 20),
        Kind("export", lambda case: ["export", str(made), "--out", str(case / "mesh.obj")], 20),
        Kind("bench", lambda case: ["bench", *PRIOR, "--prompts", PROMPT, *BENCH, "--out", str(case / "bench")], 20),
    ]


def run(arguments: Sequence[str], case: Path, act: Callable[[], None] | None = None, at: int = -1) -> Run:
    """Runs a command in a fork of this process, which calls `act` before its file operation number `at`."""
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
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    saved, count = struct.unpack("ii", shared[:8])
    return Run(status, printed.read_text(errors="replace"), tuple(map(bool, shared[8 : 8 + count])), saved)


def _count_operations(shared: mmap.mmap, case: str, act: Callable[[], None] | None, at: int) -> None:
    """Counts into `shared`: the step of the last checkpoint, the number of operations, one byte for each."""
    writing, count, original = False, 0, folders.save_checkpoint

    def save(folder, run, step, *rest):
        nonlocal writing
        writing = True
        original(folder, run, step, *rest)
        writing = False
        if str(folder).startswith(case):  # else one that is kept elsewhere, since the disk is full
            shared[:4] = struct.pack("i", step)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir"):
            return
        path = str(arguments[0])
        if path.startswith("/") and not path.startswith(case):  # what rmtree removes has no folder before its name
            return
        shared[8 + count] = writing
        count += 1
        shared[4:8] = struct.pack("i", count)
        if count == at + 1 and act is not None:
            act()

    folders.save_checkpoint, folders.CHECKPOINT_SECONDS, objects.TURNTABLE_SIZE = save, -1.0, 32
    sys.addaudithook(hook)


def results(case: Path) -> dict[str, bytes]:
    """The files that must not depend on a kill, by name and folder; of the last run, if there are two."""
    found = [path for path in sorted(case.rglob("*"), key=lambda path: path.stat().st_mtime) if path.name in COMPARED]
    return {f"{path.parent.name if 'bench' in path.parts else ''}/{path.name}": path.read_bytes() for path in found}


def unfinished(case: Path) -> list[str]:
    """What should not be left; a folder of an image is not continued."""
    return [
        str(path)
        for path in case.rglob("*")
        if path.name.startswith((".partial-", "checkpoint.")) or path.match("bench/work")
    ]


def run_folder(case: Path) -> Path | None:
    """The folder of the first run that can be continued."""
    return next((path.parent for path in case.glob("*/config.json")), None)


def go_on(kind: Kind, case: Path) -> Run:
    """Continues after a kill."""
    continued = run_folder(case) if kind.name in ("generate", "splats", "texture") else None
    if continued is not None:
        return run(["resume", str(continued)], case)
    for path in case.glob("*") if kind.name not in ("export", "bench") else ():
        shutil.rmtree(path)  # nothing was computed, or an image was
    return run(kind.command(case), case)


def check(kind: Kind, case: Path, ended: Run, whole: dict[str, bytes], expected: Sequence[int]) -> list[str]:
    """What is wrong after a case; continues it."""
    wrong = [] if ended.status in expected else [f"status {ended.status}: {ended.printed[-300:]}"]
    if "Traceback" in ended.printed:
        wrong.append(ended.printed[-1500:])
    continued = run_folder(case)
    if continued and kind.name in ("generate", "splats", "texture"):
        kept = read_state(continued / "checkpoint").step if has_checkpoint(continued / "checkpoint") else -1
        if kept < ended.saved or (kept > ended.saved + 1):
            wrong.append(f"checkpoint of step {kept} after one of step {ended.saved}")
    if "type  distill3d resume " in ended.printed:  # computed, but there was no space for it
        kept_in = Path(ended.printed.split("type  distill3d resume ")[1].split("\n")[0])
        again = run(["resume", str(kept_in)], kept_in.parent)
        name = "/scene.safetensors"  # the name of the folder is in mesh.glb
        if again.status or results(kept_in)[name] != whole[name]:
            wrong.append(f"kept elsewhere: status {again.status}: {again.printed[-1500:]}")
        shutil.rmtree(kept_in)
    after = go_on(kind, case)
    if after.status or "Traceback" in after.printed or "damaged" in after.printed:
        wrong.append(f"going on: status {after.status}: {after.printed[-1500:]}")
    found = results(case)
    if found != whole:
        names = [name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name)]
        wrong.append(f"other results: {names}")
    return wrong + [f"left: {path}" for path in unfinished(case)]


def kill_all(kind: Kind, place: Path, share: float, generator: random.Random) -> Iterator[tuple[str, list[str]]]:
    """The kills of one command: (where, what is wrong) of each."""
    case = place / kind.name
    case.mkdir()
    reference = run(kind.command(case), case)
    assert reference.status == 0, reference.printed
    whole = results(case)
    assert whole, "nothing to compare"
    writing = [i for i, part in enumerate(reference.operations) if part]
    other = [i for i, part in enumerate(reference.operations) if not part]
    for k in range(max(1, round(kind.kills * share))):
        inside = bool(writing) and k % 8 < 5  # more than half, since some commands have no checkpoint
        at = generator.choice(writing if inside else other)
        number = {5: signal.SIGTERM, 6: signal.SIGHUP}.get(k % 7, signal.SIGKILL)
        shutil.rmtree(case)
        case.mkdir()
        ended = run(kind.command(case), case, functools.partial(_kill, number), at)
        expected = [-number] if number == signal.SIGKILL else [128 + number]
        where = f"{signal.Signals(number).name}, {'in' if inside else 'outside of'} a checkpoint"
        yield where, [f"operation {at}: {wrong}" for wrong in check(kind, case, ended, whole, expected)]
    shutil.rmtree(case)


def _kill(number: int) -> None:
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A tmpfs of FEW_MB."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FEW_MB}m", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-R", place], check=True)
        place.rmdir()


def disks(kind: Kind, place: Path, cases: int, generator: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Full and read-only disks."""
    with small_disk(place / "disk") as disk:
        case = disk / "case"
        case.mkdir()
        reference = run(kind.command(case), case)
        assert reference.status == 0, reference.printed
        whole, used = results(case), sum(path.stat().st_size for path in case.rglob("*") if path.is_file())
        for k in range(cases):
            for what in ("full disk", "read-only disk"):
                shutil.rmtree(case)
                case.mkdir()
                if what == "full disk":
                    free = shutil.disk_usage(disk).free
                    (disk / "filler").write_bytes(bytes(max(free - round(1.6 * used * (k + 0.5) / cases), 0)))
                    ended = run(kind.command(case), case)
                    (disk / "filler").unlink()
                else:
                    at = generator.randrange(len(reference.operations))
                    ended = run(kind.command(case), case, functools.partial(_read_only, disk), at)
                    if os.path.ismount(disk) and not os.access(disk, os.W_OK):
                        subprocess.run(["umount", disk], check=True)
                yield what, check(kind, case, ended, whole, (0, 2))


def _read_only(disk: Path) -> None:
    """Puts a read-only view of the disk over it; files that are open already stay writable."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def main() -> None:
    """Runs the campaign and prints its table; status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the kills")
    parser.add_argument("--disks", type=int, default=20, help="cases of a full and of a read-only disk each")
    parser.add_argument("--only", default="", help="names of commands, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other threads
    generator, began, failures = random.Random(options.seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        place = Path(name)
        tempfile.tempdir = str(place / "rescued")
        (place / "rescued").mkdir()
        ball, made = place / "ball.ply", place / "made"
        trimesh.creation.icosphere(subdivisions=1, radius=0.6).export(ball)
        loading.load_prior = images.load_prior = objects.load_prior = functools.cache(loading.load_prior)
        loading.load_prior("toybox", "cpu", "float32", PriorOptions(image_size=32))
        commands = kinds(ball, made)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for kind in commands:  # here, so that the forks have everything imported
                case = place / f"first-{kind.name}"
                case.mkdir()
                assert cli.run(kind.command(case)) == 0
                if kind is commands[0]:
                    next(case.iterdir()).rename(made)
        gc.freeze()
        chosen = [kind for kind in commands if kind.name in (options.only or kind.name).split(",")]
        campaigns = [(kind, kill_all(kind, place, options.share, generator)) for kind in chosen]
        if os.geteuid() == 0:
            campaigns += [(kind, disks(kind, place, options.disks, generator)) for kind in chosen[:1]]
        else:
            print("not root: the cases of full and read-only disks are left out")
        print("| command | what | cases | wrong |\n|---|---|---|---|")
        for kind, campaign in campaigns:
            cases, bad = Counter[str](), Counter[str]()
            for what, wrong in campaign:
                cases[what] += 1
                bad[what] += bool(wrong)
                for line in wrong:
                    print(f"{kind.name}, {what}: {line}", file=sys.stderr, flush=True)
            for what in sorted(cases):
                print(f"| {kind.name} | {what} | {cases[what]} | {bad[what]} |", flush=True)
            failures += sum(bad.values())
    print(f"{time.monotonic() - began:.0f} s, {failures} wrong")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
