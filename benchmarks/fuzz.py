"""The fuzz campaign of docs/reliability.md: one change in one file of a whole input, and one command on it.

    python benchmarks/fuzz.py                         400 cases
    python benchmarks/fuzz.py --only mesh --case 7    one case again, with all that it prints

A case is right where it ends in one line and a status other than 0, or in the result of the whole input. Runs and
benches may also use a file as it is where a warning names it. A model, LoRA weights or a mesh that can be read is
another one: there the result may differ. Each case runs in a child of its own, with 8 GiB and half a minute of a core.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from random import Random

import numpy as np
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file, save_file

from distill3d.cli import main as cli
from distill3d.distill.recipes import DISTILL
from distill3d.export.options import ExportOptions
from distill3d.meshes.files import read_mesh, save_mesh
from distill3d.priors.loading import load_prior
from distill3d.runs import objects
from distill3d.scenes.voxels import VoxelOptions

to_json = json.JSONEncoder().encode  # NaN is meant
SECONDS, MEMORY = 30, 8 * 2**30
TOYBOX = Path(str(resources.files("distill3d"))) / "assets" / "toybox"
MESHES = (".glb", ".obj", ".ply", ".npz")
VALUES = (None, True, -1, 0, 3, 1e308, -1e308, 2**70, float("nan"), "", "x", "\x1b[31m", [], {}, [[]], {"kind": "x"})
WORDS = ("nan", "inf", "-1", "0", "1e308", "9" * 20, "x", "\x1b]0;x\x07", "", "\udcff", "1/2/3/4", "1e-320")
SMALL = ["--steps", "1", "--views-per-step", "1", "--frames", "1", "--render-size", "16", "--texture-size", "64"]


@dataclass(frozen=True)
class Subject:
    """A kind of input: `folder` holds a whole one, of whose copies `files` are damaged and read by `command`."""

    folder: Path
    files: tuple[str, ...]
    command: Callable[[Path, str], list[str]]  # of the copy and the name of the damaged file
    results: str  # pattern of what the command writes
    strict: bool = False  # whether another result is a fault unless a warning names the file

    def result(self, copy: Path) -> str:
        """Identifies what the command wrote."""
        files = sorted(copy.glob(self.results))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else "nothing"


# Changes: bytes -> bytes.


def bits(data: bytes, rng: Random) -> bytes:
    """One to eight bits turned."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def blocks(data: bytes, rng: Random) -> bytes:
    """Cut short, a piece taken out, overwritten, or put in another place."""
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    zeros = data[:a] + bytes(b - a) + data[b:]
    return rng.choice((data[:a], data[:a] + data[b:], zeros, data[b:] + data[:b], b"", data + data[a:b]))


def tree(value: object, rng: Random) -> object:
    """A JSON value with one change at one place."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice((*VALUES, json.loads("[" * 900 + "]" * 900)))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    changed, key, way = (dict if isinstance(value, dict) else list)(value), rng.choice(keys), rng.random()
    if way < 0.1:
        del changed[key]
    elif way < 0.2 and isinstance(changed, dict):
        changed[rng.choice(("unknown", "\x1b[31m", "auto_map", "kind"))] = rng.choice(VALUES)
    elif way < 0.3 and isinstance(changed, dict):
        changed[rng.choice(keys)], changed[key] = changed[key], changed[rng.choice(keys)]
    else:
        changed[key] = tree(value[key], rng)
    return changed


def document(data: bytes, rng: Random) -> bytes:
    """JSON, or one of its lines, with one change; of .glb and .safetensors files that in front of the numbers."""
    if data[:4] == b"glTF":
        size = struct.unpack_from("<I", data, 12)[0]
        text = to_json(tree(json.loads(data[20 : 20 + size]), rng)).encode()
        text += b" " * (-len(text) % 4)
        rest = data[20 + size :]
        return struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A) + text + rest
    size = int.from_bytes(data[:8], "little")
    if 2 <= size <= len(data) and data[8:9] == b"{":
        text = to_json(tree(json.loads(data[8 : 8 + size]), rng)).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]
    lines = data.splitlines(keepends=True)
    if len(lines) > 1 and data.count(b"\n{"):
        at = rng.randrange(len(lines))
        lines[at] = to_json(tree(json.loads(lines[at]), rng)).encode() + b"\n"
        return b"".join(lines)
    return to_json(tree(json.loads(data), rng)).encode()


def numbers(data: bytes, rng: Random) -> bytes:
    """Some of the last numbers of a file, taken as float32, are not finite or huge."""
    values = np.frombuffer(data[len(data) % 4 :], "<f4").copy()
    place = rng.randrange(len(values) // 2, len(values))
    values[place : place + rng.choice((1, 1000))] = rng.choice((np.nan, np.inf, -np.inf, 3e38))
    return data[: len(data) % 4] + values.tobytes()


def words(data: bytes, rng: Random) -> bytes:
    """One to three words of a text replaced."""
    found = data.decode("latin-1").split(" ")
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(found))
        found[at] = rng.choice(WORDS) + ("\n" if found[at].endswith("\n") else "")
    return " ".join(found).encode("utf-8", "surrogateescape")


def arrays(data: bytes, rng: Random) -> bytes:
    """One array of an .npz file has another type, shape, value or name."""
    with np.load(io.BytesIO(data)) as found:
        content = dict(found)
    value = content.pop(name := rng.choice(list(content)))
    others = [value.astype("U3"), value.ravel()[:-1], value[None], value]
    others += [value * np.nan, value.astype(int) * 10**6] if value.dtype.kind in "iuf" else [np.array(7)]
    content[rng.choice((name, name, name, "unknown"))] = rng.choice(others)
    np.savez(file := io.BytesIO(), **content)
    return file.getvalue()


def changes(name: str) -> list[Callable[[bytes, Random], bytes]]:
    """The changes that a kind of file is given."""
    kinds = {"json": [document, document], "jsonl": [document], "glb": [document, numbers], "obj": [words, words]}
    kinds |= {"mtl": [words], "ply": [words, numbers], "safetensors": [document, numbers], "npz": [arrays]}
    return [bits, blocks, *kinds.get(name.rpartition(".")[2], [])]


# Whole inputs.


def make_run(folder: Path) -> None:
    """A run that was stopped after one of two steps."""
    recipe = replace(DISTILL, steps=2, views=1, frames=1, render_size=8, scene=VoxelOptions(resolution=8))
    recipe = replace(recipe, export=ExportOptions(texture=None, resolution=8, fit=0, level=0.1))

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as out:
        config = objects.Config("a red mushroom", recipe, prior="toybox", dtype="float32")
        objects.generate(config, out, on_step=stop).folder.rename(folder)


def make_meshes(folder: Path) -> None:
    """A box in every format, with a texture where it can have one."""
    box, generator = trimesh.creation.box(), np.random.default_rng(0)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.new("RGB", (8, 8), (200, 40, 40)))
    box.export(folder / "b.ply", encoding="ascii")
    box.visual = trimesh.visual.TextureVisuals(generator.uniform(size=(len(box.vertices), 2)), material)
    box.export(folder / "a.glb")
    for name in ("a.obj", "a.ply", "a.npz"):
        save_mesh(folder / name, read_mesh(folder / "a.glb"))


def make_lora(path: Path) -> None:
    """LoRA weights for the attention of the bundled prior."""
    rng, weights = torch.Generator().manual_seed(0), {}
    for name, value in load_file(TOYBOX / "unet" / "diffusion_pytorch_model.safetensors").items():
        if name.endswith("to_q.weight"):
            for part, shape in (("lora_A", (2, value.shape[1])), ("lora_B", (value.shape[0], 2))):
                weights[f"unet.{name.removesuffix('weight')}{part}.weight"] = 0.1 * torch.randn(shape, generator=rng)
    save_file(weights, path)


def bench(copy: Path, _: str = "") -> list[str]:
    """The command that makes a bench, or judges a finished one."""
    line = "bench --methods sds --steps 1 --views 2 --view-size 16 --metrics saturation,warp_error,seconds"
    line += " --set scene.resolution=8 --set render_size=8 --set export.fit=0"
    return [*line.split(), "--prompts", "a red mushroom", "--out", str(copy)]


def texture(copy: Path, name: str) -> list[str]:
    """The command that reads a mesh, of which the damaged file may be a part."""
    main = name if name.endswith(MESHES) else "a.obj"
    return ["texture", str(copy / main), "a red car", *SMALL, "--out", str(copy / "out")]


def image(flag: str) -> Callable[[Path, str], list[str]]:
    """The command that loads a model, or LoRA weights."""
    line = ["image", "a red mushroom", "--steps", "1", "--dtype", "float32", flag]
    return lambda copy, name: [*line, str(copy / name if flag == "--lora" else copy), "--out", str(copy / "image.png")]


def subjects(work: Path) -> dict[str, Subject]:
    """All kinds of input, made in `work`."""
    folders = {name: work / name for name in ("run", "bench", "model", "lora", "mesh")}
    make_run(folders["run"])
    assert cli.run(bench(folders["bench"])) == 0
    shutil.copytree(TOYBOX, folders["model"], ignore=shutil.ignore_patterns("*.md"))
    for make, path in ((make_meshes, folders["mesh"]), (make_lora, folders["lora"] / "a.safetensors")):
        folders[path.name if path in folders.values() else "lora"].mkdir()
        make(path)
    files = {
        name: [p for p in sorted(f.rglob("*.*")) if p.is_file() and p.stat().st_size] for name, f in folders.items()
    }
    names = {n: tuple(str(p.relative_to(folders[n])) for p in f if p.suffix != ".html") for n, f in files.items()}
    read = tuple(n for n in names["run"] if n.endswith("json") or "scene.safetensors" in n or "optimizer" in n)
    line = ["--size", "16", "--frames", "2"]
    return {
        "resume": Subject(
            folders["run"], (*read, "metrics.jsonl"), lambda c, _: ["resume", str(c)], "[mp]*.[gp]*", True
        ),
        "render": Subject(folders["run"], read, lambda c, _: ["render", str(c), *line], "*.mp4", True),
        "bench": Subject(folders["bench"], names["bench"], bench, "*.csv", True),
        "model": Subject(folders["model"], names["model"], image("--prior"), "image.png"),
        "lora": Subject(folders["lora"], names["lora"], image("--lora"), "image.png"),
        "mesh": Subject(folders["mesh"], names["mesh"], texture, "out/*/mesh.glb"),
    }


# The campaign.


def run(subject: Subject, copy: Path, name: str) -> tuple[int, str]:
    """Runs the command in a child of this process: its status, or minus the signal that ended it, and what it said."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as file:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            with contextlib.redirect_stderr(file), contextlib.redirect_stdout(io.StringIO()):
                try:
                    status = cli.run(subject.command(copy, name))
                except BaseException:
                    traceback.print_exc()
                    status = 1
            file.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        return status, file.read()


def judged(subject: Subject, name: str, status: int, said: str, same: bool, made: bool) -> tuple[bool, str]:
    """Whether a case ended as promised, and how."""
    lines = [line for line in said.splitlines() if line.startswith(("distill3d: ", "warning: "))]
    errors = sum(line.startswith("distill3d: ") for line in lines)
    if status < 0 or "Traceback" in said:
        return False, f"ended by signal {-status}" if status < 0 else "traceback"
    if any(not line.isprintable() or len(line) > 2000 for line in lines) or (status and errors != 1):
        return False, "not one clear line"
    if status or same:
        return True, "refused in one line" if status else "unchanged result"
    named = any(Path(name).name in line for line in lines)
    if subject.strict or not made:
        return named, "used with a warning" if named else "another result in silence"
    return True, "another input"


def main() -> int:
    """Runs the campaign; returns 1 if a case did not end as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of input: resume, render, bench, model, lora or mesh")
    parser.add_argument("--case", type=int, help="this case alone")
    options = parser.parse_args()
    bundled = load_prior("toybox", "cpu", "float32")  # once: models are what other cases are about
    objects.load_prior = lambda name, *more: bundled if name == "toybox" else load_prior(name, *more)
    counts: Counter[tuple[str, str, bool]] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        every, copy, whole = subjects(Path(folder)), Path(folder) / "copy", {}
        kinds = [options.only] if options.only else list(every)
        for kind in kinds:  # in this process, so that the children find everything imported
            shutil.copytree(every[kind].folder, copy)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert cli.run(every[kind].command(copy, every[kind].files[0])) == 0
            whole[kind] = every[kind].result(copy)
            shutil.rmtree(copy)
        for number in range(options.cases) if options.case is None else [options.case]:
            subject = every[kind := kinds[number % len(kinds)]]
            rng = Random(f"{options.seed} {kind} {number}")
            change = rng.choice(changes(name := rng.choice(subject.files)))
            shutil.copytree(subject.folder, copy)
            (copy / name).write_bytes(change((copy / name).read_bytes(), rng))
            status, said = run(subject, copy, name)
            result = subject.result(copy)
            right, how = judged(subject, name, status, said, result == whole[kind], result != "nothing")
            shutil.rmtree(copy)
            counts[kind, how, right] += 1
            if not right or options.case is not None:
                print(f"{kind} {number}: {change.__name__} of {name}: {how}\n{said[-3000:]}", flush=True)
    wrong = sum(count for (*_, right), count in counts.items() if not right)
    print(f"{counts.total()} cases in {time.monotonic() - began:.0f} s, {wrong} wrong")
    for (kind, how, _), count in sorted(counts.items()):
        print(f"{kind:8}{how:28}{count:5}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
