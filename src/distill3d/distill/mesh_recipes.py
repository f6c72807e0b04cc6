"""What changes in a recipe where a mesh is given: it is painted, refined, or what a field begins with."""

from __future__ import annotations

from dataclasses import replace

from distill3d.distill.recipes import LAPTOP, PAPER, Penalties, Recipe
from distill3d.distill.regularizers import WeightSchedule
from distill3d.scenes.background import ConstantBackground
from distill3d.scenes.mesh import MeshOptions

INIT_START = 0.6  # time of the first step from a mesh: later ones keep its shape, earlier ones forget it

LAPTOP_TEXTURE = replace(
    LAPTOP,
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
    # The paper's cameras stand where a mesh of this size would be cropped.
    cameras=replace(PAPER.cameras, distance=(2.6, 3.1), fov=(40.0, 40.0)),
    scene=MeshOptions(levels=(16, 64, 256, 512)),
    background=ConstantBackground(0.8),
    shading=None,
    penalties=Penalties(smooth_color=WeightSchedule(0.3, 0.3)),
    export=replace(PAPER.export, texture=1024),
)
TEXTURE_RECIPES: dict[str, Recipe] = {"laptop": LAPTOP_TEXTURE, "paper": PAPER_TEXTURE}


def refinement(recipe: Recipe, steps: int, start: float, move: float) -> Recipe:
    """A texture recipe that begins with a mesh's own colors and moves its surface too.

    Args:
        start: time of the first step, in [0, 1]; the lower, the less changes.
        move: learning rate of the shape relative to that of the color.
    """
    scene = recipe.scene
    assert isinstance(scene, MeshOptions)
    scene = replace(scene, colors=True, move=move)
    penalties = replace(recipe.penalties, smooth_shape=WeightSchedule(1e-2, 1e-2))  # a tenth: spots become horns
    return replace(from_mesh(recipe, start), steps=steps, scene=scene, penalties=penalties)


def from_mesh(recipe: Recipe, start: float = INIT_START) -> Recipe:
    """A recipe without times above `start`, whatever the method, for a scene that begins with a mesh."""
    sdi = replace(recipe.sdi, start=start, stop=min(recipe.sdi.stop, start))
    sds = replace(recipe.sds, high=min(recipe.sds.high, start), low=min(recipe.sds.low, start))
    return replace(recipe, sdi=sdi, sds=sds, highest=start)
