"""Lists of prompts by name, and from files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from distill3d.prompts import read_prompts

LONGEST = 300  # characters; text encoders read 77 tokens, and a line beyond this is no prompt but a slip
LISTS = ("43", "toybox")


def prompt_list(name: str) -> tuple[str, ...]:
    """The prompts behind "43", "toybox" or the path of a text file with one prompt a line, each once, in order.

    "43" is a random draw (seed 7) of the shorter DreamFusion prompts, "toybox" 24 toys of the bundled prior, one of
    each kind. In a file blank lines and lines that start with # are skipped.

    Raises:
        ValueError: for a file that is missing, is no UTF-8 text or holds no prompt, and for a line that is too long.
    """
    if name == "toybox":
        return tuple(sentence for sentence, _ in toybox_prompts())
    path = _shipped("prompts43.txt") if name == "43" else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"no prompt file {name}: give a text file with one prompt a line, or {' or '.join(LISTS)}")
    prompts = read_prompts(f"@{path}")
    for prompt in prompts:
        if len(prompt) > LONGEST:
            raise ValueError(
                f"prompt file {name}: a line of {len(prompt)} characters ({prompt[:30]!r}...) is too long; "
                f"at most {LONGEST} are read"
            )
    return tuple(dict.fromkeys(prompts))


def toybox_prompts() -> list[tuple[str, bool]]:
    """(prompt, whether its kind and color were never trained on together), one for each kind of toy.

    Every other one is a pair that the bundled prior has not seen.
    """
    from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, Claim, held_out_pairs, sentence

    chosen = []
    for i, kind in enumerate(KIND_NAMES):
        unseen = [color for color in COLOR_NAMES if (kind, color) in held_out_pairs()]
        colors = unseen if i % 2 else [color for color in COLOR_NAMES if color not in unseen]
        color = colors[(7 * i) % len(colors)]
        chosen.append((sentence(Claim(i, COLOR_NAMES.index(color))), bool(i % 2)))
    return chosen


def _shipped(name: str) -> Path:
    return Path(str(resources.files("distill3d"))) / "bench" / name
