"""The command that draws the paper's figures again: paper."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from distill3d.commands.shared import Device, Dtype, precision


@dataclass
class Paper:
    """Measure and draw a figure of the paper on a prior of yours.

    inversion: the residual of equation 8 over t for every way to find the noise, with the network evaluations each
    spends. Writes inversion.png and inversion.csv.
    """

    figure: tyro.conf.Positional[Literal["inversion"]]
    """Which figure."""
    prior: str = "toybox"
    """The frozen 2D model: "toybox" (bundled), a folder in diffusers format, or a hub id."""
    prompts: tuple[str, ...] = ("a red mushroom", "a blue car", "a yellow duck", "a green house")
    """Prompts to average over."""
    seeds: int = 2
    """Samples of each prompt."""
    scales: tuple[float, ...] = (1.0, 5.0)
    """Guidance scales of equation 8, a panel each."""
    steps: int = 50
    """Steps of the DDIM sampler whose trajectory is the truth."""
    times: int = 9
    """Places on it that are measured."""
    device: Device = "cpu"
    """Where to compute."""
    dtype: Dtype = "float32"
    """Precision of the prior's network."""
    out: Path = Path("figures")
    """Folder for the files."""
    force: bool = False
    """Run even if the bundled prior knows nothing named in a prompt."""


def run_paper(command: Paper) -> int:
    """Measures, draws and says where the files lie."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from distill3d.evaluation.paper import STRATEGIES, Study, draw_findings, figure_class, investigate, write_points
    from distill3d.generate import check_prompt
    from distill3d.priors.loading import load_prior

    study = Study(command.prompts, command.seeds, command.scales, command.steps, command.times)
    for prompt in command.prompts:
        check_prompt(prompt, command.prior, command.force)
    figure_class()
    _check_folder(command.out)
    prior = load_prior(command.prior, command.device, getattr(torch, precision(command.dtype, command.device)))
    total = len(study.scales) * study.times * len(STRATEGIES)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=total)
        findings = investigate(prior, study, on_point=lambda: bar.advance(task))
    table, figure = command.out / "inversion.csv", command.out / "inversion.png"
    write_points(table, findings.points)
    draw_findings(figure, findings, _caption(command))
    print(f"{figure}\n{table}")
    return 0


def _caption(command: Paper) -> str:
    seeds = "seed 0" if command.seeds == 1 else f"{command.seeds} samples of each from seed 0"
    return (
        "Residual of equation 8 of Lukoianov et al. 2024, mean of |eps(x0 + sigma/alpha kappa, t, y) - kappa|^2 over "
        f"pixels and samples, on the trajectory x0(t) of a {command.steps}-step DDIM sampler. Evaluations are network "
        f"rows a sample. Prior: {command.prior}. Prompts: {'; '.join(command.prompts)} ({seeds}). Pictures: the first "
        "sample denoised in one step through each kappa at the middle time; DDIM's own kappa gives x0(t) itself. "
        f"Made by: {_command_line(command)}"
    )


def _command_line(command: Paper) -> str:
    """What to type for the same figure: the values that are not the default."""
    words = ["distill3d", "paper", command.figure]
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name in ("figure", "out") or value == field.default:
            continue
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        words += [f"--{field.name}", *map(str, values)]
    return shlex.join(words)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
