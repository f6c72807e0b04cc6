"""From flags to a configuration: recipe, then --config, then flags, then --set; each has priority over those before.

All of them are changes of plain values: `to_plain` of a configuration is a tree of tables, and a setting is named by
its path in it, "recipe.penalties.opaque.end". `from_plain` checks the result. TOML has no null: the word "none" stands
for None there and in --set.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill3d.untrusted import read_text

Tree = dict[str, Any]  # plain values: tables, lists, strings, numbers and None

OPEN = ("views",)  # tables whose keys are not fixed
SHORT = ("recipe", "recipes", "objectives")  # tables whose name may be left out of a path
NOT_SETTINGS = ("format", "kind", "versions", "prompt")  # what config.json of a run holds besides


def layered(plain: Tree, *layers: Mapping[str, Any], assignments: Sequence[str] = ()) -> Tree:
    """A configuration's plain values with changes: tables, then "path=value" texts.

    Raises:
        ValueError: for a setting that does not exist, with the ones that are spelled alike.
    """
    for layer in layers:
        for name, value in layer.items():
            plain = _merged(plain, nested({name if name in plain else _full(name, plain): value}), plain)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not path.strip() or not equals:
            raise ValueError(f"--set needs PATH=VALUE, such as steps=100, got {assignment!r}")
        plain = _merged(plain, nested({_full(path.strip(), plain): _value(text.strip())}), plain)
    return plain


def nested(changes: Mapping[str, object]) -> Tree:
    """{"recipe.steps": 9, "seed": None} as {"recipe": {"steps": 9}}: tables instead of paths, without the Nones."""
    tables: Tree = {}
    for path, value in changes.items():
        *parents, name = path.split(".")
        table = tables
        if value is not None:
            for parent in parents:
                table = table.setdefault(parent, {})
            table[name] = value
    return tables


def read_file(path: Path | None) -> Tree:
    """The settings in a TOML file or in the config.json of a run; none without a file.

    Raises:
        ValueError: where the file cannot be read.
    """
    if path is None:
        return {}
    try:
        text = read_text(path)
        if path.suffix != ".json":
            return tomllib.loads(text)
        return {name: value for name, value in json.loads(text).items() if name not in NOT_SETTINGS}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the configuration file {path} cannot be read: {reason}") from error


def to_toml(plain: Mapping[str, Any]) -> str:
    """Plain values as TOML that `read_file` and `layered` read."""
    import tomli_w

    text = tomli_w.dumps(_without_none(plain))
    return re.sub(r"\[\n[^][]*\n *\]", lambda found: _in_one_line(found[0]), text)


def paths(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings of a tree as (path, value)."""
    for name, value in plain.items():
        if isinstance(value, Mapping) and value:
            yield from paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _in_one_line(array: str) -> str:
    return f"[{', '.join(line.strip(' ,') for line in array.splitlines()[1:-1])}]"


def _full(path: str, plain: Mapping[str, Any]) -> str:
    """A path from the root of the tree; the name of the recipe's table may be left out."""
    path = path.replace("-", "_")
    first = path.split(".")[0]
    for table in SHORT:
        if first in plain.get(table, {}):
            return f"{table}.{path}"
    return path


def _value(text: str) -> Any:
    """A value as TOML writes it; anything else is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merged(old: Any, new: Any, root: Mapping[str, Any], path: tuple[str, ...] = ()) -> Any:
    """`old` with the values of `new` in place of its own, table by table. Another class starts from its defaults."""
    from distill3d.runs.config import KINDS, to_plain

    table = dict(old) if isinstance(old, Mapping) else {}
    of_class = table.get("kind") in KINDS  # "kind" may also be an ordinary setting
    if of_class and isinstance(new, str) and new in KINDS:
        new = {"kind": new}
    if not isinstance(new, Mapping):
        return None if isinstance(new, str) and new.lower() == "none" else new
    if of_class and new.get("kind", table["kind"]) != table["kind"]:
        kind = new["kind"]
        if kind not in KINDS:
            return new  # `from_plain` says what is allowed
        table = {"kind": kind, **to_plain(KINDS[kind]())}
    known = set(table)
    for name, value in new.items():
        if known and name not in known and path != OPEN:
            rest = next(paths({name: value}))[0]
            raise ValueError(_unknown(".".join([*path, rest]), root))
        table[name] = _merged(table.get(name), value, root, (*path, name))
    return table


def _short(path: str) -> str:
    """A path without the name of the recipe's table."""
    table, _, rest = path.partition(".")
    return rest if table in SHORT and rest else path


def _unknown(path: str, root: Mapping[str, Any]) -> str:
    *names, path = (_short(name) for name in [*(name for name, _ in paths(root)), path])
    close = difflib.get_close_matches(path, names, n=3, cutoff=0.5)
    same = [name for name in names if name.rpartition(".")[2] == path.rpartition(".")[2]]
    found = list(dict.fromkeys([*close, *same]))[:3]
    advice = f"did you mean {' or '.join(found)}?" if found else "distill3d recipes NAME lists the settings"
    return f"unknown setting {path!r}; {advice}"


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return "none" if value is None else value
