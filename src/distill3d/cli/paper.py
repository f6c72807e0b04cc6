"""The command that repeats the paper's experiments: paper, with a sub-command for each."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg, subcommand

from distill3d.cli.bench import Judging, bench_bars, status_of
from distill3d.cli.machines import CellMachines
from distill3d.cli.objects import base_recipe
from distill3d.cli.paper_images import Inversion, TwoD
from distill3d.cli.paper_parts import chosen_prompts, conclude, load_checked, note_evaluator, prior_config
from distill3d.cli.shared import (
    Flag,
    Int,
    Listed,
    Model,
    Name,
    PlaceOrNone,
    command_line,
    integers,
    split,
)

if TYPE_CHECKING:
    from distill3d.bench.paper.experiments import Setting
    from distill3d.bench.protocol import Protocol, Variant


@dataclass(frozen=True, kw_only=True)
class Scope:
    """On how much."""

    full: Flag = False
    """The paper's size: its recipe on Stable Diffusion 2.1, 43 prompts, 50 views; for a GPU, days."""
    prompts: Annotated[Listed, arg(metavar="PROMPTS")] = ()
    """Prompts, as for bench; default: a few toys, or some of the 43."""
    seeds: Annotated[Listed, arg(metavar="SEEDS")] = ()
    """Seeds, separated by commas or spaces; default: the experiment's."""
    steps: Int = None
    """Steps of each object; default: the recipe's."""
    budget: Annotated[str, arg(metavar="BUDGET")] = "steps"
    """What is equal for all variants, as for bench: steps, nfe, or a number of network evaluations."""
    recipe: Name = None
    """Settings that all variants share; default: distill, with --full paper."""
    force: Flag = False
    """Run even if the bundled prior does not know what a prompt names."""


@dataclass(frozen=True)
class Experiment:
    """What the experiments on objects have in common."""

    scope: Scope = field(default_factory=Scope)
    judging: Judging = field(default_factory=Judging)
    model: Model = field(default_factory=Model)
    machines: CellMachines = field(default_factory=CellMachines)
    out: PlaceOrNone = None
    """Folder for everything, or an address (s3://bucket/folder); default: paper-NAME. The same command continues."""

    @property
    def name(self) -> str:
        """The name of the sub-command."""
        return type(self).__name__.lower()

    @property
    def recipe(self) -> str:
        """The name of the recipe; ValueError for an unknown one."""
        from distill3d.distill.recipes import RECIPES

        return base_recipe(self.scope.recipe, {}, RECIPES, "paper" if self.scope.full else "distill")

    def variants(self, setting: Setting, image_size: int) -> tuple[Variant, ...]:
        """What is compared, for a prior of this image size; ValueError for what cannot be."""
        from distill3d.bench.paper.experiments import EXPERIMENTS

        return EXPERIMENTS[self.name].make(setting, image_size)

    def protocol(self) -> tuple[Protocol, Setting]:
        """What is compared, for a prior of 64 pixels, and the recipe behind it.

        Raises:
            ValueError: for anything wrong with it.
        """
        from distill3d.bench.judging import check_names
        from distill3d.bench.paper.experiments import EXPERIMENTS, FULL_VIEWS, VIEWS, Setting
        from distill3d.bench.protocol import Protocol
        from distill3d.distill.recipes import PRIORS

        experiment, scope, judging = EXPERIMENTS[self.name], self.scope, self.judging
        steps = scope.steps if scope.steps is not None else experiment.full_steps if scope.full else None
        setting = Setting(self.recipe, steps)
        place = prior_config(self.model, PRIORS[self.recipe])
        if judging.names not in (None, "all"):
            check_names(judging.names.split(","))
        protocol = Protocol(
            self.variants(setting, 64),
            chosen_prompts(scope.prompts, place.prior, scope.full, experiment.prompts),
            integers(scope.seeds, "--seeds") if scope.seeds else tuple(range(experiment.seeds)),
            views=judging.views if judging.views is not None else FULL_VIEWS if scope.full else VIEWS,
            size=judging.size(64),
            **vars(place),
        )
        return protocol, setting

    def run(self) -> int:
        """Makes what is missing, prints the table and where the files are; returns the exit status."""
        from distill3d.bench import check_libraries
        from distill3d.bench.budget import with_budget
        from distill3d.bench.judging import choose_metrics, find_judges
        from distill3d.bench.paper.experiments import EXPERIMENTS, caption, minutes
        from distill3d.bench.paper.figures import draw_experiment
        from distill3d.bench.run import run_bench

        check_libraries()
        experiment, (protocol, setting) = EXPERIMENTS[self.name], self.protocol()
        executor = self.machines.executor(protocol.device)
        device = self.machines.device_here(protocol.device)
        prior = load_checked(replace(protocol, device=device), protocol.prompts, self.scope.force)
        variants = with_budget(self.variants(setting, prior.image_size), self.scope.budget, prior)
        protocol = replace(protocol, variants=variants, size=self.judging.size(prior.image_size))
        judges = find_judges(protocol, self.judging.evaluator, self.judging.reference)
        note_evaluator(judges.evaluator)
        metrics = choose_metrics(self.judging.names, protocol, judges)
        if protocol.prior == "toybox":
            time = f"about {minutes(protocol, prior):.0f} minutes on one laptop core"
            print(f"{len(protocol.tasks())} objects, {time}", file=sys.stderr)
        out, typed = self.out or Path(f"paper-{self.name}"), command_line(["distill3d", "paper", self.name], self)
        with bench_bars(protocol) as listeners:
            found = run_bench(out, protocol, prior, judges, metrics, typed, listeners, executor)
        text, figure = caption(experiment, protocol, setting.name, typed), found.folder / f"{self.name}.png"
        draw_experiment(figure, found.folder, experiment, protocol, found.table, text)
        conclude(out, found.folder, self.name, found.table, text)
        print(f"{figure}\n{found.folder / f'{self.name}.md'}, table.tex, table.csv, cells.csv\n{found.report}")
        return status_of(found)


@dataclass(frozen=True)
class Table1(Experiment):
    """The main table: SDS, SJC, VSD, ESD, HiFA and SDI under one protocol. About 35 minutes on a laptop.

    5 toys, one seed, 200 steps. All methods share the recipe (scene, cameras, regularizers, steps); each keeps its own
    guidance scale, SJC and HiFA that of SDS. VSD and ESD need peft. Tables, a report and table1.png.
    """

    methods: Annotated[tuple[str, ...], arg(metavar="NAMES")] = ("sds", "sjc", "vsd", "esd", "hifa", "sdi")
    """Rows of the table, separated by commas or spaces; the others are compared with the first."""

    def variants(self, setting: Setting, image_size: int) -> tuple[Variant, ...]:
        """See `Experiment`."""
        from distill3d.bench.paper.experiments import methods_of

        return methods_of(split(self.methods, "--methods"), setting)


@dataclass(frozen=True)
class Ism(Experiment):
    """SDI against interval score matching at equal steps. About 25 minutes on a laptop.

    12 toys, one seed, 200 steps; with --full 5000 steps, as in the paper's appendix. Tables, a report and ism.png.
    """


@dataclass(frozen=True)
class Ablation(Experiment):
    """From SDS to SDI, one change after the other. About 30 minutes on a laptop.

    SDS rendered at 64 pixels and enlarged (half of the image size of a small prior: 32 for the bundled one); at the
    prior's own image size; with t annealed; with SDI's guidance scale and weight; with DDIM inversion, which is SDI.
    The paper makes the last two changes at once. 6 toys, one seed, 200 steps. Tables, a report and ablation.png.
    """


@dataclass(frozen=True)
class Noise(Experiment):
    """SDI on objects with each way to find the noise: random, solvers of equation 8, inversion. About 30 minutes.

    3 toys, one seed, 200 steps. The solvers run at the prediction's scale, at the time of the step before, from a noise
    that stays. `paper inversion` measures the residual of equation 8 of each. Tables, a report and
    noise.png.
    """


@dataclass(frozen=True)
class Surface(Experiment):
    """Noise that stays on the object in 3D, or per view or camera, random and inverted noise. About 30 minutes.

    3 toys, one seed, 200 steps. All have the scale and the times of SDI; random noise also has the guidance that SDI
    amounts to, and inversion the guidance that its scale says. The last row samples a set of views with the object in
    the loop. Tables, a report and surface.png.
    """


@dataclass(frozen=True)
class Cfg(Experiment):
    """SDS and SDI at guidance scales from 1 to 100. About 30 minutes on a laptop.

    4 toys, one seed, 200 steps, 4 scales. The inversion follows the scale if the recipe inverts at minus SDI's scale
    (paper), otherwise it stays (laptop: 1). Tables, a report and cfg.png.
    """

    scales: tuple[float, ...] = (1.0, 7.5, 30.0, 100.0)
    """Guidance scales."""

    def variants(self, setting: Setting, image_size: int) -> tuple[Variant, ...]:
        """See `Experiment`."""
        from distill3d.bench.paper.experiments import guidance_scales

        return guidance_scales(setting, self.scales)


@dataclass(frozen=True)
class Diversity(Experiment):
    """How much objects of one prompt differ from seed to seed, for SDS and SDI. About 25 minutes on a laptop.

    3 toys, 4 seeds, 200 steps. Tables, a report and diversity.png.
    """


@dataclass(frozen=True)
class Paper:
    """Repeat an experiment of the paper (Lukoianov et al. 2024) on a prior of your choice.

    Each takes less than 40 minutes on the bundled prior, on two cores; --full is the paper's own size. Type the same
    command again to continue after an interruption.
    """

    experiment: Annotated[
        Annotated[Table1, subcommand("table1")]
        | Annotated[Ism, subcommand("ism")]
        | Annotated[Ablation, subcommand("ablation")]
        | Annotated[Inversion, subcommand("inversion")]
        | Annotated[Noise, subcommand("noise")]
        | Annotated[Surface, subcommand("surface")]
        | Annotated[Cfg, subcommand("cfg")]
        | Annotated[Diversity, subcommand("diversity")]
        | Annotated[TwoD, subcommand("2d")],
        arg(name=""),
    ]

    def run(self) -> int:
        """Runs the experiment, draws it and says where the files are; returns the exit status."""
        return self.experiment.run()
