"""The command that shows recipes side by side, or writes one as a configuration file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill3d.cli.settings import Tree, to_toml
from distill3d.cli.shared import Flag, OptionalName

WEIGHT = {"start", "end", "begin", "finish"}  # the fields of a `WeightSchedule`
HEADER = """# distill3d {command} --config FILE reads this. Delete what should stay as in the recipe "{name}".
"""


@dataclass(frozen=True)
class Recipes:
    """Show the recipes side by side, or write one as a configuration file.

    Without NAME the settings in which the recipes differ; with it all settings as TOML, for --config:
    distill3d recipes laptop > my.toml.
    """

    name: OptionalName = None
    """laptop, distill, paper or splats; for image a method such as sdi."""
    of: Literal["generate", "texture", "image"] = "generate"
    """The command whose recipes are shown."""
    all: Flag = False
    """In the table also the settings that all recipes share."""

    def run(self) -> int:
        """Prints the table or the file; returns the exit status."""
        files = self._files()
        if self.name is None:
            columns = {name: dict(rows(plain)) for name, plain in files.items()}
            print("\n".join(table(columns, self.all)))
            return 0
        name = self.name.lower()
        if name not in files:
            raise ValueError(f"unknown recipe {self.name!r}; allowed: {', '.join(files)}")
        print(HEADER.format(command=self.of, name=name) + to_toml(files[name]), end="")
        return 0

    def _files(self) -> dict[str, Tree]:
        """The settings of each recipe, as a configuration file has them."""
        from distill3d.distill.image_recipes import IMAGE_METHODS, image_recipe
        from distill3d.distill.recipes import PRIORS, RECIPES, TEXTURE_PRIORS, TEXTURE_RECIPES
        from distill3d.runs.config import RunConfig, to_plain

        if self.of == "image":
            return {name: {"recipe": to_plain(image_recipe(name))} for name in IMAGE_METHODS}
        recipes, priors = (RECIPES, PRIORS) if self.of == "generate" else (TEXTURE_RECIPES, TEXTURE_PRIORS)
        return {
            name: {"base": name, **to_plain(RunConfig(prior=priors[name])), "recipe": to_plain(recipe)}
            for name, recipe in recipes.items()
        }


def rows(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of all settings, for people: a weight that changes over the run is one of them."""
    for name, value in plain.items():
        path = f"{prefix}{name}".removeprefix("recipe.")
        if isinstance(value, Mapping) and set(value) == WEIGHT:
            start, end, begin, finish = (f"{value[name]:g}" for name in ("start", "end", "begin", "finish"))
            yield path, start if start == end else f"{start} to {end} over {begin} to {finish}"
        elif isinstance(value, Mapping) and value:
            yield from rows(value, f"{prefix}{name}.")
        elif name != "base":
            yield path, "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def table(columns: Mapping[str, Mapping[str, str]], everything: bool) -> list[str]:
    """Lines of a table with a row for each setting; without `everything` only those in which the columns differ.

    A setting that a column does not have is a dash.
    """
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    lines = [["", *columns], *(line for line in lines if everything or len(set(line[1:])) > 1)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
