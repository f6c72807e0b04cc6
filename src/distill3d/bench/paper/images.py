"""Score distillation in 2D against DDIM itself: images of the same prompts from the same noise, and their table.

The paper's starting point is that DDIM sampling is score distillation with the right noise. The rows are DDIM; constant
noise (CFD) and SDI with the noise that the network predicted one step before, which are DDIM; SDI with the noise found
by inversion, as in 3D; and SDS. The distance between two DDIM samples gives a scale for the other distances. Each image
is a file, so that a study can be interrupted and continued; other settings make other files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distill3d
from distill3d.bench import tables
from distill3d.distill.image_recipes import DEFAULT_SCALE, ImageRecipe, image_recipe
from distill3d.evaluation.distances import kernel_distance
from distill3d.evaluation.evaluator import Evaluator
from distill3d.evaluation.metrics import METRICS, Quantity, RunResult, measure
from distill3d.files import locked, replacing
from distill3d.interrupts import Interrupted
from distill3d.priors.loading import load_prior
from distill3d.runs.config import RunConfig, to_plain
from distill3d.runs.folder import slug
from distill3d.runs.images import make_images
from distill3d.runs.shared_work import check_worker, kept_copy
from distill3d.types import Prior
from distill3d.untrusted import csv_text, read_npz
from distill3d.workers.executor import HERE, WAIT_SECONDS, Executor, Here, Make
from distill3d.workers.store import Place, Store

STEPS = 50  # of DDIM
STRONG = 100.0  # the published guidance scale of SDS
OTHER = 1000  # added to the seed for images from unrelated noise
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
            row("CFD, constant noise", "cfd"),
            row("SDI, cached noise", "sdi_cached"),
            row("SDI, DDIM inversion", "sdi", inversion_scale=-self.scale, nominal=False),
            row("SDI, nominal guidance", "sdi"),
            row(f"SDS, scale {self.scale:g}", "sds"),
            *strong,
        )

    @property
    def references(self) -> tuple[Row, ...]:
        """DDIM from two other seeds: what sharpness and distances refer to."""
        return tuple(dataclasses.replace(self.rows[0], name="reference", shift=OTHER + i) for i in (1, 2))

    def key(self, row: Row, prompt: str) -> str:
        """The file name of an image, one for each way to make it."""
        shared = {n: v for n, v in to_plain(self).items() if n not in ("prompts", "scale", "steps")}
        own = {"recipe": to_plain(row.recipe), "shift": row.shift, "prompt": prompt, "version": distill3d.__version__}
        digest = hashlib.sha256(json.dumps([own, shared], sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]
        return f"{slug(row.name)}-{self.seed + row.shift}-{digest}.npz"


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and its cost."""

    image: Tensor  # [3, H, W]
    seconds: float
    nfe: int

    @property
    def finite(self) -> bool:
        """Whether all pixels are finite numbers."""
        return bool(torch.isfinite(self.image).all())


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """The result of a study: its folder, images by row and prompt, and the table."""

    folder: Path  # of a shared one, the copy on this machine
    made: Mapping[str, tuple[Sample, ...]]  # by a row's name, in the order of the prompts
    table: tables.Table


@dataclasses.dataclass(frozen=True)
class ImageSetup:
    """Makes images of a study in a worker. It loads the prior once, unless it has it."""

    out: Place
    study: Study
    prior: Prior | None = None  # of this process; it does not travel
    version: str = distill3d.__version__

    def __call__(self) -> Make[tuple[Row, str], None]:
        """See `workers.executor.Setup`.

        Raises:
            ValueError: where this machine has another version, or does not see the folder.
        """
        check_worker(self.version, self.out, "images")
        study = self.study
        prior = self.prior or load_prior(study.prior, study.device, study.dtype, study.prior_options)
        return lambda task, tell: self.make(*task, prior)

    def make(self, row: Row, prompt: str, prior: Prior) -> None:
        """Makes an image unless it is there."""
        name = self.study.key(row, prompt)
        if isinstance(self.out, Path):
            with locked(self.out / ".locks" / name, wait=WAIT_SECONDS):
                if not (self.out / "images" / name).is_file():
                    make_sample(self.out / "images" / name, self.study, row, prompt, prior)
            return
        with tempfile.TemporaryDirectory(prefix="distill3d-") as scratch:
            path = Path(scratch) / name
            make_sample(path, self.study, row, prompt, prior)
            Store(self.out).write(f"images/{name}", path.read_bytes())


def run_study(
    out: Place,
    study: Study,
    prior: Prior,
    evaluator: Evaluator | None,
    on_image: Callable[[Row, str, bool], None] = lambda row, prompt, made: None,
    executor: Executor = HERE,
) -> StudyResult:
    """Makes the missing images and writes table.md, table.tex, table.csv and images.csv.

    Raises:
        ValueError: where the folder cannot be written or holds a damaged image, and for a prior that does not fit.
        KeyboardInterrupt: as it came; what is finished stays.
    """
    store = None if isinstance(out, Path) else Store(out)
    folder = out if isinstance(out, Path) else kept_copy(out)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    with contextlib.ExitStack() as stack:
        if store is not None:
            store.check()
            stack.enter_context(store.leased())
        stack.enter_context(locked(folder))
        prior.prepare(sorted({*study.prompts, ""}))
        rows = (*study.rows, *study.references)
        tasks = [(row, prompt) for prompt in study.prompts for row in rows]
        if store is not None:
            _pull(store, folder, [study.key(*task) for task in tasks])
        missing: list[tuple[Row, str]] = []
        for task in tasks:
            if (folder / "images" / study.key(*task)).is_file():
                on_image(*task, False)
            else:
                missing.append(task)
        setup = ImageSetup(out, study, prior if isinstance(executor, Here) else None)
        for done in stack.enter_context(contextlib.closing(executor.run(setup, missing))):
            if store is not None:
                _pull(store, folder, [study.key(*missing[done.index])])
            on_image(*missing[done.index], True)
        shutil.rmtree(folder / ".locks", ignore_errors=True)

        def samples(row: Row) -> list[Sample]:
            return [read_sample(folder / "images" / study.key(row, prompt)) for prompt in study.prompts]

        made = {row.name: samples(row) for row in study.rows}
        reference = [_finite(pair) for pair in zip(*map(samples, study.references), strict=True)]
        scores = score_rows(study, made, reference, evaluator)
        table = make_table(study, made, scores, reference, evaluator)
        _write(folder, study, table, scores)
    return StudyResult(folder, {name: tuple(row) for name, row in made.items()}, table)


def _pull(store: Store, folder: Path, names: Sequence[str]) -> None:
    """Copies images that are shared to a folder of this machine."""
    missing = [f"images/{name}" for name in names if not (folder / "images" / name).is_file()]
    for name, content in store.read_all(missing).items():
        with replacing(folder / name) as draft:
            draft.write_bytes(content)


def make_sample(path: Path, study: Study, row: Row, prompt: str, prior: Prior) -> None:
    """Makes an image and its file, whole or not at all; an interrupt is passed on."""
    generator = torch.Generator().manual_seed(study.seed + row.shift)
    made = make_images(prior, [prompt], row.recipe, generator)
    if made.interrupted:
        raise Interrupted(made.interrupted)
    with replacing(path) as draft, draft.open("wb") as file:
        image = made.images[0].float().cpu().numpy()
        image = image if made.diverged is None else np.full_like(image, np.nan)
        np.savez(file, image=image, cost=[made.seconds, float(made.nfe)])


def read_sample(path: Path) -> Sample:
    """An image of a study; ValueError where it is damaged."""
    try:
        saved = read_npz(path)
        return Sample(torch.from_numpy(saved["image"]), float(saved["cost"][0]), int(saved["cost"][1]))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it to make it again") from None


def score_rows(
    study: Study, made: Mapping[str, Sequence[Sample]], reference: Sequence[Tensor], evaluator: Evaluator | None
) -> dict[tuple[str, str], dict[str, float]]:
    """(row, prompt) -> metric -> value, for all images that are finite."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for name, row in made.items():
        for i, (prompt, sample) in enumerate(zip(study.prompts, row, strict=True)):
            if not sample.finite:
                continue
            result = RunResult(
                prompt=prompt,
                images=sample.image.clamp(0, 1)[None],
                prompts=study.prompts,
                evaluator=evaluator,
                reference=reference[i].clamp(0, 1) if len(reference[i]) else None,
                seconds=sample.seconds,
                nfe=sample.nfe,
            )
            values = measure(result, [name for name in NAMES if not result.missing(METRICS[name])])
            ddim = made[study.rows[0].name][i]
            distance = {DISTANCE.name: float((sample.image - ddim.image).square().mean())} if ddim.finite else {}
            scores[name, prompt] = {**distance, **values}
    return scores


def make_table(
    study: Study,
    made: Mapping[str, Sequence[Sample]],
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
        for row, samples in made.items():
            finite = [sample.image.clamp(0, 1) for sample in samples if sample.finite]
            if len(finite) > 1 and wanted is not None:
                distance = 1000 * kernel_distance(evaluator.embed_images(torch.stack(finite)), wanted, gamma=1.0)
                values[row, KERNEL.name] = tables.Estimate(distance, None, None, len(finite))
    shown = tuple(m for m in (*metrics, KERNEL) if any((row, m.name) in values for row in made))
    counts = {name: (sum(not sample.finite for sample in row), len(row)) for name, row in made.items()}
    return tables.Table(tuple(made), shown, values, differences, counts)


def caption(study: Study, prompts: str, command: str) -> str:
    """What a reader has to know of the figure; `prompts` is the sentence about the prompts."""
    steps = ", ".join(f"{row.name} {row.recipe.steps}" for row in study.rows if not row.shift)
    return (
        f"2D: score distillation against DDIM sampling from the same noise, guidance scale {study.scale:g}. Prior: "
        f"{study.prior}. {prompts} Seed: {study.seed}. Steps: {steps}. Sharpness refers to DDIM from two other seeds; "
        f"distance to DDIM is over pixels in [0, 1]; bars are 95 % intervals over prompts. Made by: {command}"
    )


def _finite(samples: Sequence[Sample]) -> Tensor:
    """The finite ones of the images [N, 3, H, W]; N may be 0."""
    kept = [sample.image for sample in samples if sample.finite]
    return torch.stack(kept) if kept else samples[0].image.new_zeros(0, *samples[0].image.shape)


def _write(out: Path, study: Study, table: tables.Table, scores: Mapping[tuple[str, str], Mapping[str, float]]) -> None:
    texts = {"md": tables.markdown, "tex": tables.latex, "csv": tables.summary_csv}
    for ending, text in texts.items():
        with replacing(out / f"table.{ending}") as draft:
            draft.write_text(text(table), encoding="utf-8")
    names = [DISTANCE.name, *NAMES]
    rows: list[list[object]] = [["prompt", "row", "seed", "file", *names]]
    for row in study.rows:
        for prompt in study.prompts:
            found = scores.get((row.name, prompt), {})
            numbers = [f"{found[name]:.9g}" if name in found else "" for name in names]
            rows.append([prompt, row.name, study.seed + row.shift, study.key(row, prompt), *numbers])
    with replacing(out / "images.csv") as draft:
        draft.write_text(csv_text(rows), encoding="utf-8")
