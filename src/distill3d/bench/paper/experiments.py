"""The paper's experiments (Lukoianov et al. 2024) as benches: what each compares, on how much, and what is drawn of it.

Each is a value: its variants follow from a recipe, so that it runs on any prior. The defaults are for the bundled prior
and the laptop's recipe and end in less than 40 minutes there; `--full` is the paper's size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from distill3d.bench.budget import nfe_of_a_step
from distill3d.bench.protocol import Protocol, Variant
from distill3d.distill.recipes import RECIPES, Recipe, method_settings
from distill3d.objectives import CFD, ESD, SDI, SDS, VSD, Method, SDICached, effective_guidance
from distill3d.types import Prior

TABLE1 = ("sds", "sjc", "vsd", "esd", "hifa", "sdi")  # the rows of the paper's table
SCALES = (1.0, 7.5, 30.0, 100.0)
CFG_PLUS_PLUS = 0.6  # the scale of CFG++ that looks like a guidance of 7.5
LABELS = {"flowdreamer": "FlowDreamer", "hifa": "HiFA", "mvdream": "MVDream", "sds_bridge": "SDS-Bridge"}
FULL_VIEWS, VIEWS = 50, 24
FITTED = 3  # steps of the sampling loop at each noise level


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an experiment varies: a recipe by its name, and over how many steps."""

    name: str = "distill"
    steps: int | None = None  # None is the recipe's

    @property
    def recipe(self) -> Recipe:
        """The recipe over these steps."""
        recipe = RECIPES[self.name]
        return recipe if self.steps is None else dataclasses.replace(recipe, steps=self.steps)

    @property
    def sdi(self) -> SDI:
        """The recipe's settings of SDI."""
        settings = method_settings("sdi", self.name)
        assert isinstance(settings, SDI)
        return settings

    @property
    def sds(self) -> SDS:
        """The recipe's settings of SDS."""
        settings = method_settings("sds", self.name)
        assert isinstance(settings, SDS)
        return settings

    def variant(self, name: str, objective: Method, **changes: object) -> Variant:
        """The recipe with an objective and other changes, as a row of the tables."""
        return Variant(name, dataclasses.replace(self.recipe, objective=objective, **changes))  # type: ignore[arg-type]


Make = Callable[[Setting, int], tuple[Variant, ...]]  # setting, pixels per side of the prior's images -> variants


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments; `prompts` and `seeds` are numbers, for the bundled prior."""

    name: str
    title: str  # the first sentence of the caption
    make: Make
    prompts: int
    seeds: int = 1
    full_steps: int | None = None  # of --full; None is the recipe's
    layout: Literal["prompts", "scales", "seeds"] = "prompts"  # of the figure
    panels: tuple[str, ...] = ("clip_score", "sharpness", "edge_concentration", "saturation", "seconds")


def label(method: str) -> str:
    """A method's name for people."""
    return LABELS.get(method, method.upper())


def methods_of(names: Sequence[str], setting: Setting) -> tuple[Variant, ...]:
    """A variant for each method, with its settings for the recipe; ValueError for an unknown name."""
    return tuple(setting.variant(label(name), method_settings(name, setting.name)) for name in names)


def render_size(image_size: int) -> int:
    """The low resolution of the ablation: the 64 pixels of DreamFusion's NeRF, half of what a small prior sees.

    Raises:
        ValueError: for a prior that sees fewer than 16 pixels a side.
    """
    if image_size < 16:
        raise ValueError(f"images of {image_size} pixels have no lower resolution to compare with: at least 16")
    return min(64, image_size // 2)


def ablation(setting: Setting, image_size: int) -> tuple[Variant, ...]:
    """SDS, + render resolution, + annealed t, + DDIM inversion; before the last, all of SDI but its noise.

    The paper goes from the third row to the last at once. SDI's guidance scale and weight w(t) change there too; the
    additional row separates their effect from that of the inversion.
    """
    low, sdi, sds = render_size(image_size), setting.sdi, setting.sds
    return (
        setting.variant(f"SDS, {low} px", sds, render_size=low),
        setting.variant(f"+ {image_size} px", sds),
        setting.variant("+ annealed t", dataclasses.replace(sds, low=sdi.stop, high=sdi.start, anneal=True)),
        setting.variant("+ scale and weight of SDI", dataclasses.replace(sdi, noise="random")),
        setting.variant("+ DDIM inversion (SDI)", sdi),
    )


def noises(setting: Setting, image_size: int) -> tuple[Variant, ...]:
    """SDI with each way of finding the noise; CFG++ at a scale of its own, which cannot exceed 1."""
    names = {
        "random": "random noise",
        "fixed_point": "fixed point, Anderson",
        "sign_descent": "sign descent",
        "continuation": "continuation in the scale",
        "cfg_plus_plus": "CFG++",
        "descent": "gradient descent",
        "inversion": "DDIM inversion (SDI)",
    }
    scales = {"cfg_plus_plus": CFG_PLUS_PLUS}
    return tuple(
        setting.variant(name, dataclasses.replace(setting.sdi, noise=noise, scale=scales.get(noise, setting.sdi.scale)))
        for noise, name in names.items()
    )


def surfaces(setting: Setting, image_size: int) -> tuple[Variant, ...]:
    """Noise that stays in 3D, with the scale and the times of SDI, against random noise and inversion.

    SDI by inversion acts like a larger scale than its own (`effective_guidance`, of an inversion of n steps). Random
    noise is compared at both, and so is inversion: as it is, and so that the scale is the effective guidance. The last
    row samples views with the scene in the loop instead (`ViewSampling`), with about as many rows as inversion takes.
    """
    sdi = dataclasses.replace(setting.sdi, nominal=False)
    c = (sdi.inversion_steps - 1) / (2 * sdi.inversion_steps)
    guidance = effective_guidance(sdi.scale, sdi.inversion_scale, c)
    settings: dict[str, Method] = {
        "random noise": dataclasses.replace(sdi, noise="random"),
        "random, guidance of SDI": dataclasses.replace(sdi, noise="random", scale=guidance),
        "constant noise": CFD(sdi.scale, sdi.start, sdi.stop, "constant"),
        "cached per azimuth": SDICached(sdi.scale, sdi.start, sdi.stop, "camera"),
        "on the surface (CFD)": CFD(sdi.scale, sdi.start, sdi.stop, "surface"),
        "on the surface, written back": SDICached(sdi.scale, sdi.start, sdi.stop, "surface"),
        "inversion at nominal guidance": dataclasses.replace(sdi, nominal=True),
        "DDIM inversion (SDI)": sdi,
    }
    return (*(setting.variant(name, objective) for name, objective in settings.items()), sampling_loop(setting))


def sampling_loop(setting: Setting) -> Variant:
    """Sampling of views with the scene in the loop from noise on, at the scale of SDI; for any prior."""
    laptop = RECIPES["laptop"]
    assert laptop.sampling is not None
    steps = setting.recipe.steps
    levels = max(1, steps // FITTED)
    sampling = dataclasses.replace(
        laptop.sampling, joint_levels=0, hull=False, first=0.0, levels=levels, start=setting.sdi.start
    )
    objective = CFD(setting.sdi.scale)
    return Variant("sampling loop", dataclasses.replace(laptop, steps=steps, objective=objective, sampling=sampling))


def guidance_scales(setting: Setting, scales: Sequence[float] = SCALES) -> tuple[Variant, ...]:
    """SDS and SDI at each scale.

    Where the recipe inverts at minus SDI's guidance scale, as the paper does, the inversion follows; where it inverts
    at a scale of its own, that one stays. Raises ValueError for a scale that is not a finite number.
    """
    if not all(map(math.isfinite, scales)):
        raise ValueError(f"guidance scales must be finite numbers, got {', '.join(map(str, scales))}")
    sdi = setting.sdi
    mirrored = sdi.inversion_scale == -sdi.scale
    inversion = {scale: -scale if mirrored else sdi.inversion_scale for scale in scales}
    return (
        *(setting.variant(f"SDS, scale {s:g}", dataclasses.replace(setting.sds, scale=s)) for s in scales),
        *(
            setting.variant(f"SDI, scale {s:g}", dataclasses.replace(sdi, scale=s, inversion_scale=inversion[s]))
            for s in scales
        ),
    )


def method_of(variant: Variant) -> str:
    """The name of a variant's method."""
    return type(variant.recipe.objective).__name__


def scale_of(variant: Variant) -> float:
    """The guidance scale of a variant of SDI or SDS."""
    objective = variant.recipe.objective
    assert isinstance(objective, SDI | SDS)
    return objective.scale


EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "table1",
            "Methods of score distillation under one protocol (the paper's main table).",
            lambda setting, size: methods_of(TABLE1, setting),
            prompts=5,
        ),
        Experiment(
            "ism",
            "SDI and interval score matching (ISM) after as many steps.",
            lambda setting, size: methods_of(("ism", "sdi"), setting),
            prompts=12,
            full_steps=5000,
        ),
        Experiment(
            "ablation", "From SDS to SDI, one change after the other (the paper's ablation).", ablation, prompts=6
        ),
        Experiment("noise", "SDI with each way of finding the noise.", noises, prompts=3),
        Experiment(
            "surface",
            "Noise that stays on the object, and other kinds of noise in 3D.",
            surfaces,
            prompts=3,
            panels=("silhouette_iou", "janus_rate", "edge_concentration", "seconds"),
        ),
        Experiment(
            "cfg",
            "SDS and SDI at guidance scales from weak to strong.",
            lambda setting, size: guidance_scales(setting),
            prompts=4,
            layout="scales",
        ),
        Experiment(
            "diversity",
            "Objects of one prompt from several seeds.",
            lambda setting, size: methods_of(("sds", "sdi"), setting),
            prompts=3,
            seeds=4,
            layout="seeds",
            panels=("diversity", "clip_score", "sharpness"),
        ),
    )
}


def spread(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """So many of them, evenly over the list."""
    count = min(count, len(prompts))
    return tuple(prompts[i * len(prompts) // count] for i in range(count))


def minutes(protocol: Protocol, prior: Prior) -> float:
    """How long a bench takes on one core of a laptop on the bundled prior, about.

    Measured there (docs/results.md): 200 steps of two views take 39 s besides the network and 9.7 ms for each network
    evaluation. Judging and files take 5 s per object; evaluations of methods that train a student count twice.
    """
    seconds = 0.0
    for variant in protocol.variants:
        students = isinstance(variant.recipe.objective, VSD | ESD)
        nfe = nfe_of_a_step(variant, prior) * (2 if students else 1)
        seconds += 5 + variant.recipe.steps * (0.1 * variant.recipe.views + 0.0097 * nfe)
    return seconds * len(protocol.prompts) * len(protocol.seeds) / 60


def caption(experiment: Experiment, protocol: Protocol, recipe: str, command: str) -> str:
    """What a reader has to know of a figure or table: prior, prompts, seeds, settings and the command."""
    steps = sorted({variant.recipe.steps for variant in protocol.variants})
    length = " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1])))
    return (
        f"{experiment.title} Prior: {protocol.prior}. Recipe {recipe}, {length} steps. "
        f"{list_prompts(protocol.prompts)} Seeds: {', '.join(map(str, protocol.seeds))}. Each object judged by "
        f"{protocol.views} views of {protocol.size} pixels; bars are 95 % intervals over prompts (over seeds "
        f"where there is one prompt). Made by: {command}"
    )


def list_prompts(prompts: Sequence[str], most: int = 12) -> str:
    """The prompts as a sentence, a long list cut."""
    more = f" and {len(prompts) - most} more (all in the CSV table)" if len(prompts) > most else ""
    return f"Prompts: {'; '.join(prompts[:most])}{more}."
