"""Commands about pictures: image makes one, compare sets methods side by side."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from distill3d.cli.shared import Run, progress_bar
from distill3d.distill.image_recipes import PictureRecipe, Space, picture_recipe
from distill3d.prompts import read_prompts


@dataclass
class Settings:
    """Single settings; None leaves one to the method."""

    steps: int | None = None
    """Steps: network calls of DDIM, updates of the others."""
    scale: float | None = None
    """Guidance scale: 0 unconditional, 1 conditional."""
    space: Space | None = None
    """What is optimized: the prior's latents, or pixels."""
    start: str | None = None
    """First picture: zero, gray, noise, denoised, or a picture's file."""
    rate: float | None = None
    """Learning rate of Adam; 0 takes the target whole."""
    project: bool | None = None
    """Decode, clamp and encode the latents before each step."""
    first: float | None = None
    """Time of the first step, for ddim and sdi; 1 is pure noise."""
    last: float | None = None
    """Time of the last step, for ddim and sdi."""
    inversion_scale: float | None = None
    """Guidance scale of the inversion, for sdi."""
    inversion_steps: int | None = None
    """Hops of an inversion over all times, for sdi."""
    eta: float | None = None
    """Fresh noise in the inversion, 0 to 1, for sdi."""

    def recipe(self, method: str) -> PictureRecipe:
        """The method's recipe with these settings; ValueError for what it refuses."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(picture_recipe(method), **given)


@dataclass
class Image(Run):
    """Make a picture from a sentence, by DDIM or by any objective.

    Writes a run folder with image.png, config.json and metrics.jsonl.
    """

    prompt: tyro.conf.Positional[str]
    """What to draw, for instance "a red mushroom"; @FILE draws each line of a file."""
    method: str = "ddim"
    """ddim, or an objective: sdi, sdi_cached, sds, sjc, nfsd, csd, hifa, ism, mvdream, sds_bridge, vsd, esd."""
    prior: str = "toybox"
    """The frozen 2D model: toybox (bundled), a short name (see doctor), a folder, a .safetensors file, a hub id."""
    size: int | None = None
    """Pixels a side of the file; default: what the prior makes."""
    settings: Annotated[Settings, tyro.conf.arg(name="", help="single settings")] = field(default_factory=Settings)


@dataclass
class Compare(Run):
    """Set methods side by side: one prompt, one seed, one labeled picture and one table.

    Writes a run folder with compare.png, compare.csv and config.json.
    """

    prompt: tyro.conf.Positional[str]
    """What to draw, for instance "a red mushroom"."""
    methods: str = "ddim,sds,sdi_cached,sdi"
    """Methods, separated by commas; sharpness is told relative to the first."""
    prior: str = "toybox"
    """The frozen 2D model: toybox (bundled), a short name (see doctor), a folder, a .safetensors file, a hub id."""
    size: int | None = None
    """Pixels a side of each picture in the sheet; default: what the prior makes, at least 192."""
    settings: Annotated[Settings, tyro.conf.arg(name="", help="settings for all methods")] = field(
        default_factory=Settings
    )


def run_image(command: Image) -> int:
    """Makes a picture of each prompt and says where they lie."""
    recipe = command.settings.recipe(command.method)
    from distill3d.runs.images import PictureConfig, draw_picture, told_prior
    from distill3d.runs.objects import check_prompt

    prior, prompts = None, read_prompts(command.prompt)
    for prompt in prompts:  # a bad line is found before time went into the lines above it
        check_prompt(prompt, command.prior, command.force)
    for prompt in prompts:
        config = PictureConfig(
            prompt=prompt, method=command.method, recipe=recipe, prior=command.prior,
            negative=command.negative, seed=command.seed, device=command.device,
            dtype=command.precision, prior_options=command.prior_options,
        )  # fmt: skip
        prior, _ = told_prior(config, prior)
        with progress_bar(recipe.steps, command.method) as on_step:
            result = draw_picture(config, command.out, command.size, command.force, on_step, prior)
        done = result.painting
        print(f"{done.steps} steps, {done.nfe} network evaluations, {done.seconds:.1f} s: {result.picture}")
        if done.interrupted:
            print("distill3d: interrupted; the picture is that of the last step", file=sys.stderr)
            return 130
    return 0


def run_compare(command: Compare) -> int:
    """Makes the pictures, prints the table and says where both lie."""
    names = [name.strip() for name in command.methods.split(",") if name.strip()]
    recipes = {name: command.settings.recipe(name) for name in names}
    from distill3d.runs.compare import CompareConfig, compare

    config = CompareConfig(
        prompt=command.prompt, recipes=recipes, prior=command.prior, negative=command.negative,
        seed=command.seed, device=command.device, dtype=command.precision,
        prior_options=command.prior_options,
    )  # fmt: skip
    before = dict(zip(recipes, _sums([r.steps for r in recipes.values()]), strict=True))
    with progress_bar(sum(r.steps for r in recipes.values()), "comparing", _of_method) as bar:
        result = compare(
            config, command.out, command.size, command.force,
            lambda method, progress: bar(_Step(method, before[method] + progress.step, progress.t, progress.loss)),
        )  # fmt: skip
    _print_table(result.rows)
    print(f"{result.picture}\n{result.table}")
    return 0


@dataclass(frozen=True)
class _Step:
    """A step of one method, counted through all of them."""

    method: str
    step: int
    t: float
    loss: float


def _of_method(step: _Step) -> str:
    return step.method


def _sums(numbers: list[int]) -> list[int]:
    """The sum of what stands before each number."""
    return [sum(numbers[:i]) for i in range(len(numbers))]


def _print_table(rows: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("method", "steps", "nfe", "seconds", "score", "sharpness", "saturation"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        score = "-" if row.score is None else f"{row.score:.1f}"
        numbers = (f"{row.seconds:.1f}", score, f"{row.sharpness:.2f}", f"{row.saturation:.3f}")
        table.add_row(row.method, str(row.steps), str(row.nfe), *numbers)
    Console(width=100).print(table)
