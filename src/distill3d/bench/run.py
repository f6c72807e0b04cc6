"""The loop over all cells, and the files at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distill3d.bench import check_libraries, tables
from distill3d.bench.cells import OUT_OF_MEMORY, Outcome
from distill3d.bench.judging import Judges, Scored, diversities, score
from distill3d.bench.protocol import Protocol, Task
from distill3d.bench.report import write_report
from distill3d.bench.sweep import Sweep, opened
from distill3d.distill.loop import Progress
from distill3d.distill.objects import object_run
from distill3d.distill.supervision import prompts_for, run_texts
from distill3d.files import replacing
from distill3d.types import Prior
from distill3d.workers.executor import HERE, Executor, GivenUp
from distill3d.workers.store import Place

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
    out: Place,
    protocol: Protocol,
    prior: Prior,
    judges: Judges,
    metrics: Sequence[str],
    command: str = "",
    listeners: Listeners = Listeners(),
    executor: Executor = HERE,
) -> Findings:
    """Makes the missing cells, judges all, and writes tables and report.

    `out` is a folder, or an address such as s3://bucket/folder: the result then has the folder of this machine that
    holds a copy. With another executor than `Here` workers make the cells and load the prior by its name; this process
    needs `prior` to check the settings only.

    Cells that ran out of memory, now or in an earlier call, are made once more at the end, from their checkpoints.
    After an interrupt, tables and report are written for the finished cells, and the interrupt is raised again.

    Raises:
        ValueError: for settings that do not fit the prior, before anything is made, and for a folder that holds
            something else.
        GivenUp: for cells whose workers failed again and again; tables and report are written for the others.
    """
    check_libraries()
    _check_and_embed(protocol, prior)
    with opened(out, protocol) as sweep:
        folder = sweep.folder
        try:
            missing: list[Task] = []
            starved: list[Task] = []
            for task in protocol.tasks():
                outcome = sweep.read(task)
                if outcome is None:
                    missing.append(task)
                elif outcome.failure == OUT_OF_MEMORY:
                    starved.append(task)
                else:
                    listeners.on_cell(task, outcome, False)
            for task, outcome in _made(sweep, missing, prior, executor, listeners):
                if outcome.failure == OUT_OF_MEMORY:
                    starved.append(task)
                else:
                    listeners.on_cell(task, outcome, True)
            for task in starved:  # once more: another process may have had the memory
                sweep.reopen(task)
            for task, outcome in _made(sweep, starved, prior, executor, listeners):
                listeners.on_cell(task, outcome, True)
        except (KeyboardInterrupt, GivenUp):
            if any((folder / "cells").iterdir()):
                conclude(folder, protocol, judges, metrics, command)
                sweep.upload()
            raise
        sweep.clean()
        found = conclude(folder, protocol, judges, metrics, command)
        sweep.upload()
        return found


def _made(
    sweep: Sweep, tasks: Sequence[Task], prior: Prior, executor: Executor, listeners: Listeners
) -> Iterator[tuple[Task, Outcome]]:
    """Makes cells on the workers of an executor."""

    def on_progress(index: int, progress: Progress) -> None:
        listeners.on_step(tasks[index], progress)

    return sweep.make(tasks, prior, executor, on_progress)


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
