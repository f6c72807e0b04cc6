"""Score distillation in 2D against DDIM itself: pictures of the same prompts from the same noise, and their table.

The paper's starting point is that DDIM sampling is score distillation with the right noise. Rows: DDIM; SDI with the
noise that DDIM predicted a step before, which is DDIM; SDI with the noise found by inversion, as it has to be in 3D;
SDS. How far two DDIM samples are apart tells what a distance means. Each picture is a file, so that a study can be
stopped and goes on; a file belongs to its settings, and other settings make another one.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distill3d
from distill3d.bench import tables
from distill3d.bench.protocol import locked
from distill3d.distill.image_recipes import DEFAULT_SCALE, ImageRecipe, image_recipe
from distill3d.evaluation.distances import kernel_distance
from distill3d.evaluation.evaluator import Evaluator
from distill3d.evaluation.metrics import METRICS, Quantity, RunResult, measure
from distill3d.files import replacing
from distill3d.runs.config import RunConfig, to_plain
from distill3d.runs.folder import slug
from distill3d.runs.images import make_images
from distill3d.types import Prior

STEPS = 50  # of DDIM
STRONG = 100.0  # the published guidance scale of SDS
OTHER = 1000  # added to the seed for pictures that share no noise with the others
NAMES = ("clip_score", "clip_r_precision", "sharpness", "edge_concentration", "saturation", "nfe", "seconds")
DISTANCE = Quantity("distance_to_ddim", "lower", "mean square")
KERNEL = METRICS["kernel"]
PANELS = (DISTANCE.name, "clip_score", "sharpness", "saturation")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a recipe under a name, and what is added to the seed."""

    name: str
    recipe: ImageRecipe
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class Study(RunConfig):
    """What is compared: rows x prompts, all from one seed."""

    prompts: tuple[str, ...]
    scale: float = DEFAULT_SCALE
    steps: int = STEPS

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a comparison needs at least one prompt")
        self.rows  # noqa: B018  # rejects scales and steps that are out of range

    @property
    def rows(self) -> tuple[Row, ...]:
        """DDIM first; every method has its own number of steps, all of them scaled as DDIM's are."""

        def row(name: str, method: str, shift: int = 0, **changes: float) -> Row:
            recipe = image_recipe(method)
            steps = round(recipe.steps * self.steps / STEPS) if self.steps != STEPS else recipe.steps
            objective = dataclasses.replace(recipe.objective, **{"scale": self.scale, **changes})  # type: ignore[type-var]
            steps = max(steps, 1) if self.steps > 0 else self.steps
            return Row(name, dataclasses.replace(recipe, steps=steps, objective=objective), shift)

        strong = () if f"{self.scale:g}" == f"{STRONG:g}" else (row(f"SDS, scale {STRONG:g}", "sds", scale=STRONG),)
        return (
            row("DDIM", "ddim"),
            row("DDIM, another seed", "ddim", OTHER),
            row("SDI, cached noise", "sdi_cached"),
            row("SDI, DDIM inversion", "sdi", inversion_scale=-self.scale),
            row(f"SDS, scale {self.scale:g}", "sds"),
            *strong,
        )

    @property
    def references(self) -> tuple[Row, ...]:
        """DDIM from two other seeds: what sharpness and distances refer to."""
        return tuple(dataclasses.replace(self.rows[0], name="reference", shift=OTHER + i) for i in (1, 2))

    def key(self, row: Row, prompt: str) -> str:
        """A name for the file of a picture, one for each way to make it."""
        shared = {n: v for n, v in to_plain(self).items() if n not in ("prompts", "scale", "steps")}
        own = {"recipe": to_plain(row.recipe), "shift": row.shift, "prompt": prompt, "version": distill3d.__version__}
        digest = hashlib.sha256(json.dumps([own, shared], sort_keys=True).encode()).hexdigest()[:12]
        return f"{slug(row.name)}-{self.seed + row.shift}-{digest}.npz"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture and what it took."""

    image: Tensor  # [3, H, W]
    seconds: float
    nfe: int  # network rows

    @property
    def sound(self) -> bool:
        """Whether all its numbers are numbers."""
        return bool(torch.isfinite(self.image).all())


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a study made: pictures by row and prompt, and its table."""

    made: Mapping[str, tuple[Picture, ...]]  # by a row's name, in the order of the prompts
    table: tables.Table


def run_study(
    out: Path, study: Study, prior: Prior, evaluator: Evaluator | None,
    on_picture: Callable[[Row, str, bool], None] = lambda row, prompt, made: None,
) -> Pictures:  # fmt: skip
    """Makes the pictures that are not there yet and writes table.md, table.tex, table.csv and pictures.csv.

    Raises:
        ValueError: where the folder cannot be written or holds a damaged picture, and for a prior that does not fit.
        KeyboardInterrupt: as it came; what is finished stays.
    """
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    with locked(out):
        prior.prepare(sorted({*study.prompts, ""}))
        made: dict[str, list[Picture]] = {row.name: [] for row in (*study.rows, *study.references)}
        for prompt in study.prompts:
            for row in (*study.rows, *study.references):
                path = out / "pictures" / study.key(row, prompt)
                new = not path.is_file()
                if new:
                    make_picture(path, study, row, prompt, prior)
                made[row.name].append(read_picture_file(path))
                on_picture(row, prompt, new)
        reference = [_sound(pair) for pair in _pairs(made.pop("reference"))]
        scores = score_rows(study, made, reference, evaluator)
        table = make_table(study, made, scores, reference, evaluator)
        _write(out, study, table, scores)
    return Pictures({name: tuple(row) for name, row in made.items()}, table)


def make_picture(path: Path, study: Study, row: Row, prompt: str, prior: Prior) -> None:
    """Makes a picture and its file, whole or not at all; an interrupt is passed on."""
    generator = torch.Generator().manual_seed(study.seed + row.shift)
    made = make_images(prior, [prompt], row.recipe, generator)
    if made.interrupted:
        raise KeyboardInterrupt
    with replacing(path) as draft, draft.open("wb") as file:
        image = made.images[0].float().cpu().numpy()
        np.savez(file, image=image, cost=[made.seconds, float(made.nfe)])


def read_picture_file(path: Path) -> Picture:
    """A picture of a study; ValueError where it is damaged."""
    try:
        with path.open("rb") as file, np.load(file) as saved:
            return Picture(torch.from_numpy(saved["image"]), float(saved["cost"][0]), int(saved["cost"][1]))
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}; delete it to make it again") from None


def score_rows(
    study: Study, made: Mapping[str, Sequence[Picture]], reference: Sequence[Tensor], evaluator: Evaluator | None
) -> dict[tuple[str, str], dict[str, float]]:
    """(row, prompt) -> metric -> value, for all pictures whose numbers are numbers."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for name, row in made.items():
        for i, (prompt, picture) in enumerate(zip(study.prompts, row, strict=True)):
            if not picture.sound:
                continue
            result = RunResult(
                prompt=prompt, images=picture.image.clamp(0, 1)[None], prompts=study.prompts, evaluator=evaluator,
                reference=reference[i].clamp(0, 1) if len(reference[i]) else None, seconds=picture.seconds,
                nfe=picture.nfe,
            )  # fmt: skip
            values = measure(result, [name for name in NAMES if not result.missing(METRICS[name])])
            ddim = made[study.rows[0].name][i]
            distance = {DISTANCE.name: float((picture.image - ddim.image).square().mean())} if ddim.sound else {}
            scores[name, prompt] = {**distance, **values}
    return scores


def make_table(
    study: Study,
    made: Mapping[str, Sequence[Picture]],
    scores: Mapping[tuple[str, str], Mapping[str, float]],
    reference: Sequence[Tensor],
    evaluator: Evaluator | None,
) -> tables.Table:
    """Means over prompts with their intervals, paired differences to DDIM, and one kernel distance a row."""
    values: dict[tuple[str, str], tables.Estimate] = {}
    differences: dict[tuple[str, str], tables.Estimate] = {}
    first = study.rows[0].name
    metrics = [DISTANCE, *(METRICS[name] for name in NAMES)]
    for row, metric in ((row, metric) for row in made for metric in metrics):
        column = {p: scores[row, p][metric.name] for p in study.prompts if metric.name in scores.get((row, p), {})}
        if column:
            values[row, metric.name] = tables.interval(list(column.values()))
        pairs = [
            v - scores[first, p][metric.name] for p, v in column.items() if metric.name in scores.get((first, p), {})
        ]
        if row != first and pairs:
            differences[row, metric.name] = tables.interval(pairs)
    if evaluator is not None and len(study.prompts) > 1:
        wanted = torch.cat(list(reference)).clamp(0, 1)
        wanted = evaluator.embed_images(wanted) if len(wanted) > 1 else None
        for row, pictures in made.items():
            sound = [picture.image.clamp(0, 1) for picture in pictures if picture.sound]
            if len(sound) > 1 and wanted is not None:
                distance = 1000 * kernel_distance(evaluator.embed_images(torch.stack(sound)), wanted, gamma=1.0)
                values[row, KERNEL.name] = tables.Estimate(distance, None, None, len(sound))
    shown = tuple(m for m in (*metrics, KERNEL) if any((row, m.name) in values for row in made))
    counts = {name: (sum(not picture.sound for picture in row), len(row)) for name, row in made.items()}
    return tables.Table(tuple(made), shown, values, differences, counts)


def caption(study: Study, told: str, command: str) -> str:
    """What a reader has to know of the figure; `told` is the sentence about the prompts."""
    steps = ", ".join(f"{row.name} {row.recipe.steps}" for row in study.rows if not row.shift)
    return (
        f"2D: score distillation against DDIM sampling from the same noise, guidance scale {study.scale:g}. Prior: "
        f"{study.prior}. {told} Seed: {study.seed}. Steps: {steps}. Sharpness refers to DDIM from two other seeds; "
        f"distance to DDIM is over pixels in [0, 1]; bars are 95 % intervals over prompts. Made by: {command}"
    )


def _sound(pictures: Sequence[Picture]) -> Tensor:
    """Those of the pictures whose numbers are numbers [N, 3, H, W], N from 0."""
    kept = [picture.image for picture in pictures if picture.sound]
    return torch.stack(kept) if kept else pictures[0].image.new_zeros(0, *pictures[0].image.shape)


def _pairs(pictures: Sequence[Picture]) -> list[tuple[Picture, Picture]]:
    return list(zip(pictures[::2], pictures[1::2], strict=True))


def _write(out: Path, study: Study, table: tables.Table, scores: Mapping[tuple[str, str], Mapping[str, float]]) -> None:
    texts = {"md": tables.markdown, "tex": tables.latex, "csv": tables.summary_csv}
    for ending, text in texts.items():
        with replacing(out / f"table.{ending}") as draft:
            draft.write_text(text(table), encoding="utf-8")
    names = [DISTANCE.name, *NAMES]
    with replacing(out / "pictures.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["prompt", "row", "seed", "file", *names])
        for row in study.rows:
            for prompt in study.prompts:
                found = scores.get((row.name, prompt), {})
                numbers = [f"{found[name]:.9g}" if name in found else "" for name in names]
                rows.writerow([prompt, row.name, study.seed + row.shift, study.key(row, prompt), *numbers])
