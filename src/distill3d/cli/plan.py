"""What --plan prints: memory, network rows, arithmetic and time of a run, and the flags with which it fits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from distill3d.cli.shared import duration, flag_values

if TYPE_CHECKING:
    from distill3d.planning.cards import Card
    from distill3d.planning.measure import Known
    from distill3d.planning.plan import AnyConfig, Plan

SIZES = (8, 12, 16, 24)  # GB
LEAST = 5e6  # bytes of a part that has a line of its own


def show_plan(config: AnyConfig, command: object) -> int:
    """Prints the plan of a run, each part as soon as it is known; returns the exit status.

    `command` is the command line: advice names only flags that it has.
    """
    for line in plan_lines(config, dict(flag_values(command))):
        print(line, flush=True)
    return 0


def plan_lines(config: AnyConfig, allowed: Collection[str]) -> Iterator[str]:
    """The plan of a run in lines for people. `allowed` are the flags that advice may name, such as "dtype"."""
    from distill3d.planning.cards import card_of
    from distill3d.planning.measure import Known
    from distill3d.planning.plan import plan, planned_dtype

    card, known = card_of(config.device), Known()
    found = plan(config, known)
    where = f"{card.name}, {card.memory:g} GB" if card else config.device
    yield f"{config.prior} in {planned_dtype(config)}, {found.memory.image_size} px, on {where}"
    yield from _memory(found, config)
    about = "" if found.whole else "about "
    yield f"network rows: {about}{found.rows:,} in {config.recipe.steps:,} steps"
    total = found.flops()
    share = 100 * found.flops("network") / max(1, total)
    yield f"arithmetic: {total / 1e12:,.4g} TFLOP, the network {share:.0f} % of it"
    yield from _time(found, card)
    yield from _fits(found, config, known, allowed)
    files = "the mesh and the video" if "renderer" in found.work else "the file"
    yield f"not in these figures: loading, {files} at the end"


def _memory(found: Plan, config: AnyConfig) -> Iterator[str]:
    memory, extra = found.memory, overhead(config)
    yield f"peak memory: {(memory.peak + extra) / 1e9:.2f} GB"
    for title, parts in (("in the loop", memory.step), ("while texts are encoded", memory.texts)):
        yield f"  {title}: {(sum(parts.values()) + extra) / 1e9:.2f} GB"
        yield from _parts({**parts, "CUDA, Python and libraries (assumed)": extra})
    if memory.extrapolated:
        yield "  the renderer is extrapolated from one view of 64 and 96 px"


def _parts(parts: Mapping[str, float]) -> Iterator[str]:
    for name, count in sorted(parts.items(), key=lambda item: -item[1]):
        if count >= LEAST:
            yield f"    {name:<38} {count / 1e9:8.2f}"


def _time(found: Plan, card: Card | None) -> Iterator[str]:
    from distill3d.planning import cards

    if card is None:
        yield "time: name a card, such as --device cuda:H100, or measure with distill3d doctor --prior NAME"
        return
    seconds = found.seconds(card)
    most = seconds.pop("renderer", None)
    total, without = sum(seconds.values()), "" if most is None else " without the renderer"
    yield (
        f"time on {card.name}{without}: about {duration(total)}, at {cards.UTILIZATION:.0%} of the data "
        f"sheet's arithmetic and {cards.BANDWIDTH_SHARE:.0%} of its bandwidth (assumed)"
    )
    for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        if spent > 0.01 * total:
            yield f"    {part:<38} {duration(spent):>12}"
    if most is not None:
        yield f"    renderer, at most {duration(most):>33} (data that the CPU's kernels move; a GPU's own move less)"


def _fits(found: Plan, config: AnyConfig, known: Known, allowed: Collection[str]) -> Iterator[str]:
    from distill3d.planning.cards import RESERVE
    from distill3d.planning.fit import fitting

    rooms = {size: size * 1e9 * (1 - RESERVE) - overhead(config) for size in SIZES}
    fits = fitting(config, found.memory.image_size, list(rooms.values()), known, allowed)
    advice = "; take a smaller model or --image-size" if "image_size" in allowed else ""
    yield "fits with"
    for size, room in rooms.items():
        if (one := fits[room]) is None:
            yield f"  {size:2} GB: none of the flags tried{advice}"
        else:
            flags, memory = one
            needed = (memory.peak + overhead(config)) / 1e9
            yield f"  {size:2} GB: {' '.join(flags) or 'these settings'} ({needed:.1f} GB)"


def overhead(config: AnyConfig) -> float:
    """Bytes beside tensors: CUDA's context on a card; Python and its libraries on the CPU."""
    from distill3d.planning.cards import CONTEXT, LIBRARIES

    return LIBRARIES if config.device == "cpu" else CONTEXT
