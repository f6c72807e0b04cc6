"""One cell: an object made under the protocol, its views, its mesh, and its cost.

A cell is a folder that appears whole: `config.json` and `metrics.jsonl` as in any run, `views.png` (the images that
are judged), `maps.npz` (their opacity and depth), `turn.webp` and `still.webp` (for the report), `mesh.glb` and
`cell.json`. Work in progress is in another folder, with a checkpoint every minute, and continues after a kill.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill3d import cameras
from distill3d.bench.protocol import Protocol, Task
from distill3d.distill.divergence import Diverged
from distill3d.distill.loop import ObjectRun, OnStep
from distill3d.distill.objects import object_run
from distill3d.evaluation.cost import Meter
from distill3d.export.options import ExportOptions
from distill3d.export.video import as_image, contact_sheet, save_image, still_webp, turning_webp
from distill3d.files import checksum, replacing, sync
from distill3d.interrupts import Interrupted
from distill3d.priors.components.folder import is_out_of_memory
from distill3d.runs.checkpoint import DamagedCheckpoint, has_checkpoint, json_checksum, read_state
from distill3d.runs.config import from_plain, resolved
from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import Config
from distill3d.types import Prior, Rendering, Scene
from distill3d.untrusted import read_image_file, read_npz, read_text

NOT_SEALED = ("cell.json", "scores.json", ".lock")  # what changes after a cell is finished
COLUMNS = 10  # of views.png
OUT_OF_MEMORY = "out of memory"  # as a failure
SMALL = ExportOptions(texture=None, faces=2_500, resolution=64)  # meshes that many fit into one page


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a finished cell; `failure` is empty, or says why there is no object."""

    variant: str
    prompt: str
    seed: int
    steps: int
    seconds: float  # of the loop
    nfe: int
    peak_memory: int  # bytes, see `evaluation.cost.Meter`; of the last part, if the cell was continued
    failure: str = ""


def make_cell(out: Path, protocol: Protocol, task: Task, prior: Prior, on_step: OnStep) -> Outcome:
    """Makes the object of a task and its folder in `out`/cells; a failure is recorded as an outcome.

    Raises:
        ValueError: for settings that do not fit the prior or the scene.
        KeyboardInterrupt: after the state was saved; the same call continues from there.
    """
    folder = RunFolder(out / "work" / task.folder)
    outcome = read_outcome(folder.path)  # there if it was killed before the folder was moved
    if outcome is None:
        outcome = _make(folder, protocol, task, prior, on_step)
    if outcome.failure != OUT_OF_MEMORY:  # else it may go on from it later
        shutil.rmtree(folder.checkpoint, ignore_errors=True)
    (out / "cells").mkdir(exist_ok=True)
    shutil.rmtree(out / "cells" / task.folder, ignore_errors=True)  # remains without a cell.json
    folder.path.rename(out / "cells" / task.folder)
    sync(out / "cells")
    return outcome


def _make(folder: RunFolder, protocol: Protocol, task: Task, prior: Prior, on_step: OnStep) -> Outcome:
    """The object of a task in a folder of work, with cell.json as the last of its files."""
    config = resolved(protocol.config(task))
    with Meter(prior.device) as meter:
        try:
            scene = _trained(folder, config, prior, on_step).scene
            failure = make_artifacts(folder.path, scene, protocol)
        except Diverged:
            failure = "nan"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = OUT_OF_MEMORY
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_config("object", config)
    last = (folder.history() or [{"step": -1, "seconds": 0.0, "nfe": 0}])[-1]
    outcome = Outcome(
        variant=task.variant.name,
        prompt=task.prompt,
        seed=task.seed,
        steps=last["step"] + 1,
        seconds=last["seconds"],
        nfe=last["nfe"],
        peak_memory=meter.peak_memory,
        failure=failure,
    )
    write_outcome(folder.path, outcome)
    return outcome


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Writes cell.json, with checksums of itself and of what else is in the folder now."""
    files = {p.name: checksum(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name not in NOT_SEALED}
    content = {**dataclasses.asdict(outcome), "files": files}
    with replacing(folder / "cell.json") as draft:
        draft.write_text(json.dumps({"sha256": json_checksum(content), **content}, indent=1, allow_nan=False))


def reopen_cell(out: Path, task: Task) -> None:
    """Makes a finished cell one in progress again, at its checkpoint."""
    work = out / "work" / task.folder
    shutil.rmtree(work, ignore_errors=True)
    work.parent.mkdir(exist_ok=True)
    (out / "cells" / task.folder).rename(work)
    (work / "cell.json").unlink()


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome in a cell's folder; None if the cell is not finished.

    Raises:
        ValueError: for a damaged cell.json.
    """
    path = folder / "cell.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path))
        stated = content.pop("sha256", None)  # cells of earlier versions have none
        if stated is not None and stated != json_checksum(content):
            raise ValueError("it does not have the checksum that it states")
        files = content.pop("files", {})
        outcome = from_plain(Outcome, content)
        for name, stated in files.items():
            if checksum(folder / name) != stated:
                raise ValueError(f"{name} does not have the checksum in it")
        return outcome
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete its folder to make the cell again") from None


def read_views(folder: Path, protocol: Protocol) -> Tensor:
    """The views [views, 3, size, size] of a cell, in [0, 1]; ValueError where they are missing or damaged."""
    try:
        sheet = torch.from_numpy(np.asarray(read_image_file(folder / "views.png").convert("RGB")).copy())
    except ValueError as error:
        raise ValueError(
            f"{folder / 'views.png'} cannot be read: {error}; delete its folder to make the cell again"
        ) from None
    rows, n = -(-protocol.views // COLUMNS), protocol.size
    columns = min(COLUMNS, protocol.views)
    if sheet.shape[:2] != (rows * n, columns * n):
        raise ValueError(f"{folder / 'views.png'} has another size: delete its folder to make the cell again")
    tiles = sheet.view(rows, n, columns, n, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, n, n)
    return tiles[: protocol.views].float() / 255


def read_maps(folder: Path) -> tuple[Tensor, Tensor]:
    """Opacity and depth [views, 1, size, size] of a cell; ValueError where they are missing or damaged."""
    try:
        maps = read_npz(folder / "maps.npz")
        opacity, depth = (torch.from_numpy(maps[name]).float() for name in ("opacity", "depth"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{error}; delete its folder to make the cell again") from None
    return opacity / 255, depth


def make_artifacts(work: Path, scene: Scene, protocol: Protocol) -> str:
    """Writes the views, maps and mesh of a scene; returns "" or why there is nothing to write."""
    seen = photographed(scene, protocol)
    if not bool(torch.isfinite(seen.rgb).all()):
        return "nan"
    views = seen.rgb.clamp(0, 1)
    with replacing(work / "maps.npz") as draft:
        opacity = (seen.opacity.clamp(0, 1) * 255).round().byte().numpy()
        np.savez_compressed(draft, opacity=opacity, depth=seen.depth.half().numpy())
    save_image(work / "views.png", contact_sheet(views, COLUMNS, gap=0))
    images = [as_image(view) for view in views]
    for name, picture in (("turn.webp", turning_webp(images)), ("still.webp", still_webp(images[0]))):
        with replacing(work / name) as draft:
            draft.write_bytes(picture)
    try:
        scene.cpu().export(work, SMALL)
    except ValueError:  # nothing solid: the report then has no model of it
        (work / "mesh.glb").unlink(missing_ok=True)
    return ""


@torch.no_grad()
def photographed(scene: Scene, protocol: Protocol) -> Rendering:
    """Evenly spaced views around a scene, the first from the front, rendered on its device and brought to the CPU."""
    scene.eval()
    place = next(iter(scene.parameters())).device
    around = cameras.turntable(protocol.views, protocol.elevation, protocol.distance, protocol.fov).to(place)
    behind = torch.full((1, 3), protocol.background, device=place)
    seen = [scene.render(around[i : i + 1], protocol.size, behind) for i in range(protocol.views)]
    names = ("rgb", "opacity", "depth", "depth_variance")
    return Rendering(**{name: torch.cat([getattr(one, name) for one in seen]).cpu() for name in names})


def _trained(work: RunFolder, config: Config, prior: Prior, on_step: OnStep) -> ObjectRun:
    """The finished run of a configuration, from the checkpoint in its folder or from the start.

    A damaged checkpoint, or a log that is not its own, cannot be continued: the run is made again, with a warning.
    """
    work.path.mkdir(parents=True, exist_ok=True)
    work.tidy()
    try:
        if has_checkpoint(work.checkpoint) and not work.intact(read_state(work.checkpoint)):
            raise DamagedCheckpoint(f"{work.metrics} is damaged")
        run = object_run(config.recipe, config.prompts, prior, config.seed)
        training = work.train(run, config.recipe.steps, on_step)
    except DamagedCheckpoint as error:
        warnings.warn(f"{error}; this object is made again from its first step", stacklevel=1)
        shutil.rmtree(work.path)
        return _trained(work, config, prior, on_step)
    if training.interrupted:
        raise Interrupted(training.interrupted)
    return run
