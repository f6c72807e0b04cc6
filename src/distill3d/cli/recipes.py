"""The command that shows recipes side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from distill3d.distill.recipes import PRIORS, RECIPES


@dataclass
class Recipes:
    """Show the recipes side by side: the settings in which they differ."""

    all: bool = False
    """Every setting, also those that all recipes share."""


def run_recipes(command: Recipes) -> int:
    columns = {name: {"prior": PRIORS[name]} | settings(recipe) for name, recipe in RECIPES.items()}
    for line in table(columns, command.all):
        print(line)
    return 0


def settings(value: Any, prefix: str = "") -> dict[str, str]:
    """The fields of a dataclass and of those in it, as words, by the names of their flags: {"sdi.scale": "7.5"}."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(value):
        name, item = prefix + field.name.replace("_", "-"), getattr(value, field.name)
        if field.name in ("scene", "background", "shading"):
            found[name] = "none" if item is None else type(item).__name__
        if hasattr(item, "begin_step"):  # a weight by step
            found[name] = _weight(item)
        elif dataclasses.is_dataclass(item):
            found |= settings(item, name + ".")
        elif name not in found:
            found[name] = f"{item:g}" if isinstance(item, float) else str(item)
    return found


def table(columns: dict[str, dict[str, str]], everything: bool) -> list[str]:
    """Lines of a table with a row for each setting; without `everything` only where columns differ.

    A setting that a column does not have is a dash.
    """
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [(name, *(column.get(name, "-") for column in columns.values())) for name in names]
    rows = [row for row in rows if everything or len(set(row[1:])) > 1]
    rows.insert(0, ("", *columns))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _weight(weight: Any) -> str:
    if weight.start == weight.end:
        return f"{weight.start:g}"
    return f"{weight.start:g} to {weight.end:g} (steps {weight.begin_step} to {weight.end_step})"
