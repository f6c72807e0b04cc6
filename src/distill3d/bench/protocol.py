"""What a bench compares, and under which conditions: one dataclass, and the folder that belongs to it.

A folder holds `bench.json` (the conditions), a folder in `cells/` for each finished object, tables and the report.
Methods, prompts and seeds can be added to a folder later; conditions that decide an object cannot change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distill3d
from distill3d.cameras import BACKGROUND, DISTANCE, ELEVATION, FOV
from distill3d.distill.recipes import DISTILL, Recipe
from distill3d.files import replacing
from distill3d.runs.config import PriorConfig, to_plain
from distill3d.runs.folder import slug
from distill3d.runs.objects import Config

FORMAT = 2  # of a folder; raised when a cell is written differently


@dataclass(frozen=True)
class Variant:
    """One row of the tables: a recipe, with its objective, under a name."""

    name: str
    recipe: Recipe = DISTILL

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("a variant needs a name: it is a row of the tables")


@dataclass(frozen=True)
class Protocol(PriorConfig):
    """Everything that a bench holds equal, and what it varies: variants x prompts x seeds, each a `Task`.

    `views` images of `size` pixels are taken evenly around each object, at one elevation (degrees), over one gray.
    """

    variants: tuple[Variant, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    views: int = 50
    size: int = 64
    elevation: float = ELEVATION
    distance: float = DISTANCE
    fov: float = FOV
    background: float = BACKGROUND

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """The configuration of a task's run."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(PriorConfig)}
        return Config(task.prompt, task.variant.recipe, seed=task.seed, **shared)

    def conditions(self) -> dict[str, Any]:
        """What decides a cell besides its task, as plain JSON values."""
        plain = to_plain(dataclasses.replace(self, variants=self.variants[:1]))
        return {name: value for name, value in plain.items() if name not in ("variants", "prompts", "seeds")}


@dataclass(frozen=True)
class Task:
    """One object to make: a cell."""

    variant: Variant
    prompt: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of its folder: readable, and one for each prompt, variant and seed."""
        digest = hashlib.sha256(f"{self.prompt}\0{self.variant.name}".encode()).hexdigest()[:8]
        words = [slug(text)[:40].strip("-") for text in (self.prompt, self.variant.name)]
        return "-".join([*filter(None, words), str(self.seed), digest])


def open_folder(out: Path, protocol: Protocol) -> None:
    """Makes `out` the folder of this bench, or checks that it is; call it with the folder locked.

    Raises:
        ValueError: where it cannot be written, holds something else, or holds a bench of another version or of other
            conditions; its content stays as it is.
    """
    begun = check_folder(out)
    wanted: dict[str, Any] = {
        "format": FORMAT,
        "version": distill3d.__version__,
        "conditions": protocol.conditions(),
        "variants": {variant.name: to_plain(variant) for variant in protocol.variants},
    }
    wanted = json.loads(json.dumps(wanted, allow_nan=False))  # what will be read back: lists instead of tuples
    if begun:
        wanted["variants"] = _compatible(out, wanted)
    with replacing(out / "bench.json") as draft:
        draft.write_text(json.dumps(wanted, indent=2, allow_nan=False))


def check_folder(out: Path) -> bool:
    """Whether `out` holds a bench; it is made if needed.

    Raises:
        ValueError: where it cannot be written or holds something else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    if content and "bench.json" not in content:
        raise ValueError(f"{out} is not empty and is not a bench folder: choose another folder with --out")
    return bool(content)


def _compatible(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """All variants of a folder and of the present bench; ValueError unless they go together."""
    other = "choose another folder with --out (finished objects there are kept)"
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


def _differences(was: Any, now: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(k for k in now if k not in was)]:
            yield from _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif was != now:
        yield path, json.dumps(was, allow_nan=False), json.dumps(now, allow_nan=False)
