"""The command that compares methods under one protocol: bench."""

from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from distill3d.cli.shared import Device, Dtype, precision
from distill3d.distill.recipes import PRIORS, RECIPES, Recipe
from distill3d.priors.options import PriorOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill3d.bench.run import Listeners


@dataclass
class Bench:
    """Compare methods: the same prompts, seeds, scene, cameras and budget for all.

    Writes a folder for each object, tables (Markdown, CSV, LaTeX) and report.html. It can be stopped at any time; the
    same command goes on where it was. Methods, prompts and seeds may be added later.
    """

    methods: str = "sdi,sds"
    """Objectives with commas between: sdi, sds, sjc, nfsd, csd, hifa, ism, mvdream, sds_bridge, vsd, esd."""
    prompts: str | None = None
    """A text file with one prompt a line; 43 (a draw of DreamFusion's), toybox (24 toys); default: toybox for the
    bundled prior, else 43."""
    seeds: str = "0"
    """Seeds with commas between."""
    views: int = 50
    """Pictures around each object that are judged."""
    budget: str = "steps"
    """What is equal: steps (the recipe's), nfe (network evaluations of the first method), or a number of these."""
    metrics: str | None = None
    """Metrics with commas between, or all that can be measured; default: the most telling of these."""
    prior: str | None = None
    """The frozen 2D model, as for generate; default: the recipe's."""
    device: Device = "cpu"
    """Where to compute."""
    dtype: Dtype = "auto"
    """Precision of the prior's network; auto is bfloat16 where the device computes it in hardware, else float32."""
    out: Path = Path("bench")
    """Folder for everything."""
    negative: str = ""
    """What the objects should not be (the unconditional text)."""
    evaluator: Path | None = None
    """Folder of a CLIP model that judges; default: the toybox's own for the bundled prior, else none."""
    reference: Path | None = None
    """Folder of pictures that sharpness and distances refer to; default: true renders for the bundled prior."""
    picture_side: int | None = None
    """Pixels a side of the pictures that are judged; default: as the prior's, at most 256."""
    force: bool = False
    """Run even if the bundled prior knows nothing named in a prompt."""
    prior_options: Annotated[PriorOptions, tyro.conf.arg(name="")] = field(default_factory=PriorOptions)
    recipe: str = "laptop"
    """Named settings to start from."""
    settings: Annotated[
        tyro.conf.AvoidSubcommands[Recipe], tyro.conf.arg(name="recipe", help="single settings of the recipe")
    ] = field(default_factory=lambda: RECIPES["laptop"])


def run_bench_command(command: Bench) -> int:
    """Runs the comparison, prints the table and says where the files lie."""
    from distill3d.bench.budget import with_budget
    from distill3d.bench.judging import check_names, choose_metrics, find_judges
    from distill3d.bench.prompts import prompt_list
    from distill3d.bench.protocol import Protocol, Variant
    from distill3d.bench.run import run_bench
    from distill3d.bench.tables import markdown
    from distill3d.priors.loading import load_prior
    from distill3d.runs.objects import check_prompt

    name = command.prior or PRIORS[command.recipe]
    variants = tuple(Variant(method, method, command.settings) for method in words(command.methods, "--methods"))
    if command.metrics not in (None, "all"):
        check_names(words(command.metrics, "--metrics"))
    protocol = Protocol(
        variants, prompt_list(command.prompts or ("toybox" if name == "toybox" else "43")),
        numbers(command.seeds), prior=name, negative=command.negative, views=command.views,
        size=command.picture_side or 64, device=command.device, dtype=precision(command.dtype, command.device),
        prior_options=command.prior_options,
    )  # fmt: skip
    for prompt in protocol.prompts:
        check_prompt(prompt, name, command.force)
    prior = load_prior(name, protocol.device, _dtype(protocol.dtype), protocol.prior_options)
    protocol = _replace(
        protocol, variants=with_budget(variants, command.budget, prior),
        size=command.picture_side or min(prior.image_size, 256),
    )  # fmt: skip
    judges = find_judges(protocol, command.evaluator, command.reference)
    chosen = choose_metrics(command.metrics, protocol, judges)
    with told(protocol) as listeners:
        found = run_bench(command.out, protocol, prior, judges, chosen, _typed(), listeners)
    print(markdown(found.table))
    print(f"{found.report}\n{command.out / 'table.md'}, table.tex, table.csv, cells.csv")
    return 0


def words(text: str, flag: str) -> tuple[str, ...]:
    """The words of a list with commas; ValueError for an empty one."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise ValueError(f"{flag} is a list of names with commas between, got {text!r}")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between; ValueError for anything else."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds is a list of whole numbers with commas between, such as 0,1; got {text!r}") from None


@contextmanager
def told(protocol: Any) -> Iterator[Listeners]:
    """Shows how far a bench is on stderr: a line for each finished cell, and a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from distill3d.bench.run import Listeners

    total = len(protocol.tasks())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    objects = bar.add_task("objects", total=total)
    steps = bar.add_task("steps")

    def on_step(task: Any, progress: Any) -> None:
        bar.start()
        bar.update(steps, completed=progress.step + 1, total=task.variant.recipe.steps, description=task.variant.name)

    def on_cell(task: Any, outcome: Any, made: bool) -> None:
        bar.advance(objects)
        if made:
            end = f"no object: {outcome.failure}" if outcome.failure else f"{outcome.seconds:.0f} s"
            bar.console.print(f"{task.prompt} | {task.variant.name} | seed {task.seed} | {end}", markup=False)

    try:
        yield Listeners(on_step, on_cell)
    finally:
        if bar.live.is_started:
            bar.stop()


def _typed() -> str:
    """The command line as it was typed, for the report."""
    return shlex.join(["distill3d", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else ""


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _replace(protocol: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(protocol, **changes)
