"""From a sentence to a run folder: the whole path, as a function.

A run folder holds `config.json` (everything to repeat the run), `metrics.jsonl` (a line a step), `checkpoint/`,
`preview.png` (8 views), `turntable.mp4` and `mesh.glb`.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import secrets
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import distill3d
from distill3d.export import video
from distill3d.runs.checkpoint import interrupts_between_steps, load_checkpoint, restore_optimizer, save_checkpoint
from distill3d.files import replacing
from distill3d.meshes.mesh import RADIUS, place, placed, read_mesh
from distill3d.distill.loop import ObjectRun, Progress, scene_module
from distill3d.priors.base import FrozenPrior
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.prompts import ViewPrompts
from distill3d.distill.recipes import LAPTOP, Recipe, check_method
from distill3d.distill.supervision import prompts_for, shape_prompts
from distill3d.types import Scene

Report = Callable[[Progress], None]
CHECKPOINT_SECONDS = 60.0
TURNTABLE_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run; what `config.json` holds beside the versions."""

    prompt: str
    recipe: Recipe = LAPTOP
    method: str = "sdi"
    prior: str = "toybox"
    negative: str = ""
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    prior_options: PriorOptions = PriorOptions()
    views: dict[str, str] = dataclasses.field(default_factory=dict)  # texts of single directions
    init: str | None = None  # a mesh that the scene begins with

    @property
    def prompts(self) -> ViewPrompts:
        """The texts of all views."""
        return ViewPrompts(self.prompt, self.negative, self.recipe.perp_neg, self.views)

    def load_prior(self, prior: FrozenPrior | None = None) -> FrozenPrior:
        """The prior (the one that is given, or a new one), all texts of the run embedded, its text encoders gone."""
        prior = prior or load_prior(self.prior, self.device, getattr(torch, self.dtype), self.prior_options)
        prior.prepare(self.texts(prior))
        return prior

    def texts(self, prior: FrozenPrior) -> list[str]:
        """All that the run asks this prior for in words, for the second objective too where it has no other prior."""
        supervision, texts = self.recipe.supervision, prompts_for(self.prompts, prior).texts
        if supervision.on and not supervision.apart:
            texts += prompts_for(shape_prompts(self.prompts, supervision), prior).texts
        return list(texts)

    def load_second(self, prior: FrozenPrior | None = None) -> FrozenPrior | None:
        """The same for the prior of the second objective; None where it has none of its own."""
        supervision = self.recipe.supervision
        if not supervision.apart:
            return None
        name, dtype = supervision.prior or self.prior, getattr(torch, self.dtype)
        prior = prior or load_prior(name, self.device, dtype, supervision.options)
        prior.prepare(prompts_for(shape_prompts(self.prompts, supervision), prior).texts)
        return prior


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended."""

    folder: Path
    steps: int  # finished
    interrupted: bool
    seconds: float  # of the loop
    mesh: Path | None  # or splats; None when there is no surface to export


def check_prompt(prompt: str, prior: str, force: bool = False) -> None:
    """Refuses what the bundled prior cannot know; warns of words that it has never read.

    Raises:
        ValueError: for an empty prompt, and for the toybox if the prompt names no kind of toy and `force` is off.
    """
    ViewPrompts(prompt)
    if prior != "toybox":
        return
    from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, read_prompt

    reading = read_prompt(prompt)
    if reading.kind is None and not force:
        raise ValueError(
            f"the bundled prior knows no object in {prompt!r}.\n"
            f"  kinds:   {', '.join(KIND_NAMES)}\n"
            f"  colors: {', '.join(COLOR_NAMES)}\n"
            "  any other prompt: give an open-vocabulary model, --prior FOLDER_OR_HUB_ID "
            "(sd15, sdxl, sd35, ...: see distill3d doctor), or try all the same with --force"
        )
    if reading.unknown:
        warnings.warn(
            f"the bundled prior has never read: {', '.join(reading.unknown)}; these words will do nothing sensible",
            stacklevel=2,
        )


def generate(
    config: Config,
    out: str | Path = "runs",
    force: bool = False,
    on_step: Report = lambda progress: None,
    prior: FrozenPrior | None = None,
    second: FrozenPrior | None = None,
) -> Result:
    """Makes an object and writes its run folder below `out`.

    An interrupt (Ctrl-C) ends the loop after the step that is under way, a second one at once; the artifacts of what
    is there are written all the same. `prior` and `second` are what the configuration's names mean, where they were
    loaded before.

    Raises:
        ValueError: for anything wrong with the prompt, the prior, the method or the output folder, before
            anything is written.
    """
    check_prompt(config.prompt, config.prior, force)
    check_method(config.method)
    prior, second = config.load_prior(prior), config.load_second(second)
    run = ObjectRun(config.recipe, config.method, config.prompts, prior, config.seed, second)
    if config.init is not None:
        mesh = read_mesh(config.init)
        run.begin_with(placed(mesh, place(mesh, min(RADIUS, config.recipe.cameras.whole))))
    folder = new_run_folder(Path(out), config.prompt)
    write_config(folder, with_own_mesh(folder, config))
    return _finish(run, folder, start=0, on_step=on_step)


def resume(folder: str | Path, on_step: Report = lambda progress: None) -> Result:
    """Continues a run from its checkpoint and writes its artifacts anew.

    Raises:
        ValueError: where the folder is no run or has no checkpoint.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / "checkpoint" / "state.json").is_file():
        raise ValueError(f"{folder} has no checkpoint to continue from")
    prior, second = config.load_prior(), config.load_second()
    run = ObjectRun(config.recipe, config.method, config.prompts, prior, config.seed, second)
    start, moments = load_checkpoint(folder / "checkpoint", run.module, run.generator, run.student)
    run.restart_optimizer()
    restore_optimizer(run.adam, moments)
    return _finish(run, folder, start, on_step)


def load_scene(folder: str | Path) -> Scene:
    """The scene of a run (see `distill3d.Scene`), from its checkpoint, ready to render.

    Raises:
        ValueError: where the folder is no run or has no checkpoint.
    """
    module = scene_module(read_config(Path(folder)).recipe)
    load_checkpoint(Path(folder) / "checkpoint", module, torch.Generator())
    scene: Any = module["scene"]
    return scene.eval()


def _finish(run: ObjectRun, folder: Path, start: int, on_step: Report) -> Result:
    """Goes through the steps from `start` on, with a checkpoint now and then, and writes the artifacts."""
    began = saved = time.monotonic()
    done, interrupted, between = start, False, False
    # A killed run may have written lines after its last checkpoint; those steps come again.
    log = folder / "metrics.jsonl"
    before = log.read_text().splitlines()[:start] if start else []
    nfe = json.loads(before[-1])["nfe"] if before else 0

    def save() -> None:
        save_checkpoint(folder / "checkpoint", run.module, run.adam, done, run.generator, run.student)

    with replacing(log) as draft:
        draft.write_text("".join(line + "\n" for line in before))
    with log.open("a") as metrics, interrupts_between_steps() as heed:

        def after(progress: Progress) -> None:
            nonlocal saved, done, between
            done, between = progress.step + 1, True
            metrics.write(json.dumps(dataclasses.asdict(progress)) + "\n")
            metrics.flush()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
            on_step(progress)
            heed()
            between = done == run.recipe.steps

        try:
            run.distill(range(start, run.recipe.steps), after, nfe)
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.monotonic() - began
    if between or not (folder / "checkpoint" / "state.json").is_file():
        save()
    mesh = write_artifacts(folder, run.scene, run.recipe)
    return Result(folder, done, interrupted, seconds, mesh)


@torch.no_grad()
def write_artifacts(folder: Path, scene: Scene, recipe: Recipe) -> Path | None:
    """Writes preview.png, turntable.mp4 and mesh.glb, or for splats splats.ply; returns the last one's path.

    None where there is no surface.

    The scene is moved to the CPU, where frames are rendered side by side.
    """
    scene.cpu().eval()
    frames = recipe.frames
    turn = list(video.turntable_frames(scene, frames, TURNTABLE_SIZE, background=0.9))
    preview = torch.stack([turn[i * frames // 8] for i in range(8)])
    video.save_image(folder / "preview.png", video.contact_sheet(preview, columns=4))
    video.save_video(folder / "turntable.mp4", turn, fps=16)
    try:
        return scene.export(folder, recipe.export)[0]
    except ValueError as error:
        warnings.warn(f"no mesh written: {error}", stacklevel=2)
        return None


def render_views(scene: Scene, views: int, size: int, elevation: float = 15.0, background: float = 0.9) -> torch.Tensor:
    """Pictures [views, 3, size, size] evenly around a scene, the first from the front."""
    pictures = video.turntable_frames(scene, views, size, elevation, background=background)
    return torch.stack(list(pictures)).clamp(0, 1)


def new_run_folder(out: Path, prompt: str) -> Path:
    """Makes `out`/<slug>-<id>; the slug holds only letters, digits and dashes, whatever the prompt says.

    Raises:
        ValueError: where the folder cannot be made.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "run"
    folder = out / f"{slug}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    return folder


def with_own_mesh(folder: Path, config: Config) -> Config:
    """The configuration with the mesh that is painted copied into the run's folder, and named relative to it."""
    scene = config.recipe.scene.with_own_files(folder)
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, scene=scene))


def _located(config: Config, folder: Path) -> Config:
    """The configuration of a run with the mesh found where the folder is now."""
    scene = config.recipe.scene.located(folder)
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, scene=scene))


def write_config(folder: Path, config: Config) -> None:
    """Writes config.json: the configuration and the versions it ran with."""
    content = dataclasses.asdict(config)
    content["versions"] = {
        "distill3d": distill3d.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
    }
    with replacing(folder / "config.json") as draft:
        draft.write_text(json.dumps(content, indent=2))


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        ValueError: where the folder is no run, or its config.json cannot be understood.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run: it has no config.json")
    try:
        content = json.loads(path.read_text())
        content.pop("versions", None)
        return _located(_from_plain(Config, content), folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _from_plain(kind: Any, value: Any) -> Any:
    """Dataclasses and tuples out of the dicts and lists of JSON, by the annotations."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _from_plain(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _of_union(arguments, value)
    if origin is tuple:
        inner = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(_from_plain(k, item) for k, item in zip(inner, value, strict=True))
    return value


def _of_union(kinds: tuple[Any, ...], value: Any) -> Any:
    """Which of several dataclasses a dict means: the one with these fields, or the only one that has them all.

    A folder of an earlier version lacks what was added since, and takes the defaults.
    """
    if not isinstance(value, dict):
        return value
    fields = {k: {f.name for f in dataclasses.fields(k)} for k in kinds if dataclasses.is_dataclass(k)}
    fits = [k for k in fields if fields[k] == value.keys()] or [k for k in fields if fields[k] >= value.keys()]
    if len(fits) != 1:
        raise ValueError(f"nothing known has the fields {', '.join(value)}")
    return _from_plain(fits[0], value)
