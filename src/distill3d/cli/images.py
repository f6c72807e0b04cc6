"""Commands about images: image makes one, compare sets methods side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from distill3d.cli.plan import show_plan
from distill3d.cli.settings import layered, nested, read_file
from distill3d.cli.shared import (
    RUNS,
    Flag,
    Float,
    Int,
    LogTo,
    Model,
    Name,
    Prompt,
    Settings,
    Text,
    duration,
    is_file_name,
    method_key,
    progress_bar,
    split,
)

if TYPE_CHECKING:
    from distill3d.distill.loop import Progress
    from distill3d.runs.compare import CompareConfig, Row
    from distill3d.runs.images import ImageConfig

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class ImageTexts:
    """What to make."""

    negative: Text = None
    """What the image should not show (the negative prompt)."""
    seed: Int = None
    """Random seed; default: 0. The same seed on the same machine gives the same image."""


@dataclass(frozen=True, kw_only=True)
class ImageQuality:
    """How well, and how long. The defaults are those of each method."""

    steps: Int = None
    """Network calls of DDIM, optimization steps of the other methods."""
    scale: Float = None
    """Guidance scale: 0 unconditional, 1 conditional."""
    space: Annotated[Name, arg(metavar="SPACE")] = None
    """What is optimized: latents or pixels."""
    start: Name = None
    """First image: zero, gray, noise, denoised, or an image file."""
    learning_rate: Float = None
    """Learning rate of Adam; --set rate=none takes the whole target at each step."""

    def changes(self) -> dict[str, object]:
        """The settings that these flags change, by their path in an image's recipe; None changes nothing."""
        return {
            "steps": self.steps,
            "objective.scale": self.scale,
            "space": self.space,
            "start": self.start,
            "rate": self.learning_rate,
        }


@dataclass(frozen=True, kw_only=True)
class ImageOutput:
    """Where to."""

    out: Path = RUNS
    """Folder in which the run's folder is made, or an image file (.png, .jpg, .webp)."""
    force: Flag = False
    """Run even if the bundled prior does not know what the prompt names."""
    size: Int = None
    """Pixels per side of each image; default: the prior's image size."""
    log: LogTo = ()
    """Log numbers and images for TensorBoard or Weights & Biases too, in the run's folder; needs distill3d[log]."""

    @property
    def file(self) -> Path | None:
        """The image file that --out names; ValueError for a file of another kind."""
        if not is_file_name(self.out):
            return None
        if self.out.suffix.lower() not in IMAGE_FILES:
            raise ValueError(f"images are written as {', '.join(IMAGE_FILES)}, got --out {self.out}")
        return self.out

    def folder(self) -> Path:
        """The folder for run folders."""
        return self.out if self.file is None else RUNS

    def deliver(self, image: Path) -> Path:
        """Writes the image to the file that --out names, if any; returns where the image is."""
        from PIL import Image as Picture

        from distill3d.export.video import save_image

        if self.file is None:
            return image
        with Picture.open(image) as opened:
            save_image(self.file, opened)
        return self.file


@dataclass(frozen=True)
class Image:
    """Make an image from a prompt, with DDIM or any objective.

    Writes a run folder with image.png, config.json and metrics.jsonl.
    """

    prompt: Prompt
    """What to make, such as "a red mushroom"; @FILE makes each line of a file."""
    method: Name = None
    """ddim (default), sdi_cached, cfd, or an objective as for generate: sdi, sds, ..."""
    plan: Flag = False
    """Only print what the run needs: memory by part, network evaluations, time. --device may name a card, cuda:H100."""
    texts: Annotated[ImageTexts, arg(name="prompt")] = field(default_factory=ImageTexts)
    quality: ImageQuality = field(default_factory=ImageQuality)
    model: Model = field(default_factory=Model)
    output: ImageOutput = field(default_factory=ImageOutput)
    other: Settings = field(default_factory=Settings)

    def config(self) -> ImageConfig:
        """The configuration of the image, with the prompt as typed."""
        from distill3d.distill.image_recipes import image_recipe
        from distill3d.runs.config import from_plain, to_plain
        from distill3d.runs.images import ImageConfig

        plain = layered(to_plain(ImageConfig(self.prompt)), read_file(self.other.config))
        if self.method is not None:
            recipe = to_plain(image_recipe(self.method))
            if recipe["objective"]["kind"] != plain["recipe"]["objective"]["kind"]:
                plain["recipe"] = recipe
        flags = {f"recipe.{path}": value for path, value in self.quality.changes().items()}
        flags |= {"negative": self.texts.negative, "seed": self.texts.seed, **self.model.changes()}
        return from_plain(ImageConfig, layered(plain, nested(flags), assignments=self.other.set))

    def run(self) -> int:
        """Makes an image of each prompt; returns the exit status."""
        from distill3d.prompts import read_prompts
        from distill3d.runs.images import generate_image, load_image_prior
        from distill3d.runs.logs import open_logs
        from distill3d.runs.objects import check_prompt

        config, prompts = self.config(), read_prompts(self.prompt)
        if self.output.file is not None and len(prompts) > 1:
            raise ValueError(f"{len(prompts)} images cannot be written to one file: give a folder with --out")
        for prompt in prompts:  # a wrong line is found before time went into the lines above it
            check_prompt(prompt, config.prior, self.output.force)
        if self.plan:
            return show_plan(replace(config, prompt=prompts[0]), self)
        logs = open_logs(self.output.log, config.recipe.steps)
        prior = load_image_prior(config)
        for prompt in prompts:
            with progress_bar(config.recipe.steps, "sampling") as on_step:
                out, config = self.output.folder(), replace(config, prompt=prompt)
                result = generate_image(config, out, size=self.output.size, on_step=on_step, prior=prior, logs=logs)
            made, image = result.made, self.output.deliver(result.image)
            print(f"{made.steps} steps in {duration(made.seconds)} with {made.nfe:,} NFE: {image}")
            if made.interrupted:
                print("interrupted; this is the image of the last step", file=sys.stderr)
                return 128 + made.interrupted
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare methods: one prompt and one seed, all images labeled in one, and a table.

    Writes a run folder with compare.png, compare.csv and config.json.
    """

    prompt: Prompt
    """What to make, such as "a red mushroom"."""
    methods: Annotated[str, arg(metavar="NAMES")] = "ddim,sds,sdi_cached,sdi"
    """Methods separated by commas, as for image; sharpness is relative to the first."""
    texts: Annotated[ImageTexts, arg(name="prompt")] = field(default_factory=ImageTexts)
    quality: ImageQuality = field(default_factory=ImageQuality)
    model: Model = field(default_factory=Model)
    output: ImageOutput = field(default_factory=ImageOutput)
    other: Settings = field(default_factory=Settings)

    def config(self) -> CompareConfig:
        """The configuration of the comparison; --set sdi.steps=20 changes a setting of one method."""
        from distill3d.distill.image_recipes import image_recipe
        from distill3d.runs.compare import CompareConfig
        from distill3d.runs.config import from_plain, to_plain

        names = [method_key(name) for name in split([self.methods], "--methods")]
        recipes = {name: image_recipe(name) for name in names}
        plain = layered(to_plain(CompareConfig(self.prompt, recipes)), read_file(self.other.config))
        quality = self.quality.changes().items()
        flags = {f"recipes.{name}.{path}": value for name in names for path, value in quality}
        flags |= {"negative": self.texts.negative, "seed": self.texts.seed, **self.model.changes()}
        return from_plain(CompareConfig, layered(plain, nested(flags), assignments=self.other.set))

    def run(self) -> int:
        """Makes the images, prints the table and where both are; returns the exit status."""
        from distill3d.runs.compare import compare

        config, output = self.config(), self.output
        seconds: dict[str, float] = {}
        steps = [recipe.steps for recipe in config.recipes.values()]
        before = {name: sum(steps[:i]) for i, name in enumerate(config.recipes)}
        with progress_bar(sum(steps), "comparing") as show:

            def on_step(method: str, progress: Progress) -> None:
                seconds[method] = progress.seconds
                step = before[method] + progress.step
                show(replace(progress, step=step, seconds=sum(seconds.values())), method)

            result = compare(config, output.folder(), size=output.size, force=output.force, on_step=on_step)
        _print_table(result.rows)
        print(f"{output.deliver(result.image)}\n{result.table}")
        return 0


def _print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("method", "steps", "NFE", "seconds", "score", "sharpness", "saturation"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        score = "-" if row.score is None else f"{row.score:.1f}"
        numbers = (f"{row.seconds:.1f}", score, f"{row.sharpness:.2f}", f"{row.saturation:.3f}")
        table.add_row(row.method, str(row.steps), str(row.nfe), *numbers)
    Console(width=100).print(table)
