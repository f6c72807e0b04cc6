"""Which flags make a run fit into a given memory, in the order of what they cost in quality."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from distill3d.planning.cards import card_of
from distill3d.planning.measure import Known
from distill3d.planning.plan import AnyConfig, Memory, planned_dtype, planned_memory
from distill3d.runs.images import ImageConfig

Change = Callable[[AnyConfig, int], tuple[str, AnyConfig] | None]  # configuration, image size -> flag, configuration


def half(config: AnyConfig, image_size: int) -> tuple[str, AnyConfig] | None:
    """Half the memory for network and text encoders; results change less than between two seeds."""
    if planned_dtype(config) not in ("float32", "float64"):
        return None
    card = card_of(config.device)
    name = "bfloat16" if card is None or card.bfloat16 else "float16"
    return f"--dtype {name}", replace(config, dtype=name)


def checkpointing(config: AnyConfig, image_size: int) -> tuple[str, AnyConfig] | None:
    """The same result, a longer backward pass."""
    if config.prior_options.checkpointing or config.prior_options.vae == "taesd":
        return None
    options = replace(config.prior_options, checkpointing=True)
    return "--set prior_options.checkpointing=true", replace(config, prior_options=options)


def one_view(config: AnyConfig, image_size: int) -> tuple[str, AnyConfig] | None:
    """A noisier gradient at each step."""
    if isinstance(config, ImageConfig) or config.recipe.views == 1:
        return None
    if config.recipe.sampling is not None or config.recipe.cameras.orthogonal:
        return None
    return "--views-per-step 1", replace(config, recipe=replace(config.recipe, views=1))


def offload(config: AnyConfig, image_size: int) -> tuple[str, AnyConfig] | None:
    """The same result, much slower."""
    if config.prior_options.offload or config.device == "cpu":
        return None
    return "--offload", replace(config, prior_options=replace(config.prior_options, offload=True))


def render_half(config: AnyConfig, image_size: int) -> tuple[str, AnyConfig] | None:
    """Half the detail of the renderings."""
    if isinstance(config, ImageConfig):
        return None
    size = (config.recipe.render_size or image_size) // 2
    if config.recipe.sampling is not None or size < 64:
        return None
    return f"--render-size {size}", replace(config, recipe=replace(config.recipe, render_size=size))


def tiny_autoencoder(config: AnyConfig, image_size: int) -> tuple[str, AnyConfig] | None:
    """Softer gradients."""
    if config.prior_options.vae is not None or image_size <= 64:
        return None
    options = replace(config.prior_options, vae="taesd", checkpointing=False)
    return "--vae taesd", replace(config, prior_options=options)


FLAGS: Mapping[Change, str] = {  # the flag of each, as a field of a command
    half: "dtype",
    checkpointing: "set",
    one_view: "views_per_step",
    offload: "offload",
    render_half: "render_size",
    tiny_autoencoder: "vae",
}
LOSSLESS: tuple[Change, ...] = (half, checkpointing)
TRIED: tuple[tuple[Change, ...], ...] = (
    (),
    (half,),
    LOSSLESS,
    (*LOSSLESS, one_view),
    (*LOSSLESS, one_view, offload),
    (*LOSSLESS, one_view, render_half),
    (half, one_view, tiny_autoencoder),
    (half, one_view, render_half, tiny_autoencoder),
    (half, one_view, render_half, tiny_autoencoder, offload),
)


def candidates(
    config: AnyConfig, image_size: int, known: Known, allowed: Collection[str]
) -> Iterator[tuple[tuple[str, ...], Memory]]:
    """Flags of `allowed` and the memory with them, those that lose least first; each set once."""
    seen: set[tuple[str, ...]] = set()
    for changes in TRIED:
        flags, changed = list[str](), config
        for change in (one for one in changes if FLAGS[one] in allowed):
            if (made := change(changed, image_size)) is not None:
                flags.append(made[0])
                changed = made[1]
        if tuple(flags) not in seen:
            seen.add(tuple(flags))
            yield tuple(flags), planned_memory(changed, known)


def fitting(
    config: AnyConfig,
    image_size: int,
    rooms: Sequence[float],
    known: Known,
    allowed: Collection[str] = tuple(FLAGS.values()),
) -> dict[float, tuple[tuple[str, ...], Memory] | None]:
    """The first flags with which a run fits into each of `rooms` (bytes), and the memory with them; None for none.

    Args:
        allowed: the flags that the command has, as names of fields, such as "dtype".
    """
    found: dict[float, tuple[tuple[str, ...], Memory] | None] = dict.fromkeys(rooms)
    for flags, memory in candidates(config, image_size, known, allowed):
        for room in rooms:
            if found[room] is None and memory.peak <= room:
                found[room] = flags, memory
        if all(found.values()):
            break
    return found
