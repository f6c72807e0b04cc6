"""Settings of the methods as values: for recipes, config files and the command line.

Each class holds the arguments of the function of the same name in methods.py, where the equations are, with the
same defaults. Settings out of range raise ValueError when the value is made, before any prior is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from distill3d.objectives import methods, noise, prediction, reference, timesteps
from distill3d.objectives.objective import Noise, NoiseFrame, Objective
from distill3d.objectives.settings_base import ForFlows, Method, ScaledTime, Settings
from distill3d.objectives.successor_settings import ASD, BSD, DSD, SCTD, FlowDreamer
from distill3d.types import Prior

PUBLISHED_TRAINING = 25000 * 1e-4  # training steps times learning rate of VSD's student
SOLVERS: dict[str, Callable[..., Noise]] = {
    "fixed_point": partial(noise.fixed_point, damping=0.5, memory=3),
    "sign_descent": noise.sign_descent,
    "continuation": partial(noise.continuation, damping=0.5, memory=3),
    "cfg_plus_plus": partial(noise.cfg_plus_plus, damping=0.5, memory=3),
    "descent": noise.descent,
}


@dataclass(frozen=True)
class SDI(Settings):
    """Settings of `sdi`.

    A noise other than "inversion" is for comparison: a random draw, or a solver of equation 8 as the derivation has it:
    `inversion_steps` steps at the prediction's `scale`, at the level that made x, from a noise that stays.

    SDI by inversion amounts to more guidance than its scale says (`prediction.effective_guidance`): the published 7.5
    and -7.5 with ten steps act like 18 to 20.
    """

    scale: float = 7.5
    inversion_scale: float = -7.5
    inversion_steps: int = 10
    eta: float = 0.3
    start: float = 0.98
    stop: float = 0.25
    noise: Literal["inversion", "random", "fixed_point", "sign_descent", "continuation", "cfg_plus_plus", "descent"] = (
        "inversion"
    )
    """cfg_plus_plus needs a scale in [0, 1]."""
    nominal: bool = False
    """scale is the effective guidance: the prediction uses (1 - c) scale + c inversion_scale, c being that of the
    inversion (`prediction.nominal`). The effective guidance of the other kinds of noise is the scale anyhow.
    """

    def _make(self, **more: object) -> Objective:
        settings = (self.scale, self.inversion_scale, self.inversion_steps, self.eta, self.start, self.stop)
        objective = methods.sdi(*settings)
        if self.noise == "inversion":
            nominal = prediction.nominal(self.scale, self.inversion_scale, self.inversion_steps)
            return replace(objective, prediction=nominal) if self.nominal else objective
        if self.noise == "random":
            return replace(objective, noise=noise.gaussian())
        if self.noise not in SOLVERS:
            raise ValueError(f"unknown noise {self.noise!r}: choose inversion, random, {', '.join(SOLVERS)}")
        memory = noise.Constant()
        find = SOLVERS[self.noise](self.inversion_steps, self.scale, start=memory.start)
        found = noise.at_previous_level(find, objective.timesteps, memory.start)
        return replace(objective, noise=found, state=memory)


@dataclass(frozen=True)
class SDICached(ScaledTime):
    """Settings of `sdi_cached`; the defaults are for 2D."""

    factory = staticmethod(methods.sdi_cached)
    scale: float = 7.5
    start: float = 0.98
    stop: float = 0.02
    noise: NoiseFrame = "image"
    eta: float = 0.0


@dataclass(frozen=True)
class CFD(ScaledTime):
    """Settings of `cfd`; the defaults are for 2D."""

    factory = staticmethod(methods.cfd)
    scale: float = 7.5
    start: float = 0.98
    stop: float = 0.02
    noise: NoiseFrame = "image"
    refresh: float = 0.0


@dataclass(frozen=True)
class SDS(Settings):
    """Settings of `sds`."""

    factory = staticmethod(methods.sds)
    scale: float = 100.0
    low: float = 0.02
    high: float = 0.98
    anneal: bool = False
    """t falls linearly from high to low instead of being drawn at random."""


@dataclass(frozen=True)
class SJC(ScaledTime):
    """Settings of `sjc`."""

    factory = staticmethod(methods.sjc)
    scale: float = 100.0
    low: float = 0.01
    high: float = 0.97
    variance_reduced: bool = True


@dataclass(frozen=True)
class NFSD(ScaledTime):
    """Settings of `nfsd`."""

    factory = staticmethod(methods.nfsd)
    guided = False
    scale: float = 7.5
    negative_prompt: str = methods.NFSD_NEGATIVE_PROMPT
    low: float = 0.02
    high: float = 0.98


@dataclass(frozen=True)
class CSD(ScaledTime):
    """Settings of `csd`."""

    factory = staticmethod(methods.csd)
    guided = False
    scale: float = 1.0
    negative_prompt: str | None = None
    negative_weight: float = 1.0
    stage: Literal["form", "refine"] = "form"
    """How the negative prompt's weight goes: up from 0 while the object forms, down to a half while it is refined."""
    low: float = 0.02
    high: float = 0.98


@dataclass(frozen=True)
class HiFA(ScaledTime):
    """Settings of `hifa`."""

    factory = staticmethod(methods.hifa)
    scale: float = 100.0
    start: float = 0.98
    stop: float = 0.3
    image_weight: float = 0.48
    """Weight of the method's own loss on images; 0 leaves it out."""


@dataclass(frozen=True)
class ISM(ScaledTime):
    """Settings of `ism`."""

    factory = staticmethod(methods.ism)
    scale: float = 7.5
    steps: int = 5
    wide: float = 0.1
    narrow: float = 0.08
    high: float = 0.98
    warmup: float = 0.3
    """Fraction of the run over which the times and the interval narrow."""


@dataclass(frozen=True)
class MVDream(ScaledTime):
    """Settings of `mvdream`, built for groups of one view; a run on a multi-view prior sets Objective.views."""

    factory = staticmethod(methods.mvdream)
    guided = False
    scale: float = 50.0
    rescale: float = 0.5
    warmup: float = 0.8
    """Fraction of the run over which the times widen."""
    shared_noise: bool = False

    def _make(self, **more: object) -> Objective:
        return super()._make(views=1, **more)


@dataclass(frozen=True)
class SDSBridge(ScaledTime):
    """Settings of `sds_bridge`."""

    factory = staticmethod(methods.sds_bridge)
    guided = False
    scale: float = 40.0
    target_suffix: str = methods.BRIDGE_TARGET
    source_suffix: str = methods.BRIDGE_SOURCE
    first: float = 0.5
    """Fraction of the run, at its beginning, that is SDS towards the target text."""
    low: float = 0.02
    high: float = 0.98


@dataclass(frozen=True)
class RFDS(ForFlows):
    """Settings of `rfds`; for flow-matching priors only."""

    factory = staticmethod(methods.rfds)
    scale: float = 100.0
    low: float = 0.02
    high: float = 0.7


@dataclass(frozen=True)
class _Trained(ScaledTime):
    scale: float = 7.5
    student_steps: int = field(default=1, kw_only=True)
    """Training steps of the student at each step."""
    student_rate: float = field(default=1e-4, kw_only=True)
    """Learning rate of the student."""
    lookahead: bool = field(default=False, kw_only=True)
    """The student learns before it is asked, not after."""

    def build(self, prior: Prior, steps: int, generator: torch.Generator) -> Objective:
        """The objective with a new student of the prior, whose weights are drawn from the generator.

        Warns where student_rate times all training steps is less than a tenth of the source's: the method is then not
        far from CSD. Raises ValueError for a prior without a UNet on latents, and what priors.student.Student raises.
        """
        from distill3d.priors.stable_diffusion import LatentPrior
        from distill3d.priors.student import Student

        if not isinstance(prior, LatentPrior):
            raise ValueError(
                f"{type(self).__name__.lower()} trains a student, which needs a latent diffusion model with a UNet; "
                f"{prior.name} is not one"
            )
        student = Student(prior, generator, learning_rate=self.student_rate)
        if (training_steps := steps * self.student_steps) * self.student_rate < 0.1 * PUBLISHED_TRAINING:
            warnings.warn(
                f"{training_steps} training steps of {self.student_rate:g} teach the student little, so that "
                f"{type(self).__name__} is close to CSD at scale {self.scale - 1:g}: raise the steps, student_steps or "
                "student_rate (published: 25000 of 1e-4)",
                stacklevel=1,
            )
        return replace(self.with_student(student), state=student)

    def renewed(self, old: Objective) -> Objective:
        """See `Settings`: the student stays."""
        student: Any = old.state
        return replace(self.with_student(student), state=student, views=old.views, fixed_views=old.fixed_views)

    def with_student(self, student: reference.Student) -> Objective:
        """The objective with a student of your own."""
        return self._completed(self._make(student=student))

    def _make(self, **more: object) -> Objective:
        return super()._make(**{"student": None, **more})


@dataclass(frozen=True)
class VSD(_Trained):
    """Settings of `vsd`."""

    factory = staticmethod(methods.vsd)
    camera: float = 1.0
    """Guidance scale of the student's camera, in [0, 1]."""
    low: float = 0.02
    high: float = 0.98
    switch: float = 0.2
    """Fraction of the run after which t is drawn from [low, 0.5]."""


@dataclass(frozen=True)
class ESD(_Trained):
    """Settings of `esd`."""

    factory = staticmethod(methods.esd)
    entropy: float = 0.5


def starting_at(method: Method, t: float) -> Method:
    """The same method without times above t in [0, 1], for a scene that begins with a mesh.

    SDI anneals from t, SDS, RFDS and FlowDreamer draw below t, and every other method has its times multiplied by t.
    Raises ValueError for t out of range, and for a method of another class: build it, and pass its Objective.
    """
    if isinstance(method, SDI):
        return replace(method, start=t, stop=min(method.stop, t))
    if isinstance(method, SDS | RFDS | FlowDreamer):
        return replace(method, high=min(method.high, t), low=min(method.low, t))
    if isinstance(method, ScaledTime):
        return replace(method, time_scale=min(method.time_scale, t))
    if isinstance(method, Objective):
        return replace(method, timesteps=timesteps.scaled(method.timesteps, t))
    raise ValueError(f"the times of {type(method).__name__} cannot be limited: pass the Objective that it builds")


# The names on the command line. `sdi_cached` and `cfd` are as in 2D, `rfds` and `flowdreamer` for flow models.
METHODS: dict[str, Method] = {
    "sdi": SDI(),
    "sds": SDS(),
    "sjc": SJC(),
    "nfsd": NFSD(),
    "csd": CSD(),
    "hifa": HiFA(),
    "ism": ISM(),
    "mvdream": MVDream(),
    "sds_bridge": SDSBridge(),
    "vsd": VSD(),
    "esd": ESD(),
    "rfds": RFDS(),
    "sdi_cached": SDICached(),
    "cfd": CFD(),
    "dsd": DSD(),
    "asd": ASD(),
    "flowdreamer": FlowDreamer(),
    "sctd": SCTD(),
    "bsd": BSD(),
}
