"""Methods side by side on one prompt and one seed: a labeled picture and a table."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill3d.export import video
from distill3d.evaluation.images import saturation, sharpness
from distill3d.files import replacing
from distill3d.runs.objects import check_prompt, new_run_folder, write_config
from distill3d.distill.loop import Progress
from distill3d.distill.image_recipes import PictureRecipe
from distill3d.runs.images import Painting, check_size, finish, prepare, to_size, told_prior
from distill3d.priors.options import PriorOptions

Report = Callable[[str, Progress], None]
Judge = Callable[[Tensor, Sequence[str]], Tensor]


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Everything that decides a comparison: one recipe for each method, by its name and in their order."""

    prompt: str
    recipes: dict[str, PictureRecipe]
    prior: str = "toybox"
    negative: str = ""
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    prior_options: PriorOptions = PriorOptions()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    steps: int
    nfe: int  # network rows
    seconds: float
    score: float | None  # how well the prompt fits, 0 to 100; None without an evaluator
    sharpness: float  # high-frequency energy as a share of the first method's
    saturation: float  # mean chroma, 0 to 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Where a comparison lies, and its table."""

    folder: Path
    rows: tuple[Row, ...]

    @property
    def picture(self) -> Path:
        """All pictures in one, labeled."""
        return self.folder / "compare.png"

    @property
    def table(self) -> Path:
        """The rows as CSV."""
        return self.folder / "compare.csv"


def compare(
    config: CompareConfig,
    out: str | Path = "runs",
    size: int | None = None,
    force: bool = False,
    on_step: Report = lambda method, progress: None,
) -> Comparison:
    """Makes one picture by each method from the same seed; writes compare.png, compare.csv and config.json.

    `size` is the pixels a side of each picture in the sheet. An interrupt (Ctrl-C) is passed on; a folder without
    a table is what is left of it.

    Raises:
        ValueError: for anything wrong with the prompt, the methods, the prior or the output folder, before
            anything is written.
    """
    if not config.recipes:
        raise ValueError("nothing to compare: name at least one method")
    check_prompt(config.prompt, config.prior, force)
    check_size(size)
    judge = find_judge(config.prior)
    prior, conditioning = told_prior(config)
    runs = {
        method: prepare(prior, conditioning, method, recipe, torch.Generator().manual_seed(config.seed))
        for method, recipe in config.recipes.items()
    }
    folder = new_run_folder(Path(out), config.prompt)
    plain: Any = config
    write_config(folder, plain)
    paintings: dict[str, Painting] = {}
    for method, run in runs.items():
        paintings[method] = finish(run, partial(on_step, method))
        if paintings[method].interrupted:
            raise KeyboardInterrupt
    rows = measure(paintings, config.prompt, judge)
    result = Comparison(folder, rows)
    side = size or max(prior.image_size, 192)
    pictures = [to_size(p.images[0], side) for p in paintings.values()]
    video.save_image(result.picture, labeled(pictures, [_label(row) for row in rows]))
    write_table(result.table, rows)
    return result


def find_judge(prior: str) -> Judge | None:
    """The evaluator's score, where the bundled prior or a folder in its layout has one beside it, else None."""
    bundled = Path(str(resources.files("distill3d"))) / "assets" / "toybox"
    folder = (bundled if prior == "toybox" else Path(prior).expanduser()) / "evaluator_judge"
    if not (folder / "config.json").is_file():
        return None
    from distill3d.evaluation.evaluator import ToyboxJudge

    return ToyboxJudge(folder).score


def measure(paintings: dict[str, Painting], prompt: str, judge: Judge | None) -> tuple[Row, ...]:
    """The table of finished paintings; sharpness is told relative to the first."""
    reference = next(iter(paintings.values())).images.cpu()
    rows = []
    for method, painting in paintings.items():
        images = painting.images.cpu()
        score = None if judge is None else float(judge(images, [prompt] * len(images)).mean())
        rows.append(
            Row(
                method=method,
                steps=painting.steps,
                nfe=painting.nfe,
                seconds=painting.seconds,
                score=score,
                sharpness=sharpness(images, reference),
                saturation=saturation(images),
            )
        )
    return tuple(rows)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as CSV, whole or not at all; a missing score is an empty cell."""
    with replacing(path) as draft, draft.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(field.name for field in dataclasses.fields(Row))
        for row in rows:
            values = dataclasses.astuple(row)
            table.writerow(f"{v:.4f}" if isinstance(v, float) else "" if v is None else v for v in values)


def labeled(pictures: Sequence[Image.Image], labels: Sequence[str], gap: int = 8) -> Image.Image:
    """Pictures of one size in a row, each with lines of text under it that grow with the picture."""
    width, height = pictures[0].size
    font = ImageFont.load_default(size=max(10, min(28, width // 13)))
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [canvas.multiline_textbbox((0, 0), label, font=font) for label in labels]
    column = max(width, *(int(box[2]) + 1 for box in boxes))
    below = max(int(box[3]) for box in boxes) + gap
    size = (len(pictures) * (column + gap) + gap, height + below + 2 * gap)
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = gap + i * (column + gap)
        sheet.paste(picture, (left + (column - width) // 2, gap))
        middle = (left + column // 2, height + 2 * gap)
        canvas.multiline_text(middle, label, fill="black", font=font, anchor="ma", align="center")
    return sheet


def _label(row: Row) -> str:
    score = "" if row.score is None else f"\nscore {row.score:.1f}"
    return f"{row.method}\n{row.steps} steps, {row.nfe} NFE{score}"
