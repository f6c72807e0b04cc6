"""The command that repeats the paper's experiments: paper, and its sub-commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distill3d.cli.experiments import (
    Ablation,
    Cfg,
    Diversity,
    Ism,
    Noise,
    Objects,
    Table1,
    TwoD,
    command_line,
    run_flat,
    run_objects,
)
from distill3d.cli.shared import Device, Dtype, precision


@dataclass
class Inversion:
    """Ways to find the noise: the residual of equation 8 over t for each, with the network evaluations it spends.

    Writes inversion.png and inversion.csv. About 5 minutes on a laptop.
    """

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


Experiments = (
    Annotated[Table1, tyro.conf.subcommand("table1")]
    | Annotated[Ism, tyro.conf.subcommand("ism")]
    | Annotated[Ablation, tyro.conf.subcommand("ablation")]
    | Annotated[Inversion, tyro.conf.subcommand("inversion")]
    | Annotated[Noise, tyro.conf.subcommand("noise")]
    | Annotated[Cfg, tyro.conf.subcommand("cfg")]
    | Annotated[Diversity, tyro.conf.subcommand("diversity")]
    | Annotated[TwoD, tyro.conf.subcommand("2d")]
)


@dataclass
class Paper:
    """Repeat an experiment of the paper (Lukoianov et al. 2024) on a prior of yours.

    Each ends in less than 40 minutes on the bundled prior, on two cores; --full is the paper's own size. What was
    interrupted goes on when the same command is typed again.
    """

    experiment: Annotated[Experiments, tyro.conf.arg(name="")]


def run_paper(command: Paper) -> int:
    """Runs the experiment, draws it and says where the files lie."""
    experiment = command.experiment
    if isinstance(experiment, Inversion):
        return _run_inversion(experiment)
    if isinstance(experiment, Objects):
        return run_objects(experiment)
    return run_flat(experiment)


def _run_inversion(command: Inversion) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from distill3d.bench.paper.inversion import (
        STRATEGIES,
        Study,
        draw_findings,
        figure_class,
        investigate,
        write_points,
    )
    from distill3d.priors.loading import load_prior
    from distill3d.runs.objects import check_prompt

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


def _caption(command: Inversion) -> str:
    seeds = "seed 0" if command.seeds == 1 else f"{command.seeds} samples of each from seed 0"
    return (
        "Residual of equation 8 of Lukoianov et al. 2024, mean of |eps(x0 + sigma/alpha kappa, t, y) - kappa|^2 over "
        f"pixels and samples, on the trajectory x0(t) of a {command.steps}-step DDIM sampler. Evaluations are network "
        f"rows a sample. Prior: {command.prior}. Prompts: {'; '.join(command.prompts)} ({seeds}). Pictures: the first "
        "sample denoised in one step through each kappa at the middle time; DDIM's own kappa gives x0(t) itself. "
        f"Made by: {command_line('inversion', command)}"
    )


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
