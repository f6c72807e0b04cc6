"""What the commands share: groups of flags, the progress bar, and small helpers.

Help must appear at once, so the modules of the command line import nothing heavy before a command runs. A flag that is
not given is None (or empty, or False): the value then comes from the recipe or the configuration file, see `settings`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

if TYPE_CHECKING:
    from distill3d.distill.loop import Progress

RUNS = Path("runs")  # where run folders go unless --out says otherwise
MESHES = (".glb", ".gltf", ".obj", ".ply", ".fbx", ".stl", ".usd", ".usdz")
FILES = (*MESHES, ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mp4")


def _optional(kind: Callable[[str], Any], metavar: str, choices: tuple[str, ...] | None = None) -> object:
    """How tyro reads a flag that may be left out; its own help and errors for `kind | None` speak of "{None}|INT"."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, str | int | float | Path),
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def _place(text: str) -> Path | str:
    from distill3d.workers.store import place_of

    return place_of(text)


DTYPES = ("auto", "float32", "bfloat16", "float16")
NO_DEFAULT = arg(help_behavior_hint="")  # in the help; the text of the flag says what happens without it
Int = Annotated[int | None, _optional(int, "INT"), NO_DEFAULT]
Float = Annotated[float | None, _optional(float, "FLOAT"), NO_DEFAULT]
Text = Annotated[str | None, _optional(str, "TEXT"), NO_DEFAULT]
Name = Annotated[str | None, _optional(str, "NAME"), NO_DEFAULT]
File = Annotated[Path | None, _optional(Path, "PATH"), NO_DEFAULT]
Folder = Annotated[Path | None, _optional(Path, "FOLDER"), NO_DEFAULT]
Place = Annotated["Path | str", _optional(_place, "FOLDER")]
PlaceOrNone = Annotated["Path | str | None", _optional(_place, "FOLDER"), NO_DEFAULT]
Dtype = Annotated[str | None, _optional(str, "{auto,float32,bfloat16,float16}", DTYPES), NO_DEFAULT]
Control = Annotated[str | None, _optional(str, "{depth,normal}", ("depth", "normal")), NO_DEFAULT]
UpAxis = Annotated[Literal["auto", "y", "z"] | None, _optional(str, "{auto,y,z}", ("auto", "y", "z")), NO_DEFAULT]
Pivot = Annotated[
    Literal["center", "bottom"] | None, _optional(str, "{center,bottom}", ("center", "bottom")), NO_DEFAULT
]
Flag = Annotated[bool, NO_DEFAULT]
Prompt = Annotated[Positional[str], arg(metavar="PROMPT")]
OptionalName = Annotated[Positional[str | None], arg(metavar="[NAME]", help_behavior_hint="")]
Run = Annotated[Positional[Path], arg(metavar="RUN")]
Repeated = UseAppendAction[tuple[str, ...]]
Listed = Annotated[tuple[str, ...], NO_DEFAULT]
LogTo = Annotated[UseAppendAction[tuple[Literal["tensorboard", "wandb"], ...]], NO_DEFAULT]
REPEATED_FLAGS = ("lora", "token", "set", "log")  # the fields that are `Repeated`


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What to make."""

    negative: Text = None
    """What the result should not be (the negative prompt)."""
    front: Text = None
    """Prompt for views from the front; default: the prompt and "front view". Likewise for the next three."""
    side: Text = None
    """Prompt for views from the side."""
    back: Text = None
    """Prompt for views from the back."""
    overhead: Text = None
    """Prompt for views from above."""
    seed: Int = None
    """Random seed; default: 0. The same seed on the same machine gives the same result."""

    def changes(self) -> dict[str, object]:
        """The settings that these flags change, by path; None changes nothing."""
        views = {name: text for name in ("front", "side", "back", "overhead") if (text := getattr(self, name))}
        return {"negative": self.negative, "seed": self.seed, "views": views or None}


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and where it runs."""

    prior: Name = None
    """Frozen 2D model: a name (toybox, sd15, sd21, sdxl, ...: see distill3d doctor), folder, file or hub id."""
    device: Name = None
    """Where to compute: cpu (default), cuda, cuda:1, mps."""
    dtype: Dtype = None
    """Precision of the network; auto (default) is bfloat16 where the hardware supports it, else float32."""
    image_size: Int = None
    """Pixels per side of the images it sees; default: the size it was trained on."""
    vae: Name = None
    """Another autoencoder: taesd (small and fast), a folder or a hub id."""
    lora: Annotated[Repeated, arg(metavar="FILE[:SCALE]")] = ()
    """LoRA weights for the prior's network."""
    token: Annotated[Repeated, arg(metavar="FILE[:NAME]")] = ()
    """A textual-inversion embedding; write NAME in the prompt."""
    controlnet: Name = None
    """A ControlNet: a folder or a hub id. It sees the map that --control names."""
    control: Control = None
    """The rendered map that the ControlNet sees: depth (default) or normal."""
    offload: Flag = False
    """Keep the network in main memory and send it to the GPU layer by layer: little memory, slow."""
    compile: Flag = False
    """Compile the network with torch.compile: a slow start, faster steps."""

    def changes(self) -> dict[str, object]:
        """The settings that these flags change, by path; None changes nothing."""
        place = {"prior": self.prior, "device": self.device, "dtype": self.dtype}
        names = [field.name for field in dataclasses.fields(self) if field.name not in place]
        return place | {f"prior_options.{name}": _given(getattr(self, name)) for name in names}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything else. Flags have priority over --config, --set over both."""

    config: File = None
    """Settings from a TOML file, such as distill3d recipes NAME writes, or from the config.json of a run."""
    set: Annotated[Repeated, arg(metavar="PATH=VALUE")] = ()
    """Any other setting, such as penalties.opaque.end=0; distill3d recipes NAME lists them all."""


def _given(value: object) -> object:
    """A flag's value as a plain one; None if it was not given."""
    return None if value is False or value == () else list(value) if isinstance(value, tuple) else value


def run_folder(path: Path) -> Path:
    """The folder of a run; ValueError for a file in it, with what to type instead."""
    if path.is_file():
        raise ValueError(f"RUN must be the folder of a run, {path} is a file: pass {path.parent}")
    return path


def is_file_name(path: Path) -> bool:
    """Whether a path names a file rather than a folder, by its suffix."""
    return path.suffix.lower() in FILES and not path.is_dir()


def method_key(name: str) -> str:
    """The name of a method as the dictionaries of methods have it: "SDS-Bridge" is sds_bridge."""
    return name.lower().replace("-", "_")


def split(words: Sequence[str], flag: str) -> tuple[str, ...]:
    """The names of a list, separated by spaces or commas; ValueError for an empty one."""
    names = [name.strip() for word in words for name in word.split(",")]
    if not names or not all(names):
        raise ValueError(f"{flag} needs names separated by commas, got {','.join(words)!r}")
    return tuple(names)


def integers(words: Sequence[str], flag: str) -> tuple[int, ...]:
    """The integers of a list, separated by spaces or commas; ValueError for anything else."""
    try:
        return tuple(int(name) for name in split(words, flag))
    except ValueError:
        raise ValueError(f"{flag} needs integers separated by commas, such as 0,1; got {','.join(words)!r}") from None


def duration(seconds: float) -> str:
    """A time for people, such as "4.2 s", "42 s", "3 min 07 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole // 60 % 60:02} min"


def command_line(words: Sequence[str], command: object) -> str:
    """What to type for the same command: the flags that are not at their default, without --out and where it runs.

    `words` are the command's name and its positional arguments.
    """
    return shlex.join([*words, *_flags(command)])


def _flags(command: Any) -> Iterator[str]:
    for field in dataclasses.fields(command):
        value, default, flag = getattr(command, field.name), field.default, f"--{field.name.replace('_', '-')}"
        if default is dataclasses.MISSING:
            if field.default_factory is dataclasses.MISSING:  # a positional argument
                continue
            default = field.default_factory()
        if field.name in ("out", "machines") or value == default:
            continue
        if dataclasses.is_dataclass(value):
            yield from _flags(value)
        elif value is True:
            yield flag
        elif field.name in REPEATED_FLAGS:
            yield from (word for one in value for word in (flag, one))
        else:
            yield from (flag, *map(str, value if isinstance(value, tuple) else (value,)))


# What to try when memory runs out, by the flag of a command that does it, the most effective ones first.
MEMORY_FLAGS = {
    "dtype": "--dtype bfloat16",
    "offload": "--offload (on a GPU)",
    "render_size": "a lower --render-size",
    "views_per_step": "fewer --views-per-step",
    "image_size": "a smaller --image-size",
    "size": "a smaller --size",
    "view_size": "a smaller --view-size",
    "texture_size": "a smaller --texture-size",
    "resolution": "a lower --resolution",
    "frames": "fewer --frames",
    "set": "--set prior_options.checkpointing=true",
}


def memory_advice(command: object) -> str:
    """What to type so that a command needs less memory: the flags that it has."""
    given, lowest = dict(flag_values(command)), (True, 1, "bfloat16")
    texts = [text for name, text in MEMORY_FLAGS.items() if name in given and given[name] not in lowest]
    if not texts:  # resume: the settings are those of the run
        return "free some, or start again with lower settings, such as --render-size or --views-per-step"
    return f"try {' or '.join(filter(None, (', '.join(texts[:-1]), texts[-1])))}"


def flag_values(command: Any) -> Iterator[tuple[str, object]]:
    """The flags of a command by the names of their fields, those of its groups included."""
    for one in dataclasses.fields(command):
        value = getattr(command, one.name)
        yield from flag_values(value) if dataclasses.is_dataclass(value) else ((one.name, value),)


def on_terminal() -> bool:
    """Whether a person reads what is printed, in lines of limited length."""
    return sys.stdout is not None and sys.stdout.isatty()


@contextlib.contextmanager
def counter(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr that counts. Yields the function to call for each thing that is done."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows on stderr that something takes its time."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


class Show(Protocol):
    """Shows a finished step."""

    def __call__(self, progress: Progress, status: str = "", /, *, numbers: bool = True) -> None:
        """Moves the bar; `status` stands behind the numbers of the step, or in their place."""
        ...


@contextlib.contextmanager
def progress_bar(total: int, name: str) -> Iterator[Show]:
    """A progress bar on stderr, which appears with the first step. Yields the function to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    name_column, times, status_column = map(
        TextColumn, ("{task.description}", "{task.fields[elapsed]}, left", "{task.fields[status]}")
    )
    columns = (
        SpinnerColumn(),
        name_column,
        BarColumn(),
        MofNCompleteColumn(),
        times,
        TimeRemainingColumn(),
        status_column,
    )
    bar = Bar(*columns, console=Console(stderr=True))
    task = bar.add_task(name, total=total, status="", elapsed="")

    def on_step(progress: Progress, status: str = "", /, *, numbers: bool = True) -> None:
        bar.start()  # errors before the first step are then printed alone
        text = f"t {progress.t:.2f}  loss {progress.loss:.3f}  {status}" if numbers else status
        bar.update(task, completed=progress.step + 1, elapsed=duration(progress.seconds), status=text)

    try:
        yield on_step
    finally:
        if bar.live.is_started:
            bar.stop()
