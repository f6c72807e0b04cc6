"""Recipes: everything that decides how an object is distilled, as values.

A recipe holds the objective, the scene, the cameras, the regularizers and the optimizer settings. All schedules are
fractions of the run, so `steps` alone makes a run longer or shorter. The command line starts from a recipe by name and
changes single settings; `config.json` of a run holds the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from distill3d.cameras import MOST_VIEWS, CameraSampler, orbit
from distill3d.distill.image_recipes import LARGEST_RATE, MOST_STEPS
from distill3d.distill.regularizers import WeightSchedule
from distill3d.export.options import ExportOptions
from distill3d.export.video import MOST_SIZE
from distill3d.objectives import CFD, ESD, METHODS, SDI, SDS, SJC, VSD, HiFA, Method, SDICached, starting_at
from distill3d.priors.options import PriorOptions
from distill3d.render.shading import ShadingOptions
from distill3d.render.volume import Sampling
from distill3d.scenes.background import BackgroundOptions, ConstantBackground, LearnedBackground, RandomGray
from distill3d.scenes.gaussians import Densification, GaussianOptions
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.mesh import MeshOptions
from distill3d.scenes.voxels import VoxelOptions
from distill3d.types import Cameras, SceneOptions

TRAINING_GRAYS = RandomGray(0.5, 1.0)  # the backgrounds that the bundled prior was trained on
INIT_START = 0.6  # t of the first step from a mesh: below, its shape survives; above, it is lost


@dataclass(frozen=True)
class Penalties:
    """Weights of the regularizers; 0 switches one off. They are relative to a loss that is a mean over elements.

    The first five are functions of the rendered views (see `regularizers`). The last three are for some scenes only.
    """

    sparsity: WeightSchedule = WeightSchedule()
    opaque: WeightSchedule = WeightSchedule()
    z_variance: WeightSchedule = WeightSchedule()
    orientation: WeightSchedule = WeightSchedule()
    convexity: WeightSchedule = WeightSchedule()
    smooth_density: WeightSchedule = WeightSchedule()
    smooth_color: WeightSchedule = WeightSchedule()
    smooth_shape: WeightSchedule = WeightSchedule()


@dataclass(frozen=True)
class Supervision:
    """A second objective on the geometry alone: rendered normal or depth maps as images (see supervision.py)."""

    weight: WeightSchedule = WeightSchedule()  # relative to the first objective's 1; 0 is off
    kind: Literal["normal", "depth"] = "normal"
    objective: Method = SDS()  # any that trains no student
    prior: str | None = None  # a prior of its own, named as for --prior; None is the run's
    options: PriorOptions = PriorOptions()  # of that prior; any change makes it a prior of its own

    def __post_init__(self) -> None:
        if isinstance(self.objective, VSD | ESD):
            raise ValueError(f"the second objective cannot train a student, got {type(self.objective).__name__}")

    @property
    def separate_prior(self) -> bool:
        """Whether it uses a prior of its own."""
        return bool(self.weight) and (self.prior is not None or self.options != PriorOptions())


@dataclass(frozen=True)
class ViewSampling:
    """Sampling a fixed set of views and fitting the scene to them (see view_sampling.py), instead of random views.

    Azimuths and elevations in degrees.
    """

    rings: tuple[tuple[int, float, float], ...] = ((8, 12.0, 0.0), (8, 38.0, 22.5))
    """(views, elevation, azimuth of the first) of each ring; the views of a ring are evenly spaced."""
    distance: float = 2.85  # of the cameras, world units
    fov: float = 40.0
    group: int = 16  # views that a multi-view prior denoises jointly; a divisor of the number of views
    background: float = 0.75  # gray level behind the object
    joint_levels: int = 30  # noise levels of the views before there is a scene; 0 starts with the scene as it is
    hull: bool = True  # whether the scene then starts from the visual hull of these views
    tolerance: int = 2  # of the hull: how many views may disagree
    first: float = 0.4  # fraction of the steps that fit the scene to these views
    levels: int = 8  # noise levels with the scene in the loop
    start: float = 0.6  # t of the first of them

    def __post_init__(self) -> None:
        if not self.rings or any(views < 1 for views, _, _ in self.rings):
            raise ValueError(f"rings must be (views, elevation, azimuth) with at least one view, got {self.rings}")
        if self.group < 1 or self.views % self.group:
            raise ValueError(f"group must divide the number of views, {self.views}, got {self.group}")
        if self.levels < 0 or self.joint_levels < 0 or self.levels + self.joint_levels == 0:
            raise ValueError(f"sampling needs levels, got {self.joint_levels} and {self.levels}")
        if not 0 <= self.first <= 1 or not 0 < self.start <= 1:
            raise ValueError(f"first must lie in [0, 1] and start in (0, 1], got {self.first} and {self.start}")
        if self.hull and not self.joint_levels:
            raise ValueError("a hull needs views: set joint_levels above 0, or hull to false")

    @property
    def views(self) -> int:
        """Number of views."""
        return sum(views for views, _, _ in self.rings)

    def cameras(self) -> Cameras:
        """The cameras of all views; groups are neighbors in the batch and have views of all rings."""
        angles = [(start + 360 * i / views, elevation) for views, elevation, start in self.rings for i in range(views)]
        order = [i for g in range(self.views // self.group) for i in range(g, self.views, self.views // self.group)]
        azimuth, elevation = zip(*(angles[i] for i in order), strict=True)
        return orbit(azimuth, elevation, self.distance, self.fov)


@dataclass(frozen=True)
class Recipe:
    """How an object is distilled. Lengths are in world units, angles in degrees.

    `objective` is the settings of a method or an `Objective` of your own; `scene` is the options of a scene or any
    value with `build(device) -> Scene`. With `sampling`, `views` counts the views of an optimizer step, and cameras,
    background and image_weight are not used.
    """

    steps: int = 200
    views: int = 2  # per step
    learning_rate: float = 0.08
    decay: float = 0.3  # fraction of the run, at its end, over which the learning rate falls to a tenth
    adam_eps: float = 1e-10
    perp_neg: bool = False
    render_size: int | None = None  # pixels per side, resized to the prior's; None renders at the prior's size
    frames: int = 48  # of the turntable
    objective: Method = SDI()
    image_weight: float = 0.0  # times the objective's `pull`: weight of 0.5 mean((rgb - decode(x0))^2) beside its loss
    scene: SceneOptions = VoxelOptions()
    cameras: CameraSampler = CameraSampler()
    background: BackgroundOptions = TRAINING_GRAYS
    shading: ShadingOptions | None = None  # None renders the unlit color at every step
    penalties: Penalties = Penalties()
    supervision: Supervision = Supervision()
    sampling: ViewSampling | None = None  # None distills random views
    export: ExportOptions = ExportOptions()  # of the mesh that is written at the end

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS or not 1 <= self.views <= MOST_VIEWS:
            raise ValueError(
                f"a recipe needs at least one step and one view, and at most {MOST_STEPS} and {MOST_VIEWS}, "
                f"got {self.steps} and {self.views}"
            )
        if not 1 <= self.frames <= MOST_VIEWS:
            raise ValueError(f"a turntable needs 1 to {MOST_VIEWS} frames, got {self.frames}")
        if self.render_size is not None and not 8 <= self.render_size <= MOST_SIZE:
            raise ValueError(f"render_size must be 8 to {MOST_SIZE} pixels, got {self.render_size}")
        if not 0 <= self.learning_rate <= LARGEST_RATE:
            raise ValueError(f"the learning rate must lie in [0, {LARGEST_RATE:,.0f}], got {self.learning_rate}")

    def rate(self, step: int) -> float:
        """Learning rate at a step: constant, then a linear decay to a tenth."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * (0.1 + 0.9 * min(1.0, left))


DISTILL = Recipe(
    # An inversion at scale 1 needs conditional rows only; with half the steps a run takes a third of the paper's NFE.
    objective=SDI(scale=7.5, inversion_scale=1.0, inversion_steps=5, eta=0.0, stop=0.1, nominal=True),
    cameras=CameraSampler(elevation=(-8.0, 45.0), distance=(2.6, 3.1), fov=(40.0, 40.0)),
    # At 64 grid points a cell is as wide as a pixel, and every edge as soft.
    scene=VoxelOptions(
        resolution=64, refine=((0.4, 1.5),), density_gain=((0.45, 1.3), (0.7, 1.3)), sampling=Sampling(samples=80)
    ),
    # Without the loss on images blue turns violet: the encoder is blind to colors beyond those it was trained on.
    image_weight=30.0,
    # Fog costs a latent nothing either. Shapes first form in it, then each pixel is made opaque or empty.
    penalties=Penalties(
        sparsity=WeightSchedule(1.0, 3.0, 0.3, 0.8),
        opaque=WeightSchedule(0.0, 1.0, 0.3, 0.8),
        z_variance=WeightSchedule(0.0, 300.0, 0.3, 0.9),  # without it opaque pixels still see halfway through
        smooth_density=WeightSchedule(0.05, 0.05),
        smooth_color=WeightSchedule(3.0, 3.0),
    ),
)

# The 3D recipe of the SDI release (Lukoianov et al. 2024). Constants of the scene and the shading are the defaults of
# their options. Defects of the release are corrected: see `regularizers` and `scenes.hashgrid.occupancy`.
PAPER = Recipe(
    objective=SDI(scale=7.5, inversion_scale=-7.5, inversion_steps=10, eta=0.3, start=0.98, stop=0.25),
    steps=10000,
    views=1,
    learning_rate=0.01,
    decay=0.0,
    adam_eps=1e-15,
    perp_neg=True,
    frames=120,
    export=ExportOptions(texture=2048, faces=100_000, resolution=256),
    cameras=CameraSampler(
        elevation=(-10.0, 45.0),
        distance=(1.5, 2.0),
        fov=(40.0, 70.0),
        position_jitter=0.1,
        target_jitter=0.2,
        up_jitter=0.02,
    ),
    scene=HashOptions(),
    background=LearnedBackground(scale=0.1),  # a learning rate of 0.001
    shading=ShadingOptions(),
    penalties=Penalties(
        orientation=WeightSchedule(0.1, 0.1),
        sparsity=WeightSchedule(0.15, 0.0, 0.0, 0.3),
        opaque=WeightSchedule(0.1, 0.1),
        z_variance=WeightSchedule(1.0, 1.0),
        convexity=WeightSchedule(1.0, 0.1, 0.0, 0.4),
    ),
)

# For a GPU; not yet run on one. 1500 steps of four views are 100,000 network evaluations. Number and learning rates of
# the splats follow DreamGaussian (Tang et al. 2024), the objective the paper. The base rate and the weights are those
# that gave a red mushroom on the bundled prior in 120 steps of two views with the laptop recipe's objective.
SPLATS = Recipe(
    steps=1500,
    views=4,
    learning_rate=0.03,
    adam_eps=1e-15,
    frames=120,
    cameras=CameraSampler(elevation=(-10.0, 45.0), distance=(2.6, 3.1), fov=(40.0, 40.0)),
    scene=GaussianOptions(count=5000, densification=Densification(every=50, max_splats=50_000)),
    image_weight=30.0,
    penalties=Penalties(
        sparsity=WeightSchedule(0.3, 1.0, 60 / 1500, 160 / 1500), opaque=WeightSchedule(0.0, 0.3, 60 / 1500, 160 / 1500)
    ),
)

# Views of the multi-view prior first, then the object in the loop. The weights are for a fit to 64 x 64 pixels.
LAPTOP = Recipe(
    steps=150,
    views=4,
    learning_rate=0.06,
    decay=0.4,
    objective=CFD(scale=5.0),
    sampling=ViewSampling(),
    # The fit leaves edges soft; with a larger gain they are sharp, without one half of the outline is a veil.
    scene=VoxelOptions(density_gain=((0.5, 1.5), (0.75, 1.5))),
    penalties=Penalties(
        sparsity=WeightSchedule(0.003, 0.003),
        opaque=WeightSchedule(0.0, 0.02, 0.4, 0.8),
        z_variance=WeightSchedule(0.0, 0.3, 0.4, 0.8),
        smooth_density=WeightSchedule(0.002, 0.002),
        smooth_color=WeightSchedule(0.02, 0.02),
    ),
)

RECIPES: dict[str, Recipe] = {"laptop": LAPTOP, "distill": DISTILL, "paper": PAPER, "splats": SPLATS}
# The prior that each recipe was made for.
PRIORS: dict[str, str] = {"laptop": "toybox-mv", "distill": "toybox", "paper": "sd21", "splats": "sd21"}

# In 3D. CFD's scale is that of its public code, its times are near those there: 0.98 to 0.21 in pieces of lines.
OBJECTS: dict[str, Method] = {
    "sdi_cached": SDICached(stop=0.2, noise="surface"),
    "cfd": CFD(scale=71.0, stop=0.2, noise="surface"),
}
# Settings of methods that differ from the published ones within a recipe. SJC and HiFA are published with the guidance
# scale of SDS; where a recipe changes that one, they follow.
TUNED: dict[str, dict[str, Method]] = {
    "distill": {
        "sdi": DISTILL.objective,
        "sds": SDS(scale=30.0),
        "sjc": SJC(scale=30.0),
        "hifa": HiFA(scale=30.0),
        "sdi_cached": SDICached(stop=0.1, noise="surface"),
        "cfd": CFD(stop=0.1, noise="surface"),
    },
    "laptop": {"cfd": LAPTOP.objective, "sdi_cached": SDICached(5.0)},  # each view is an image of its own
    "paper": {"sdi": PAPER.objective},
}


def method_settings(name: str, recipe: str = "distill") -> Method:
    """The settings of a method by its name (in any case), as tuned for a recipe where they are.

    Raises:
        ValueError: for a name that is not in `METHODS`.
    """
    settings = METHODS | OBJECTS | TUNED.get(recipe, {})
    key = name.lower().replace("-", "_")
    if key not in settings:
        raise ValueError(f"unknown method {name!r}; allowed: {', '.join(METHODS)}")
    return settings[key]


LAPTOP_TEXTURE = replace(
    DISTILL,
    steps=60,
    learning_rate=0.1,
    decay=0.5,
    scene=MeshOptions(),
    penalties=Penalties(smooth_color=WeightSchedule(3.0, 3.0)),  # with a tenth of it surfaces are speckled
)
PAPER_TEXTURE = replace(
    PAPER,
    steps=2000,
    learning_rate=0.02,
    decay=0.5,
    # The paper's cameras are so close that a mesh of this size would be cropped.
    cameras=replace(PAPER.cameras, distance=(2.6, 3.1), fov=(40.0, 40.0)),
    scene=MeshOptions(levels=(16, 64, 256, 512)),
    export=replace(PAPER.export, texture=1024),
    background=ConstantBackground(0.8),
    shading=None,
    penalties=Penalties(smooth_color=WeightSchedule(0.3, 0.3)),
)
TEXTURE_RECIPES: dict[str, Recipe] = {"laptop": LAPTOP_TEXTURE, "paper": PAPER_TEXTURE}
TEXTURE_PRIORS: dict[str, str] = {"laptop": "toybox", "paper": "sd21"}


def refinement(recipe: Recipe, steps: int, start: float, move: float) -> Recipe:
    """A texture recipe that starts from a mesh's own colors and also moves its surface.

    Args:
        start: t of the first step, in [0, 1]; the lower, the less changes.
        move: learning rate of the shape relative to that of the color.
    """
    scene = recipe.scene
    assert isinstance(scene, MeshOptions)
    scene = replace(scene, colors=True, move=move)
    penalties = replace(recipe.penalties, smooth_shape=WeightSchedule(1e-2, 1e-2))  # with a tenth, spots become horns
    return replace(from_mesh(recipe, start), steps=steps, scene=scene, penalties=penalties)


def from_mesh(recipe: Recipe, start: float = INIT_START) -> Recipe:
    """The recipe without times above `start`, for a scene that starts from a mesh."""
    return replace(recipe, objective=starting_at(recipe.objective, start))
