"""Commands about meshes: texture colors one of yours, refine continues with that of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from distill3d.cli.objects import Output, Quality, object_bar, object_config, report
from distill3d.cli.plan import show_plan
from distill3d.cli.shared import (
    MESHES,
    Dtype,
    Flag,
    Folder,
    LogTo,
    Model,
    Name,
    Prompt,
    Run,
    Settings,
    Texts,
    run_folder,
)
from distill3d.cli.viewing import Viewing

if TYPE_CHECKING:
    from distill3d.runs.objects import Config


@dataclass(frozen=True)
class Texture:
    """Texture a mesh from a prompt; its shape stays as it is.

    Writes a run folder with mesh.glb, turntable.mp4, preview.png, config.json and metrics.jsonl. The mesh's own UV map
    is kept if it can hold a texture (inside the image, without overlaps); otherwise a new one is made.
    """

    mesh: Annotated[Positional[Path], arg(metavar="MESH")]
    """The mesh: a .glb, .gltf, .obj or .ply file."""
    prompt: Prompt
    """What it is, such as "a red chair"."""
    up: Literal["auto", "y", "z"] = "auto"
    """The file's upward axis; auto is y for glTF and OBJ and z for PLY."""
    turn: float = 0.0
    """Degrees to turn the mesh, counterclockwise seen from above, so that its front faces +x (+z with y up)."""
    keep_colors: Flag = False
    """Start from the colors of the file; --set objective.start=0.6 keeps more of them. Default: gray."""
    plan: Flag = False
    """Only print what the run needs: memory by part, network evaluations, time. --device may name a card, cuda:H100."""
    texts: Annotated[Texts, arg(name="prompt")] = field(default_factory=Texts)
    quality: Quality = field(default_factory=Quality)
    model: Model = field(default_factory=Model)
    output: Output = field(default_factory=Output)
    viewing: Annotated[Viewing, arg(name="viewer")] = field(default_factory=Viewing)
    other: Settings = field(default_factory=Settings)

    def config(self) -> Config:
        """The configuration of the run."""
        from distill3d.distill.recipes import TEXTURE_PRIORS, TEXTURE_RECIPES

        scene = {
            "mesh": str(self.mesh),
            "up": self.up,
            "turn": self.turn,
            "colors": self.keep_colors or None,
        }
        return object_config(
            self, TEXTURE_RECIPES, TEXTURE_PRIORS, {f"recipe.scene.{name}": value for name, value in scene.items()}
        )

    def run(self) -> int:
        """Makes the texture; returns the exit status."""
        from distill3d.meshes.files import read_mesh
        from distill3d.meshes.texture import uv_problem
        from distill3d.runs.logs import open_logs
        from distill3d.runs.objects import check_prompt, generate

        if not self.mesh.is_file() and Path(self.prompt).suffix.lower() in MESHES:
            raise ValueError(f'MESH comes before PROMPT: distill3d texture {self.prompt} "{self.mesh}"')
        self.output.check()
        config = self.config()
        check_prompt(self.prompt, config.prior, self.output.force)
        if self.plan:
            return show_plan(config, self)
        logs = open_logs(self.output.log, config.recipe.steps)
        if problem := uv_problem(read_mesh(self.mesh, self.up)):
            print(f"making a UV map for {self.mesh.name}: {problem}")
        with self.viewing.observers() as observers, object_bar(config.recipe.steps, "texturing") as callbacks:
            out, force, retries = self.output.out, self.output.force, self.quality.retries
            result = generate(config, out, force=force, retries=retries, observers=(*observers, *logs), **callbacks)
        return report(result)


@dataclass(frozen=True)
class Refine:
    """Refine the texture and the surface of a run's mesh with the same prompt, in a new run folder."""

    folder: Run
    """The run's folder; its mesh.glb is the start."""
    steps: int = 60
    """Optimization steps."""
    start: float = 0.5
    """Time of the first step, 0 to 1; the lower, the less changes."""
    move: float = 0.03
    """Learning rate of the surface relative to that of the colors; 0 keeps the surface."""
    texture_size: int = 1024
    """Texels per side of the texture."""
    seed: int = 0
    """Seed of all randomness."""
    device: Name = None
    """Where to compute: cpu, cuda, cuda:1, mps; default: where the run was."""
    dtype: Dtype = None
    """Precision of the prior's network; default: the run's."""
    retries: int = 0
    """How often a run that diverges goes on from its last checkpoint with another seed."""
    out: Folder = None
    """Folder in which the new run's folder is made; default: the one that holds the run."""
    log: LogTo = ()
    """Log numbers and images for TensorBoard or Weights & Biases too, in the run's folder; needs distill3d[log]."""
    plan: Flag = False
    """Only print what the run needs: memory by part, network evaluations, time. --device may name a card, cuda:H100."""
    viewing: Annotated[Viewing, arg(name="viewer")] = field(default_factory=Viewing)

    def config(self) -> Config:
        """The configuration of the new run; ValueError where the run has no mesh."""
        from distill3d.distill.recipes import TEXTURE_RECIPES, refinement
        from distill3d.priors.components.hub import BUNDLED
        from distill3d.runs.objects import read_config
        from distill3d.scenes.mesh import MeshOptions

        config, mesh = read_config(run_folder(self.folder)), self.folder / "mesh.glb"
        if not mesh.is_file():
            raise ValueError(f"{self.folder} has no mesh.glb to refine; write one with: distill3d export {self.folder}")
        base = config.recipe
        if config.prior in BUNDLED:  # a surface is refined in single views
            config = replace(config, prior="toybox")
        if not isinstance(base.scene, MeshOptions):
            base = TEXTURE_RECIPES["laptop" if config.prior in BUNDLED else "paper"]
        recipe = refinement(base, self.steps, self.start, self.move)
        assert isinstance(recipe.scene, MeshOptions)
        scene = replace(recipe.scene, mesh=str(mesh), up="auto")
        return replace(
            config,
            recipe=replace(recipe, scene=scene, export=replace(recipe.export, texture=self.texture_size)),
            seed=self.seed,
            device=self.device or config.device,
            dtype=self.dtype or config.dtype,
            init=None,
        )

    def run(self) -> int:
        """Refines; returns the exit status."""
        from distill3d.runs.logs import open_logs
        from distill3d.runs.objects import generate

        config = self.config()
        if self.plan:
            return show_plan(config, self)
        logs = open_logs(self.log, self.steps)
        with self.viewing.observers() as observers, object_bar(self.steps, "refining") as callbacks:
            holds = self.folder / ".." if self.folder.name in ("", "..") else self.folder.parent  # printed as typed
            out = self.out or holds
            result = generate(config, out, force=True, retries=self.retries, observers=(*observers, *logs), **callbacks)
        return report(result)
