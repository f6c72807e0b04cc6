"""The command that repeats the paper's experiments: paper, with a sub-command for each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import arg, subcommand

from distill3d.cli.bench import Judging, bench_bars, prompts_from, status_of
from distill3d.cli.objects import base_recipe
from distill3d.cli.settings import nested
from distill3d.cli.shared import Flag, Float, Folder, Int, Listed, Model, Name, command_line, counter, integers, split

if TYPE_CHECKING:
    from distill3d.bench.paper.experiments import Setting
    from distill3d.bench.protocol import Protocol, Variant
    from distill3d.bench.tables import Table
    from distill3d.evaluation.evaluator import Evaluator
    from distill3d.runs.config import PriorConfig
    from distill3d.types import Prior


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
    out: Folder = None
    """Folder for everything; default: paper-NAME. The same command in the same folder continues."""

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
        prior = load_checked(protocol, protocol.prompts, self.scope.force)
        variants = with_budget(self.variants(setting, prior.image_size), self.scope.budget, prior)
        protocol = replace(protocol, variants=variants, size=self.judging.size(prior.image_size))
        judges = find_judges(protocol, self.judging.evaluator, self.judging.reference)
        _note_evaluator(judges.evaluator)
        metrics = choose_metrics(self.judging.names, protocol, judges)
        if protocol.prior == "toybox":
            time = f"about {minutes(protocol, prior):.0f} minutes on one laptop core"
            print(f"{len(protocol.tasks())} objects, {time}", file=sys.stderr)
        out, typed = self.out or Path(f"paper-{self.name}"), command_line(["distill3d", "paper", self.name], self)
        with bench_bars(protocol) as listeners:
            found = run_bench(out, protocol, prior, judges, metrics, typed, listeners)
        text, figure = caption(experiment, protocol, setting.name, typed), out / f"{self.name}.png"
        draw_experiment(figure, out, experiment, protocol, found.table, text)
        _conclude(out, self.name, found.table, text)
        print(f"{figure}\n{out / f'{self.name}.md'}, table.tex, table.csv, cells.csv\n{found.report}")
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
class TwoD:
    """2D: constant, cached and inverted noise, and SDS, against DDIM from the same noise. About 20 minutes.

    16 toys, one seed. With constant noise, and with that of the previous step, the image is DDIM's; the row of another
    seed shows how far apart two samples of DDIM are. Tables and 2d.png.
    """

    PROMPTS: ClassVar[int] = 16
    full: Flag = False
    """The paper's size: Stable Diffusion 2.1, 43 prompts, guidance scale 7.5."""
    prompts: Annotated[Listed, arg(metavar="PROMPTS")] = ()
    """Prompts, as for bench; default: 16 toys, or 16 of the 43."""
    seed: int = 0
    """Seed of all images; references use others."""
    scale: Float = None
    """Guidance scale of DDIM and SDI, and of the first SDS; default: 5, with --full 7.5. SDI as in the paper inverts at
    minus that, and amounts to more guidance; the row of nominal guidance does not."""
    steps: int = 50
    """Steps of DDIM; those of the other methods are in proportion (SDI 40, SDS 400 at 50)."""
    evaluator: Name = None
    """Folder of a CLIP model; default: the bundled evaluator for the bundled prior, else none."""
    force: Flag = False
    """Run even if the bundled prior does not know what a prompt names."""
    out: Path = Path("paper-2d")
    """Folder for everything. The same command in the same folder continues."""
    model: Model = field(default_factory=Model)

    def run(self) -> int:
        """Makes what is missing, prints the table and where the files are; returns the exit status."""
        from distill3d.bench import check_libraries
        from distill3d.bench.judging import find_evaluator
        from distill3d.bench.paper.experiments import list_prompts
        from distill3d.bench.paper.figures import draw_images
        from distill3d.bench.paper.images import PANELS, Study, caption, run_study
        from distill3d.distill.image_recipes import DEFAULT_SCALE

        check_libraries()
        place = prior_config(self.model, "sd21" if self.full else "toybox")
        scale = self.scale if self.scale is not None else 7.5 if self.full else DEFAULT_SCALE
        prompts = chosen_prompts(self.prompts, place.prior, self.full, self.PROMPTS)
        study = Study(prompts, scale, self.steps, seed=self.seed, **vars(place))
        prior, evaluator = load_checked(study, prompts, self.force), find_evaluator(self.evaluator, study.prior)
        _note_evaluator(evaluator)
        typed, total = command_line(["distill3d", "paper", "2d"], self), len(study.rows) + len(study.references)
        with counter("images", len(prompts) * total) as advance:
            found = run_study(self.out, study, prior, evaluator, lambda row, prompt, made: advance())
        text, figure = caption(study, list_prompts(prompts), typed), self.out / "2d.png"
        images = {row: [one.image for one in made] for row, made in found.made.items()}
        draw_images(figure, images, prompts, found.table, PANELS, text)
        _conclude(self.out, "2d", found.table, text)
        print(f"{figure}\n{self.out / '2d.md'}, table.tex, table.csv, images.csv")
        return 0


@dataclass(frozen=True)
class Inversion:
    """Ways to find the noise: the residual of equation 8 over t for each, with the NFE that it needs.

    Writes inversion.png and inversion.csv. About 5 minutes on a laptop.
    """

    prompts: Annotated[tuple[str, ...], arg(metavar="PROMPTS")] = (
        "a red mushroom",
        "a blue car",
        "a yellow duck",
        "a green house",
    )
    """Prompts to average over."""
    seeds: int = 2
    """Samples of each prompt."""
    scales: tuple[float, ...] = (1.0, 5.0)
    """Guidance scales of equation 8, one panel each."""
    steps: int = 50
    """Steps of the DDIM sampler whose trajectory is the ground truth."""
    times: int = 9
    """Points on the trajectory that are measured."""
    force: Flag = False
    """Run even if the bundled prior does not know what a prompt names."""
    out: Path = Path("figures")
    """Folder for the files."""
    model: Model = field(default_factory=Model)

    def run(self) -> int:
        """Measures, draws and says where the files are; returns the exit status."""
        from distill3d.bench import check_libraries
        from distill3d.bench.paper import inversion
        from distill3d.bench.paper.figures import draw_residuals

        settings = inversion.InversionSettings(self.prompts, self.seeds, self.scales, self.steps, self.times)
        check_libraries()
        place = prior_config(self.model, "toybox", dtype="float32")
        prior = load_checked(place, self.prompts, self.force, self.out)
        with counter("measuring", len(settings.scales) * settings.times * len(inversion.STRATEGIES)) as advance:
            result = inversion.measure_residuals(prior, settings, on_residual=advance)
        table, figure = self.out / "inversion.csv", self.out / "inversion.png"
        inversion.write_residuals(table, result.residuals)
        draw_residuals(figure, result, self._caption(place.prior))
        print(f"{figure}\n{table}")
        return 0

    def _caption(self, prior: str) -> str:
        seeds = "seed 0" if self.seeds == 1 else f"{self.seeds} samples of each from seed 0"
        return (
            "Residual of equation 8 of Lukoianov et al. 2024, mean of |eps(x0 + sigma/alpha kappa, t, y) - kappa|^2 "
            f"over pixels and samples, on the trajectory x0(t) of a {self.steps}-step DDIM sampler, against the "
            f"network evaluations (NFE) per sample. Prior: {prior}. Prompts: {'; '.join(self.prompts)} ({seeds}). "
            "Images: the first sample denoised in one step through each kappa at the middle time; DDIM's own kappa "
            f"gives x0(t) itself. Made by: {command_line(['distill3d', 'paper', 'inversion'], self)}"
        )


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


def prior_config(model: Model, prior: str, dtype: str = "auto") -> PriorConfig:
    """Which prior, and where it runs; `prior` and `dtype` where the flags do not say it."""
    from distill3d.runs.config import PriorConfig, from_plain

    return from_plain(PriorConfig, {"prior": prior, "dtype": dtype, **nested(model.changes())})


def chosen_prompts(words: Sequence[str], prior: str, full: bool, count: int) -> tuple[str, ...]:
    """The prompts of --prompts, else `count` of the list for this prior, with --full all of it."""
    from distill3d.bench.paper.experiments import spread

    listed = prompts_from(words, prior)
    return listed if words or full else spread(listed, count)


def load_checked(config: PriorConfig, prompts: Sequence[str], force: bool, out: Path | None = None) -> Prior:
    """The prior of a configuration, if it knows the prompts and the folder `out` can be made; else ValueError."""
    from distill3d.priors.loading import load_prior
    from distill3d.runs.objects import check_prompt

    for prompt in prompts:
        check_prompt(prompt, config.prior, force)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    return load_prior(config.prior, config.device, config.dtype, config.prior_options)


def _note_evaluator(evaluator: Evaluator | None) -> None:
    if evaluator is None:
        text = "no evaluator: scores that need one are left out; pass the folder of a CLIP model with --evaluator"
        print(text, file=sys.stderr)


def _conclude(out: Path, name: str, table: Table, text: str) -> None:
    """Prints the table and writes it with figure and caption as one Markdown page."""
    from distill3d.bench.tables import markdown
    from distill3d.files import replacing

    written = markdown(table)
    with replacing(out / f"{name}.md") as draft:
        draft.write_text(f"![{name}]({name}.png)\n\n{text}\n\n{written}", encoding="utf-8")
    print(written)
