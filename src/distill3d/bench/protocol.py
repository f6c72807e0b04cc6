"""What a bench compares, and under which conditions: one dataclass, and the folder that belongs to it.

A folder holds `bench.json` (the conditions), a folder in `cells/` for each object that is finished, tables and the
report. More methods, prompts and seeds may be added to a folder; conditions that decide an object may not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distill3d
from distill3d.distill.recipes import LAPTOP, Recipe, check_method
from distill3d.files import replacing
from distill3d.priors.options import PriorOptions
from distill3d.runs.objects import Config

FORMAT = 1  # of a folder; raise it when a cell is written otherwise than before


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the tables: a method and all its settings, under a name."""

    name: str
    method: str
    recipe: Recipe = LAPTOP

    def __post_init__(self) -> None:
        check_method(self.method)
        if not self.name.strip():
            raise ValueError("a variant needs a name: it is a row of the tables")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that a bench holds equal, and what it varies: variants x prompts x seeds, each a `Task`.

    `views` pictures of `size` pixels are taken evenly around each object, at one elevation (degrees), over one gray.
    """

    variants: tuple[Variant, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    prior: str = "toybox"
    negative: str = ""
    views: int = 50
    size: int = 64
    elevation: float = 15.0
    distance: float = 2.8
    fov: float = 40.0
    background: float = 0.9
    device: str = "cpu"
    dtype: str = "float32"
    prior_options: PriorOptions = PriorOptions()

    def __post_init__(self) -> None:
        for what, given in (("method", self.names), ("prompt", self.prompts), ("seed", self.seeds)):
            if not given:
                raise ValueError(f"a bench needs at least one {what}")
            twice = [str(one) for one in given if given.count(one) > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]} is given twice")
        if self.views < 2 or self.size < 8:
            raise ValueError(
                f"a bench needs at least 2 views of 8 pixels, got {self.views} views of {self.size} pixels"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The rows of the tables."""
        return tuple(variant.name for variant in self.variants)

    def tasks(self) -> list[Task]:
        """All cells, prompt by prompt, so that whatever is finished early compares all variants."""
        every = itertools.product(self.prompts, self.seeds, self.variants)
        return [Task(variant, prompt, seed) for prompt, seed, variant in every]

    def config(self, task: Task) -> Config:
        """The run that a task is."""
        return Config(
            prompt=task.prompt, recipe=task.variant.recipe, method=task.variant.method, prior=self.prior,
            negative=self.negative, seed=task.seed, device=self.device, dtype=self.dtype,
            prior_options=self.prior_options,
        )  # fmt: skip

    def conditions(self) -> dict[str, Any]:
        """What decides a cell beside its task, as plain JSON values."""
        varied = ("variants", "prompts", "seeds")
        return {name: value for name, value in _plain(self).items() if name not in varied}


@dataclasses.dataclass(frozen=True)
class Task:
    """One object to make: a cell."""

    variant: Variant
    prompt: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of its folder: readable, and one for each prompt, variant and seed."""
        told = hashlib.sha256(f"{self.prompt}\0{self.variant.name}".encode()).hexdigest()[:8]
        words = [_slug(text)[:40].strip("-") for text in (self.prompt, self.variant.name)]
        return "-".join([*filter(None, words), str(self.seed), told])


def open_folder(out: Path, protocol: Protocol) -> None:
    """Makes `out` the folder of this bench, or checks that it is.

    Raises:
        ValueError: where it cannot be written, holds something else, or a bench of another version or other conditions;
            what it holds stays as it is.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    wanted: dict[str, Any] = {
        "format": FORMAT, "version": distill3d.__version__, "conditions": protocol.conditions(),
        "variants": {variant.name: _plain(variant) for variant in protocol.variants},
    }  # fmt: skip
    if "bench.json" in content:
        wanted["variants"] = _compatible(out, wanted)
    elif content:
        raise ValueError(f"{out} is not empty and holds no bench: choose another folder with --out")
    with replacing(out / "bench.json") as draft:
        draft.write_text(json.dumps(wanted, indent=2))


def _compatible(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """All variants of a folder and of the present bench; ValueError unless they go together."""
    other = "choose another folder with --out (what is finished there is kept)"
    try:
        found = json.loads((out / "bench.json").read_text())
        begun, variants = (found["format"], found["version"]), dict(found["variants"])
        conditions = dict(found["conditions"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out / 'bench.json'} cannot be read: {other}") from None
    if begun != (wanted["format"], wanted["version"]):
        raise ValueError(f"{out} was begun by distill3d {begun[1]}, this is {wanted['version']}: {other}")
    kept = {name: variants[name] for name in wanted["variants"] if name in variants}
    new = {name: wanted["variants"][name] for name in kept}
    for path, was, now in _differences({**conditions, **kept}, {**wanted["conditions"], **new}):
        raise ValueError(f"{out} holds a bench of another configuration: {path} was {was}, is {now}; {other}")
    return {**variants, **wanted["variants"]}


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second bench out of the folder while this one works; ended processes hold nothing.

    Raises:
        ValueError: where another process works in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another bench is at work in {out}: wait for it, or choose another --out") from None
        yield


def _differences(was: Any, now: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(k for k in now if k not in was)]:
            yield from _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif was != now:
        yield path, json.dumps(was), json.dumps(now)


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as what JSON gives back."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
