"""From one prompt to the conditioning of each view: direction words, Perp-Neg directions and their weights.

Works on texts and numbers only. `ViewPrompts.conditioning` takes the embedding function of a prior.

Directions by |azimuth| (degrees, 0 = front): front below FRONT_LIMIT, back beyond BACK_LIMIT, side between, and
overhead above OVERHEAD_LIMIT degrees of elevation (DreamFusion, section 3.2).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from distill3d.devices import at_once, on_host
from distill3d.types import Condition, Conditioning
from distill3d.untrusted import CONTROL, read_text

DIRECTIONS = ("front", "side", "back", "overhead")
FRONT_LIMIT, BACK_LIMIT, OVERHEAD_LIMIT = 45.0, 135.0, 60.0  # degrees
# Not after a digit: "(ratio 16:9)" and "(at 12:30)" are words.
WEIGHT = re.compile(r"(?<!\d):(-?[0-9]*\.?[0-9]+)$")  # after a number it is a time, a ratio or a scale
MAX_WEIGHT = 10.0
MAX_LENGTH = 4000  # characters of a text; the longest that an encoder reads are 512 tokens
MOST_FILE = 2**20  # bytes of a prompt file
Embed = Callable[[Sequence[str]], Condition]


def direction_of(azimuth: float, elevation: float) -> str:
    """The word for a camera at azimuth and elevation in degrees."""
    turned = abs((azimuth + 180) % 360 - 180)
    if elevation > OVERHEAD_LIMIT:
        return "overhead"
    return "front" if turned < FRONT_LIMIT else "back" if turned > BACK_LIMIT else "side"


def read_prompts(text: str) -> list[str]:
    """The prompts of a command-line argument: the text itself, or the lines of a file for @FILE.

    Empty lines and lines that start with # are skipped. Raises ValueError for a file that cannot be read as UTF-8 text
    or contains no prompt.
    """
    if not text.startswith("@"):
        return [text]
    try:
        lines = read_text(Path(text[1:]).expanduser(), MOST_FILE).splitlines()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise ValueError(f"prompt file {text[1:]} cannot be read: {error}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"prompt file {text[1:]} contains no prompt: write one per line")
    return prompts


def check_text(text: str, what: str = "the prompt") -> None:
    """Raises ValueError for a text that is too long, or that a terminal would obey instead of showing it."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{what} has {len(text):,} characters ({text[:30]!r}...); the limit is {MAX_LENGTH}")
    if found := CONTROL.search(text):
        raise ValueError(f"{what} holds the character {found[0]!a}, which is no text: leave it out")


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """A text as parts with weights: "a (red:1.3) hat" is [("a", 1), ("red", 1.3), ("hat", 1)]; nested ones multiply.

    Brackets without a number are plain words. Only the text encoder uses the weights.

    Raises:
        ValueError: for a weight beyond +-MAX_WEIGHT.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[int] = []  # where the brackets begin
    found = False
    for piece in re.split(r"([()])", text):
        if piece == "(":
            opened.append(len(pieces))
        if piece == ")" and opened:
            first = opened.pop()
            match = WEIGHT.search(pieces[-1][0])
            inside = [*pieces[first + 1 : -1], (pieces[-1][0][: match.start()], pieces[-1][1])] if match else []
            if match and any(words.strip() for words, _ in inside):
                weight, found = float(match[1]), True
                pieces[first:] = [(words, own * weight) for words, own in inside]
                if max(abs(weight), *(abs(own) for _, own in pieces[first:])) > MAX_WEIGHT:
                    given = "".join(words for words, _ in inside) + match[0]
                    raise ValueError(f"the weight in ({given}) must lie between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
                continue
        pieces.append((piece, 1.0))
    parts = []
    for weight, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
        if words := "".join(piece for piece, _ in run).strip():
            parts.append((words, weight))
    return parts if found else [(text, 1.0)]


@dataclass(frozen=True)
class ViewPrompts:
    """A prompt with a text for each direction.

    `perp_neg` interpolates between neighboring directions and pushes away from the others (Armandpour et al.
    2023); without it each view uses its nearest direction.
    """

    prompt: str
    negative: str = ""
    perp_neg: bool = False
    views: Mapping[str, str] = field(default_factory=dict)  # texts of single directions

    def __post_init__(self) -> None:
        if unknown := set(self.views) - set(DIRECTIONS):
            raise ValueError(f"no view is called {', '.join(sorted(unknown))}: use {', '.join(DIRECTIONS)}")
        if not self.prompt.strip():
            raise ValueError('the prompt is empty; say what you want, for instance: "a red mushroom"')
        check_text(self.prompt)
        check_text(self.negative, "the negative prompt")
        for direction, text in self.views.items():
            check_text(text, f"the prompt of the {direction}")

    def text(self, direction: str) -> str:
        """The prompt as seen from a direction: "a red mushroom, front view", or what `views` has for it."""
        return self.views.get(direction) or f"{self.prompt}, {direction} view"

    def extended(self, suffix: str) -> ViewPrompts:
        """The same with a suffix after the prompt and after each text of a single direction."""
        views = {direction: text + suffix for direction, text in self.views.items()}
        return replace(self, prompt=self.prompt + suffix, views=views)

    def undirected(self) -> ViewPrompts:
        """The same without direction words: the prompt itself where a direction has no text of its own."""
        return replace(self, views=dict.fromkeys(DIRECTIONS, self.prompt) | dict(self.views))

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that the prior has to embed."""
        return tuple(dict.fromkeys([self.negative, *map(self.text, DIRECTIONS)]))

    def conditioning(self, azimuth: Tensor, elevation: Tensor, embed: Embed) -> Conditioning:
        """The conditioning of B views at azimuth [B] and elevation [B], in degrees."""
        views = list(zip(on_host(azimuth).tolist(), on_host(elevation).tolist(), strict=True))
        negative = embed([self.negative] * len(views))
        if not self.perp_neg:
            return Conditioning(embed([self.text(direction_of(*v)) for v in views]), negative)
        table = embed([self.text(d) for d in DIRECTIONS])
        mixed = [perp_neg_mix(*v) for v in views]
        first, second, away, fraction, weights = at_once(
            table.hidden.device,
            torch.tensor([DIRECTIONS.index(m.first) for m in mixed]),
            torch.tensor([DIRECTIONS.index(m.second) for m in mixed]),
            torch.tensor([DIRECTIONS.index(d) for m in mixed for d in m.away]),
            torch.tensor([m.fraction for m in mixed]).to(table.hidden.dtype),
            torch.tensor([m.weights for m in mixed]).to(table.hidden.dtype),
        )
        first, second, fraction = table[first], table[second], fraction[:, None, None]
        pooled = None
        if first.pooled is not None and second.pooled is not None:
            pooled = fraction[:, 0] * first.pooled + (1 - fraction[:, 0]) * second.pooled
        positive = Condition(fraction * first.hidden + (1 - fraction) * second.hidden, pooled)
        return Conditioning(positive, negative, table[away], weights)


@dataclass(frozen=True)
class PerpNegMix:
    """fraction * first + (1 - fraction) * second is the positive text; `away` are the two negatives."""

    first: str
    second: str
    fraction: float
    away: tuple[str, str]
    weights: tuple[float, float]


def _fading(a: float, b: float, c: float, r: float) -> float:
    return -abs(a * math.exp(-b * r) + c)


def perp_neg_mix(azimuth: float, elevation: float) -> PerpNegMix:
    """Perp-Neg directions and weights for one view (constants of the SDI release, f(r) = a exp(-b r) + c).

    On the front half front and side are mixed, on the back half side and back; overhead views are plain.
    """
    turned = abs((azimuth + 180) % 360 - 180)
    if direction_of(azimuth, elevation) == "overhead":
        return PerpNegMix("overhead", "overhead", 1.0, ("front", "side"), (0.0, 0.0))
    if turned < 90:
        r = 1 - turned / 90  # 1 in front, 0 from the side
        weights = (_fading(4, 0.5, -2.426, r), _fading(4, 0.5, -2.426, 1 - r))
        return PerpNegMix("front", "side", r, ("front", "side"), weights)
    r = 2 - turned / 90  # 1 from the side, 0 from behind
    weights = (_fading(1, 0.5, -0.606, r), _fading(1, 0.5, 0.967, r))
    return PerpNegMix("side", "back", r, ("side", "front"), weights)
