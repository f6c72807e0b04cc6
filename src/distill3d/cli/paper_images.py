"""The experiments of `paper` on images and on single predictions: 2d, inversion."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from distill3d.cli.machines import CellMachines
from distill3d.cli.paper_parts import chosen_prompts, conclude, load_checked, note_evaluator, prior_config
from distill3d.cli.shared import Flag, Float, Listed, Model, Name, Place, command_line, counter


@dataclass(frozen=True)
class TwoD:
    """2D: constant, cached and inverted noise, and SDS, against DDIM from the same noise. About 20 minutes.

    16 toys, one seed. With constant noise, and with that of the previous step, the image is DDIM's; the row of another
    seed shows how far apart two samples of DDIM are. Tables and 2d.png.
    """

    PROMPTS: ClassVar[int] = 16
    full: Flag = False
    """The paper's size: Stable Diffusion 2.1, 43 prompts, guidance scale 7.5."""
    prompts: Annotated[Listed, arg(metavar="PROMPTS")] = ()
    """Prompts, as for bench; default: 16 toys, or 16 of the 43."""
    seed: int = 0
    """Seed of all images; references use others."""
    scale: Float = None
    """Guidance scale of DDIM and SDI, and of the first SDS; default: 5, with --full 7.5. SDI as in the paper inverts at
    minus that, and amounts to more guidance; the row of nominal guidance does not."""
    steps: int = 50
    """Steps of DDIM; those of the other methods are in proportion (SDI 40, SDS 400 at 50)."""
    evaluator: Name = None
    """Folder of a CLIP model; default: the bundled evaluator for the bundled prior, else none."""
    force: Flag = False
    """Run even if the bundled prior does not know what a prompt names."""
    machines: CellMachines = field(default_factory=CellMachines)
    out: Place = Path("paper-2d")
    """Folder for everything, or an address such as s3://bucket/folder. The same command continues."""
    model: Model = field(default_factory=Model)

    def run(self) -> int:
        """Makes what is missing, prints the table and where the files are; returns the exit status."""
        from distill3d.bench import check_libraries
        from distill3d.bench.judging import find_evaluator
        from distill3d.bench.paper.experiments import list_prompts
        from distill3d.bench.paper.figures import draw_images
        from distill3d.bench.paper.images import PANELS, Study, caption, run_study
        from distill3d.distill.image_recipes import DEFAULT_SCALE

        check_libraries()
        place = prior_config(self.model, "sd21" if self.full else "toybox")
        scale = self.scale if self.scale is not None else 7.5 if self.full else DEFAULT_SCALE
        prompts = chosen_prompts(self.prompts, place.prior, self.full, self.PROMPTS)
        study = Study(prompts, scale, self.steps, seed=self.seed, **vars(place))
        executor, device = self.machines.executor(study.device), self.machines.device_here(study.device)
        prior = load_checked(replace(study, device=device), prompts, self.force)
        evaluator = find_evaluator(self.evaluator, study.prior)
        note_evaluator(evaluator)
        typed, total = command_line(["distill3d", "paper", "2d"], self), len(study.rows) + len(study.references)
        with counter("images", len(prompts) * total) as advance:
            found = run_study(self.out, study, prior, evaluator, lambda row, prompt, made: advance(), executor)
        text, figure = caption(study, list_prompts(prompts), typed), found.folder / "2d.png"
        images = {row: [one.image for one in made] for row, made in found.made.items()}
        draw_images(figure, images, prompts, found.table, PANELS, text)
        conclude(self.out, found.folder, "2d", found.table, text)
        print(f"{figure}\n{found.folder / '2d.md'}, table.tex, table.csv, images.csv")
        return 0


@dataclass(frozen=True)
class Inversion:
    """Ways to find the noise: the residual of equation 8 over t for each, with the NFE that it needs.

    Writes inversion.png and inversion.csv. About 5 minutes on a laptop.
    """

    prompts: Annotated[tuple[str, ...], arg(metavar="PROMPTS")] = (
        "a red mushroom",
        "a blue car",
        "a yellow duck",
        "a green house",
    )
    """Prompts to average over."""
    seeds: int = 2
    """Samples of each prompt."""
    scales: tuple[float, ...] = (1.0, 5.0)
    """Guidance scales of equation 8, one panel each."""
    steps: int = 50
    """Steps of the DDIM sampler whose trajectory is the ground truth."""
    times: int = 9
    """Points on the trajectory that are measured."""
    force: Flag = False
    """Run even if the bundled prior does not know what a prompt names."""
    out: Path = Path("figures")
    """Folder for the files."""
    model: Model = field(default_factory=Model)

    def run(self) -> int:
        """Measures, draws and says where the files are; returns the exit status."""
        from distill3d.bench import check_libraries
        from distill3d.bench.paper import inversion
        from distill3d.bench.paper.figures import draw_residuals

        settings = inversion.InversionSettings(self.prompts, self.seeds, self.scales, self.steps, self.times)
        check_libraries()
        place = prior_config(self.model, "toybox", dtype="float32")
        prior = load_checked(place, self.prompts, self.force, self.out)
        with counter("measuring", len(settings.scales) * settings.times * len(inversion.STRATEGIES)) as advance:
            result = inversion.measure_residuals(prior, settings, on_residual=advance)
        table, figure = self.out / "inversion.csv", self.out / "inversion.png"
        inversion.write_residuals(table, result.residuals)
        draw_residuals(figure, result, self._caption(place.prior))
        print(f"{figure}\n{table}")
        return 0

    def _caption(self, prior: str) -> str:
        seeds = "seed 0" if self.seeds == 1 else f"{self.seeds} samples of each from seed 0"
        return (
            "Residual of equation 8 of Lukoianov et al. 2024, mean of |eps(x0 + sigma/alpha kappa, t, y) - kappa|^2 "
            f"over pixels and samples, on the trajectory x0(t) of a {self.steps}-step DDIM sampler, against the "
            f"network evaluations (NFE) per sample. Prior: {prior}. Prompts: {'; '.join(self.prompts)} ({seeds}). "
            "Images: the first sample denoised in one step through each kappa at the middle time; DDIM's own kappa "
            f"gives x0(t) itself. Made by: {command_line(['distill3d', 'paper', 'inversion'], self)}"
        )
