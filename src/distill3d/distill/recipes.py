"""Run configurations as values: everything that decides how an object is made, in one dataclass.

The command line picks a recipe by name and overrides single fields; `config.json` of a run holds the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from distill3d.cameras import CameraSampler
from distill3d.distill.family import FAMILY, PLAIN, family_objective
from distill3d.distill.regularizers import WeightSchedule
from distill3d.export.options import ExportOptions
from distill3d.objectives import Objective, noise, sdi, sds
from distill3d.priors.options import PriorOptions
from distill3d.priors.student import Student
from distill3d.render.shading import ShadingOptions
from distill3d.render.volume import Sampling
from distill3d.scenes.background import ConstantBackground, LearnedBackground, RandomGray
from distill3d.scenes.gaussians import Densification, GaussianOptions
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.mesh import MeshOptions
from distill3d.scenes.voxels import VoxelOptions

SceneOptions = VoxelOptions | HashOptions | GaussianOptions | MeshOptions
BackgroundOptions = RandomGray | ConstantBackground | LearnedBackground
Noise = Literal["inversion", "random", "fixed_point", "descent"]
TRAINING_GRAYS = RandomGray(0.5, 1.0)  # as behind the pictures that the bundled prior was trained on


@dataclass(frozen=True)
class SDI:
    """Settings of `distill3d.objectives.sdi`."""

    scale: float = 7.5
    inversion_scale: float = -7.5
    inversion_steps: int = 10
    eta: float = 0.3
    start: float = 0.98
    stop: float = 0.25
    noise: Noise = "inversion"  # the others: to compare with

    def build(self) -> Objective:
        """The objective with these settings; solvers of equation 8 take the inversion's steps and scale."""
        objective = sdi(self.scale, self.inversion_scale, self.inversion_steps, self.eta, self.start, self.stop)
        if self.noise == "inversion":
            return objective
        if self.noise == "random":
            return replace(objective, noise=noise.gaussian())
        solver = {"fixed_point": noise.fixed_point, "descent": noise.descent}[self.noise]
        return replace(objective, noise=solver(self.inversion_steps, self.inversion_scale))


@dataclass(frozen=True)
class SDS:
    """Settings of `distill3d.objectives.sds`."""

    scale: float = 100.0
    low: float = 0.02
    high: float = 0.98
    anneal: bool = False  # t falls evenly from high to low instead of being drawn

    def build(self) -> Objective:
        """The objective with these settings."""
        return sds(self.scale, self.low, self.high, self.anneal)


@dataclass(frozen=True)
class Penalties:
    """Weights of the regularizers by step; 0 switches one off. They belong to a loss that is a mean.

    The first are of pictures, those that begin with `smooth` are of single kinds of scenes.
    """

    sparsity: WeightSchedule = WeightSchedule(0.0, 0.0)
    opaque: WeightSchedule = WeightSchedule(0.0, 0.0)
    z_variance: WeightSchedule = WeightSchedule(0.0, 0.0)
    orientation: WeightSchedule = WeightSchedule(0.0, 0.0)
    convexity: WeightSchedule = WeightSchedule(0.0, 0.0)
    smooth_density: WeightSchedule = WeightSchedule(0.0, 0.0)
    smooth_color: WeightSchedule = WeightSchedule(0.0, 0.0)
    smooth_shape: WeightSchedule = WeightSchedule(0.0, 0.0)


@dataclass(frozen=True)
class Supervision:
    """A second objective, on the shape alone: rendered normals or depth as pictures (see supervision.py)."""

    weight: WeightSchedule = WeightSchedule(0.0, 0.0)  # beside the first objective's 1; 0 is off
    kind: Literal["normal", "depth"] = "normal"
    suffix: str | None = None  # after the prompt; None is ", normal map" or ", depth map"
    method: str = "sds"  # any but those that train a companion
    scale: float | None = None  # guidance of methods other than sdi and sds; None is the method's own
    sdi: SDI = SDI()
    sds: SDS = SDS()
    prior: str | None = None  # a model of its own, as --prior names them; None is the run's
    options: PriorOptions = PriorOptions()  # of that model; any that is set makes it one of its own

    def __post_init__(self) -> None:
        if self.method not in ("sdi", *PLAIN):
            raise ValueError(f"the second objective is one of sdi, {', '.join(PLAIN)}, got {self.method!r}")
        if min(self.weight.start, self.weight.end) < 0:
            raise ValueError(f"the weight of the second objective must not be negative, got {self.weight}")

    @property
    def on(self) -> bool:
        """Whether it is used at all."""
        return self.weight.start > 0 or self.weight.end > 0

    @property
    def apart(self) -> bool:
        """Whether it has a model of its own."""
        return self.on and (self.prior is not None or self.options != PriorOptions())

    def objective(self, steps: int) -> Objective:
        """The objective with these settings, for a run of so many steps."""
        if self.method in ("sdi", "sds"):
            return getattr(self, self.method).build()
        return family_objective(self.method, steps, self.scale, None)


@dataclass(frozen=True)
class Recipe:
    """How an object is distilled. Lengths in world units, angles in degrees."""

    steps: int = 200
    views: int = 2  # a step
    learning_rate: float = 0.08
    decay: float = 0.3  # share of the steps at the end over which the rate falls to a tenth
    adam_eps: float = 1e-10
    perp_neg: bool = False
    render_size: int | None = None  # pixels a side, enlarged to those that the prior sees; None is as many
    frames: int = 48  # of the turntable
    export: ExportOptions = ExportOptions()  # of the mesh that is written at the end
    cameras: CameraSampler = CameraSampler()
    scene: SceneOptions = VoxelOptions()
    background: BackgroundOptions = TRAINING_GRAYS
    shading: ShadingOptions | None = None  # None is the bare color at every step
    penalties: Penalties = Penalties()
    picture_weight: float = 0.0  # of the pull towards the decoded target, beside that on x
    sdi: SDI = SDI()
    sds: SDS = SDS()
    scale: float | None = None  # guidance of every other method; None is the method's own
    highest: float = 1.0  # every other method's times are multiplied by this: less where a run begins with a mesh
    supervision: Supervision = Supervision()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.views < 1:
            raise ValueError(f"a recipe needs at least one step and one view, got {self.steps} and {self.views}")
        if not 0 < self.highest <= 1:
            raise ValueError(f"the highest time lies above 0 and not above 1, got {self.highest}")
        if self.frames < 1:
            raise ValueError(f"a turntable has at least one frame, got {self.frames}")
        if self.render_size is not None and self.render_size < 8:
            raise ValueError(f"a scene is rendered at 8 pixels or more, got {self.render_size}")

    def objective(self, method: str, student: Student | None = None) -> Objective:
        """The objective that `--method` names, with this recipe's settings and, where it trains one, its student.

        Raises:
            ValueError: for a name that is not in `METHODS`.
        """
        check_method(method)
        if method == "sdi":
            return self.sdi.build()
        if method == "sds":
            return self.sds.build()
        return family_objective(method, self.steps, self.scale, student, self.highest)

    def rate(self, step: int) -> float:
        """Learning rate: constant, then a linear fall to a tenth."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * (0.1 + 0.9 * min(1.0, left))


METHODS = ("sdi", *FAMILY)


def check_method(method: str) -> None:
    """Raises ValueError for a name that is not in `METHODS`."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")


LAPTOP = Recipe(
    cameras=CameraSampler(elevation=(-8.0, 45.0), distance=(2.6, 3.1), fov=(40.0, 40.0)),
    # At 64 points a cell is as wide as a pixel, and every edge as soft.
    scene=VoxelOptions(
        resolution=64, refine=((0.4, 1.5),), harden=((0.45, 1.3), (0.7, 1.3)), sampling=Sampling(samples=80)
    ),
    # Without the pull on pictures blue turns violet: the encoder does not see colors beyond those it was trained on.
    picture_weight=30.0,
    # Fog costs a latent nothing either. First shapes form in it, then pixels are made to be hit or missed.
    penalties=Penalties(
        sparsity=WeightSchedule(1.0, 3.0, 60, 160),
        opaque=WeightSchedule(0.0, 1.0, 60, 160),
        z_variance=WeightSchedule(0.0, 300.0, 60, 180),  # else pixels are opaque and still see half of the way through
        smooth_density=WeightSchedule(0.05, 0.05),
        smooth_color=WeightSchedule(3.0, 3.0),
    ),
    # An inversion at scale 1 needs the conditional rows only; with half the hops a run takes a third of the paper's
    # network rows.
    sdi=SDI(scale=7.5, inversion_scale=1.0, inversion_steps=5, eta=0.0, stop=0.1),
    sds=SDS(scale=30.0),
)

# The 3D recipe of the SDI release (Lukoianov et al. 2024). The scene's and the shading's constants are the defaults of
# their options. What the release gets wrong is done right: see `regularizers` and `scenes.occupancy`.
PAPER = Recipe(
    steps=10000,
    views=1,
    learning_rate=0.01,
    decay=0.0,
    adam_eps=1e-15,
    perp_neg=True,
    frames=120,
    export=ExportOptions(texture=2048, faces=100_000, resolution=256),
    cameras=CameraSampler(
        elevation=(-10.0, 45.0), distance=(1.5, 2.0), fov=(40.0, 70.0),
        position_jitter=0.1, target_jitter=0.2, up_jitter=0.02,
    ),
    scene=HashOptions(),
    background=LearnedBackground(scale=0.1),  # so at a rate of 0.001
    shading=ShadingOptions(),
    penalties=Penalties(
        orientation=WeightSchedule(0.1, 0.1),
        sparsity=WeightSchedule(0.15, 0.0, 0, 3000),
        opaque=WeightSchedule(0.1, 0.1),
        z_variance=WeightSchedule(1.0, 1.0),
        convexity=WeightSchedule(1.0, 0.1, 0, 4000),
    ),
    sdi=SDI(scale=7.5, inversion_scale=-7.5, inversion_steps=10, eta=0.3, start=0.98, stop=0.25),
)  # fmt: skip

# Meant for a GPU, where it has not been run: 1500 steps of four views are 100,000 rows of the prior's network. Number
# and rates of splats as in DreamGaussian (Tang et al. 2024), the objective as in the paper. The base rate and the
# weights are those that gave a red mushroom on the bundled prior in 120 steps of two views with laptop's objective.
SPLATS = Recipe(
    steps=1500,
    views=4,
    learning_rate=0.03,
    adam_eps=1e-15,
    frames=120,
    cameras=CameraSampler(elevation=(-10.0, 45.0), distance=(2.6, 3.1), fov=(40.0, 40.0)),
    scene=GaussianOptions(count=5000, densification=Densification(every=50, most=50_000)),
    picture_weight=30.0,
    penalties=Penalties(sparsity=WeightSchedule(0.3, 1.0, 60, 160), opaque=WeightSchedule(0.0, 0.3, 60, 160)),
)

RECIPES: dict[str, Recipe] = {"laptop": LAPTOP, "paper": PAPER, "splats": SPLATS}
PRIORS: dict[str, str] = {"laptop": "toybox", "paper": "sd21", "splats": "sd21"}  # what each recipe was made for
