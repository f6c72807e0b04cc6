"""The command that compares methods under one protocol: bench."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from distill3d.cli.machines import CellMachines
from distill3d.cli.objects import base_recipe, plain_method
from distill3d.cli.settings import layered, nested, read_file
from distill3d.cli.shared import (
    Flag,
    Folder,
    Int,
    Listed,
    Model,
    Name,
    Place,
    Settings,
    Text,
    command_line,
    duration,
    integers,
    method_key,
    on_terminal,
    split,
)

if TYPE_CHECKING:
    from distill3d.bench.cells import Outcome
    from distill3d.bench.protocol import Protocol, Task
    from distill3d.bench.run import Findings, Listeners
    from distill3d.distill.loop import Progress


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What is compared."""

    methods: Annotated[tuple[str, ...], arg(metavar="NAMES")] = ("sdi", "sds")
    """Methods, separated by commas or spaces, as for generate."""
    prompts: Annotated[Listed, arg(metavar="PROMPTS")] = ()
    """Prompts in quotes, a text file with one per line, or a list: toybox (24 toys) or 43 (some of DreamFusion's)."""
    seeds: Annotated[tuple[str, ...], arg(metavar="SEEDS")] = ("0",)
    """Seeds, separated by commas or spaces."""
    negative: Text = None
    """What the objects should not be (the negative prompt)."""
    force: Flag = False
    """Run even if the bundled prior does not know what a prompt names."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How well, and how long."""

    recipe: Name = None
    """Settings that all methods share: distill (default), laptop, paper or splats; see distill3d recipes."""
    steps: Int = None
    """Optimization steps; default: the recipe's."""
    budget: Annotated[str, arg(metavar="BUDGET")] = "steps"
    """What is equal: steps, nfe (network evaluations, as many as the first method takes), or a number of these."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How the objects are judged."""

    views: Int = None
    """Rendered views of each object; default: 50 (paper without --full: 24)."""
    view_size: Int = None
    """Pixels per side of these views; default: the prior's image size, at most 256."""
    metrics: Annotated[Listed, arg(metavar="NAMES")] = ()
    """Metrics separated by commas or spaces, or all that can be measured; default: the most important ones."""
    evaluator: Name = None
    """Folder of a CLIP model; default: the bundled evaluator for the bundled prior, else none."""
    reference: Folder = None
    """Folder of reference images for sharpness and distances; default: true renders for the bundled prior."""

    def size(self, image_size: int) -> int:
        """Pixels per side of the views, for a prior of this image size."""
        return min(image_size, 256) if self.view_size is None else self.view_size

    @property
    def names(self) -> str | None:
        """The metrics separated by commas; None if none are given."""
        return ",".join(split(self.metrics, "--metrics")) if self.metrics else None


@dataclass(frozen=True)
class Bench:
    """Compare methods on objects: the same prompts, seeds, scene, cameras and budget for all.

    Writes a folder for each object, tables (Markdown, CSV, LaTeX) and report.html. It can be stopped at any time; the
    same command continues. Methods, prompts and seeds can be added later.
    """

    compared: Annotated[Compared, arg(name="comparison")] = field(default_factory=Compared)
    quality: Budget = field(default_factory=Budget)
    judging: Judging = field(default_factory=Judging)
    model: Model = field(default_factory=Model)
    machines: CellMachines = field(default_factory=CellMachines)
    out: Place = Path("bench")
    """Folder for everything, or an address that all machines share, such as s3://bucket/folder."""
    other: Settings = field(default_factory=Settings)

    def protocol(self) -> Protocol:
        """What is compared, for a prior of 64 pixels. --set sdi.scale=5 changes a setting of one method.

        Raises:
            ValueError: for anything wrong with it.
        """
        from distill3d.bench.protocol import Protocol, Variant
        from distill3d.distill.recipes import PRIORS, RECIPES
        from distill3d.runs.config import PriorConfig, from_plain, to_plain
        from distill3d.runs.objects import Config

        file = read_file(self.other.config)
        base = base_recipe(self.quality.recipe, file, RECIPES, "distill")
        plain = layered(to_plain(Config("", recipe=RECIPES[base], prior=PRIORS[base])), file)
        own = plain["recipe"].pop("objective")
        names = [method_key(name) for name in split(self.compared.methods, "--methods")]
        methods = [(name, plain_method(name, base)) for name in names]
        plain["objectives"] = {name: own if own["kind"] == m["kind"] else m for name, m in methods}
        flags = {"negative": self.compared.negative, "recipe.steps": self.quality.steps, **self.model.changes()}
        plain = layered(plain, nested(flags), assignments=self.other.set)
        objectives, recipe = plain.pop("objectives"), plain.pop("recipe")
        configs = {
            name: from_plain(Config, {**plain, "recipe": {**recipe, "objective": objective}})
            for name, objective in objectives.items()
        }
        shared = next(iter(configs.values()))
        return Protocol(
            tuple(Variant(name, configs[name].recipe) for name in names),
            prompts_from(self.compared.prompts, shared.prior),
            integers(self.compared.seeds, "--seeds"),
            views=50 if self.judging.views is None else self.judging.views,
            size=self.judging.size(64),
            **{name: getattr(shared, name) for name in PriorConfig.__dataclass_fields__},
        )

    def run(self) -> int:
        """Makes what is missing, prints the table and where the files are; returns the exit status."""
        from distill3d.bench.budget import with_budget
        from distill3d.bench.judging import check_names, choose_metrics, find_judges
        from distill3d.bench.run import run_bench
        from distill3d.bench.tables import markdown
        from distill3d.priors.loading import load_prior
        from distill3d.runs.objects import check_prompt

        judging, protocol = self.judging, self.protocol()
        if judging.names not in (None, "all"):
            check_names(judging.names.split(","))
        for prompt in protocol.prompts:
            check_prompt(prompt, protocol.prior, self.compared.force)
        executor = self.machines.executor(protocol.device)
        device = self.machines.device_here(protocol.device)
        prior = load_prior(protocol.prior, device, protocol.dtype, protocol.prior_options)
        variants = with_budget(protocol.variants, self.quality.budget, prior)
        protocol = replace(protocol, variants=variants, size=judging.size(prior.image_size))
        judges = find_judges(protocol, judging.evaluator, judging.reference)
        chosen, typed = choose_metrics(judging.names, protocol, judges), command_line(["distill3d", "bench"], self)
        with bench_bars(protocol) as listeners:
            found = run_bench(self.out, protocol, prior, judges, chosen, typed, listeners, executor)
        print(markdown(found.table, transposed=on_terminal()))
        print(f"{found.report}\n{found.folder / 'table.md'}, table.tex, table.csv, cells.csv")
        if found.folder != self.out:
            print(f"all of it: {self.out}")
        return status_of(found)


def status_of(found: Findings) -> int:
    """The exit status of a bench: 4, with a line on stderr, where no cell has an object."""
    if not all(cell.diverged for cell in found.cells):
        return 0
    print(f"distill3d: no object was made: {found.folder / 'cells.csv'} says why", file=sys.stderr)
    return 4


def prompts_from(words: Sequence[str], prior: str) -> tuple[str, ...]:
    """The prompts of --prompts: names of lists, files, and prompts as they are; each once, in order.

    Without words the list for this prior. Raises ValueError for a file that is missing or holds no prompt.
    """
    from distill3d.bench.prompts import LISTS, prompt_list
    from distill3d.priors.components.hub import BUNDLED

    prompts: list[str] = []
    for word in words or ("toybox" if prior in BUNDLED else "43",):
        name = word.removeprefix("@")
        listed = word in LISTS or name != word or Path(word).suffix == ".txt" or Path(word).is_file()
        prompts += prompt_list(name) if listed else [word]
    return tuple(dict.fromkeys(prompts))


@contextmanager
def bench_bars(protocol: Protocol) -> Iterator[Listeners]:
    """Shows the progress of a bench on stderr: a line for each finished object, and two bars."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from distill3d.bench.run import Listeners

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    objects = bar.add_task("objects", total=len(protocol.tasks()))
    steps = bar.add_task("steps")

    at_work: dict[str, tuple[int, Task]] = {}  # by folder: finished steps

    def on_step(task: Task, progress: Progress) -> None:
        bar.start()
        at_work[task.folder] = (progress.step + 1, task)
        name = task.variant.name if len(at_work) == 1 else f"{len(at_work)} at work"
        total = sum(task.variant.recipe.steps for _, task in at_work.values())
        bar.update(steps, completed=sum(step for step, _ in at_work.values()), total=total, description=name)

    def on_cell(task: Task, outcome: Outcome, made: bool) -> None:
        bar.advance(objects)
        at_work.pop(task.folder, None)
        if made:
            end = f"no object: {outcome.failure}" if outcome.failure else duration(outcome.seconds)
            bar.console.print(f"{task.prompt} | {task.variant.name} | seed {task.seed} | {end}", markup=False)

    try:
        yield Listeners(on_step, on_cell)
    finally:
        if bar.live.is_started:
            bar.stop()
