"""The command about this machine: doctor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from distill3d.cli.shared import Device, Dtype, precision
from distill3d.priors.options import PriorOptions


@dataclass
class Doctor:
    """Show what is installed, which device and which priors there are, and how fast a prior runs here."""

    prior: str | None = "toybox"
    """A prior to load and time; None for none."""
    device: Device = "cpu"
    """Where to time it."""
    dtype: Dtype = "auto"
    """Precision of the prior's network; auto is bfloat16 where the device computes it in hardware, else float32."""
    prior_options: Annotated[PriorOptions, tyro.conf.arg(name="")] = field(default_factory=PriorOptions)


def run_doctor(command: Doctor) -> int:
    from distill3d.cli.report import report

    for line in report(command.prior, command.device, precision(command.dtype, command.device), command.prior_options):
        print(line, flush=True)
    return 0
