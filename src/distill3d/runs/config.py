"""Configurations of runs, and how they become JSON and TOML and back.

A dataclass becomes a table of its fields. Where a field can hold one of several classes (a scene, a background, an
objective), the table names the class under "kind". A value of your own class is written with its import path for the
record, but never imported from a file: pass it again to `resume`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import eq
from typing import TYPE_CHECKING, Any, TypeVar

from distill3d import objectives
from distill3d.distill.image_recipes import DDIM
from distill3d.objectives import METHODS, Method
from distill3d.priors.base import resolve_dtype
from distill3d.priors.options import PriorOptions
from distill3d.prompts import check_text
from distill3d.scenes.background import BackgroundOptions, ConstantBackground, LearnedBackground, RandomGray
from distill3d.scenes.gaussians import GaussianOptions
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.mesh import MeshOptions
from distill3d.scenes.voxels import VoxelOptions
from distill3d.types import SceneOptions

if TYPE_CHECKING:
    from cattrs import Converter

FORMAT = 1  # of config.json and of run folders; raised when they are written differently
T = TypeVar("T")
C = TypeVar("C", bound="PriorConfig")
NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}

# The classes that a field may hold, by the type in its annotation.
FAMILIES: dict[object, tuple[type, ...]] = {
    Method: (*map(type, METHODS.values()), DDIM),
    SceneOptions: (VoxelOptions, HashOptions, GaussianOptions, MeshOptions),
    BackgroundOptions: (RandomGray, ConstantBackground, LearnedBackground),
}
KINDS: dict[str, type] = {kind.__name__: kind for classes in FAMILIES.values() for kind in classes}


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Which prior, and where it runs: what every configuration shares."""

    prior: str = "toybox"  # a name, a folder, a .safetensors file or a hub id
    negative: str = ""  # the unconditional text
    device: str = "cpu"
    dtype: str = "auto"  # of the prior's network; auto is bfloat16 where the device has it in hardware, else float32
    prior_options: PriorOptions = PriorOptions()

    def __post_init__(self) -> None:
        check_text(self.negative, "the negative prompt")


@dataclass(frozen=True, kw_only=True)
class RunConfig(PriorConfig):
    """What every run shares: a prior and a seed."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must be a whole number from 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Custom(SceneOptions):
    """Stands for a value of a class that is not part of the library, read from a file."""

    kind: str

    def build(self, *_: object) -> Any:
        """Raises ValueError: the value itself is needed."""
        raise ValueError(f"this run used {self.kind}, which is not part of distill3d: pass the value to resume()")


def to_plain(value: object) -> Any:
    """A configuration as dicts, lists, strings, numbers and None; see the top of this file."""
    return _converter().unstructure(value)


def from_plain(kind: type[T], plain: object) -> T:
    """The reverse of `to_plain`.

    Raises:
        ValueError: for unknown fields, missing ones, wrong types and values out of range, each with its path.
    """
    from cattrs import transform_error

    try:
        return _converter().structure(plain, kind)
    except Exception as error:  # cattrs raises groups of whatever the fields raised
        lines = transform_error(error, path="", format_exception=_reason)
        raise ValueError("; ".join(map(_readable, lines))) from error


def resolved(config: C) -> C:
    """The configuration with the dtype that "auto" means on its device, so that the run can be repeated elsewhere."""
    dtype = resolve_dtype(config.dtype, config.device)
    return dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))


@functools.cache
def _converter() -> Converter:
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _exactly)
    converter.register_structure_hook(float | Sequence[float], lambda v, _: tuple(v) if isinstance(v, list) else v)
    for family, classes in FAMILIES.items():
        kinds = {kind.__name__: kind for kind in classes}
        converter.register_unstructure_hook_func(partial(eq, family), lambda v, k=kinds: _tagged(converter, v, k))
        converter.register_structure_hook_func(partial(eq, family), lambda v, _, k=kinds: _of_kind(converter, v, k))
    return converter


def _exactly(value: object, kind: type[T]) -> T:
    """A number or a text of this type; cattrs alone would convert, "false" to True for instance."""
    finite = not isinstance(value, int | float) or abs(value) < (2**63 if type(value) is int else math.inf)
    if finite and kind is float and type(value) is int:
        return kind(value)
    if type(value) is not kind or not finite:
        below = " below 2**63" if kind is int and not finite else ""
        raise ValueError(f"{NAMES[kind]}{below} is needed, got {repr(value)[:60]}")
    return value


def _tagged(converter: Converter, value: object, kinds: dict[str, type]) -> Any:
    """A value with its class under "kind". Of a class that is not the library's, the settings are kept as a text."""
    kind = type(value)
    if kinds.get(kind.__name__) is kind:
        return {"kind": kind.__name__, **converter.unstructure(value, kind)}
    if isinstance(value, Custom):
        return {"kind": value.kind}
    # The text of an Objective holds addresses of functions, which change from process to process.
    settings = dataclasses.is_dataclass(kind) and kind is not objectives.Objective
    return {"kind": f"{kind.__module__}:{kind.__qualname__}"} | ({"settings": repr(value)} if settings else {})


def _of_kind(converter: Converter, plain: Any, kinds: dict[str, type]) -> Any:
    if not isinstance(plain, dict) or not isinstance(plain.get("kind"), str):
        raise ValueError(f'a table with a "kind" is needed, one of {", ".join(kinds)}, got {plain!r}')
    fields = {name: value for name, value in plain.items() if name != "kind"}
    if plain["kind"] in kinds:
        return converter.structure(fields, kinds[plain["kind"]])
    if ":" in plain["kind"]:
        return Custom(plain["kind"])
    raise ValueError(f"unknown kind {plain['kind']!r}; allowed: {', '.join(kinds)}")


def _reason(error: BaseException, kind: type | None) -> str:
    """What an error of a field says: our own words where there are some, else those of cattrs."""
    from cattrs.v import format_exception

    return str(error) if isinstance(error, ValueError) else format_exception(error, kind)


def _readable(line: str) -> str:
    """cattrs' "invalid value ... @ .recipe.steps" with the path in front."""
    text, _, path = line.partition(" @ ")
    return f"{path.lstrip('.')}: {text}" if path.lstrip(".") else text
