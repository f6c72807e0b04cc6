"""The plan of a run: peak memory by part, network rows, arithmetic and time."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from distill3d.distill.loop import ObjectRun, Progress
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import Recipe
from distill3d.distill.view_sampling import SamplingRun
from distill3d.planning.cards import PCIE, Card, card_of
from distill3d.planning.measure import Known, Stage
from distill3d.planning.meter import Operation
from distill3d.planning.shells import load_shell, size_of
from distill3d.planning.stand_ins import MEASURED, CountingPrior, StandInOptions, StandInScene
from distill3d.priors.base import resolve_dtype
from distill3d.runs.images import ImageConfig, ImageRun, prepare
from distill3d.runs.objects import Config
from distill3d.scenes.gaussians import GaussianOptions
from distill3d.scenes.hull import Hull, start_from_hull
from distill3d.types import Scene

AnyConfig = Config | ImageConfig
COUNTED = 50  # steps of a run that are counted, evenly spread; a shorter run, or one that samples views, is whole


@dataclass(frozen=True)
class Memory:
    """Bytes by part: while the texts are encoded, and at the peak of the loop."""

    texts: Mapping[str, int]
    step: Mapping[str, int]
    image_size: int  # pixels a side that the prior sees
    extrapolated: bool = False  # whether the renderer was measured at fewer pixels

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return max(sum(self.texts.values()), sum(self.step.values()))


@dataclass(frozen=True)
class Plan:
    """What a run will need; operations of the whole run by part."""

    memory: Memory
    rows: int  # network evaluations
    whole: bool  # whether every step was counted
    work: Mapping[str, Counter[Operation]] = field(repr=False)
    sent: int = 0  # bytes that --offload sends to the card

    def flops(self, part: str | None = None) -> int:
        """Arithmetic of the run, or of a part: matrix products, convolutions and attention."""
        parts = self.work.values() if part is None else [self.work.get(part, Counter())]
        return sum(one.flops * times for work in parts for one, times in work.items())

    def seconds(self, card: Card) -> dict[str, float]:
        """Estimated time of the run by part."""
        found = {part: card.seconds(work) for part, work in self.work.items()}
        return found | ({"sending layers": self.sent / PCIE} if self.sent else {})


def plan(config: AnyConfig, known: Known | None = None) -> Plan:
    """The plan of a run, without a download and without weights.

    Args:
        config: of the run. Its device may name a card, as in "cuda:H100".
        known: what other plans have found; it grows.

    Raises:
        ValueError: for a model whose configuration is not known, a method that trains a student, an unknown card, and
            as the run itself would.
    """
    rehearsal = _rehearsal(config, known)
    with _quiet():
        memory, rest = rehearsal.memory()
        rows, work, calls, scale = rehearsal.count()
    totals = {part: _times(found, scale) for part, found in work.items()}
    totals["rest"] = _times(rest, config.recipe.steps)
    offload = config.prior_options.offload
    sent = round(scale * calls["network"] * size_of(rehearsal.prior.network)) if offload else 0
    return Plan(memory, round(rows * scale), scale == 1, totals, sent)


def planned_memory(config: AnyConfig, known: Known | None = None) -> Memory:
    """Only the memory of `plan`, which takes less time."""
    rehearsal = _rehearsal(config, known)
    with _quiet():
        return rehearsal.memory()[0]


def planned_dtype(config: AnyConfig) -> str:
    """The precision of the network: "auto" is bfloat16 on a card with the instructions, else float32."""
    card = card_of(config.device)
    if config.dtype != "auto" or (card is None and config.device != "cuda"):
        return str(resolve_dtype(config.dtype, config.device)).removeprefix("torch.")
    if card is None and torch.cuda.is_available():
        return str(resolve_dtype("auto", "cuda")).removeprefix("torch.")
    return "bfloat16" if card is None or card.bfloat16 else "float32"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: they are about the run, which tells them itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rehearsal(config: AnyConfig, known: Known | None) -> _Rehearsal | _ImageRehearsal:
    if config.prior_options.offload and config.device.partition(":")[0] == "cpu":
        raise ValueError("--offload sends layers from main memory to a GPU: choose one with --device")
    return _ImageRehearsal(config, known) if isinstance(config, ImageConfig) else _Rehearsal(config, known)


class _Rehearsal:
    """A run with stand-ins for prior and scene."""

    def __init__(self, config: Config, known: Known | None):
        accelerator = config.device.partition(":")[0] != "cpu"
        self.config = config
        self.stage = stage = Stage(known or Known())
        dtype, supervision = planned_dtype(config), config.recipe.supervision
        self.prior = load_shell(config.prior, dtype, config.prior_options, stage)
        self.second = None
        if supervision.separate_prior:
            self.second = load_shell(supervision.prior or config.prior, dtype, supervision.options, stage)
        recipe = _bounded(config.recipe)
        size = recipe.render_size or self.prior.image_size
        self.recipe = replace(recipe, scene=StandInOptions(recipe.scene, stage, size, accelerator))

    def memory(self) -> tuple[Memory, Counter[Operation]]:
        """Memory at the first and the last step, and the operations of a step beside the stand-ins'.

        The scene is as it is at the end of the run, with gradients and Adam's moments.
        """
        meter, recipe = self.stage.meter, self.recipe
        with meter:
            run = object_run(recipe, self.config.prompts, self.prior, self.config.seed, self.second)
            texts = dict(meter.peak)
            with meter.within("scene, gradients, Adam"):
                scene = self._scene(run)
                with meter.pause():
                    scene.adapt(recipe.steps - 1, recipe.steps, run.optimizer)
                assert isinstance(scene, nn.Module)
                meter.hold(meter.part, size_of(scene))
                for group in run.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = torch.zeros_like(parameter)
                run.optimizer.step()
            meter.restart()
            meter.work.clear()
            middle = () if recipe.sampling is None else (recipe.steps // 2,)
            steps = list(dict.fromkeys((0, *middle, recipe.steps - 1)))
            for step in steps:
                run.optimizer_at(step)
                run.loss(step)[0].backward()
            rest = _times(meter.work, 1 / len(steps))
            sampling = self.config.recipe.sampling
            if isinstance(run, SamplingRun) and sampling is not None and sampling.hull:
                with meter.within("visual hull"):
                    _start(run, scene)
        self.run = run
        assert isinstance(run.scene, StandInScene)
        few = run.scene.size**2 * recipe.views <= MEASURED
        return Memory(texts, dict(meter.peak), self.prior.image_size, not few), rest

    def count(self) -> tuple[int, dict[str, Counter[Operation]], Counter[str], float]:
        """Network rows, operations and calls by part of some steps, and how many times as many the run has.

        After `memory`, whose scene it takes.
        """
        total, stand_in, second = self.recipe.steps, self.run.scene, self.second
        assert isinstance(stand_in, StandInScene)
        stand_in.counted = True
        recipe = replace(self.recipe, scene=stand_in, render_size=None)
        others = CountingPrior(self.prior), None if second is None else CountingPrior(second)
        counted = object_run(recipe, self.config.prompts, others[0], self.config.seed, others[1])
        few = total > COUNTED and recipe.sampling is None
        steps = [int((k + 0.5) * total / COUNTED) for k in range(COUNTED)] if few else range(total)
        self.stage.take()
        rows = 0
        for step in steps:
            counted.optimizer_at(step)
            loss, progress = counted.loss(step)
            loss.backward()
            rows += progress.nfe
        return rows, *self.stage.take(), total / len(steps)

    @staticmethod
    def _scene(run: ObjectRun) -> Scene:
        assert isinstance(run.scene, StandInScene)
        return run.scene.scene


class _ImageRehearsal:
    """A run of an image with a stand-in for the prior."""

    def __init__(self, config: ImageConfig, known: Known | None):
        self.config, self.stage = config, Stage(known or Known())
        self.prior = load_shell(config.prior, planned_dtype(config), config.prior_options, self.stage)

    def memory(self) -> tuple[Memory, Counter[Operation]]:
        """Memory of the first two steps and of the image, and the operations of a step beside the stand-in's."""
        meter, steps = self.stage.meter, min(2, self.config.recipe.steps)
        with meter:
            self._prepare(1, "zero")  # only the texts
            texts = dict(meter.peak)
            meter.restart()
            meter.work.clear()
            run = self._prepare(steps, self.config.recipe.start)
            run.run(lambda progress: None)
            run.images()
        return Memory(texts, dict(meter.peak), self.prior.image_size), _times(meter.work, 1 / steps)

    def count(self) -> tuple[int, dict[str, Counter[Operation]], Counter[str], float]:
        """See `_Rehearsal.count`; every step is counted."""
        self.stage.take()
        seen = list[Progress]()
        run = self._prepare(self.config.recipe.steps, self.config.recipe.start)
        run.run(seen.append)
        run.images()
        return run.nfe + seen[-1].nfe, *self.stage.take(), 1

    def _prepare(self, steps: int, start: str) -> ImageRun:
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        recipe = replace(config.recipe, steps=steps, start=start)
        return prepare(self.prior, [config.prompt], recipe, generator, config.negative)


def _bounded(recipe: Recipe) -> Recipe:
    """The recipe with as much in the scene as may be in it later, and without a start from what is not there."""
    scene, sampling = recipe.scene, recipe.sampling
    if isinstance(scene, GaussianOptions):
        scene = replace(scene, count=max(scene.count, scene.densification.max_splats))
    return replace(recipe, scene=scene, sampling=None if sampling is None else replace(sampling, hull=False))


def _start(run: SamplingRun, scene: Scene) -> None:
    """The start from the visual hull, of images that show nothing."""
    radius = run.settings.distance * math.sin(math.radians(run.settings.fov) / 2)
    assert run.targets.cutouts is not None
    with contextlib.suppress(ValueError):  # there is no object
        start_from_hull(scene, Hull(run.cameras, run.targets.cutouts, radius, run.settings.tolerance))


def _times(work: Mapping[Operation, float], scale: float) -> Counter[Operation]:
    return Counter({one: times * scale for one, times in work.items()})  # type: ignore[dict-item]
