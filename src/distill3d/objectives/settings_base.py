"""What the settings of all methods share; settings.py and successor_settings.py have the methods themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch

from distill3d.diffusion.guidance import APG, CFG
from distill3d.objectives import timesteps, weighting
from distill3d.objectives.objective import Objective, check_number
from distill3d.types import Prior


class Method(Protocol):
    """Anything that can be built into an objective: the settings below, and an Objective itself."""

    def build(self, prior: Prior, steps: int, generator: torch.Generator) -> Objective:
        """The objective for one run of so many steps; networks that it trains are drawn from the generator.

        Raises ValueError if the prior does not suit the method.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """Settings of a method; `factory` is the function that has its equation."""

    factory: ClassVar[Callable[..., Objective]]
    guided: ClassVar[bool] = True  # whether it predicts with prediction.guided, which apg is for

    pull: float | None = field(default=None, kw_only=True)
    """Share of the recipe's `image_weight`, the pull on decoded images, that is added to the method; None is its own: 1
    for methods that match x0_hat, 0 for the others."""
    apg: APG = field(default=CFG, kw_only=True)
    """Adaptive projected guidance in place of the plain one, at the same scale."""

    def __post_init__(self) -> None:
        if self.pull is not None:
            check_number("pull", self.pull)
        if self.apg != CFG and not self.guided:
            raise ValueError(f"apg is for methods that predict with guidance alone, not for {type(self).__name__}")
        self._make()  # raises ValueError for settings out of range

    def build(self, prior: Prior, steps: int, generator: torch.Generator) -> Objective:
        """The objective with these settings; it needs neither prior nor generator."""
        return self._completed(self._make())

    def renewed(self, old: Objective) -> Objective:
        """The objective with these settings in place of one that has taken steps: it goes on from the state of that."""
        new = self._completed(self._make())
        if new.state is not None and old.state is not None:
            new.state.load_state_dict(old.state.state_dict())
        return replace(new, views=old.views, fixed_views=old.fixed_views)

    def _completed(self, objective: Objective) -> Objective:
        return replace(objective, apg=self.apg, pull=objective.pull if self.pull is None else self.pull)

    def _make(self, **more: object) -> Objective:
        arguments: dict[str, Any] = vars(self) | more
        for name in ("pull", "apg", "student_rate"):
            arguments.pop(name, None)
        time_scale = arguments.pop("time_scale", 1.0)
        if not 0.0 < time_scale <= 1.0:
            raise ValueError(f"time_scale must lie above 0 and up to 1, got {time_scale}")
        objective = type(self).factory(**arguments)
        if time_scale == 1.0:
            return objective
        return replace(objective, timesteps=timesteps.scaled(objective.timesteps, time_scale))


@dataclass(frozen=True)
class ScaledTime(Settings):
    """Settings of a method whose times can be limited by a factor."""

    time_scale: float = field(default=1.0, kw_only=True)
    """All times are multiplied by this, in (0, 1]."""


@dataclass(frozen=True)
class ForFlows(ScaledTime):
    """Settings of a method for flow-matching priors only."""

    def build(self, prior: Prior, steps: int, generator: torch.Generator) -> Objective:
        """The objective with these settings. Raises ValueError unless the prior is a flow-matching model."""
        weighting.velocity_matching(prior.schedule, torch.tensor([0.5]))
        return super().build(prior, steps, generator)
