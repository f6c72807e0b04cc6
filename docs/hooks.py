"""What mkdocs does besides Markdown: equations as MathML, and the reference of the command line from its parser."""

from __future__ import annotations

import contextlib
import io
import os
import re
from html import unescape

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from distill3d.cli import main as cli

EQUATION = re.compile(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    """Browsers draw MathML themselves: no script, no fonts to load."""

    def mathml(found: re.Match[str]) -> str:
        return convert(unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")

    return EQUATION.sub(mathml, html)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of the command line."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def commands_page() -> str:
    """The help of every command, as the command line prints it, without its frames."""
    parts = ["# Command line\n\nThis is what `distill3d COMMAND --help` prints."]
    for command in cli.COMMANDS:
        text = plain_help(command)
        parts.append(f"## distill3d {command}\n\n```text\n{text}\n```")
        for name in re.findall(r"^ +• (\w+)", text, re.MULTILINE):  # sub-commands
            parts.append(f"### distill3d {command} {name}\n\n```text\n{plain_help(command, name)}\n```")
    return "\n\n".join(parts)


def plain_help(*command: str) -> str:
    """The help of one command, without the rules between its parts."""
    os.environ["COLUMNS"] = "92"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.run([*command, "--help"]) == 0
    lines = (line.rstrip() for line in printed.getvalue().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if set(line) != {" ", "-"})).strip()
