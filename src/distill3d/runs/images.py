"""From a prompt to an image: DDIM itself, or any objective on an image instead of a 3D scene.

An image shows without any camera how score distillation and DDIM differ by their noise alone: `sdi_cached` is the DDIM
sampler, `sdi` finds the noise again by inversion as it has to in 3D.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from distill3d.diffusion.ddim import ddim_step
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.random import normal
from distill3d.diffusion.schedule import coefficients, from_eps
from distill3d.distill.divergence import PARAMETER, PREDICTION, Diverged, check_step, first_not_finite
from distill3d.distill.image_recipes import DDIM, STARTS, ImageRecipe, image_recipe
from distill3d.distill.loop import OnStep, Progress, optimize
from distill3d.distill.observer import See
from distill3d.export import video
from distill3d.interrupts import interrupts_between_steps, signal_of
from distill3d.meshes.images import FORMATS
from distill3d.objectives import attach
from distill3d.priors.loading import load_prior
from distill3d.runs.config import RunConfig, resolved
from distill3d.runs.folder import RunFolder
from distill3d.runs.logs import StepLog, logging
from distill3d.runs.objects import check_prompt
from distill3d.scenes.image import ImageScene, encodable, unit_range
from distill3d.types import Conditioning, Prior
from distill3d.untrusted import read_image_file

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageConfig(RunConfig):
    """Everything that decides an image."""

    prompt: str
    recipe: ImageRecipe = field(default_factory=lambda: image_recipe("ddim"))


@dataclass(frozen=True)
class Images:
    """B images and what they cost."""

    x: Tensor  # [B, *sample_shape]
    images: Tensor  # [B, 3, H, W] in [0, 1]
    steps: int  # finished
    nfe: int
    seconds: float
    interrupted: int = 0  # the number of the signal that ended it early
    diverged: Diverged | None = None  # why the run ended early; the images are those of its last finite step


@dataclass(frozen=True)
class ImageResult:
    """An image and its run folder."""

    folder: Path
    made: Images

    @property
    def image(self) -> Path:
        """The image file."""
        return self.folder / "image.png"


class ImageRun(Protocol):
    """A way to make images: `run` makes them, and an exception of `on_step` may end it after any step.

    `Diverged` ends it with the images of the step before.
    """

    nfe: int  # network evaluations before the first step

    def run(self, on_step: OnStep) -> None:
        """Takes all steps."""
        ...

    def x(self) -> Tensor:
        """The images as they are now, as x of the prior [B, *sample_shape]."""
        ...

    def images(self) -> Tensor:
        """The images as they are now [B, 3, H, W]."""
        ...


class Sampling:
    """DDIM sampling; the images of a step are its denoised estimates, x = 0 before the first."""

    def __init__(
        self, settings: DDIM, steps: int, prior: Prior, conditioning: Conditioning, generator: torch.Generator
    ):
        self.settings, self.steps = settings, steps
        self.prior, self.conditioning, self.generator = prior, conditioning, generator
        self.nfe = 0
        self._x0 = torch.zeros(len(conditioning), *prior.sample_shape, device=prior.device)

    @torch.no_grad()
    def run(self, on_step: OnStep) -> None:
        """See `ImageRun`."""
        schedule, settings = self.prior.schedule, self.settings
        times = torch.linspace(settings.start, settings.stop, self.steps, dtype=torch.float64)
        times = times.to(self._x0)[:, None].expand(-1, len(self.conditioning))
        model = Guided(self.prior, self.conditioning, settings.scale)
        x = coefficients(schedule, times[0], self._x0)[1] * normal(self._x0, self.generator)
        for step, t in enumerate(times):
            eps = model(x, t)
            before, self._x0 = self._x0, from_eps("x0", eps, x, *coefficients(schedule, t, x))
            if step + 1 < len(times):
                x = ddim_step(x, eps, schedule, t, times[step + 1])
            loss = 0.5 * float((self._x0 - before).square().mean())
            progress = Progress(step, float(t.mean()), loss, penalty=0.0, opacity=1.0, nfe=model.nfe)
            try:
                check_step(progress, [(PREDICTION, eps)])
            except Diverged:
                self._x0 = before
                raise
            on_step(progress)

    def x(self) -> Tensor:
        """See `ImageRun`."""
        return self._x0

    @torch.no_grad()
    def images(self) -> Tensor:
        """See `ImageRun`."""
        return self.prior.decode(self._x0)


class Distillation:
    """B images under an objective: an `ImageScene` and its optimizer."""

    def __init__(
        self, recipe: ImageRecipe, prior: Prior, prompts: Sequence[str], negative: str, generator: torch.Generator
    ):
        """Raises ValueError for an objective that does not fit the prior, and for an unknown start."""
        self.objective = recipe.objective.build(prior, recipe.steps, generator)
        self.recipe, self.prior, self.generator = recipe, prior, generator
        texts, suffixes = self.objective.texts, self.objective.suffixes
        self.conditioning = text_conditioning(prior, prompts, negative, suffixes, texts)
        self.pixels = recipe.space == "pixels"
        values, self.nfe = _start(recipe, prior, self.conditioning, generator)
        project = encodable(prior.encode, prior.decode) if recipe.project else None
        self.scene = ImageScene(values, unit_range if self.pixels else project)
        self._finite = self.scene.values.detach().clone()  # the values before the last update
        parameters = self.scene.parameters()
        if recipe.rate is None:  # the loss is 0.5 mean(...): this learning rate undoes the mean, and x <- x - g
            self._optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=float(values.numel()))
        else:
            self._optimizer = torch.optim.Adam(parameters, lr=recipe.rate, betas=(0.9, 0.99), eps=1e-10)

    def run(self, on_step: OnStep) -> None:
        """See `ImageRun`."""
        last, values = self.recipe.steps - 1, [(f"{PARAMETER} image", self.scene.values)]
        try:
            optimize(self, range(last + 1), on_step)
            if culprit := first_not_finite(values):
                raise Diverged(last, culprit)
        except Diverged:
            if first_not_finite(values):
                self.scene.values.data.copy_(self._finite)
            raise

    def optimizer_at(self, step: int) -> torch.optim.Optimizer:
        """See `distill.loop.Run`."""
        return self._optimizer

    def loss(self, step: int, see: See | None = None) -> tuple[Tensor, Progress]:
        """See `distill.loop.Run`; images have no observers, so `see` is not called."""
        self.scene.project()
        x = self._encode(self.scene.render().rgb)
        total = self.recipe.steps
        guidance = self.objective.guidance(
            x, self.prior, self.conditioning, step=step, total=total, generator=self.generator
        )
        loss = attach(x, guidance.gradient)
        progress = Progress(step, float(guidance.t.mean()), float(loss.detach()), 0.0, 1.0, guidance.nfe)
        names = (f"{PARAMETER} image", "the encoded image", PREDICTION, "the gradient")
        check_step(progress, zip(names, (self.scene.values, x, guidance.prediction, guidance.gradient), strict=True))
        self._finite = self.scene.values.detach().clone()
        return loss, progress

    @torch.no_grad()
    def x(self) -> Tensor:
        """See `ImageRun`."""
        return self._encode(self.scene.values).detach()

    @torch.no_grad()
    def images(self) -> Tensor:
        """See `ImageRun`."""
        values = self.scene.values.detach()
        return unit_range(values) if self.pixels else self.prior.decode(values)

    def _encode(self, values: Tensor) -> Tensor:
        return self.prior.encode(values) if self.pixels else values


def make_images(
    prior: Prior,
    prompts: Sequence[str],
    recipe: ImageRecipe,
    generator: torch.Generator,
    negative: str = "",
    on_step: OnStep = lambda progress: None,
) -> Images:
    """One image for each of the B prompts; see `prepare` and `finish`."""
    return finish(prepare(prior, prompts, recipe, generator, negative), on_step)


def prepare(
    prior: Prior, prompts: Sequence[str], recipe: ImageRecipe, generator: torch.Generator, negative: str = ""
) -> ImageRun:
    """A run at its start; ValueError for settings that do not fit the prior."""
    if isinstance(recipe.objective, DDIM):
        conditioning = text_conditioning(prior, prompts, negative)
        if recipe.start != "zero":
            raise ValueError(f"DDIM starts from noise, not from an image: leave out start, got {recipe.start!r}")
        return Sampling(recipe.objective, recipe.steps, prior, conditioning, generator)
    return Distillation(recipe, prior, prompts, negative, generator)


def finish(run: ImageRun, on_step: OnStep = lambda progress: None) -> Images:
    """Takes all steps of a run; Ctrl-C and divergence end it early with the images of the last finite step."""
    began, last, interrupted, diverged = time.monotonic(), None, 0, None
    with interrupts_between_steps() as check_interrupt:

        def after(progress: Progress) -> None:
            nonlocal last
            last = replace(progress, nfe=progress.nfe + run.nfe, seconds=round(time.monotonic() - began, 3))
            on_step(last)
            check_interrupt()

        try:
            run.run(after)
        except KeyboardInterrupt as error:
            interrupted = signal_of(error)
        except Diverged as error:
            diverged = error
    steps, nfe, seconds = (last.step + 1, last.nfe, last.seconds) if last else (0, run.nfe, 0.0)
    return Images(run.x(), run.images(), steps, nfe, seconds, interrupted, diverged)


def generate_image(
    config: ImageConfig,
    out: str | Path = "runs",
    *,
    size: int | None = None,
    force: bool = False,
    on_step: OnStep = lambda progress: None,
    prior: Prior | None = None,
    logs: Sequence[StepLog] = (),
) -> ImageResult:
    """Makes an image and writes its run folder below `out`: config.json, metrics.jsonl, image.png.

    Args:
        size: pixels per side of image.png; default: the prior's.
        prior: a prior that is loaded already, or your own; default: the one that the configuration names.
        logs: for other programs, see `logs.open_logs`.

    Raises:
        ValueError: for anything wrong with the prompt, the prior, the recipe or the output folder, before anything is
            written.
        Diverged: for numbers that are not finite; image.png then is that of the last finite step.
    """
    if prior is None:
        check_prompt(config.prompt, config.prior, force)
    check_size(size)
    config = resolved(config)
    prior = load_image_prior(config, prior)
    generator = torch.Generator().manual_seed(config.seed)
    run = prepare(prior, [config.prompt], config.recipe, generator, config.negative)
    folder = RunFolder.create(out, config.prompt)
    folder.write_config("image", config)

    with folder.log() as append, logging(logs, folder.path):

        def after(progress: Progress) -> None:
            append(progress)
            on_step(progress)
            for log in logs:
                log.after(progress)
                if log.wants(progress.step):
                    log.show(progress.step, {"image": run.images()})

        made = finish(run, after)
    result = ImageResult(folder.path, made)
    folder.check()
    video.save_image(result.image, to_size(made.images[0], size))
    if made.diverged is not None:
        made.diverged.add_note(f"the image of step {made.steps} is {result.image}")
        raise made.diverged
    return result


def load_image_prior(config: RunConfig, prior: Prior | None = None) -> Prior:
    """The prior of a configuration, or the one that is given.

    Raises:
        ValueError: for a ControlNet, which needs a 3D object.
    """
    if config.prior_options.controlnet is not None:
        raise ValueError("a ControlNet needs renderings of an object, which an image has not: use generate")
    return prior or load_prior(config.prior, config.device, config.dtype, config.prior_options)


def text_conditioning(
    prior: Prior,
    prompts: Sequence[str],
    negative: str = "",
    suffixes: tuple[str, str] | None = None,
    texts: Sequence[str] = (),
) -> Conditioning:
    """The conditioning of images: each prompt as it is, without direction words, and with an objective's suffixes.

    The prior embeds `texts` too, for later.
    """
    positives, negatives = list(prompts), [negative] * len(prompts)
    if suffixes is not None:
        positives, negatives = ([prompt + suffix for prompt in prompts] for suffix in suffixes)
    prior.prepare([*positives, *negatives, *texts])
    return Conditioning(prior.embed(positives), prior.embed(negatives))


def check_size(size: int | None) -> None:
    """Raises ValueError unless a side has 1 to `video.MOST_SIZE` pixels."""
    if size is not None and not 1 <= size <= video.MOST_SIZE:
        raise ValueError(f"the size must be 1 to {video.MOST_SIZE} pixels per side, got {size}")


def read_image(path: str | Path, size: int) -> Tensor:
    """The center square of an image file [1, 3, size, size] in [0, 1]; ValueError where it cannot be read."""
    from PIL import ImageOps

    try:
        square = ImageOps.fit(read_image_file(path, FORMATS).convert("RGB"), (size, size))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255


def to_size(image: Tensor, size: int | None) -> Image.Image:
    """An image [3, H, W] in [0, 1], resized to `size` pixels per side unless that is None."""
    whole = video.contact_sheet(image[None], columns=1)
    return whole if size is None else whole.resize((size, size), resample=1)  # LANCZOS


@torch.no_grad()
def _start(
    recipe: ImageRecipe, prior: Prior, conditioning: Conditioning, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The first values of a scene, pixels or x as the recipe says, and the network evaluations they took."""
    pixels, nfe = recipe.space == "pixels", 0
    shape = (len(conditioning), 3, prior.image_size, prior.image_size)
    x = torch.zeros(len(conditioning), *prior.sample_shape, device=prior.device)
    if recipe.start == "noise":
        return (ImageScene.noise(shape, generator).values if pixels else normal(x, generator)).to(x), nfe
    if recipe.start in ("zero", "denoised"):
        if recipe.start == "denoised":
            settings = DDIM(*(getattr(recipe.objective, n, getattr(DDIM, n)) for n in ("scale", "start", "stop")))
            one = finish(Sampling(settings, 1, prior, conditioning, generator))
            x, nfe = one.x, one.nfe
        return (prior.decode(x) if pixels else x), nfe
    if recipe.start != "gray" and not Path(recipe.start).is_file():
        raise ValueError(f"unknown start {recipe.start!r}: allowed are {', '.join(STARTS)}, or an image file")
    gray = recipe.start == "gray"
    images = ImageScene.gray(shape).values if gray else read_image(recipe.start, shape[-1]).expand(shape)
    return (images.to(x) if pixels else prior.encode(images.to(x))), nfe
