"""From a configuration back to a command line: what to type for an object that a folder holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from distill3d.cli.meshes import Refine, Texture
from distill3d.cli.objects import Generate, ObjectTexts, Quality
from distill3d.cli.settings import paths
from distill3d.cli.shared import Model, Settings, Texts, command_line
from distill3d.distill.recipes import RECIPES, TEXTURE_RECIPES, refinement
from distill3d.meshes.files import file_up
from distill3d.objectives import METHODS
from distill3d.runs.config import KINDS, Custom, from_plain, resolved, to_plain
from distill3d.runs.objects import Config
from distill3d.scenes.mesh import MeshOptions

# What a run began with: it keeps a copy of it, but not its path. A MESH has y up, as glTF and OBJ have, or else the
# command holds --up.
MESH, RUN = "MESH", "RUN"
MODEL = {path: ("model", path.removeprefix("prior_options.")) for path in Model().changes()}


def typed(config: Config, folder: Path) -> str:
    """The command that makes the object of a run, such as distill3d generate "a red mushroom" --seed 1.

    It is the shortest of several. A precision is left out where this machine takes it by itself. Where flags and --set
    cannot say all, the command reads the configuration in `folder`. No command makes a run with parts of your own: "".
    """
    config = resolved(config)
    if config.init is not None and config.init_up == file_up(config.init):  # what the file's type means anyway
        config = replace(config, init_up="auto")
    if isinstance(scene := config.recipe.scene, MeshOptions):
        if refined := _refined(config, scene):
            return refined
        up = "auto" if scene.up == "y" else scene.up  # a run keeps the axis, not the format of the file that implied it
        config = replace(config, recipe=replace(config.recipe, scene=replace(scene, mesh=MESH, up=up)))
    lines = []
    for command in _candidates(config):
        if to_plain(resolved(command.config())) == to_plain(config):
            lines.append(_line(command))
            if not command.other.set:
                break
    if not lines:
        read = from_plain(Config, to_plain(config)).recipe
        if any(isinstance(part, Custom) for part in (read.objective, read.scene, read.background)):
            return ""
        base = _started(config, Quality(), None)
        return _line(replace(base, other=Settings(config=folder / "config.json")))
    return min(lines, key=len)


def _line(command: Generate | Texture) -> str:
    name = type(command).__name__.lower()
    mesh = [str(command.mesh)] if isinstance(command, Texture) else []
    return command_line(["distill3d", name, *mesh, command.prompt], command)


def _refined(config: Config, scene: MeshOptions) -> str:
    """The command for a refined mesh; empty for a textured one."""
    recipe, start = config.recipe, getattr(config.recipe.objective, "start", None)
    if not scene.colors or start is None:
        return ""
    for base in TEXTURE_RECIPES.values():
        same = refinement(base, recipe.steps, start, scene.move)
        mesh = replace(scene, colors=True, move=scene.move, levels=base.scene.levels)  # type: ignore[attr-defined]
        texture = recipe.export.texture
        if replace(same, scene=mesh, export=replace(same.export, texture=texture)) == recipe and texture is not None:
            command = Refine(Path(RUN), recipe.steps, start, scene.move, texture, config.seed)
            return command_line(["distill3d", "refine", RUN], command)
    return ""


def _candidates(config: Config) -> Iterator[Generate | Texture]:
    """Commands from each recipe that may make the object, those with the fewest flags first."""
    recipes = TEXTURE_RECIPES if isinstance(config.recipe.scene, MeshOptions) else RECIPES
    method = next((name for name, m in METHODS.items() if type(m) is type(config.recipe.objective)), None)
    choices = itertools.product((None, *recipes), (None, method), (None, config.prior))
    for recipe, name, prior in sorted(choices, key=lambda flags: sum(flag is not None for flag in flags)):
        command = _started(config, Quality(recipe=recipe, method=name), prior)
        try:
            plain = dict(paths(to_plain(resolved(command.config()))))
            wanted = {p: v for p, v in paths(to_plain(config)) if p not in plain or plain[p] != v}
            if any(path.endswith(".kind") and value not in KINDS for path, value in wanted.items()):
                continue  # a class of your own
            command = _with(command, wanted)
            command.config()
        except ValueError:  # no such combination
            continue
        yield command


def _started(config: Config, quality: Quality, prior: str | None) -> Generate | Texture:
    """A command with the texts, and with what the object begins with."""
    views = {name: config.views.get(name) for name in ("front", "side", "back", "overhead")}
    texts: dict[str, Any] = {"negative": config.negative or None, "seed": config.seed or None, **views}
    model, scene = Model(prior=prior), config.recipe.scene
    if isinstance(scene, MeshOptions):
        begin = {"up": scene.up, "turn": scene.turn, "keep_colors": scene.colors}
        return Texture(Path(MESH), config.prompt, **begin, texts=Texts(**texts), quality=quality, model=model)
    if config.init is not None:
        up = None if config.init_up == "auto" else config.init_up
        texts |= {"init": Path(config.init), "up": up, "turn": config.init_turn or None}
    return Generate(config.prompt, ObjectTexts(**texts), quality=quality, model=model)


def _with(command: Any, wanted: Mapping[str, object]) -> Any:
    """The command with these settings, by flags where there are some, else by --set."""
    known, left = {**MODEL, **_flags(command)}, []
    for path, value in wanted.items():
        if path == "recipe.perp_neg" and value:
            command = replace(command, quality=replace(command.quality, perp_neg=True))
        elif path in known and value is not None:
            group, flag = known[path]
            given = tuple(value) if isinstance(value, list) else value
            command = replace(command, **{group: replace(getattr(command, group), **{flag: given})})
        else:
            text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, allow_nan=False)
            left.append(f"{path.removeprefix('recipe.')}={text}")
    return replace(command, other=Settings(set=tuple(left)))


def _flags(command: Generate | Texture) -> dict[str, tuple[str, str]]:
    """(group, field) of the flags that are a number, by the path of their setting."""
    found = {}
    for name in ("quality", "output"):
        kind = type(getattr(command, name))
        for field in fields(kind):
            if field.type in ("Int", "Float"):
                changed = {path for path, value in kind(**{field.name: 7}).changes().items() if value == 7}
                found |= dict.fromkeys(changed, (name, field.name))
    return found
