"""The language of the toy world: colors, kinds, accents and view words, and sentences made of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np

from distill3d.prompts import DIRECTIONS
from distill3d.toybox.shapes import COLORS, KINDS

KIND_NAMES = tuple(KINDS)
COLOR_NAMES = tuple(COLORS)
VIEW_WORDS = DIRECTIONS
COLOR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "brown": ("brown", "chocolate"),
    "white": ("white",),
    "black": ("black",),
}
TEMPLATES = ("{}", "{}", "{}", "a toy {}", "a photo of {}", "a 3d render of {}", "a small {}", "one {}", "a cute {}")
EXTRA_WORDS = ("and", "the", "of", "in", "on", "two", "view", "object", "background")


@dataclass(frozen=True)
class Claim:
    """What a caption says, as indices into the names; -1 for what it does not mention."""

    kind: int = -1
    color: int = -1
    accent: int = -1
    view: int = -1


def held_out_pairs() -> frozenset[tuple[str, str]]:
    """The (kind, color) pairs that the prior never saw, read from `held_out.txt`."""
    text = resources.files("distill3d.toybox").joinpath("held_out.txt").read_text()
    rows = [line.split(",") for line in text.splitlines() if line and not line.startswith("#")]
    return frozenset((kind.strip(), color.strip()) for kind, color in rows)


def default_accent(kind: int) -> int:
    """Index of the accent color that a kind has when the prompt names none."""
    return COLOR_NAMES.index(KINDS[KIND_NAMES[kind]][3])


def sentence(claim: Claim, rng: np.random.Generator | None = None) -> str:
    """A caption of a claim; with a generator, synonyms and templates vary.

    Without one it has the plain form "a red mushroom with blue spots, front view".
    """
    pick = (lambda options: options[0]) if rng is None else (lambda options: options[rng.integers(len(options))])
    noun = pick(KINDS[KIND_NAMES[claim.kind]][1]) if claim.kind >= 0 else "toy"
    words = f"{pick(COLOR_WORDS[COLOR_NAMES[claim.color]])} {noun}" if claim.color >= 0 else noun
    form = "{}" if rng is None else pick(TEMPLATES)
    if form in ("{}", "a photo of {}", "a 3d render of {}"):
        words = ("an " if words[0] in "aeiou" else "a ") + words
    text = form.format(words)
    if claim.accent >= 0 and claim.kind >= 0:
        text += f" with {pick(COLOR_WORDS[COLOR_NAMES[claim.accent]])} {KINDS[KIND_NAMES[claim.kind]][2]}"
    if claim.view >= 0:
        text += f", {VIEW_WORDS[claim.view]} view"
    return text


def random_claim(kind: int, color: int, accent: int, view: int, rng: np.random.Generator) -> Claim:
    """What a caption of an image says: unusual accents always, the rest with some probability."""
    unusual = accent != default_accent(kind)
    say_accent = unusual or rng.random() < 0.1
    return Claim(
        kind if rng.random() < 0.97 or say_accent else -1,
        color if rng.random() < 0.95 else -1,
        accent if say_accent else -1,
        view if rng.random() < 0.75 else -1,
    )


def vocabulary() -> list[str]:
    """Every word that a sentence can contain, sorted: the order must not change between processes."""
    words = set(EXTRA_WORDS) | set(VIEW_WORDS) | {"with", "an", "a", "toy"}
    for template in TEMPLATES:
        words |= set(template.replace("{}", "").split())
    for synonyms in COLOR_WORDS.values():
        words |= set(synonyms)
    for _, nouns, accent, _ in KINDS.values():
        words |= {w for noun in nouns for w in noun.split()} | set(accent.split())
    return sorted(words)


@dataclass(frozen=True)
class Reading:
    """The kind and color that a prompt names, None if it names none, and its words outside the vocabulary."""

    kind: str | None
    color: str | None
    unknown: tuple[str, ...]


def read_prompt(prompt: str) -> Reading:
    """Finds the kind (longest noun first) and its color in a prompt, and its words outside the vocabulary."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    known = set(vocabulary())
    text = f" {' '.join(words)} "
    nouns = sorted(((noun, kind) for kind, row in KINDS.items() for noun in row[1]), key=lambda p: -len(p[0]))
    kind = next((kind for noun, kind in nouns if f" {noun} " in text), None)
    before = text.split(" with ")[0].split()
    colors = {word: name for name, synonyms in COLOR_WORDS.items() for word in synonyms}
    color = next((colors[w] for w in before if w in colors), None)
    return Reading(kind, color, tuple(w for w in words if w not in known))
