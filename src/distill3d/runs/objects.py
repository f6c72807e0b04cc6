"""From a prompt to a 3D object in a run folder.

A run folder holds `config.json` (everything to repeat the run), `metrics.jsonl` (one line per step), `checkpoint/`,
`preview.png` (8 views), `turntable.mp4` and `mesh.glb` (or `splats.ply`).
"""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from distill3d.distill.divergence import Diverged
from distill3d.distill.loop import ObjectRun, OnStep
from distill3d.distill.objects import object_run
from distill3d.distill.observer import Observer
from distill3d.distill.recipes import LAPTOP, PRIORS, Recipe
from distill3d.export import video
from distill3d.meshes.files import Up, read_mesh
from distill3d.meshes.mesh import RADIUS, place, placed, rotated
from distill3d.objectives import Method
from distill3d.priors.base import resolve_device
from distill3d.priors.components.folder import is_out_of_memory
from distill3d.priors.components.hub import BUNDLED
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.runs.checkpoint import has_checkpoint, load_module, read_state
from distill3d.runs.config import RunConfig, resolved
from distill3d.runs.folder import CONFIG, RunFolder
from distill3d.runs.watching import Watching
from distill3d.types import Prior, Scene, SceneOptions

TURNTABLE_SIZE = 256
OnFile = Callable[[str], None]  # called with what is about to be written


@dataclass(frozen=True)
class Config(RunConfig):
    """Everything that decides the object of a run."""

    prompt: str
    recipe: Recipe = LAPTOP
    prior: str = field(default="", kw_only=True)  # by default a bundled one: the multi-view prior for sampled views
    views: dict[str, str] = field(default_factory=dict)  # texts of single directions: front, side, back, overhead
    init: str | None = None  # a mesh that the scene starts from
    init_up: Up = "auto"  # its upward axis
    init_turn: float = 0.0  # degrees by which it is turned, counter-clockwise from above, to face the front

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prior:
            name = PRIORS["distill" if self.recipe.sampling is None else "laptop"]
            object.__setattr__(self, "prior", name)

    @property
    def prompts(self) -> ViewPrompts:
        """The texts of all views."""
        return ViewPrompts(self.prompt, self.negative, self.recipe.perp_neg, self.views)


@dataclass(frozen=True)
class Result:
    """Where a run ended."""

    folder: Path
    steps: int  # finished
    nfe: int  # network evaluations
    interrupted: int  # the number of the signal that ended it early, as of Ctrl-C; else 0
    seconds: float  # of the loop
    export_seconds: float  # of the preview, the video and the files
    files: tuple[Path, ...]  # what the scene was exported to; empty if there is no surface

    @property
    def mesh(self) -> Path | None:
        """The first exported file, a mesh or splats."""
        return self.files[0] if self.files else None


def check_prompt(prompt: str, prior: str, force: bool = False) -> None:
    """Rejects prompts outside the bundled prior's vocabulary, and warns of single unknown words.

    Raises:
        ValueError: for an empty prompt, and for the toybox if the prompt names no kind of toy and `force` is off.
    """
    ViewPrompts(prompt)
    if prior not in BUNDLED:
        return
    from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, read_prompt

    reading = read_prompt(prompt)
    if reading.kind is None and not force:
        raise ValueError(
            f"the bundled prior does not know any object in {prompt!r}.\n"
            f"  objects: {', '.join(KIND_NAMES)}\n"
            f"  colors:  {', '.join(COLOR_NAMES)}\n"
            "  For any other prompt use an open-vocabulary model, --prior NAME_OR_FOLDER (sd15, sdxl, sd35, ...: "
            "see distill3d doctor), or try it anyway with --force."
        )
    if reading.unknown:
        words = ", ".join(reading.unknown)
        warnings.warn(f"the bundled prior does not know these words and will ignore them: {words}", stacklevel=1)


def load_priors(config: Config, prior: Prior | None = None, second: Prior | None = None) -> tuple[Prior, Prior | None]:
    """The prior of a run and that of its second objective (None if it has none of its own).

    Priors that are given are used as they are; the others are loaded by name.
    """
    supervision = config.recipe.supervision
    prior = prior or load_prior(config.prior, config.device, config.dtype, config.prior_options)
    if not supervision.separate_prior:
        return prior, None
    if second is None:
        second = load_prior(supervision.prior or config.prior, config.device, config.dtype, supervision.options)
    return prior, second


def generate(
    config: Config | str,
    out: str | Path = "runs",
    *,
    force: bool = False,
    retries: int = 0,
    on_step: OnStep = lambda progress: None,
    prior: Prior | None = None,
    second: Prior | None = None,
    observers: Sequence[Observer] = (),
    on_file: OnFile = lambda names: None,
) -> Result:
    """Makes an object and writes its run folder below `out`.

    Ctrl-C ends the loop after the present step, a second one at once; the artifacts are written in both cases. The
    command line hears SIGTERM and SIGHUP, too.

    Args:
        config: a configuration, or just a prompt. Its recipe may hold an objective and a scene of your own.
        force: run even if the bundled prior does not know the prompt.
        retries: how often a run that diverges goes on from its last checkpoint with another seed.
        prior, second: priors that are loaded already, or your own; default: those that the configuration names.
        observers: they see each step and may change settings, pause or end the run (see distill3d.distill.observer).
        on_file: called after the last step with what is about to be written, such as "preview and turntable".

    Raises:
        ValueError: for anything wrong with the prompt, the prior, the objective or the output folder, before anything
            is written.
        Diverged: for numbers that are not finite; the artifacts then show the last finite state.
    """
    config = Config(config) if isinstance(config, str) else config
    if prior is None:
        check_prompt(config.prompt, config.prior, force)
    config = resolved(config)
    prior, second = load_priors(config, prior, second)
    run = _start(config, prior, second)
    folder = RunFolder.create(out, config.prompt)
    with folder.locked():
        own = config.recipe.scene.with_own_files(folder.path)
        folder.write_config("object", replace(config, recipe=replace(config.recipe, scene=own)))
        return _finish(run, folder, on_step, retries, observers, on_file)


def generate_in(
    folder: RunFolder, config: Config, prior: Prior, second: Prior | None, on_step: OnStep, retries: int = 0
) -> Result:
    """Makes an object in a folder of this name, or goes on with the one that was begun there; see `generate`."""
    begun = has_checkpoint(folder.checkpoint)
    run = _start(replace(config, init=None) if begun else config, prior, second)
    with folder.locked():
        if not (folder.path / CONFIG).is_file():
            own = config.recipe.scene.with_own_files(folder.path)
            folder.write_config("object", replace(config, recipe=replace(config.recipe, scene=own)))
        return _finish(run, folder, on_step, retries, ())


def resume(
    folder: str | Path,
    on_step: OnStep = lambda progress: None,
    *,
    prior: Prior | None = None,
    scene: SceneOptions | None = None,
    objective: Method | None = None,
    device: str | None = None,
    retries: int = 0,
    observers: Sequence[Observer] = (),
    on_file: OnFile = lambda names: None,
) -> Result:
    """Continues a run from its checkpoint, or from the start if there is none yet, and writes its artifacts.

    Args:
        prior, scene, objective: needed where the run used your own; they cannot be read from its folder.
        device: where to compute; default: the device of the run.
        retries, observers, on_file: as for `generate`. Settings that observers changed before are changed at the same
            steps.

    Raises:
        ValueError: where the folder is not a run, its checkpoint is missing or damaged, or another process is at work.
        Diverged: as for `generate`.
    """
    config, run_folder = read_config(Path(folder), scene, objective), RunFolder(Path(folder))
    with run_folder.locked():
        begun = has_checkpoint(run_folder.checkpoint)
        if not begun and run_folder.history():
            raise ValueError(f"{folder} has no checkpoint to continue from")
        config = replace(config, device=device or config.device)
        prior, second = load_priors(config, prior)
        run = _start(replace(config, init=None) if begun else config, prior, second)
        return _finish(run, run_folder, on_step, retries, observers, on_file)


def read_config(folder: Path, scene: SceneOptions | None = None, objective: Method | None = None) -> Config:
    """The configuration of an object's run, with a scene and an objective of your own put in.

    Raises:
        ValueError: where the folder is not a run of an object, or its config.json cannot be read.
    """
    config = RunFolder(folder).read_config("object", Config)
    scene = scene or config.recipe.scene.located(folder)
    return replace(config, recipe=replace(config.recipe, scene=scene, objective=objective or config.recipe.objective))


def load_scene(folder: str | Path, scene: SceneOptions | None = None, device: str = "cpu") -> Scene:
    """The scene of a run from its checkpoint, ready to render; `scene` as for `resume`.

    Raises:
        ValueError: where the folder is not a run or has no checkpoint, or the device cannot be used.
    """
    folder, place = Path(folder), resolve_device(device)
    recipe = read_config(folder, scene).recipe
    parts = {"scene": recipe.scene.build(place), "background": recipe.background.build(place)}
    module = torch.nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)})
    load_module(RunFolder(folder).checkpoint, module)
    RunFolder(folder).warn_of_changes(read_state(RunFolder(folder).checkpoint))
    return module["scene"].eval()  # type: ignore[return-value]


@torch.no_grad()
def write_artifacts(
    folder: Path, scene: Scene, recipe: Recipe, on_file: OnFile = lambda names: None
) -> tuple[Path, ...]:
    """Writes preview.png, turntable.mp4 and what the scene exports; returns the paths of the latter, maybe none.

    The views are rendered where the scene is; then it is moved to the CPU.
    """
    on_file("preview and turntable")
    turn = list(video.turntable_frames(scene.eval(), recipe.frames, TURNTABLE_SIZE))
    preview = torch.stack([turn[i * recipe.frames // 8] for i in range(8)])
    video.save_image(folder / "preview.png", video.contact_sheet(preview, columns=4))
    video.save_video(folder / "turntable.mp4", turn, fps=16)
    on_file("3D file")
    try:
        return tuple(scene.cpu().export(folder, recipe.export))
    except ValueError as error:
        warnings.warn(f"no mesh written: {error}", stacklevel=1)
        return ()


def render_views(scene: Scene, views: int, size: int, elevation: float = 15.0) -> Tensor:
    """Images [views, 3, size, size] of evenly spaced views around a scene, the first from the front."""
    return torch.stack(list(video.turntable_frames(scene, views, size, elevation))).clamp(0, 1)


def _start(config: Config, prior: Prior, second: Prior | None) -> ObjectRun:
    """A run before its first step."""
    run = object_run(config.recipe, config.prompts, prior, config.seed, second)
    if config.init is not None:
        mesh = rotated(read_mesh(config.init, config.init_up), config.init_turn)
        run.scene.init_from_mesh(placed(mesh, place(mesh, min(RADIUS, config.recipe.cameras.visible_radius))))
        run.restart_optimizer()
    return run


def _finish(
    run: ObjectRun,
    folder: RunFolder,
    on_step: OnStep,
    retries: int,
    observers: Sequence[Observer] = (),
    on_file: OnFile = lambda names: None,
) -> Result:
    type_this = f"type  distill3d resume {shlex.quote(str(folder.path))}"
    training, watching = None, Watching(run, folder.path, observers)
    try:
        training, began = folder.train(run, run.recipe.steps, on_step, retries, watching), time.monotonic()
        files = write_artifacts(folder.path, run.scene, run.recipe, on_file)
    except Diverged as error:
        write_artifacts(folder.path, run.scene, run.recipe, on_file)
        error.add_note(f"its last finite state is in {folder.path}: {type_this} --retries 1")
        raise
    except Exception as error:
        if training is not None or is_out_of_memory(error):  # `train` itself says what became of its checkpoint
            error.add_note(f"the run is kept in {folder.path}: {type_this}")
        raise
    finally:
        watching.end()
    return Result(folder.path, **vars(training), export_seconds=time.monotonic() - began, files=files)
