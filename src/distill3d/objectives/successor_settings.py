"""Settings of the methods in successors.py, each with the arguments and defaults of the function of its name."""

from __future__ import annotations

from dataclasses import dataclass

from distill3d.objectives import successors
from distill3d.objectives.settings_base import ForFlows, ScaledTime


@dataclass(frozen=True)
class DSD(ScaledTime):
    """Settings of `dsd`."""

    factory = staticmethod(successors.dsd)
    scale: float = 7.5
    steps: int = 10
    """Steps of the trajectory that the noise comes from."""
    gap: float = 0.1
    start: float = 0.98
    stop: float = 0.32


@dataclass(frozen=True)
class ASD(ScaledTime):
    """Settings of `asd`."""

    factory = staticmethod(successors.asd)
    scale: float = 7.5
    gap: float = 0.1
    """How much later than the prediction the reference is, at most, as a fraction of t minus the lowest time."""


@dataclass(frozen=True)
class FlowDreamer(ForFlows):
    """Settings of `flowdreamer`; for flow-matching priors only."""

    factory = staticmethod(successors.flowdreamer)
    scale: float = 60.0
    inversion_scale: float = 1.0
    inversion_steps: int = 3
    warmup: float = 0.18
    """Fraction of the run, at its beginning, with random noise."""
    low: float = 0.02
    high: float = 0.7


@dataclass(frozen=True)
class SCTD(ScaledTime):
    """Settings of `sctd`."""

    factory = staticmethod(successors.sctd)
    scale: float = 7.5
    segments: int = 5
    gap: float = 0.08


@dataclass(frozen=True)
class BSD(ScaledTime):
    """Settings of `bsd`, which has no guidance scale."""

    factory = staticmethod(successors.bsd)
    guided = False
    denoising: float = 1.25
    """Weight of the denoiser's direction."""
    warmup: float = 0.3
    """Fraction of the run over which the times narrow."""
