"""What an observer sees of a run, and what it may ask for: a viewer, a log.

An observer is called between steps, on the thread of the run. Views are made only for the steps it wants to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from distill3d.types import Cameras

if TYPE_CHECKING:
    from distill3d.distill.loop import ObjectRun, Progress


@dataclass(frozen=True)
class StepViews:
    """The B training views of a step, before its update. All tensors are detached, on the prior's device.

    Networks decode the targets and the estimates only when they are asked for.
    """

    cameras: Cameras
    images: Tensor  # rendered, [B, 3, S, S] in [0, 1]
    target_images: Callable[[], Tensor]  # what the step pulls the views to, [B, 3, S, S] in [0, 1]
    x0_images: Callable[[], Tensor] | None  # one-step denoised estimates [B, 3, S, S]; None where there are none (yet)
    penalties: Mapping[str, Tensor]  # the weighted regularizers of the step, scalars


See = Callable[[StepViews], None]
Watch = Callable[[int], See | None]  # step -> what takes the views of the step; None where nobody looks


def nobody(step: int) -> See | None:
    """The `Watch` of a run without observers."""
    return None


@dataclass(frozen=True)
class Steering:
    """What an observer asks for after a step."""

    settings: Mapping[str, float] | None = None  # new values of `changes.changeable` settings, from the next step on
    stop: bool = False  # end the run here, as if it had been finished
    again: bool = False  # call `after` again before the next step: the run pauses


class Observer(Protocol):
    """Watches a run. Subclass it and define what you need; the defaults see nothing and ask for nothing.

    An observer that raises an exception is dropped with a warning, and the run goes on.
    """

    def start(self, run: ObjectRun, folder: Path, step: int) -> None:
        """Called before the first step, which is `step` (above 0 for a run that is resumed).

        Called again where a run that diverged goes on from its checkpoint.
        """

    def wants(self, step: int) -> bool:
        """Whether to call `see` at this step."""
        return False

    def see(self, step: int, views: StepViews) -> None:
        """Called after the update of a step that `wants` asked for, before `after`."""

    def after(self, progress: Progress) -> Steering | None:
        """Called after each step, when it is in the log; on return the next step begins."""
        return None

    def end(self) -> None:
        """Called once when the run has ended, in whatever way, and its files are written."""
