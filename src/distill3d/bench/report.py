"""The report: one HTML file with tables, plots, turntables and models, that needs nothing but itself.

The page's own parts lie in `page/`. Pictures and models are inside the file as text; models and the program that shows
them (model-viewer, Apache-2.0) are unpacked only when a row is opened. A policy in the page forbids it the network.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

import distill3d
from distill3d.bench.judging import Scored
from distill3d.bench.plots import Line, interval_plot, line_plot
from distill3d.bench.protocol import Protocol, Task
from distill3d.bench.tables import Estimate, Table, clear, heading, plain
from distill3d.evaluation.metrics import Quantity
from distill3d.files import replacing
from distill3d.runs.folder import RunFolder

PAGE = Path(str(resources.files("distill3d"))) / "bench" / "page"
History = Mapping[Task, Sequence[Mapping[str, float]]]


def write_report(
    path: Path, out: Path, protocol: Protocol, table: Table, cells: Sequence[Scored], command: str = ""
) -> None:
    """Writes the page about the cells of the folder `out`; `command` is what made it."""
    histories = {cell.task: RunFolder(out / "cells" / cell.task.folder).history() for cell in cells}
    body = "\n".join([
        _header(protocol, cells, command),
        _means(table),
        _differences(table),
        _glance(protocol, table, cells, histories),
        _objects(out, protocol, table, cells, histories),
        _footer(protocol),
    ])  # fmt: skip
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    viewer = (PAGE / "model-viewer.min.js").read_text(encoding="utf-8").split("//# sourceMappingURL")[0]
    fill = {
        "title": f"distill3d bench: {', '.join(protocol.names)}",
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "js": (PAGE / "page.js").read_text(encoding="utf-8"),
        "body": body,
        "viewer": _packed(viewer.encode()),
    }
    # Split at the places to fill, so that nothing inside a part is taken for one.
    pieces = page.split("%%")
    with replacing(path) as draft:
        draft.write_text("".join(fill[p] if i % 2 else p for i, p in enumerate(pieces)), encoding="utf-8")


def _header(protocol: Protocol, cells: Sequence[Scored], command: str) -> str:
    total = len(protocol.tasks())
    missing = f" So far {len(cells)} of {total} objects are finished." if len(cells) < total else ""
    steps = sorted({variant.recipe.steps for variant in protocol.variants})
    length = f"{steps[0]:,} steps each" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps"
    told = (
        f"{_count(len(protocol.names), 'method')} on {_count(len(protocol.prompts), 'prompt')}, "
        f"{_count(len(protocol.seeds), 'seed')} each: {total:,} objects, {length}, on the prior "
        f"{Path(protocol.prior).name or protocol.prior}. All share one protocol; every object is judged by "
        f"{protocol.views} views, {protocol.size} pixels a side, {protocol.elevation:g}° above the horizon.{missing}"
    )
    line = f"<pre>{escape(command)}</pre>" if command else ""
    return f'<header><h1>distill3d bench</h1><p class="lede">{escape(told)}</p>{line}</header>'


def _means(table: Table) -> str:
    rows = []
    for i, variant in enumerate(table.variants):
        numbers = [_cell(table.values.get((variant, m.name)), table.best(m) == variant) for m in table.columns]
        diverged, n = table.counts[variant]
        numbers.append(f'<td data-value="{diverged / max(n, 1):.6g}">{diverged} of {n}</td>')
        rows.append(f'<tr><th scope="row">{_name(i, variant)}</th>{"".join(numbers)}</tr>')
    note = (
        "Mean and half the length of its 95 % interval (Student's t over prompts, or seeds where there is one prompt; "
        "seeds of a prompt are averaged first, as they are not independent), over all objects that left pictures. The "
        "best mean of a column is bold. ↑ more is better, ↓ less is, → 1 the nearer to 1. Click a heading to sort."
    )
    return _table_section("Means", "means", ["method", *map(heading, table.columns), "diverged ↓"], rows, note)


def _differences(table: Table) -> str:
    if len(table.variants) < 2 or not table.differences:
        return ""
    rows = []
    for i, variant in enumerate(table.variants[1:], 1):
        found = [table.differences.get((variant, m.name)) for m in table.columns]
        numbers = [_cell(one, bool(one and clear(one)), signed=True) for one in found]
        rows.append(f'<tr><th scope="row">{_name(i, variant)}</th>{"".join(numbers)}</tr>')
    first = table.variants[0]
    note = (
        f"Each method minus {first} on the same prompt. How hard a prompt is drops out, so compare by these "
        "intervals. Bold: the interval leaves out zero."
    )
    return _table_section(
        f"Differences to {first}", "differences", ["method", *map(heading, table.columns)], rows, note
    )


def _table_section(title: str, key: str, heads: Sequence[str], rows: Sequence[str], note: str) -> str:
    head = "".join(f'<th scope="col"><button type="button">{_heading(text)}</button></th>' for text in heads)
    return (
        f'<section><h2>{escape(title)}</h2><div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">'
        f'<table class="sortable" id="{key}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">{escape(note)}</p></section>'
    )


def _glance(protocol: Protocol, table: Table, cells: Sequence[Scored], histories: History) -> str:
    plots = [_courses(protocol, cells, histories, key, title, log) for key, title, log in COURSES]
    plots += [interval_plot(table, metric, heading(metric)) for metric in table.columns]
    return (
        f'<section><h2>At a glance</h2>{_legend(table)}<div class="plots">{"".join(plots)}</div><p class="note">'
        "Curves are means over all prompts and seeds. Dots are means, bars their 95 % intervals.</p></section>"
    )


COURSES = (("loss", "loss", True), ("opacity", "mean opacity", False))


def _courses(protocol: Protocol, cells: Sequence[Scored], histories: History, key: str, title: str, log: bool) -> str:
    """One curve a variant: the mean of its cells step by step, as far as all of them go."""
    lines = []
    for i, name in enumerate(protocol.names):
        rows = [histories[c.task] for c in cells if c.task.variant.name == name and not c.outcome.failure]
        if rows:
            together = list(zip(*rows, strict=False))
            x = [_mean([one["nfe"] for one in step]) for step in together]
            lines.append(Line(i, name, x, [_mean([one[key] for one in step]) for step in together]))
    return line_plot(lines, title, "network evaluations", log)


def _objects(out: Path, protocol: Protocol, table: Table, cells: Sequence[Scored], histories: History) -> str:
    rows, data, n = [], [], 0
    for prompt in protocol.prompts:
        own = [cell for cell in cells if cell.task.prompt == prompt]
        if not own:
            continue
        cards = []
        for cell in own:
            folder = out / "cells" / cell.task.folder
            turn, mesh = folder / "turn.webp", folder / "mesh.glb"
            if turn.is_file():
                data.append(f'<script type="text/plain" id="turn-{n}">{_base64(turn.read_bytes())}</script>')
            if mesh.is_file():
                data.append(f'<script type="text/plain" id="mesh-{n}">{_packed(mesh.read_bytes())}</script>')
            cards.append(_card(n, cell, table, folder / "still.webp", mesh.is_file()))
            n += 1
        stills = "".join(_still(out, cell) for cell in own if cell.task.seed == own[0].task.seed)
        rows.append(
            f'<details class="prompt"><summary><span class="words">{escape(prompt)}</span>'
            f'<span class="stills">{stills}</span></summary><div class="cards">{"".join(cards)}</div>'
            f'<div class="plots">{_prompt_plots(protocol, own, histories)}</div></details>'
        )
    search = '<label class="search">Find <input type="search" id="find" placeholder="words of a prompt"></label>'
    return f'<section><h2>Objects</h2>{search}<div id="objects">{"".join(rows)}</div></section>{"".join(data)}'


def _prompt_plots(protocol: Protocol, own: Sequence[Scored], histories: History) -> str:
    plots = []
    for key, title, log in COURSES:
        lines = []
        for cell in own:
            steps, name = histories[cell.task], cell.task.variant.name
            index = protocol.names.index(name)
            x, y = [s["nfe"] for s in steps], [s[key] for s in steps]
            lines.append(Line(index, f"{name}, seed {cell.task.seed}", x, y))
        plots.append(line_plot(lines, title, "network evaluations", log))
    return "".join(plots)


def _card(n: int, cell: Scored, table: Table, still: Path, solid: bool) -> str:
    """One object: its turntable, a button for the model, and its numbers."""
    variant = cell.task.variant.name
    told = f"seed {cell.task.seed}{', diverged' if cell.diverged else ''}"
    title = f"{_name(table.variants.index(variant), variant)} <small>{told}</small>"
    if still.is_file():
        words = f"{cell.task.prompt}, by {variant}, seed {cell.task.seed}"
        picture = f'<img src="{_image(still)}" alt="{escape(words)}" data-turn="{n}" width="128" height="128">'
    else:
        picture = f'<p class="none">no object: {escape(cell.outcome.failure or "nothing to see")}</p>'
    button = f'<button type="button" class="turn" data-mesh="{n}">turn it yourself</button>' if solid else ""
    named = [(m, cell.scores.get(m.name)) for m in table.metrics]
    numbers = "".join(f"<dt>{escape(_plain_name(m))}</dt><dd>{v:.4g}</dd>" for m, v in named if v is not None)
    return (
        f'<article class="card"><h3>{title}</h3><div class="stage">{picture}</div>{button}<dl>{numbers}</dl></article>'
    )


def _still(out: Path, cell: Scored) -> str:
    path = out / "cells" / cell.task.folder / "still.webp"
    name = escape(cell.task.variant.name)
    picture = f'<img src="{_image(path)}" alt="" width="56" height="56">' if path.is_file() else '<i class="none">-</i>'
    return f"<span>{picture}<small>{name}</small></span>"


def _legend(table: Table) -> str:
    names = "".join(f"<li>{_name(i, variant)}</li>" for i, variant in enumerate(table.variants))
    return f'<ul class="legend">{names}</ul>'


def _footer(protocol: Protocol) -> str:
    told = {name: value for name, value in dataclasses.asdict(protocol).items() if name != "prompts"}
    settings = json.dumps(told, indent=1)
    return (
        f"<footer><details><summary>All settings</summary><pre>{escape(settings)}</pre></details>"
        f"<p>Made by distill3d {distill3d.__version__}. Models are shown by model-viewer (Apache-2.0), which is inside "
        "this file; the page asks no network for anything.</p></footer>"
    )


def _cell(estimate: Estimate | None, bold: bool, signed: bool = False) -> str:
    if estimate is None:
        return '<td class="none">&ndash;</td>'
    text = escape(plain(estimate, " ± ", signed)).replace(" ± ", ' <span class="half">± ', 1)
    text += "</span>" if "half" in text else ""
    return f'<td data-value="{estimate.mean:.9g}">{f"<b>{text}</b>" if bold else text}</td>'


def _name(index: int, variant: str) -> str:
    return f'<span class="key k{index % 8}"></span>{escape(variant)}'


def _heading(text: str) -> str:
    """Its arrow does not stand alone on a line."""
    return "&nbsp;".join(escape(text).rsplit(" ", 1)) if text[-1] in "↑↓1" else escape(text)


def _plain_name(metric: Quantity) -> str:
    return metric.name.replace("_", " ") + (f" ({metric.unit})" if metric.unit else "")


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _image(path: Path) -> str:
    return f"data:image/webp;base64,{_base64(path.read_bytes())}"


def _packed(content: bytes) -> str:
    return _base64(gzip.compress(content, 9, mtime=0))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
