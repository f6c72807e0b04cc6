"""Lists of prompts by name, and from files."""

from __future__ import annotations

from pathlib import Path

from distill3d.prompts import read_prompts

MAX_LENGTH = 300  # characters; text encoders read 77 tokens, so a longer line is a mistake
LISTS = ("43", "toybox")


def prompt_list(name: str) -> tuple[str, ...]:
    """The prompts of a list or of a text file with one prompt per line, without duplicates, in order.

    "43" is a random draw (seed 7) of the shorter DreamFusion prompts. "toybox" is 24 toys of the bundled prior, one of
    each kind. Blank lines and lines that start with # are skipped.

    Raises:
        ValueError: for a file that is missing, is not UTF-8 text or holds no prompt, and for a line that is too long.
    """
    if name == "toybox":
        return tuple(prompt for prompt, _ in toybox_prompts())
    path = Path(__file__).parent / "prompts43.txt" if name == "43" else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"no prompt file {name}: give a text file with one prompt per line, or {' or '.join(LISTS)}")
    prompts = read_prompts(f"@{path}")
    for prompt in prompts:
        if len(prompt) > MAX_LENGTH:
            raise ValueError(
                f"prompt file {name}: a line of {len(prompt)} characters ({prompt[:30]!r}...) is too long; "
                f"the limit is {MAX_LENGTH}"
            )
    return tuple(dict.fromkeys(prompts))


def toybox_prompts() -> list[tuple[str, bool]]:
    """(prompt, whether the bundled prior never saw this kind in this color) for each kind of toy; half are unseen."""
    from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, Claim, held_out_pairs, sentence

    chosen = []
    for i, kind in enumerate(KIND_NAMES):
        unseen = [color for color in COLOR_NAMES if (kind, color) in held_out_pairs()]
        colors = unseen if i % 2 else [color for color in COLOR_NAMES if color not in unseen]
        color = colors[(7 * i) % len(colors)]
        chosen.append((sentence(Claim(i, COLOR_NAMES.index(color))), bool(i % 2)))
    return chosen
