"""What mkdocs does besides Markdown: equations as MathML, and the reference of the command line from its parser."""

from __future__ import annotations

import contextlib
import io
import os
import re
from html import unescape

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from distill3d.cli import main as cli

EQUATION = re.compile(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
PRIME = re.compile(r"<msup>(<mi>[^<]+</mi>)<m[io]>&#x02032;</m[io]></msup>")  # the sign itself is raised already
# A letter, maybe with a bar or hat, an underscore, and an index: x_t, x̂_0, ε_s, t⁺ below x.
INDEX = re.compile(r"(?<![\w/])([A-Za-z\u03b1-\u03c9][\u0304\u0302]?)_\{?([0-9a-z+τ]+⁺?(?:,[a-z])?\u2032?)\}?")
UNTOUCHED = re.compile(r"(<(pre|code|math|svg|a)\b.*?</\2>|<[^>]*>)", re.DOTALL)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Equations become MathML, which browsers draw without scripts and fonts; indices go below the line."""

    def mathml(found: re.Match[str]) -> str:
        drawn = convert(unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")
        return PRIME.sub(r"<mrow>\1<mo>&#x02032;</mo></mrow>", drawn)

    html = EQUATION.sub(mathml, html)
    if page.file.src_uri.startswith("reference/"):
        return html
    parts = UNTOUCHED.split(html)  # text, markup, its tag, text, ...
    for i in range(0, len(parts), 3):
        parts[i] = INDEX.sub(r"\1<sub>\2</sub>", parts[i])
    return "".join(part for i, part in enumerate(parts) if i % 3 != 2)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """A page that loads anything from elsewhere is an error."""
    if foreign := re.search(
        r"""<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)=["']?https?:[^>]*>""", output
    ):
        raise PluginError(f"{page.file.src_uri} loads {foreign[0]}: keep a copy in docs/")
    return output


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
    os.environ["COLUMNS"] = "80"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.run([*command, "--help"]) == 0
    lines = (line.rstrip() for line in printed.getvalue().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if set(line) != {" ", "-"})).strip()
