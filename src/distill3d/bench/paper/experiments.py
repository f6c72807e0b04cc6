"""The paper's experiments (Lukoianov et al. 2024) as benches: what each compares, on how much, and what is drawn of it.

Each is a value: its variants follow from a recipe, so that it runs on any prior. The defaults are for the bundled prior
and the laptop's recipe and end in less than 40 minutes there; `--full` is the paper's size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from distill3d.bench.budget import rows_of_a_step
from distill3d.bench.protocol import Protocol, Variant
from distill3d.distill.family import TAUGHT
from distill3d.distill.recipes import Noise, Recipe
from distill3d.types import Prior

Make = Callable[[Recipe, int], tuple[Variant, ...]]  # recipe, pixels a side that the prior sees -> variants
TABLE1 = ("sds", "sjc", "vsd", "esd", "hifa", "sdi")  # the rows of the paper's table
SCALES = (1.0, 7.5, 30.0, 100.0)
LABELS = {"hifa": "HiFA", "mvdream": "MVDream", "sds_bridge": "SDS-Bridge"}
LIKE_SDS = ("sjc", "hifa")  # published with the guidance scale of SDS, 100
FULL_VIEWS, VIEWS = 50, 24


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


def methods_of(names: Sequence[str], recipe: Recipe) -> tuple[Variant, ...]:
    """A variant for each method with the recipe's settings; SJC and HiFA take the recipe's scale of SDS.

    Raises:
        ValueError: for an unknown name.
    """

    def settings(name: str) -> Recipe:
        own = recipe.scale is None and name in LIKE_SDS
        return dataclasses.replace(recipe, scale=recipe.sds.scale) if own else recipe

    return tuple(Variant(label(name), name, settings(name)) for name in names)


def render_size(image_size: int) -> int:
    """The low resolution of the ablation: the 64 pixels of DreamFusion's NeRF, half of what a small prior sees.

    Raises:
        ValueError: for a prior that sees fewer than 16 pixels a side.
    """
    if image_size < 16:
        raise ValueError(f"pictures of {image_size} pixels have no lower resolution to compare with: at least 16")
    return min(64, image_size // 2)


def ablation(recipe: Recipe, image_size: int) -> tuple[Variant, ...]:
    """SDS, + render resolution, + annealed t, + DDIM inversion; between the last two all of SDI but its noise.

    The paper goes from the third to the last at once. SDI's guidance scale and weight w(t) change there too, and the
    additional row tells what they do from what the inversion does.
    """
    low = render_size(image_size)
    annealed = dataclasses.replace(recipe.sds, low=recipe.sdi.stop, high=recipe.sdi.start, anneal=True)
    random = dataclasses.replace(recipe.sdi, noise="random")
    return (
        Variant(f"SDS, {low} px", "sds", dataclasses.replace(recipe, render_size=low)),
        Variant(f"+ {image_size} px", "sds", recipe),
        Variant("+ annealed t", "sds", dataclasses.replace(recipe, sds=annealed)),
        Variant("+ scale and weight of SDI", "sdi", dataclasses.replace(recipe, sdi=random)),
        Variant("+ DDIM inversion (SDI)", "sdi", recipe),
    )


def noises(recipe: Recipe, image_size: int) -> tuple[Variant, ...]:
    """SDI with each way of finding the noise; the solvers take the inversion's steps and scale."""

    def found_by(noise: Noise) -> Recipe:
        return dataclasses.replace(recipe, sdi=dataclasses.replace(recipe.sdi, noise=noise))

    names: dict[Noise, str] = {
        "random": "random noise", "fixed_point": "fixed-point iteration", "descent": "gradient descent",
        "inversion": "DDIM inversion (SDI)",
    }  # fmt: skip
    return tuple(Variant(name, "sdi", found_by(noise)) for noise, name in names.items())


def guidance_scales(recipe: Recipe, scales: Sequence[float] = SCALES) -> tuple[Variant, ...]:
    """SDS and SDI at each scale.

    Where the recipe inverts at minus SDI's guidance scale, as the paper does, the inversion follows; where it inverts
    at a scale of its own, that one stays. Raises ValueError for a scale that is no finite number.
    """
    if not all(map(math.isfinite, scales)):
        raise ValueError(f"guidance scales must be finite numbers, got {', '.join(map(str, scales))}")
    mirrored = recipe.sdi.inversion_scale == -recipe.sdi.scale

    def sdi(scale: float) -> Recipe:
        inversion = -scale if mirrored else recipe.sdi.inversion_scale
        return dataclasses.replace(recipe, sdi=dataclasses.replace(recipe.sdi, scale=scale, inversion_scale=inversion))

    def sds(scale: float) -> Recipe:
        return dataclasses.replace(recipe, sds=dataclasses.replace(recipe.sds, scale=scale))

    every = (("sds", sds), ("sdi", sdi))
    return tuple(Variant(f"{label(m)}, scale {s:g}", m, build(s)) for m, build in every for s in scales)


def scale_of(variant: Variant) -> float:
    """The guidance scale of a variant of SDI or SDS."""
    return variant.recipe.sdi.scale if variant.method == "sdi" else variant.recipe.sds.scale


EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "table1", "Methods of score distillation under one protocol (the paper's main table).",
            lambda recipe, size: methods_of(TABLE1, recipe), prompts=5,
        ),
        Experiment(
            "ism", "SDI and interval score matching (ISM) after as many steps.",
            lambda recipe, size: methods_of(("ism", "sdi"), recipe), prompts=12, full_steps=5000,
        ),
        Experiment(
            "ablation", "From SDS to SDI, one change after the other (the paper's ablation).", ablation, prompts=6
        ),
        Experiment("noise", "SDI with each way of finding the noise.", noises, prompts=3),
        Experiment(
            "cfg", "SDS and SDI at guidance scales from weak to strong.",
            lambda recipe, size: guidance_scales(recipe), prompts=4, layout="scales",
        ),
        Experiment(
            "diversity", "Objects of one prompt from several seeds.",
            lambda recipe, size: methods_of(("sds", "sdi"), recipe), prompts=3, seeds=4, layout="seeds",
            panels=("diversity", "clip_score", "sharpness"),
        ),
    )
}  # fmt: skip


def spread(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """So many of them, evenly over the list."""
    count = min(count, len(prompts))
    return tuple(prompts[i * len(prompts) // count] for i in range(count))


def minutes(protocol: Protocol, prior: Prior) -> float:
    """How long a bench takes on one core of a laptop on the bundled prior, about.

    Measured there (docs/results.md): 200 steps of two views take 39 s beside the network and 9.7 ms for each of its
    rows. Judging and files take 5 s an object; rows of methods that train a companion count twice.
    """
    seconds = 0.0
    for variant in protocol.variants:
        rows = rows_of_a_step(variant, prior) * (2 if variant.method in TAUGHT else 1)
        seconds += 5 + variant.recipe.steps * (0.1 * variant.recipe.views + 0.0097 * rows)
    return seconds * len(protocol.prompts) * len(protocol.seeds) / 60


def caption(experiment: Experiment, protocol: Protocol, recipe: str, command: str) -> str:
    """What a reader has to know of a figure or table: prior, prompts, seeds, settings and the command."""
    steps = sorted({variant.recipe.steps for variant in protocol.variants})
    length = " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1])))
    return (
        f"{experiment.title} Prior: {protocol.prior}. Recipe {recipe}, {length} steps. "
        f"{told_prompts(protocol.prompts)} Seeds: {', '.join(map(str, protocol.seeds))}. Each object judged by "
        f"{protocol.views} views of {protocol.size} pixels; bars are 95 % intervals over prompts (over seeds "
        f"where there is one prompt). Made by: {command}"
    )


def told_prompts(prompts: Sequence[str], most: int = 12) -> str:
    """The prompts as a sentence, a long list cut."""
    more = f" and {len(prompts) - most} more (all in the CSV table)" if len(prompts) > most else ""
    return f"Prompts: {'; '.join(prompts[:most])}{more}."
