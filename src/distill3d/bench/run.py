"""The loop over all cells, and the files at its end."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from distill3d.bench import check_libraries, tables
from distill3d.bench.cells import OUT_OF_MEMORY, Outcome, make_cell, read_outcome, reopen_cell
from distill3d.bench.judging import Judges, Scored, diversities, score
from distill3d.bench.protocol import Protocol, Task, check_folder, open_folder
from distill3d.bench.report import write_report
from distill3d.distill.loop import Progress
from distill3d.distill.objects import object_run
from distill3d.distill.supervision import prompts_for, run_texts
from distill3d.files import locked, replacing
from distill3d.types import Prior

OnStep = Callable[[Task, Progress], None]
OnCell = Callable[[Task, Outcome, bool], None]


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of a bench and its folder."""

    folder: Path
    table: tables.Table
    cells: tuple[Scored, ...]

    @property
    def report(self) -> Path:
        """The page with everything in it."""
        return self.folder / "report.html"


@dataclasses.dataclass(frozen=True)
class Listeners:
    """Callbacks for progress."""

    on_step: OnStep = lambda task, progress: None
    on_cell: OnCell = lambda task, outcome, made: None  # made: now, not in an earlier call


def run_bench(
    out: Path,
    protocol: Protocol,
    prior: Prior,
    judges: Judges,
    metrics: Sequence[str],
    command: str = "",
    listeners: Listeners = Listeners(),
) -> Findings:
    """Makes the missing cells, judges all, and writes tables and report.

    Cells that ran out of memory, now or in an earlier call, are made once more at the end, from their checkpoints.
    After an interrupt, tables and report are written for the finished cells, and the interrupt is raised again.

    Raises:
        ValueError: for settings that do not fit the prior, before anything is made, and for a folder that holds
            something else.
    """
    check_libraries()
    _check_and_embed(protocol, prior)
    check_folder(out)  # before there is a lock file in it
    with locked(out):
        open_folder(out, protocol)
        (out / "cells").mkdir(exist_ok=True)
        try:
            starved: list[Task] = []
            for task in protocol.tasks():
                outcome = read_outcome(out / "cells" / task.folder)
                made = outcome is None
                if outcome is None:
                    outcome = make_cell(out, protocol, task, prior, lambda p, task=task: listeners.on_step(task, p))
                if outcome.failure == OUT_OF_MEMORY:
                    starved.append(task)
                else:
                    listeners.on_cell(task, outcome, made)
            for task in starved:  # once more: another process may have had the memory
                reopen_cell(out, task)
                outcome = make_cell(out, protocol, task, prior, lambda p, task=task: listeners.on_step(task, p))
                listeners.on_cell(task, outcome, True)
        except KeyboardInterrupt:
            if any((out / "cells").iterdir()):
                conclude(out, protocol, judges, metrics, command)
            raise
        shutil.rmtree(out / "work", ignore_errors=True)
        return conclude(out, protocol, judges, metrics, command)


def conclude(out: Path, protocol: Protocol, judges: Judges, metrics: Sequence[str], command: str = "") -> Findings:
    """Judges the finished cells of a folder and writes tables and report."""
    cells = score(out, protocol, judges, metrics)
    across = diversities(out, protocol, judges, cells) if "diversity" in metrics else {}
    table = tables.make_table(protocol.names, metrics, cells, across)
    texts = {
        "table.md": tables.markdown(table),
        "table.tex": tables.latex(table),
        "table.csv": tables.summary_csv(table),
        "cells.csv": tables.cells_csv(table.metrics, cells),
    }
    for name, text in texts.items():
        with replacing(out / name) as draft:
            draft.write_text(text, encoding="utf-8")
    write_report(out / "report.html", out, protocol, table, cells, command)
    return Findings(out, table, tuple(cells))


def _check_and_embed(protocol: Protocol, prior: Prior) -> None:
    """Raises ValueError for a variant that cannot run, and embeds all texts, before any time is spent on cells."""
    prompts = [protocol.config(task).prompts for task in protocol.tasks()]
    prior.prepare(sorted({text for each in prompts for text in prompts_for(each, prior).texts}))
    for variant in protocol.variants:
        if variant.recipe.supervision.separate_prior:
            raise ValueError(f"{variant.name}: a bench has one prior; leave out supervision.prior and its options")
        try:
            run = object_run(variant.recipe, prompts[0], prior)
        except ValueError as error:
            raise ValueError(f"{variant.name}: {error}") from error
        texts = {text for each in prompts for text in run_texts(variant.recipe, each, prior, run.objective)}
        prior.prepare(sorted(texts))
