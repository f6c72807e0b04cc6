"""Settings that may change while a run is under way: the guidance scale and the weights of the regularizers.

The settings of a step are a function of the recipe, the list of changes and the step alone. A run that is resumed with
the same list takes the same steps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

from distill3d.distill.recipes import Recipe
from distill3d.distill.regularizers import WeightSchedule
from distill3d.objectives import Method
from distill3d.objectives.objective import check_count, check_number
from distill3d.objectives.settings_base import Settings

SCALE, PENALTY = "objective.scale", "penalties."


@dataclass(frozen=True)
class Change:
    """From `step` on, a setting has this value; a penalty's weight is then constant.

    Raises ValueError for a setting that cannot change, and for a value out of range.
    """

    step: int
    setting: str  # "objective.scale", or "penalties." and the name of one
    value: float

    def __post_init__(self) -> None:
        check_count("step", self.step, least=0)
        check_number(self.setting, self.value)
        if self.setting.startswith(PENALTY):
            WeightSchedule(self.value, self.value)  # raises ValueError


def changeable(recipe: Recipe, penalties: Collection[str]) -> tuple[str, ...]:
    """The settings of a recipe that may change, for a scene with these penalties.

    A method without a guidance scale, or an `Objective` of your own, has no scale to change.
    """
    scale = (SCALE,) if scaled(recipe.objective, 1.0) is not None else ()
    return (*scale, *(PENALTY + field.name for field in fields(recipe.penalties) if field.name in penalties))


def scaled(method: Method, scale: float) -> Settings | None:
    """A method with another guidance scale; None if it has none."""
    if not isinstance(method, Settings) or "scale" not in (field.name for field in fields(method)):
        return None
    return replace(method, scale=scale)  # type: ignore[call-arg]


def changed(recipe: Recipe, changes: Sequence[Change], step: int) -> Recipe:
    """The recipe at a step: as it was written, with the changes until then, later ones over earlier ones."""
    for change in sorted((change for change in changes if change.step <= step), key=lambda change: change.step):
        if change.setting == SCALE:
            recipe = replace(recipe, objective=scaled(recipe.objective, change.value))
        else:
            weight = {change.setting.removeprefix(PENALTY): WeightSchedule(change.value, change.value)}
            recipe = replace(recipe, penalties=replace(recipe.penalties, **weight))
    return recipe
