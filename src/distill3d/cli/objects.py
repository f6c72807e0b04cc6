"""Commands that make 3D objects: generate, resume."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

from tyro.conf import arg

from distill3d.cli.machines import ObjectMachines, generate_many
from distill3d.cli.plan import show_plan
from distill3d.cli.settings import Tree, layered, nested, read_file
from distill3d.cli.shared import (
    RUNS,
    File,
    Flag,
    Float,
    Int,
    LogTo,
    Model,
    Name,
    Place,
    Prompt,
    Run,
    Settings,
    Texts,
    UpAxis,
    busy,
    duration,
    is_file_name,
    progress_bar,
    run_folder,
)
from distill3d.cli.viewing import Viewing
from distill3d.untrusted import printable

if TYPE_CHECKING:
    from distill3d.cli.meshes import Texture
    from distill3d.distill.loop import OnStep, Progress
    from distill3d.distill.recipes import Recipe
    from distill3d.runs.objects import Config, Result


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well, and how long. The defaults are those of the recipe."""

    recipe: Name = None
    """Named settings to start from: laptop (default), distill (default with --method, --init, --perp-neg or another
    prior), paper or splats; see distill3d recipes."""
    method: Name = None
    """Objective: sdi (default), sds, sjc, nfsd, csd, hifa, ism, mvdream, sds_bridge, vsd, esd, dsd, asd, sctd, bsd,
    sdi_cached or cfd; rfds and flowdreamer for flow models."""
    scale: Float = None
    """Guidance scale of the objective."""
    steps: Int = None
    """Optimization steps."""
    views_per_step: Int = None
    """Rendered views per step."""
    learning_rate: Float = None
    """Learning rate of Adam."""
    render_size: Int = None
    """Pixels per side of the rendered views, which are then resized to the prior's image size."""
    perp_neg: Flag = False
    """Use Perp-Neg, against faces on all sides (the Janus problem); --set recipe.perp_neg=false turns it off."""
    retries: int = 0
    """How often a run that diverges goes on from its last checkpoint with another seed."""

    def changes(self) -> dict[str, object]:
        """The settings that these flags change, by path; None changes nothing.

        `method` is for `object_config`, `retries` for `generate`.
        """
        return {
            "recipe.objective.scale": self.scale,
            "recipe.steps": self.steps,
            "recipe.views": self.views_per_step,
            "recipe.learning_rate": self.learning_rate,
            "recipe.render_size": self.render_size,
            "recipe.perp_neg": self.perp_neg or None,
        }


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where to, and what is written."""

    out: Path = RUNS
    """Folder in which the run's folder is made."""
    force: Flag = False
    """Run even if the bundled prior does not know what the prompt names."""
    frames: Int = None
    """Frames of the turntable video."""
    texture_size: Int = None
    """Texels per side of the mesh's texture."""
    log: LogTo = ()
    """Log numbers and images for TensorBoard or Weights & Biases too, in the run's folder; needs distill3d[log]."""

    def changes(self) -> dict[str, object]:
        """The settings that these flags change, by path; None changes nothing."""
        return {"recipe.frames": self.frames, "recipe.export.texture": self.texture_size}

    def check(self) -> None:
        """Raises ValueError where --out is a file."""
        if is_file_name(Path(self.out)):
            raise ValueError(
                f"--out is the folder for run folders, got {self.out}; to write a run's mesh to a file, type: "
                f"distill3d export RUN --out FILE.glb (or .obj, .ply)"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectTexts(Texts):
    """What to make."""

    init: File = None
    """A mesh (.glb, .gltf, .obj, .ply) to start from, shape and colors; times then begin at 0.6 of the schedule."""
    up: UpAxis = None
    """Upward axis of --init; default: y for glTF and OBJ, z for PLY."""
    turn: Float = None
    """Degrees to turn --init, counterclockwise seen from above, so that its front faces +x (+z with y up)."""

    def changes(self) -> dict[str, object]:
        """See `Texts`."""
        if self.init is None and not (self.up is None and self.turn is None):
            raise ValueError("--up and --turn are about the mesh of --init: pass --init FILE, too")
        return {**super().changes(), "init_up": self.up, "init_turn": self.turn}


@dataclass(frozen=True, kw_only=True)
class ObjectOutput(Output):
    """Where to, and what is written."""

    out: Place = RUNS  # pyright: ignore[reportIncompatibleVariableOverride]
    """Folder in which run folders are made, or an address that all machines share, such as s3://bucket/folder."""
    faces: Int = None
    """Triangles of the mesh, at most about."""
    plan: Flag = False
    """Only print what the run needs: memory by part, network evaluations, time. --device may name a card, cuda:H100."""

    def changes(self) -> dict[str, object]:
        """See `Output`."""
        return {**super().changes(), "recipe.export.faces": self.faces}


@dataclass(frozen=True)
class Generate:
    """Make a 3D object from a prompt.

    Writes a run folder with mesh.glb, turntable.mp4, preview.png, config.json and metrics.jsonl.
    """

    prompt: Prompt
    """What to make, such as "a red mushroom"; @FILE makes each line of a file."""
    texts: Annotated[ObjectTexts, arg(name="prompt")] = field(default_factory=ObjectTexts)
    quality: Quality = field(default_factory=Quality)
    model: Model = field(default_factory=Model)
    output: ObjectOutput = field(default_factory=ObjectOutput)
    machines: ObjectMachines = field(default_factory=ObjectMachines)
    viewing: Annotated[Viewing, arg(name="viewer")] = field(default_factory=Viewing)
    other: Settings = field(default_factory=Settings)

    def config(self) -> Config:
        """The configuration of the run, with the prompt as typed."""
        from distill3d.distill.recipes import PRIORS, RECIPES

        return object_config(self, RECIPES, PRIORS, {}, self.texts.init)

    def run(self) -> int:
        """Makes an object for each prompt; returns the exit status."""
        from distill3d.prompts import read_prompts
        from distill3d.runs.logs import open_logs
        from distill3d.runs.objects import check_prompt, generate, load_priors

        self.output.check()
        config, prompts = self.config(), read_prompts(self.prompt)
        for prompt in prompts:  # a wrong line is found before hours went into the lines above it
            check_prompt(prompt, config.prior, self.output.force)
        if self.output.plan:
            return show_plan(replace(config, prompt=prompts[0]), self)
        watched = bool(self.output.log) or self.viewing != Viewing()
        if self.machines != ObjectMachines() or isinstance(self.output.out, str) or (len(prompts) > 1 and not watched):
            if watched:
                raise ValueError(
                    "--log and --view are for one object at a time: not for --workers, --at-once, --ray and addresses"
                )
            return generate_many(config, prompts, self.output.out, self.machines, self.quality.retries)
        logs = open_logs(self.output.log, config.recipe.steps)
        prior, second, status = None, None, 0
        with self.viewing.observers() as observers:
            for prompt in prompts:
                config = replace(config, prompt=prompt)
                prior, second = load_priors(config, prior, second)
                with object_bar(config.recipe.steps, "distilling") as callbacks:
                    result = generate(
                        config,
                        self.output.out,
                        retries=self.quality.retries,
                        **callbacks,
                        prior=prior,
                        second=second,
                        observers=(*observers, *logs),
                    )
                status = report(result) or status
                if result.interrupted:
                    break
        return status


@dataclass(frozen=True)
class Resume:
    """Continue a run from its last checkpoint."""

    folder: Run
    """The run's folder."""
    device: Name = None
    """Where to compute: cpu, cuda, cuda:1, mps; default: where the run was."""
    retries: int = 0
    """How often a run that diverges goes on from its last checkpoint with another seed."""
    log: LogTo = ()
    """Log numbers and images for TensorBoard or Weights & Biases too, in the run's folder; needs distill3d[log]."""
    viewing: Annotated[Viewing, arg(name="viewer")] = field(default_factory=Viewing)

    def run(self) -> int:
        """Takes the steps that are missing; returns the exit status."""
        from distill3d.runs.logs import open_logs
        from distill3d.runs.objects import read_config, resume

        steps = read_config(run_folder(self.folder)).recipe.steps
        logs = open_logs(self.log, steps)
        with self.viewing.observers() as observers, object_bar(steps, "distilling") as callbacks:
            result = resume(
                self.folder, device=self.device, retries=self.retries, observers=(*observers, *logs), **callbacks
            )
        return report(result)


def object_config(
    command: Generate | Texture,
    recipes: Mapping[str, Recipe],
    priors: Mapping[str, str],
    more: Mapping[str, object],
    init: Path | None = None,
) -> Config:
    """The configuration that a command line describes.

    Args:
        recipes, priors: those that --recipe names, and the prior of each.
        more: settings of the command's own flags, by path.
        init: a mesh to start from, which limits the times of the objective.

    Raises:
        ValueError: for names and settings that do not exist, and values out of range.
    """
    from distill3d.distill.recipes import from_mesh
    from distill3d.runs.config import from_plain, to_plain
    from distill3d.runs.objects import Config

    file = read_file(command.other.config)
    prior, quality = command.model.prior or file.get("prior"), command.quality
    distilled = (
        quality.method or init or quality.perp_neg or quality.render_size or prior not in (None, priors["laptop"])
    )
    base = base_recipe(quality.recipe, file, recipes, "distill" if distilled and "distill" in recipes else "laptop")
    plain = layered(to_plain(Config(command.prompt, recipe=recipes[base], prior=priors[base])), file)
    groups = (command.texts, command.model, command.quality, command.output)
    flags = {path: value for group in groups for path, value in group.changes().items()}
    if command.quality.method is not None:
        objective = plain_method(command.quality.method, base)
        if objective["kind"] != plain["recipe"]["objective"]["kind"]:
            flags = {"recipe.objective": objective, **flags}
    plain = layered(plain, nested({**flags, **more}))
    if init is not None:
        config = from_plain(Config, plain)
        plain = to_plain(replace(config, recipe=from_mesh(config.recipe), init=str(init)))
    return from_plain(Config, layered(plain, assignments=command.other.set))


def base_recipe(name: str | None, file: Tree, recipes: Mapping[str, Recipe], default: str) -> str:
    """The name of the recipe to start from: that of --recipe, else the file's "base" (which is removed), else default.

    Raises:
        ValueError: for an unknown one.
    """
    base = str(file.pop("base", default))
    base = (name or base).lower()
    if base not in recipes:
        raise ValueError(f"unknown recipe {base!r}; allowed: {', '.join(recipes)}")
    return base


def plain_method(name: str, recipe: str) -> Tree:
    """The settings of a method for a recipe as plain values; ValueError for an unknown name."""
    from distill3d.distill.recipes import RECIPES, method_settings
    from distill3d.runs.config import to_plain

    return to_plain(replace(RECIPES[recipe], objective=method_settings(name, recipe)))["objective"]


class Callbacks(TypedDict):
    """What `generate` and `resume` call while a run is under way."""

    on_step: OnStep
    on_file: Callable[[str], None]


@contextlib.contextmanager
def object_bar(total: int, name: str) -> Iterator[Callbacks]:
    """The progress bar of a run of an object; after the last step it says which files are being made."""
    with progress_bar(total, name) as show, contextlib.ExitStack() as waiting:
        last: Progress | None = None

        def on_step(progress: Progress) -> None:
            nonlocal last
            last = progress
            show(progress, f"opacity {progress.opacity:.2f}")

        def on_file(names: str) -> None:
            if last is not None:
                show(last, f"writing {names}", numbers=False)
            else:  # no step was left to take, so there is no bar
                waiting.close()
                waiting.enter_context(busy(f"writing {names}"))

        yield Callbacks(on_step=on_step, on_file=on_file)
        if last is not None:
            show(last)


def report(result: Result) -> int:
    """Prints what a run made and how long it took; returns the exit status."""
    print(
        f"{result.steps} steps in {duration(result.seconds)} with {result.nfe:,} NFE, "
        f"files in {duration(result.export_seconds)}:"
    )
    for path in sorted(result.folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            print(f"  {printable(str(path))}")
    if result.interrupted:
        print(f"interrupted; continue with: distill3d resume {shlex.quote(str(result.folder))}", file=sys.stderr)
        return 128 + result.interrupted
    if not result.files:
        print(f"distill3d: {result.folder} has no mesh", file=sys.stderr)
        return 4
    return 0
