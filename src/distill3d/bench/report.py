"""The report: one HTML file with tables, plots, turntables and models that needs no other file and no network.

Its template is page/report.html; see `pages` for what it shares with other pages. Models and their viewer are only
unpacked when a row is opened.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill3d.bench.judging import Scored
from distill3d.bench.pages import base64_text, data_uri, packed, write_page
from distill3d.bench.plots import Curve, interval_plot, line_plot
from distill3d.bench.protocol import Protocol, Task
from distill3d.bench.tables import Table, heading, plain, readable
from distill3d.runs.config import to_plain
from distill3d.runs.folder import RunFolder

CURVES = (("loss", "loss", True), ("opacity", "mean opacity", False))  # of metrics.jsonl: key, title, log axis
History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class _Card:
    """One object on the page; files are text that the page can use, or empty if they are missing."""

    id: int
    variant: str
    seed: int
    diverged: bool
    failure: str
    scores: list[tuple[str, float]]
    still: str  # data URI
    turn: str  # base64
    model: str  # base64 of gzip


@dataclass(frozen=True)
class _Prompt:
    """One row of the page: a prompt, its objects, and plots of their runs."""

    text: str
    cards: list[_Card]
    plots: list[str]


def write_report(
    path: Path, out: Path, protocol: Protocol, table: Table, cells: Sequence[Scored], command: str = ""
) -> None:
    """Writes the page about the cells of the folder `out`; `command` is the command line that made it."""
    histories = {cell.task: RunFolder(out / "cells" / cell.task.folder).history() for cell in cells}
    write_page(
        path,
        "report.html",
        protocol=protocol,
        prior=Path(protocol.prior).name or protocol.prior,
        steps=sorted(variant.recipe.steps for variant in protocol.variants),
        total=len(protocol.tasks()),
        finished=len(cells),
        command=command,
        table=table,
        headings=[heading(metric) for metric in table.columns],
        plain=plain,
        plots=[
            *(line_plot(_means(protocol, cells, histories, key), title, "NFE", log) for key, title, log in CURVES),
            *(interval_plot(table, metric, heading(metric)) for metric in table.columns),
        ],
        prompts=_prompts(out, protocol, table, cells, histories),
        settings=json.dumps({k: v for k, v in to_plain(protocol).items() if k != "prompts"}, indent=1, allow_nan=False),
    )


def _means(protocol: Protocol, cells: Sequence[Scored], histories: Mapping[Task, History], key: str) -> list[Curve]:
    """One curve per variant: the mean over its cells step by step, up to the end of the shortest."""
    curves = []
    for i, name in enumerate(protocol.names):
        own = [histories[c.task] for c in cells if c.task.variant.name == name and not c.outcome.failure]
        steps = list(zip(*own, strict=False))
        x, y = ([statistics.fmean(line[k] for line in step) for step in steps] for k in ("nfe", key))
        curves.append(Curve(i, name, x, y))
    return curves


def _prompts(
    out: Path, protocol: Protocol, table: Table, cells: Sequence[Scored], histories: Mapping[Task, History]
) -> list[_Prompt]:
    prompts = []
    for prompt in protocol.prompts:
        own = [(i, cell) for i, cell in enumerate(cells) if cell.task.prompt == prompt]
        plots = []
        for key, title, log in CURVES:
            curves = []
            for _, cell in own:
                name, steps = cell.task.variant.name, histories[cell.task]
                x, y = ([step[k] for step in steps] for k in ("nfe", key))
                curves.append(Curve(protocol.names.index(name), f"{name}, seed {cell.task.seed}", x, y))
            plots.append(line_plot(curves, title, "NFE", log))
        cards = [_card(i, cell, out / "cells" / cell.task.folder, table) for i, cell in own]
        if cards:
            prompts.append(_Prompt(prompt, cards, plots))
    return prompts


def _card(index: int, cell: Scored, folder: Path, table: Table) -> _Card:
    still, turn, model = (_read(folder / name) for name in ("still.webp", "turn.webp", "mesh.glb"))
    return _Card(
        id=index,
        variant=cell.task.variant.name,
        seed=cell.task.seed,
        diverged=cell.diverged,
        failure=cell.outcome.failure or "nothing to see",
        scores=[(readable(m), cell.scores[m.name]) for m in table.metrics if m.name in cell.scores],
        still=data_uri(still),
        turn=base64_text(turn),
        model=packed(model),
    )


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
