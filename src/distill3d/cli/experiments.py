"""The paper's experiments on objects and pictures as commands: table1, ism, ablation, noise, cfg, diversity, 2d."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from distill3d.cli.bench import numbers, told, words
from distill3d.cli.shared import Device, Dtype, precision
from distill3d.distill.recipes import PRIORS, RECIPES, Recipe
from distill3d.priors.options import PriorOptions

if TYPE_CHECKING:
    from distill3d.bench.paper.experiments import Experiment
    from distill3d.bench.protocol import Protocol, Variant


@dataclass
class Objects:
    """What the experiments on objects have in common."""

    full: bool = False
    """The paper's size: its recipe on Stable Diffusion 2.1, 43 prompts, 50 views; for a GPU, days."""
    prompts: str | None = None
    """A text file with one prompt a line; 43 or toybox, as for bench; default: a few toys, or some of the 43."""
    seeds: str | None = None
    """Seeds with commas between; default: the experiment's."""
    steps: int | None = None
    """Steps of each object; default: the recipe's."""
    views: int | None = None
    """Pictures around each object that are judged; default: 24, in full 50."""
    metrics: str | None = None
    """Metrics with commas between, or all that can be measured; default: the most telling of these."""
    recipe: str | None = None
    """Named settings; default: laptop, in full paper."""
    prior: str | None = None
    """The frozen 2D model, as for generate; default: the recipe's."""
    device: Device = "cpu"
    """Where to compute."""
    dtype: Dtype = "auto"
    """Precision of the prior's network; auto is bfloat16 where the device computes it in hardware, else float32."""
    out: Path | None = None
    """Folder for everything; default: paper-NAME. The same command in the same folder goes on where it was."""
    evaluator: Path | None = None
    """Folder of a CLIP model that judges; default: the toybox's own for the bundled prior, else none."""
    reference: Path | None = None
    """Folder of pictures that sharpness refers to; default: true renders for the bundled prior."""
    picture_side: int | None = None
    """Pixels a side of the pictures that are judged; default: as the prior's, at most 256."""
    force: bool = False
    """Run even if the bundled prior knows nothing named in a prompt."""
    prior_options: Annotated[PriorOptions, tyro.conf.arg(name="")] = field(default_factory=PriorOptions)

    @property
    def name(self) -> str:
        """The experiment's."""
        return type(self).__name__.lower()

    def chosen(self, experiment: Experiment, recipe: Recipe, size: int) -> tuple[Variant, ...]:
        """What is compared, for a prior that sees `size` pixels; ValueError for what cannot be."""
        return experiment.make(recipe, size)


@dataclass
class Table1(Objects):
    """The main table: SDS, SJC, VSD, ESD, HiFA and SDI under one protocol. About 35 minutes on a laptop.

    5 toys, one seed, 200 steps. All methods share the recipe (scene, cameras, regularizers, steps); each keeps its own
    guidance, SJC and HiFA that of SDS. VSD and ESD need peft. Tables, a report and table1.png.
    """

    methods: str = "sds,sjc,vsd,esd,hifa,sdi"
    """Rows of the table, with commas between; the first is the one that others are compared with."""
    budget: str = "steps"
    """What is equal, as for bench: steps, nfe, or a number of these."""

    def chosen(self, experiment: Experiment, recipe: Recipe, size: int) -> tuple[Variant, ...]:
        """The methods that were named."""
        from distill3d.bench.paper.experiments import methods_of

        return methods_of(words(self.methods, "--methods"), recipe)


@dataclass
class Ism(Objects):
    """SDI against interval score matching at equal steps. About 25 minutes on a laptop.

    12 toys, one seed, 200 steps; in full 5000 steps, as in the paper's appendix. Tables, a report and ism.png.
    """


@dataclass
class Ablation(Objects):
    """From SDS to SDI, one change after the other. About 30 minutes on a laptop.

    SDS rendered at 64 pixels and enlarged (half of what a small prior sees: 32 for the bundled one); at the prior's own
    resolution; with t annealed; with SDI's guidance scale and weight; with DDIM inversion, which is SDI. The paper has
    the last two as one. 6 toys, one seed, 200 steps. Tables, a report and ablation.png.
    """


@dataclass
class Noise(Objects):
    """SDI on objects with each way of finding the noise: random, fixed point, descent, inversion. About 20 minutes.

    3 toys, one seed, 200 steps. What each leaves of equation 8 is measured by `inversion`. Tables, a report and
    noise.png.
    """


@dataclass
class Cfg(Objects):
    """SDS and SDI at guidance scales from 1 to 100. About 30 minutes on a laptop.

    4 toys, one seed, 200 steps, 4 scales. The inversion follows the scale where the recipe inverts at minus SDI's scale
    (paper), else it stays (laptop: 1). Tables, a report and cfg.png.
    """

    scales: tuple[float, ...] = (1.0, 7.5, 30.0, 100.0)
    """Guidance scales."""

    def chosen(self, experiment: Experiment, recipe: Recipe, size: int) -> tuple[Variant, ...]:
        """Both methods at the scales that were given."""
        from distill3d.bench.paper.experiments import guidance_scales

        return guidance_scales(recipe, self.scales)


@dataclass
class Diversity(Objects):
    """How different objects of one prompt are from seed to seed, for SDS and SDI. About 25 minutes on a laptop.

    3 toys, 4 seeds, 200 steps. Tables, a report and diversity.png.
    """


@dataclass
class TwoD:
    """2D: SDI with cached noise, SDI with inversion and SDS against DDIM from the same noise. About 20 minutes.

    16 toys, one seed. With the noise of the step before SDI is DDIM; the row of another seed tells how far two samples
    of DDIM are apart. Tables and 2d.png.
    """

    full: bool = False
    """The paper's size: Stable Diffusion 2.1, 43 prompts, guidance scale 7.5."""
    prompts: str | None = None
    """A text file with one prompt a line; 43 or toybox, as for bench; default: 16 toys, or 16 of the 43."""
    seed: int = 0
    """Seed of all pictures; references take others."""
    scale: float | None = None
    """Guidance of DDIM and SDI, and of the first SDS; default: 5, in full 7.5. SDI inverts at minus that."""
    steps: int = 50
    """Steps of DDIM; the other methods' numbers of steps are scaled along (SDI 40, SDS 400 at 50)."""
    prior: str | None = None
    """The frozen 2D model, as for generate; default: toybox, in full sd21."""
    device: Device = "cpu"
    """Where to compute."""
    dtype: Dtype = "auto"
    """Precision of the prior's network; auto is bfloat16 where the device computes it in hardware, else float32."""
    out: Path | None = None
    """Folder for everything; default: paper-2d. The same command in the same folder goes on where it was."""
    evaluator: Path | None = None
    """Folder of a CLIP model that judges; default: the toybox's own for the bundled prior, else none."""
    force: bool = False
    """Run even if the bundled prior knows nothing named in a prompt."""
    prior_options: Annotated[PriorOptions, tyro.conf.arg(name="")] = field(default_factory=PriorOptions)


FLAT_PROMPTS = 16


def run_objects(command: Objects) -> int:
    """Makes what is missing of an experiment, prints its table and says where the files lie."""
    from distill3d.bench.budget import with_budget
    from distill3d.bench.judging import choose_metrics, find_judges
    from distill3d.bench.paper.experiments import EXPERIMENTS, caption, minutes
    from distill3d.bench.paper.figures import draw_experiment
    from distill3d.bench.paper.inversion import figure_class
    from distill3d.bench.run import run_bench

    figure_class()
    experiment = EXPERIMENTS[command.name]
    protocol, recipe, named = protocol_for(command)
    prior = _loaded(protocol, protocol.prompts, command.force)
    variants = command.chosen(experiment, recipe, prior.image_size)
    if isinstance(command, Table1):
        variants = with_budget(variants, command.budget, prior)
    size = command.picture_side or min(prior.image_size, 256)
    protocol = dataclasses.replace(protocol, variants=variants, size=size)
    judges = find_judges(protocol, command.evaluator, command.reference)
    _told_judge(judges.evaluator)
    chosen = choose_metrics(command.metrics, protocol, judges)
    if protocol.prior == "toybox":
        _say(f"{len(protocol.tasks())} objects, about {minutes(protocol, prior):.0f} minutes on one core of a laptop")
    out, typed = command.out or Path(f"paper-{command.name}"), command_line(command.name, command)
    with told(protocol) as listeners:
        found = run_bench(out, protocol, prior, judges, chosen, typed, listeners)
    text = caption(experiment, protocol, named, typed)
    figure = out / f"{command.name}.png"
    draw_experiment(figure, out, experiment, protocol, found.table, text)
    _conclude(out, command.name, found.table, text)
    print(f"{figure}\n{out / f'{command.name}.md'}, table.tex, table.csv, cells.csv\n{found.report}")
    return 0


def protocol_for(command: Objects) -> tuple[Protocol, Recipe, str]:
    """What a command asks for before its prior is known (for one of 64 pixels): protocol, recipe, the recipe's name.

    Raises:
        ValueError: for anything wrong with it.
    """
    from distill3d.bench.budget import with_steps
    from distill3d.bench.judging import check_names
    from distill3d.bench.paper.experiments import EXPERIMENTS, FULL_VIEWS, VIEWS
    from distill3d.bench.protocol import Protocol

    experiment = EXPERIMENTS[command.name]
    named = command.recipe or ("paper" if command.full else "laptop")
    name, recipe = command.prior or PRIORS[named], RECIPES[named]
    steps = command.steps if command.steps is not None else experiment.full_steps if command.full else None
    recipe = recipe if steps is None else with_steps(recipe, steps)
    if command.metrics not in (None, "all"):
        check_names(words(command.metrics, "--metrics"))
    seeds = tuple(range(experiment.seeds)) if command.seeds is None else numbers(command.seeds)
    views = command.views if command.views is not None else FULL_VIEWS if command.full else VIEWS
    protocol = Protocol(
        command.chosen(experiment, recipe, 64), _prompts(command, name, experiment.prompts), seeds, prior=name,
        views=views, size=command.picture_side or 64, device=command.device,
        dtype=precision(command.dtype, command.device), prior_options=command.prior_options,
    )  # fmt: skip
    return protocol, recipe, named


def run_flat(command: TwoD) -> int:
    """Makes what is missing of the 2D comparison, prints its table and says where the files lie."""
    from rich.console import Console
    from rich.progress import Progress

    from distill3d.bench.judging import find_evaluator
    from distill3d.bench.paper.experiments import told_prompts
    from distill3d.bench.paper.figures import draw_pictures
    from distill3d.bench.paper.images import PANELS, Study, caption, run_study
    from distill3d.bench.paper.inversion import figure_class
    from distill3d.distill.image_recipes import DEFAULT_SCALE

    figure_class()
    name = command.prior or ("sd21" if command.full else "toybox")
    scale = command.scale if command.scale is not None else 7.5 if command.full else DEFAULT_SCALE
    study = Study(
        _prompts(command, name, FLAT_PROMPTS), scale, command.steps, command.seed, name, command.device,
        precision(command.dtype, command.device), command.prior_options,
    )  # fmt: skip
    prior = _loaded(study, study.prompts, command.force)
    judge = find_evaluator(command.evaluator, name)
    _told_judge(judge)
    out, typed = command.out or Path("paper-2d"), command_line("2d", command)
    total = len(study.prompts) * len((*study.rows, *study.references))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("pictures", total=total)
        found = run_study(out, study, prior, judge, lambda row, prompt, made: bar.advance(task))
    text, figure = caption(study, told_prompts(study.prompts), typed), out / "2d.png"
    pictures = {row: [picture.image for picture in made] for row, made in found.made.items()}
    draw_pictures(figure, pictures, study.prompts, found.table, PANELS, text)
    _conclude(out, "2d", found.table, text)
    print(f"{figure}\n{out / '2d.md'}, table.tex, table.csv, pictures.csv")
    return 0


def command_line(name: str, settings: Any) -> str:
    """What to type for the same: the values that are not the default, the folder left out."""
    return shlex.join(["distill3d", "paper", name, *_flags(settings)])


def _flags(settings: Any) -> list[str]:
    found: list[str] = []
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if one.name == "out" or value == default:
            continue
        flag = one.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += _flags(value)
        elif isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def _prompts(command: Objects | TwoD, prior: str, count: int) -> tuple[str, ...]:
    """The prompts that were asked for, else `count` of the list for this prior, in full all of it."""
    from distill3d.bench.paper.experiments import spread
    from distill3d.bench.prompts import prompt_list

    listed = prompt_list(command.prompts or ("toybox" if prior == "toybox" else "43"))
    return listed if command.prompts or command.full else spread(listed, count)


def _loaded(told_by: Any, prompts: tuple[str, ...], force: bool) -> Any:
    """The prior of a protocol or a study, after its prompts were found to be ones that it can know."""
    import torch

    from distill3d.priors.loading import load_prior
    from distill3d.runs.objects import check_prompt

    for prompt in prompts:
        check_prompt(prompt, told_by.prior, force)
    return load_prior(told_by.prior, told_by.device, getattr(torch, told_by.dtype), told_by.prior_options)


def _told_judge(evaluator: Any) -> None:
    if evaluator is None:
        _say("no evaluator: scores that need one are left out; give a CLIP model's folder with --evaluator")


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, highlight=False)


def _conclude(out: Path, name: str, table: Any, text: str) -> None:
    """Prints the table and writes it with figure and caption as one Markdown page."""
    from distill3d.bench.tables import markdown
    from distill3d.files import replacing

    written = markdown(table)
    with replacing(out / f"{name}.md") as draft:
        draft.write_text(f"![{name}]({name}.png)\n\n{text}\n\n{written}", encoding="utf-8")
    print(written)
