"""From a sentence to a picture: DDIM itself, or any objective on one picture instead of a field.

Where score distillation is told apart from DDIM by its noise alone, a picture shows it without a camera:
`sdi_cached` is the DDIM sampler, `sdi` finds the noise again by inversion as it has to in 3D.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill3d.export import video
from distill3d.diffusion.ddim import ddim_step
from distill3d.diffusion.random import normal
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import coefficients
from distill3d.runs.objects import check_prompt, new_run_folder, write_config
from distill3d.objectives import Objective
from distill3d.distill.loop import Progress, distill
from distill3d.distill.image_recipes import PictureRecipe, picture_objective, picture_recipe
from distill3d.priors.base import FrozenPrior
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.scenes.image import ImageScene, encodable, unit_range
from distill3d.types import Conditioning, Prior, Rendering

Report = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class PictureConfig:
    """Everything that decides a picture; what `config.json` holds beside the versions."""

    prompt: str
    method: str = "ddim"
    recipe: PictureRecipe = dataclasses.field(default_factory=lambda: picture_recipe("ddim"))
    prior: str = "toybox"
    negative: str = ""
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    prior_options: PriorOptions = PriorOptions()


@dataclasses.dataclass(frozen=True)
class Painting:
    """B pictures and what they cost."""

    x: Tensor  # [B, *sample_shape]
    images: Tensor  # [B, 3, H, W] in [0, 1]
    steps: int  # finished
    nfe: int  # network rows
    seconds: float
    interrupted: bool = False


@dataclasses.dataclass(frozen=True)
class PictureResult:
    """Where a picture lies, and the painting itself."""

    folder: Path
    painting: Painting

    @property
    def picture(self) -> Path:
        """The file."""
        return self.folder / "image.png"


class Run(Protocol):
    """A way to make pictures: `run` makes them, and may be left at any step by an exception."""

    nfe: int  # network rows before the first step

    def run(self, on_step: Report) -> None: ...
    def x(self) -> Tensor: ...
    def images(self) -> Tensor: ...


class DDIMRun:
    """DDIM sampling, told as its denoised pictures; it starts from x = 0 with noise of the first time's level."""

    def __init__(self, recipe: PictureRecipe, prior: Prior, conditioning: Conditioning, generator: torch.Generator):
        self.recipe, self.prior, self.conditioning, self.generator = recipe, prior, conditioning, generator
        self.nfe = 0
        self._x0 = torch.zeros(len(conditioning), *prior.sample_shape, device=prior.device)

    @torch.no_grad()
    def run(self, on_step: Report) -> None:
        """Samples; after each step `x` is the denoised picture of its time."""
        schedule, batch = self.prior.schedule, len(self.conditioning)
        times = torch.linspace(self.recipe.first, self.recipe.last, self.recipe.steps, dtype=torch.float64)
        times = times.to(self._x0)[:, None].expand(-1, batch)
        rows = torch.arange(batch, device=self._x0.device)
        model = Guided(self.prior, self.conditioning, self.recipe.guidance)
        x = coefficients(schedule, times[0], self._x0)[1] * normal(self._x0, self.generator)
        for step, t in enumerate(times):
            eps = model(x, t, rows)
            alpha, sigma = coefficients(schedule, t, x)
            before, self._x0 = self._x0, (x - sigma * eps) / alpha
            if step + 1 < len(times):
                x = ddim_step(x, eps, schedule, t, times[step + 1])
            loss = 0.5 * float((self._x0 - before).square().mean())
            on_step(Progress(step, float(t.mean()), loss, penalty=0.0, opacity=1.0, nfe=model.nfe))

    def x(self) -> Tensor:
        """The denoised pictures [B, *sample_shape] so far."""
        return self._x0

    @torch.no_grad()
    def images(self) -> Tensor:
        """The pictures [B, 3, H, W]."""
        return self.prior.decode(self._x0)


class PictureRun:
    """B pictures under an objective: the scene, its optimizer and its prompts, as callables that `distill` wants."""

    def __init__(
        self, recipe: PictureRecipe, objective: Objective, prior: Prior, conditioning: Conditioning,
        generator: torch.Generator,
    ):  # fmt: skip
        self.recipe, self.objective, self.prior = recipe, objective, prior
        self.conditioning, self.generator = conditioning, generator
        self.pixels = recipe.space == "pixels"
        values, self.nfe = _start(recipe, prior, conditioning, generator)
        hold = encodable(prior.encode, prior.decode) if recipe.project else None
        self.scene = ImageScene(values, unit_range if self.pixels else hold)
        parameters = self.scene.parameters()
        if recipe.rate == 0:  # the loss is 0.5 mean(...): this rate undoes the mean, and x <- x - g
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=float(values.numel()))
        else:
            self._optimizer = torch.optim.Adam(parameters, lr=recipe.rate, betas=(0.9, 0.99), eps=1e-10)

    def run(self, on_step: Report) -> None:
        """Distils the prior into the pictures."""
        steps = range(self.recipe.steps)
        distill(
            self.views, self.prior, self.objective, lambda step: self._optimizer, lambda step, rendering: {},
            steps, len(steps), self.generator, on_step, self.encode,
        )  # fmt: skip

    def views(self, step: int) -> tuple[Rendering, Conditioning]:
        """The pictures, put back among the allowed ones, and their prompts."""
        self.scene.settle()
        return self.scene.render(), self.conditioning

    def encode(self, values: Tensor) -> Tensor:
        """The scene's values as x: latents are x already."""
        return self.prior.encode(values) if self.pixels else values

    @torch.no_grad()
    def x(self) -> Tensor:
        """The pictures as x of the prior."""
        return self.encode(self.scene.values).detach()

    @torch.no_grad()
    def images(self) -> Tensor:
        """The pictures [B, 3, H, W]."""
        values = self.scene.values.detach()
        return unit_range(values) if self.pixels else self.prior.decode(values)


def paint(
    prior: Prior,
    conditioning: Conditioning,
    method: str,
    recipe: PictureRecipe,
    generator: torch.Generator,
    on_step: Report = lambda progress: None,
) -> Painting:
    """One picture for each of the B conditions, by a method's name; see `prepare` and `finish`."""
    return finish(prepare(prior, conditioning, method, recipe, generator), on_step)


def prepare(
    prior: Prior, conditioning: Conditioning, method: str, recipe: PictureRecipe, generator: torch.Generator
) -> Run:
    """A run that stands at its start; ValueError for an unknown method, and settings that do not fit it."""
    picture_recipe(method)
    if method == "ddim":
        return DDIMRun(recipe, prior, conditioning, generator)
    return PictureRun(recipe, picture_objective(method, recipe, prior, generator), prior, conditioning, generator)


def finish(run: Run, on_step: Report = lambda progress: None) -> Painting:
    """Goes through a run; an interrupt (Ctrl-C) ends it early, with the pictures that are there."""
    began, last = time.monotonic(), None

    def after(progress: Progress) -> None:
        nonlocal last
        last = dataclasses.replace(progress, nfe=progress.nfe + run.nfe)
        on_step(last)

    interrupted = False
    try:
        run.run(after)
    except KeyboardInterrupt:
        interrupted = True
    steps, nfe = (last.step + 1, last.nfe) if last else (0, run.nfe)
    return Painting(run.x(), run.images(), steps, nfe, time.monotonic() - began, interrupted)


def draw_picture(
    config: PictureConfig,
    out: str | Path = "runs",
    size: int | None = None,
    force: bool = False,
    on_step: Report = lambda progress: None,
    prior: FrozenPrior | None = None,
) -> PictureResult:
    """Makes a picture and writes its run folder below `out`: config.json, metrics.jsonl, image.png.

    `size` is the pixels a side of image.png; default: what the prior makes. `prior` is what the configuration's
    names mean, where it was loaded before.

    Raises:
        ValueError: for anything wrong with the prompt, the prior, the method or the output folder, before
            anything is written.
    """
    check_prompt(config.prompt, config.prior, force)
    check_size(size)
    prior, conditioning = told_prior(config, prior)
    generator = torch.Generator().manual_seed(config.seed)
    run = prepare(prior, conditioning, config.method, config.recipe, generator)
    folder = new_run_folder(Path(out), config.prompt)
    plain: Any = config
    write_config(folder, plain)
    with (folder / "metrics.jsonl").open("w") as metrics:

        def after(progress: Progress) -> None:
            metrics.write(json.dumps(dataclasses.asdict(progress)) + "\n")
            metrics.flush()
            on_step(progress)

        painting = finish(run, after)
    video.save_image(folder / "image.png", to_size(painting.images[0], size))
    return PictureResult(folder, painting)


class Told(Protocol):
    """What the configurations of a picture and of a comparison have in common."""

    @property
    def prompt(self) -> str: ...
    @property
    def prior(self) -> str: ...
    @property
    def negative(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def prior_options(self) -> PriorOptions: ...


def told_prior(config: Told, prior: FrozenPrior | None = None) -> tuple[FrozenPrior, Conditioning]:
    """The prior (the one that is given, or a new one) and what it is told, its text encoders gone.

    Raises:
        ValueError: for a ControlNet, which needs an object.
    """
    if config.prior_options.controlnet is not None:
        raise ValueError("a ControlNet is told a rendering of an object, and a picture has none: use generate")
    prior = prior or load_prior(config.prior, config.device, getattr(torch, config.dtype), config.prior_options)
    conditioning = text_conditioning(prior, [config.prompt], config.negative)
    prior.texts.drop()
    return prior, conditioning


def check_size(size: int | None) -> None:
    """Raises ValueError for a side that is not 1 to 4096 pixels."""
    if size is not None and not 1 <= size <= 4096:
        raise ValueError(f"a picture is 1 to 4096 pixels a side, got {size}")


def text_conditioning(prior: Prior, prompts: Sequence[str], negative: str = "") -> Conditioning:
    """What the prior is told about pictures: each prompt as it stands, no view words."""
    return Conditioning(prior.embed(list(prompts)), prior.embed([negative] * len(prompts)))


def read_picture(path: str | Path, size: int) -> Tensor:
    """A picture's middle square [1, 3, size, size] in [0, 1]; ValueError where the file is no picture."""
    try:
        with Image.open(path) as picture:
            square = ImageOps.fit(picture.convert("RGB"), (size, size))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255


def to_size(image: Tensor, size: int | None) -> Image.Image:
    """A picture [3, H, W] in [0, 1], resized to `size` pixels a side unless that is None."""
    picture = video.contact_sheet(image[None], columns=1)
    return picture if size is None else picture.resize((size, size), Image.Resampling.LANCZOS)


@torch.no_grad()
def _start(
    recipe: PictureRecipe, prior: Prior, conditioning: Conditioning, generator: torch.Generator
) -> tuple[Tensor, int]:
    """First values of a scene, pixels or x as the recipe says, and the network rows they took."""
    batch, pixels, rows = len(conditioning), recipe.space == "pixels", 0
    shape = (batch, 3, prior.image_size, prior.image_size)
    x = torch.zeros(batch, *prior.sample_shape, device=prior.device)
    if recipe.start == "noise":
        return (ImageScene.noise(shape, generator).values if pixels else normal(x, generator)).to(x), rows
    if recipe.start in ("zero", "denoised"):
        if recipe.start == "denoised":
            one = DDIMRun(dataclasses.replace(recipe, steps=1), prior, conditioning, generator)
            seen: list[Progress] = []
            one.run(seen.append)
            x, rows = one.x(), seen[-1].nfe
        return (prior.decode(x) if pixels else x), rows
    gray = recipe.start == "gray"
    images = ImageScene.gray(shape).values if gray else read_picture(recipe.start, shape[-1]).expand(shape)
    images = images.to(x)
    return (images if pixels else prior.encode(images)), rows
