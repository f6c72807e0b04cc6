"""Methods side by side on one prompt and one seed: a labeled image and a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill3d.distill.image_recipes import ImageRecipe
from distill3d.distill.loop import Progress
from distill3d.evaluation.images import saturation, sharpness
from distill3d.export import video
from distill3d.files import replacing
from distill3d.interrupts import Interrupted
from distill3d.priors.components.hub import BUNDLED
from distill3d.runs.config import RunConfig, resolved
from distill3d.runs.folder import RunFolder
from distill3d.runs.images import Images, check_size, finish, load_image_prior, prepare, to_size
from distill3d.runs.objects import check_prompt
from distill3d.untrusted import csv_text

OnMethodStep = Callable[[str, Progress], None]
Judge = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class CompareConfig(RunConfig):
    """Everything that decides a comparison: one recipe for each method, by its name and in their order."""

    prompt: str
    recipes: dict[str, ImageRecipe]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    steps: int
    nfe: int
    seconds: float
    score: float | None  # how well the image fits the prompt, 0 to 100; None without an evaluator
    sharpness: float  # high-frequency energy relative to the first method
    saturation: float  # mean chroma, 0 to 1


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its run folder and its table."""

    folder: Path
    rows: tuple[Row, ...]

    @property
    def image(self) -> Path:
        """All images in one, labeled."""
        return self.folder / "compare.png"

    @property
    def table(self) -> Path:
        """The rows as CSV."""
        return self.folder / "compare.csv"


def compare(
    config: CompareConfig,
    out: str | Path = "runs",
    *,
    size: int | None = None,
    force: bool = False,
    on_step: OnMethodStep = lambda method, progress: None,
) -> Comparison:
    """Makes one image with each method from the same seed; writes compare.png, compare.csv and config.json.

    `size` is the pixels per side of each image in the sheet. Ctrl-C is passed on, and leaves a folder without a table.

    Raises:
        Diverged: for numbers that are not finite.
        ValueError: for anything wrong with the prompt, the recipes, the prior or the output folder, before anything is
            written.
    """
    if not config.recipes:
        raise ValueError("nothing to compare: name at least one method")
    check_prompt(config.prompt, config.prior, force)
    check_size(size)
    judge = find_judge(config.prior)
    config = resolved(config)
    prior = load_image_prior(config)
    runs = {
        name: prepare(prior, [config.prompt], recipe, torch.Generator().manual_seed(config.seed), config.negative)
        for name, recipe in config.recipes.items()
    }
    folder = RunFolder.create(out, config.prompt)
    folder.write_config("comparison", config)
    made: dict[str, Images] = {}
    for method, run in runs.items():
        made[method] = finish(run, partial(on_step, method))
        if made[method].interrupted:
            raise Interrupted(made[method].interrupted)
        if (diverged := made[method].diverged) is not None:
            diverged.add_note(f"method: {method}")
            raise diverged
    rows = measure(made, config.prompt, judge)
    result = Comparison(folder.path, rows)
    folder.check()
    side = size or max(prior.image_size, 192)
    images = [to_size(one.images[0], side) for one in made.values()]
    video.save_image(result.image, labeled(images, [_label(row) for row in rows]))
    write_table(result.table, rows)
    return result


def find_judge(prior: str) -> Judge | None:
    """The score of the evaluator beside the bundled prior or a folder in its layout; None if there is none."""
    bundled = Path(str(resources.files("distill3d"))) / "assets" / "toybox"
    folder = (bundled if prior in BUNDLED else Path(prior).expanduser()) / "evaluator_judge"
    if not (folder / "config.json").is_file():
        return None
    from distill3d.evaluation.evaluator import ToyboxJudge

    return ToyboxJudge(folder).score


def measure(made: dict[str, Images], prompt: str, judge: Judge | None) -> tuple[Row, ...]:
    """The table of finished images; sharpness is relative to the first."""
    reference = next(iter(made.values())).images.cpu()
    rows = []
    for method, one in made.items():
        images = one.images.cpu()
        score = None if judge is None else float(judge(images, [prompt] * len(images)).mean())
        sharp = sharpness(images, reference)
        rows.append(Row(method, one.steps, one.nfe, one.seconds, score, sharp, saturation(images)))
    return tuple(rows)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, whole or not at all; a missing score is an empty cell."""
    values = [[f"{v:.4f}" if isinstance(v, float) else v for v in dataclasses.astuple(row)] for row in rows]
    with replacing(path) as draft:
        draft.write_text(csv_text([[field.name for field in dataclasses.fields(Row)], *values]), encoding="utf-8")


def labeled(images: Sequence[Image.Image], labels: Sequence[str], gap: int = 8) -> Image.Image:
    """Images of one size in a row, each with lines of text under it that grow with the image."""
    width, height = images[0].size
    font = ImageFont.load_default(size=max(10, min(28, width // 13)))
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [canvas.multiline_textbbox((0, 0), label, font=font) for label in labels]
    column = max(width, *(int(box[2]) + 1 for box in boxes))
    below = max(int(box[3]) for box in boxes) + gap
    size = (len(images) * (column + gap) + gap, height + below + 2 * gap)
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = gap + i * (column + gap)
        sheet.paste(image, (left + (column - width) // 2, gap))
        middle = (left + column // 2, height + 2 * gap)
        canvas.multiline_text(middle, label, fill="black", font=font, anchor="ma", align="center")
    return sheet


def _label(row: Row) -> str:
    score = "" if row.score is None else f"\nscore {row.score:.1f}"
    return f"{row.method}\n{row.steps} steps, {row.nfe} NFE{score}"
