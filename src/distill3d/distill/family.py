"""Objectives by name, for recipes and command lines, in 2D and in 3D alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from distill3d.objectives import Objective, csd, esd, hifa, ism, mvdream, nfsd, sds, sds_bridge, sjc, vsd
from distill3d.objectives.timesteps import scaled
from distill3d.priors.stable_diffusion import LatentPrior
from distill3d.priors.student import Student
from distill3d.types import Prior

# Each makes its objective for a run of so many steps; SDI has settings of its own in every recipe.
PLAIN: dict[str, Callable[..., Objective]] = {
    "sds": lambda steps, **scale: sds(**scale),
    "sjc": lambda steps, **scale: sjc(**scale),
    "nfsd": lambda steps, **scale: nfsd(**scale),
    "csd": lambda steps, **scale: csd(**scale),
    "hifa": lambda steps, **scale: hifa(**scale),
    "ism": lambda steps, **scale: ism(**scale),
    "mvdream": lambda steps, **scale: mvdream(views=1, **scale),
    "sds_bridge": lambda steps, **scale: sds_bridge(**scale),
}
TAUGHT: dict[str, Callable[..., Objective]] = {"vsd": vsd, "esd": esd}  # they train a companion of the prior
FAMILY = (*PLAIN, *TAUGHT)


def companion(method: str, prior: Prior, generator: torch.Generator) -> Student | None:
    """The student that a method trains beside the prior; None for methods without one.

    Raises:
        ValueError: for a prior that is no latent diffusion model.
    """
    if method not in TAUGHT:
        return None
    if not isinstance(prior, LatentPrior):
        raise ValueError(
            f"{method} trains a companion of a latent diffusion model with a UNet, which {prior.name} is not"
        )
    return Student(prior, generator)


def family_objective(
    method: str, steps: int, scale: float | None, student: Student | None, highest: float = 1.0
) -> Objective:
    """The objective behind a name of FAMILY for a run of `steps`; without a scale the method's own is taken.

    highest: its times are multiplied by this.
    """
    given = {} if scale is None else {"scale": scale}
    if method in TAUGHT:
        assert student is not None, "make it with `companion`"
        objective = TAUGHT[method](student, **given)
    else:
        objective = PLAIN[method](steps, **given)
    return replace(objective, timesteps=scaled(objective.timesteps, highest)) if highest < 1 else objective
