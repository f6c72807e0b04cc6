"""The command line: `distill3d generate "a red mushroom"` and its companions.

Exit status: 0 done, 2 a mistake of the user's (one clear line), 1 a mistake of ours, 130 after Ctrl-C (the state is
saved and the artifacts of what is there are written).
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import tyro

from distill3d.cli.bench import Bench, run_bench_command
from distill3d.cli.doctor import Doctor, run_doctor
from distill3d.cli.images import Compare, Image, run_compare, run_image
from distill3d.cli.meshes import Refine, Texture, run_refine, run_texture
from distill3d.cli.mistakes import one_line
from distill3d.cli.objects import (
    Export,
    Generate,
    Render,
    Resume,
    run_export,
    run_generate,
    run_render,
    run_resume,
)
from distill3d.cli.paper import Paper, run_paper
from distill3d.cli.recipes import Recipes, run_recipes
from distill3d.distill.mesh_recipes import TEXTURE_RECIPES
from distill3d.distill.recipes import METHODS, RECIPES

Command = Generate | Texture | Refine | Resume | Export | Render | Image | Compare | Bench | Paper | Recipes | Doctor
HANDLERS: dict[type, Callable[[Any], int]] = {
    Generate: run_generate,
    Texture: run_texture,
    Refine: run_refine,
    Resume: run_resume,
    Export: run_export,
    Render: run_render,
    Image: run_image,
    Compare: run_compare,
    Bench: run_bench_command,
    Paper: run_paper,
    Recipes: run_recipes,
    Doctor: run_doctor,
}
COMMANDS: dict[str, type] = {kind.__name__.lower(): kind for kind in HANDLERS}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `distill3d`; ends the process with its exit status."""
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: list[str]) -> int:
    """Runs a command line and returns its exit status."""
    try:
        command = parse(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    # Warnings of other libraries are about their own upkeep; ours are meant for the user.
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", module=r"distill3d\.")
    try:
        return HANDLERS[type(command)](command)
    except (ValueError, ImportError) as error:
        print(f"distill3d: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from distill3d.priors.components.folder import MEMORY_ADVICE, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"distill3d: out of memory: {MEMORY_ADVICE}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill3d: interrupted", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> Command:
    """The command that a command line means.

    Raises:
        SystemExit: with status 0 after --help, with 2 and one line on stderr for anything wrong.
    """
    recipe = _value_of(argv, "--recipe", "laptop")
    if recipe not in RECIPES:
        _fail(f"unknown recipe {recipe!r}; allowed: {', '.join(RECIPES)}")
    default = Generate(prompt=tyro.MISSING, settings=RECIPES[recipe], recipe=recipe)
    painted = TEXTURE_RECIPES.get(recipe, TEXTURE_RECIPES["laptop"])
    texture = Texture(mesh=tyro.MISSING, prompt=tyro.MISSING, settings=painted, recipe=recipe)
    bench = Bench(settings=RECIPES[recipe], recipe=recipe)
    defaults: dict[type, Any] = {Generate: default, Texture: texture, Bench: bench}
    commands = {
        name: tyro.conf.subcommand(name, default=defaults[kind]) if kind in defaults else tyro.conf.subcommand(name)
        for name, kind in COMMANDS.items()
    }
    union: Any = None
    for name, kind in COMMANDS.items():
        annotated = Annotated[kind, commands[name]]
        union = annotated if union is None else union | annotated
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            command = tyro.cli(union, args=argv, prog="distill3d", description=__doc__)
    except SystemExit as stop:
        if stop.code:
            _fail(one_line(errors.getvalue(), argv[0] if argv and argv[0] in COMMANDS else ""))
        raise
    except ValueError as error:  # a value of the right type that a recipe refuses
        _fail(str(error))
    if isinstance(command, Texture) and recipe not in TEXTURE_RECIPES:
        _fail(f"no mesh is painted by the recipe {recipe!r}; allowed: {', '.join(TEXTURE_RECIPES)}")
    if isinstance(command, Generate | Texture) and command.method not in METHODS:
        _fail(f"unknown method {command.method!r}; allowed: {', '.join(METHODS)}")
    return command


def _value_of(argv: list[str], flag: str, default: str) -> str:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return default


def _fail(message: str) -> NoReturn:
    print(f"distill3d: {message}", file=sys.stderr)
    raise SystemExit(2)
