"""From finished cells to numbers: the metrics of `evaluation.metrics`, and diversity over the seeds of a prompt.

Scores are stored in each cell's folder and measured again only if what they depend on has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from distill3d.bench.cells import Outcome, read_maps, read_outcome, read_views
from distill3d.bench.protocol import Protocol, Task
from distill3d.cameras import turntable
from distill3d.evaluation.distances import diversity
from distill3d.evaluation.evaluator import Evaluator, load_evaluator
from distill3d.evaluation.ground_truth import true_kind
from distill3d.evaluation.language import knows_iqa
from distill3d.evaluation.metrics import METRICS, Quantity, RunResult, check_metrics, measure
from distill3d.evaluation.views import has_back_views
from distill3d.files import nan_as_null, replacing
from distill3d.meshes.files import read_mesh
from distill3d.priors.components.hub import BUNDLED
from distill3d.runs.checkpoint import json_checksum
from distill3d.untrusted import read_image_file

DIVERSITY = Quantity("diversity", "higher", "")  # measured over the seeds of a prompt, not from one cell
QUANTITIES: dict[str, Quantity] = {**METRICS, DIVERSITY.name: DIVERSITY}
HEADLINE = (  # the most informative metrics, in the order of the tables
    *("clip_score", "clip_r_precision", "clip_iqa_quality", "clip_iqa_sharpness", "clip_iqa_real", "image_reward"),
    *("sharpness", "edge_concentration", "spectrum_gap", "saturation", "janus_rate", "lost_back"),
    *("toy_rate", "silhouette_iou", "chamfer", "diversity", "diverged", "seconds", "nfe", "peak_memory"),
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """A finished cell and its scores; a metric that could not be measured is missing."""

    task: Task
    outcome: Outcome
    scores: dict[str, float]

    @property
    def diverged(self) -> bool:
        """Whether the run failed or diverged, see `RunResult.divergence`."""
        return bool(self.outcome.failure) or bool(self.scores.get("diverged", 0.0))


@dataclasses.dataclass(frozen=True)
class Judges:
    """What images are compared with: a CLIP model, and reference images for each prompt."""

    evaluator: Evaluator | None = None
    reference: Callable[[str], Tensor | None] = lambda prompt: None  # prompt -> images [M, 3, H, W]
    fingerprint: str = ""  # identifies both; scores by other judges are measured again


def find_evaluator(name: str | Path | None, prior: str) -> Evaluator | None:
    """The evaluator of a name (see `load_evaluator`), by default the bundled judge for the bundled prior, else None.

    Raises:
        ValueError: if there is no such evaluator.
    """
    if name is None:
        return load_evaluator("toybox") if prior in BUNDLED else None
    return load_evaluator(name)


def find_judges(protocol: Protocol, evaluator: str | Path | None, reference: Path | None) -> Judges:
    """The judges of a bench.

    Args:
        evaluator: see `find_evaluator`.
        reference: folder of reference images; by default ground-truth renders for the bundled prior, else none.

    Raises:
        ValueError: if a folder does not exist or holds no such thing.
    """
    model = find_evaluator(evaluator, protocol.prior)
    fingerprint = f"{'' if model is None else model.folder.resolve()} {_content(reference)}"
    if reference is not None:
        images = read_reference(reference, protocol.size)
        return Judges(model, lambda prompt: images, fingerprint)
    if protocol.prior in BUNDLED:
        return Judges(model, lambda prompt: true_views(prompt, protocol), fingerprint)
    return Judges(model, fingerprint=fingerprint)


def _content(folder: Path | None) -> str:
    """Identifies the content of a folder by the names, sizes and times of its files."""
    if folder is None or not folder.is_dir():
        return ""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
    return f"{folder.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def read_reference(folder: Path, size: int) -> Float[Tensor, "m 3 size size"]:
    """All images of a folder, center-cropped to squares.

    Raises:
        ValueError: if there are none, or one cannot be read.
    """
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise ValueError(f"no images in {folder}: a reference is a folder of png, jpg or webp files")
    images = []
    for file in files:
        try:
            image = read_image_file(file)
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}; remove it from the reference folder") from None
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        images.append(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).copy())
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def true_views(prompt: str, protocol: Protocol) -> Float[Tensor, "views 3 size size"] | None:
    """Ground-truth renders of a prompt's toy from the protocol's cameras; None if the prompt names no toy."""
    from distill3d.toybox.captions import COLOR_NAMES, read_prompt
    from distill3d.toybox.world import View, build, draw

    reading = read_prompt(prompt)
    if reading.kind is None:
        return None
    toy = build(reading.kind, reading.color or COLOR_NAMES[0], seed=5)
    views = [View(i * 360 / protocol.views, protocol.elevation) for i in range(protocol.views)]
    images = np.stack([draw(toy, view, protocol.background, protocol.size) for view in views])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


# What every object of a bench has, unless it failed.
RENDERED = {"prompt", "images", "cameras", "azimuths", "opacity", "depth", "mesh"}
ALWAYS = {*RENDERED, "divergence", "seconds", "nfe", "peak_memory"}


def measurable(protocol: Protocol, judges: Judges) -> tuple[str, ...]:
    """Every metric that can be measured for some prompt of this bench."""
    possible: set[str] = set()
    for prompt in protocol.prompts:
        available = ALWAYS | _provided(prompt, protocol, judges)
        possible |= {m.name for m in METRICS.values() if m.installed and available.issuperset(m.needs)}
    if judges.evaluator is not None and len(protocol.seeds) > 1:
        possible.add(DIVERSITY.name)
    return tuple(name for name in QUANTITIES if name in possible)


def _provided(prompt: str, protocol: Protocol, judges: Judges) -> set[str]:
    """The needs of metrics (see `Metric.needs`) that depend on the judges and the protocol."""
    evaluator, reference = judges.evaluator, judges.reference(prompt)
    conditions = {
        "evaluator": evaluator is not None,
        "iqa_evaluator": evaluator is not None and knows_iqa(evaluator),
        "reference": reference is not None,
        "features": evaluator is not None and reference is not None and min(protocol.views, len(reference)) > 1,
        "prompt_pool": len(protocol.prompts) > 1,
        "azimuths_with_back": has_back_views(turntable(protocol.views, 0.0, 1.0, 1.0).azimuth),
        "kind": true_kind(prompt) is not None,
    }
    return {name for name, there in conditions.items() if there}


def choose_metrics(text: str | None, protocol: Protocol, judges: Judges) -> tuple[str, ...]:
    """The metrics of a command line: comma-separated names, "all" that are measurable, or by default (None) the most
    informative of these.

    Raises:
        ValueError: for an unknown name.
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
        check_metrics([name for name in names if name != DIVERSITY.name])
    except ValueError as error:
        raise ValueError(f"{error}, {DIVERSITY.name}, or all") from None


def score(
    out: Path, protocol: Protocol, judges: Judges, names: Sequence[str], on_cell: Callable[[], None] = lambda: None
) -> list[Scored]:
    """The scores of all finished cells of a protocol, in the protocol's order.

    Raises:
        ValueError: for an unknown metric, or a damaged cell.
    """
    check_names(names)
    scored = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for task in protocol.tasks():
            folder = out / "cells" / task.folder
            outcome = read_outcome(folder)
            if outcome is not None:
                scored.append(Scored(task, outcome, _scores(folder, outcome, protocol, judges, names)))
            on_cell()
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warnings.warn(message, stacklevel=1)
    return scored


def read_result(folder: Path, outcome: Outcome, protocol: Protocol, judges: Judges) -> RunResult:
    """A cell as the metrics need it.

    Raises:
        ValueError: if the cell is damaged.
    """
    result = RunResult(
        outcome.prompt,
        prompts=protocol.prompts,
        seconds=outcome.seconds,
        nfe=outcome.nfe,
        peak_memory=outcome.peak_memory,
        failure=outcome.failure,
    )
    if outcome.failure:
        return result
    opacity, depth = read_maps(folder)
    return dataclasses.replace(
        result,
        images=read_views(folder, protocol),
        cameras=turntable(protocol.views, protocol.elevation, protocol.distance, protocol.fov),
        opacity=opacity,
        depth=depth,
        mesh=read_mesh(folder / "mesh.glb") if (folder / "mesh.glb").is_file() else None,
        evaluator=judges.evaluator,
        reference=judges.reference(outcome.prompt),
    )


def _scores(
    folder: Path, outcome: Outcome, protocol: Protocol, judges: Judges, names: Sequence[str]
) -> dict[str, float]:
    """The scores of one cell: those on disk that are still valid, and the others measured now."""
    conditions = json.dumps([judges.fingerprint, sorted(protocol.prompts)], allow_nan=False)
    key = hashlib.sha256(conditions.encode()).hexdigest()[:16]
    path, kept = folder / "scores.json", {}
    try:
        content = json.loads(path.read_text())
        stated = content.pop("sha256", None)  # earlier versions wrote none
        whole = stated is None or stated == json_checksum(content)
        kept = content["scores"] if content["key"] == key and whole else {}
        kept = {name: math.nan if value is None else float(value) for name, value in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kept = {}
    wanted = dict.fromkeys([*(name for name in names if name in METRICS), "diverged"])  # always counted
    new = [name for name in wanted if name not in kept]
    if new:
        result = read_result(folder, outcome, protocol, judges)
        if outcome.failure:  # there is nothing to see: no warning about metrics that need images
            new = [name for name in new if not result.missing(METRICS[name])]
        kept = {**kept, **measure(result, new)}
        with replacing(path) as draft:
            content = {"key": key, "scores": nan_as_null(kept)}
            draft.write_text(json.dumps({"sha256": json_checksum(content), **content}, allow_nan=False))
    return {name: kept[name] for name in wanted if name in kept}


def diversities(out: Path, protocol: Protocol, judges: Judges, cells: Sequence[Scored]) -> dict[tuple[str, str], float]:
    """(prompt, variant) -> diversity over its seeds, where at least two of them have an object."""
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for cell in cells:
        if cell.outcome.failure or judges.evaluator is None:
            continue
        features = judges.evaluator.embed_images(read_views(out / "cells" / cell.task.folder, protocol))
        groups.setdefault((cell.task.prompt, cell.task.variant.name), []).append(features)
    return {key: diversity(torch.stack(parts)) for key, parts in groups.items() if len(parts) > 1}
