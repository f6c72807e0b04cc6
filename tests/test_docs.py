"""The manual stays true: its commands parse, its Python runs, its links lead somewhere, nothing public is left out.

A block after the line `<!-- not run: REASON -->` is compiled only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import distill3d as d3d
from distill3d.cli import main as cli
from distill3d.distill.recipes import DISTILL, LAPTOP_TEXTURE
from distill3d.evaluation.metrics import METRICS
from distill3d.export.options import ExportOptions
from distill3d.runs.config import FORMAT, to_plain

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md")))}
RUN = [*sorted(name for name in PAGES if name.startswith("docs/tutorials/")), "CONTRIBUTING.md"]
GENERATED = DOCS / "reference" / "commands.md"

# What makes the blocks of a page small. Each text on the left must be there.
TINY = dict(steps=2, views=1, frames=2, export=ExportOptions(texture=64, resolution=24, fit=0))
SMALL = dataclasses.replace(
    DISTILL, scene=d3d.VoxelOptions(resolution=12), objective=d3d.SDI(inversion_steps=2), **TINY
)
SMALL_TEXTURE = dataclasses.replace(LAPTOP_TEXTURE, **TINY)
MUSHROOM = ('d3d.generate("a red mushroom")', 'd3d.generate(d3d.Config("a red mushroom", SMALL))')
SMALLER: dict[str, tuple[tuple[str, str], ...]] = {
    "first-object": (MUSHROOM, ('d3d.RECIPES["laptop"], frames=24', "SMALL, frames=1")),
    "reading-a-run": (MUSHROOM,),
    "own-loop": (("steps = 100", "steps = 2"), ("steps=20", "steps=1")),
    "own-objective": (('d3d.RECIPES["distill"]', "SMALL"),),
    "own-lora": (("range(64)", "range(8)"), ("range(150)", "range(2)"), ("steps=20", "steps=1")),
    "comparing-methods": (('d3d.RECIPES["distill"]', "SMALL"), ("views=24", "views=2")),
    "paint-a-mesh": (('TEXTURE_RECIPES["laptop"]', "SMALL_TEXTURE"),),
}


class Block(NamedTuple):
    """A fenced or indented block of code."""

    language: str
    code: str
    run: bool = True


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page."""
    fence = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for skip, language, code in fence.findall(text):
        yield Block(language, code, not skip)
    for code in re.findall(r"(?:^    [^\n]+\n)+", fence.sub("", text), re.MULTILINE):
        yield Block("", inspect.cleandoc(code))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `distill3d ...` in blocks and between backquotes, without what the shell does around it."""
    for block in blocks(text):
        if block.language not in ("", "sh", "bash"):
            continue
        code = block.code.replace("\\\n", " ")
        for name, first in re.findall(r"for (\w+) in (\S+).*?; do", code):
            code = code.replace(f"${name}", first)
        for line in code.splitlines():
            if found := re.search(r"(?:^|\s)distill3d\s.*", line.partition(" # ")[0]):
                yield _words(found[0])
    for line in re.findall(r"`(distill3d [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        if len(words := _words(line.replace("\n", " "))) > 1:
            yield words


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list(lexer)[1:]
    end = next((i for i, word in enumerate(words) if set(word) <= set(";&|>")), len(words))
    return words[:end]


def check(words: list[str]) -> None:
    """Parses a command line as far as it goes without running it: flags, settings, names of recipes and methods."""
    if words[0].startswith("--") or (words[0].isupper() and words[1:] == ["--help"]):
        return  # --version, the completion of a shell, COMMAND --help
    try:
        command = cli.parse(words)
    except SystemExit as stop:
        assert stop.code == 0, words
        return
    for name in ("config", "protocol"):
        if callable(build := getattr(command, name, None)):
            build()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with the configuration files that pages name."""
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.run(["recipes", "laptop"]) == 0
    (tmp_path / "my.toml").write_text(printed.getvalue())
    (tmp_path / "RUN").mkdir()
    plain = {"format": FORMAT, "kind": "object", **to_plain(d3d.Config("a red mushroom"))}
    (tmp_path / "RUN" / "config.json").write_text(json.dumps(plain))
    (tmp_path / "RUN" / "mesh.glb").touch()  # to refine


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, workplace):
    for words in commands(PAGES[page]):
        check(words)


def test_a_wrong_command_is_seen(workplace):
    text = '```\nfor p in sd15 sd21; do\n  distill3d generate "a hat" --prior $p \\\n    --stepps 3 > log; done\n```\n'
    (words,) = commands(text)
    assert words == ["generate", "a hat", "--prior", "sd15", "--stepps", "3"]
    with pytest.raises(AssertionError), contextlib.redirect_stderr(io.StringIO()):
        check(words)
    with pytest.raises(ValueError, match="no_such"):
        check(["generate", "a hat", "--set", "scene.no_such=1"])
    assert sum(1 for text in PAGES.values() for _ in commands(text)) > 100


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page):
    for block in blocks(PAGES[page]):
        if block.language == "python":
            compile(block.code, page, "exec", dont_inherit=True)


@pytest.mark.parametrize("page", RUN)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block.code for block in blocks(PAGES[page]) if block.language == "python" and block.run)
    for old, new in SMALLER.get(Path(page).stem, ()):
        assert old in code, f"{page} has no {old}"
        code = code.replace(old, new)
    with contextlib.redirect_stdout(io.StringIO()):
        names = {"SMALL": SMALL, "SMALL_TEXTURE": SMALL_TEXTURE, "__name__": "__main__"}
        exec(compile(code, page, "exec", dont_inherit=True), names)


def slug(heading: str) -> str:
    """The anchor of a heading, as the site and code forges make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Where a link into a page can lead: its headings, and what its API reference lists."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {*map(slug, headings), *re.findall(r"^::: (\S+)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        if path.resolve() == GENERATED.resolve():
            continue
        assert path.exists(), f"{page} links to {target}"
        inside = DOCS in path.resolve().parents or DOCS not in (ROOT / page).parents
        assert inside, f"{page} links to {target}, which is not on the site"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}: there is no such heading"


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"([\w/-]+\.md)$", menu, re.MULTILINE)
    there = {p.relative_to(DOCS).as_posix() for p in (*DOCS.rglob("*.md"), GENERATED)}
    assert len(listed) == len(set(listed))
    assert set(listed) == there, f"give these a place in the nav of mkdocs.yml: {sorted(set(listed) ^ there)}"


def test_the_reference_lists_every_public_name():
    listed: list[object] = []
    for page in (DOCS / "reference").glob("*.md"):
        for path in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            try:
                listed += vars(importlib.import_module(path)).values()
            except ModuleNotFoundError:
                module, _, name = path.rpartition(".")
                listed.append(getattr(importlib.import_module(module), name))
    names = set(d3d.__all__) - {"__version__"}
    assert not [name for name in names if not any(getattr(d3d, name) is value for value in listed)]


def test_the_front_page_counts_right():
    assert (
        f"{len(d3d.METHODS)} methods" in PAGES["docs/index.md"] and f"{len(METRICS)} metrics" in PAGES["docs/index.md"]
    )
