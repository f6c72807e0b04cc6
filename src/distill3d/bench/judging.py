"""From finished cells to numbers: the metrics of `evaluation.metrics`, and diversity over the seeds of a prompt.

Scores are kept beside the pictures and are made again only where what they depend on has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill3d.bench.cells import Outcome, read_maps, read_outcome, read_views
from distill3d.bench.protocol import Protocol, Task
from distill3d.evaluation.distances import diversity
from distill3d.evaluation.evaluator import Evaluator, ToyboxJudge
from distill3d.evaluation.metrics import METRICS, NEEDS, Cell, Metric, check_metrics, measure
from distill3d.files import replacing

ACROSS = {"diversity": Metric("diversity", "", "higher", ("evaluator",), lambda c: float("nan"))}  # over seeds
KNOWN: dict[str, Metric] = {**METRICS, **ACROSS}
HEADLINE = (
    "clip_score", "clip_r_precision", "clip_iqa_quality", "clip_iqa_sharpness", "clip_iqa_real", "image_reward",
    "sharpness", "edge_concentration", "spectrum_gap", "saturation", "janus_rate", "lost_back",
    "silhouette_iou", "chamfer", "diversity", "diverged",
    "seconds", "nfe", "peak_memory",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scored:
    """A finished cell and its numbers; a metric that could not be measured is missing."""

    task: Task
    outcome: Outcome
    scores: dict[str, float]

    @property
    def diverged(self) -> bool:
        """Whether there is no object."""
        return bool(self.outcome.failure) or bool(self.scores.get("diverged", 0.0))


@dataclasses.dataclass(frozen=True)
class Judges:
    """What pictures are compared with: a contrastive model, and pictures of what is wanted."""

    evaluator: Evaluator | None = None
    reference: Tensor | None = None  # [M, 3, H, W], the same for all cells
    reference_of: Callable[[str], Tensor | None] = lambda prompt: None  # where each prompt has its own
    label: str = ""  # tells these judges from others

    def reference_for(self, prompt: str) -> Tensor | None:
        """The pictures that an object of this prompt is compared with."""
        own = self.reference_of(prompt)
        return self.reference if own is None else own


def find_judges(protocol: Protocol, evaluator: Path | None, reference: Path | None) -> Judges:
    """The judges of a bench: the folders that are given, for the toybox its own judge and true renders.

    Raises:
        ValueError: for a folder that does not exist or holds no such thing.
    """
    toybox = protocol.prior == "toybox"
    model, pictures = None, None
    if evaluator is not None:
        if not (evaluator / "config.json").is_file():
            raise ValueError(f"no evaluator in {evaluator}: give the folder of a CLIP model, as transformers saves it")
        model = Evaluator(evaluator)
    elif toybox:
        model = ToyboxJudge()
    if reference is not None:
        pictures = read_reference(reference, protocol.size)
    label = f"{Path(getattr(model, 'folder', '')).resolve()} {_seen(reference)}"
    if toybox and reference is None:
        return Judges(model, None, lambda prompt: true_views(prompt, protocol), label)
    return Judges(model, pictures, label=label)


def _seen(reference: Path | None) -> str:
    """Which pictures these are: the folder, and the names, sizes and times of its files."""
    if reference is None:
        return ""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in reference.iterdir() if p.is_file())
    return f"{reference.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def read_reference(folder: Path, size: int) -> Tensor:
    """All pictures of a folder [M, 3, size, size], squared by cropping; ValueError where there are none."""
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise ValueError(f"no pictures in {folder}: a reference is a folder of png, jpg or webp files")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                square = picture.convert("RGB").crop((left, top, left + side, top + side))
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error}; take it out of the reference") from None
        pictures.append(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).copy())
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def true_views(prompt: str, protocol: Protocol) -> Tensor | None:
    """The views of a true toy of the prompt, from the protocol's cameras; None where the prompt names none."""
    from distill3d.toybox.captions import COLOR_NAMES, read_prompt
    from distill3d.toybox.world import View, build, draw

    reading = read_prompt(prompt)
    if reading.kind is None:
        return None
    toy = build(reading.kind, reading.color or COLOR_NAMES[0], seed=5)
    turns = [View(i * 360 / protocol.views, protocol.elevation) for i in range(protocol.views)]
    pictures = np.stack([draw(toy, view, protocol.background, protocol.size) for view in turns])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float()


def measurable(protocol: Protocol, judges: Judges) -> tuple[str, ...]:
    """Every metric that can be measured of some object of this bench."""
    blank = torch.zeros(protocol.views, 1, 8, 8)
    around = torch.arange(protocol.views) * 360 / protocol.views
    possible: set[str] = set()
    for prompt in protocol.prompts:
        cell = Cell(
            prompt, pictures=blank.expand(-1, 3, 8, 8), azimuths=around, opacity=blank, depth=blank,
            vertices=np.zeros((3, 3)), faces=np.array([[0, 1, 2]]), evaluator=judges.evaluator,
            reference=judges.reference_for(prompt), prompts=protocol.prompts, seconds=0.0, nfe=0.0,
            peak_memory=0.0,
        )  # fmt: skip
        possible |= {name for name, metric in KNOWN.items() if all(NEEDS[need](cell) for need in metric.needs)}
    if len(protocol.seeds) == 1:
        possible -= ACROSS.keys()
    return tuple(name for name in KNOWN if name in possible)


def choose_metrics(text: str | None, protocol: Protocol, judges: Judges) -> tuple[str, ...]:
    """The metrics that a command line means: names with commas between, "all" that can be measured, or None: the
    most telling of these.

    Raises:
        ValueError: for an unknown one.
    """
    possible = measurable(protocol, judges)
    if text is None:
        return tuple(name for name in HEADLINE if name in possible)
    if text == "all":
        return possible
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    check_names(names)
    return names


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown metric."""
    try:
        check_metrics([name for name in names if name not in ACROSS])
    except ValueError as error:
        raise ValueError(f"{error}, {', '.join(ACROSS)}, or all") from None


def score(
    out: Path, protocol: Protocol, judges: Judges, names: Sequence[str], on_cell: Callable[[], None] = lambda: None
) -> list[Scored]:
    """The numbers of all cells of the protocol that are finished, in the protocol's order.

    Raises:
        ValueError: for an unknown metric, and for damaged cells.
    """
    check_names(names)
    scored = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for task in protocol.tasks():
            folder = out / "cells" / task.folder
            outcome = read_outcome(folder)
            if outcome is not None:
                scored.append(Scored(task, outcome, _scores(folder, outcome, protocol, judges, names)))
            on_cell()
    for message in dict.fromkeys(str(one.message) for one in told):
        warnings.warn(message, stacklevel=2)
    return scored


def measured_cell(folder: Path, outcome: Outcome, protocol: Protocol, judges: Judges) -> Cell:
    """What `evaluation.metrics` wants to know of a cell."""
    common: dict[str, Any] = dict(
        prompt=outcome.prompt, prompts=protocol.prompts, elevation=protocol.elevation, distance=protocol.distance,
        fov=protocol.fov, background=protocol.background, seconds=outcome.seconds,
        nfe=outcome.nfe, peak_memory=outcome.peak_memory, failure=outcome.failure,
    )  # fmt: skip
    if outcome.failure:
        return Cell(**common)
    opacity, depth = read_maps(folder)
    vertices, faces = _mesh(folder / "mesh.glb")
    return Cell(
        **common, pictures=read_views(folder, protocol), azimuths=torch.arange(protocol.views) * 360 / protocol.views,
        opacity=opacity, depth=depth, vertices=vertices, faces=faces, evaluator=judges.evaluator,
        reference=judges.reference_for(outcome.prompt),
    )  # fmt: skip


def _scores(
    folder: Path, outcome: Outcome, protocol: Protocol, judges: Judges, names: Sequence[str]
) -> dict[str, float]:
    """The scores of one cell: those on disk that still hold, and the others measured now."""
    told = json.dumps([judges.label, sorted(protocol.prompts)])
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    path, kept = folder / "scores.json", {}
    try:
        content = json.loads(path.read_text())
        kept = content["scores"] if content["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    wanted = dict.fromkeys([*(name for name in names if name not in ACROSS), "diverged"])  # that is always counted
    missing = [name for name in wanted if name not in kept]
    if missing:
        cell = measured_cell(folder, outcome, protocol, judges)
        if outcome.failure:  # nothing to look at: what lacks its pictures is no news
            missing = [n for n in missing if all(NEEDS[need](cell) for need in METRICS[n].needs)]
        kept = {**kept, **measure(cell, missing)}
        with replacing(path) as draft:
            draft.write_text(json.dumps({"key": key, "scores": kept}))
    return {name: kept[name] for name in wanted if name in kept}


def diversities(out: Path, protocol: Protocol, judges: Judges, cells: Sequence[Scored]) -> dict[tuple[str, str], float]:
    """(prompt, variant) -> diversity over its seeds, where at least two of them have an object."""
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for cell in cells:
        if cell.outcome.failure or judges.evaluator is None:
            continue
        features = judges.evaluator.pictures(read_views(out / "cells" / cell.task.folder, protocol))
        groups.setdefault((cell.task.prompt, cell.task.variant.name), []).append(features)
    return {key: diversity(torch.stack(parts)) for key, parts in groups.items() if len(parts) > 1}


def _mesh(path: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Vertices in world space and faces of a GLB that we wrote; (None, None) where there is none."""
    if not path.is_file():
        return None, None
    import trimesh

    mesh = trimesh.load(path, force="mesh", process=False)
    to_world = [2, 0, 1]  # glTF's (x, y, z) is the world's (y, z, x)
    return np.asarray(mesh.vertices)[:, to_world], np.asarray(mesh.faces)  # type: ignore[union-attr]
