"""The command line: `distill3d generate "a red mushroom"` and the other commands.

Exit status: 0 done; 2 something wrong with what was asked for, in one line; 3 the run diverged; 4 the run ended without
a mesh; 5 out of memory; 1 an error of distill3d itself, with a traceback; 130, 143 or 129 after Ctrl-C, SIGTERM or
SIGHUP, with the state saved and the artifacts written; 141 where the reader of a pipe, such as head, has enough.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import make_dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any, Protocol

import tyro

from distill3d.files import explain
from distill3d.interrupts import raise_on_signals, signal_of
from distill3d.untrusted import CONTROL, printable
from distill3d.workers.turns import THREADS

DESCRIPTION = """Text to 3D by score distillation from a frozen 2D diffusion model.

distill3d generate "a red mushroom" makes an object; distill3d COMMAND --help shows the flags of a command;
distill3d --version shows the version."""
# The module of each command, and the first line of its docstring: help needs neither the command nor torch.
SUMMARIES = {
    "generate": ("objects", "Make a 3D object from a prompt."),
    "texture": ("meshes", "Texture a mesh from a prompt; its shape stays as it is."),
    "refine": (
        "meshes",
        "Refine the texture and the surface of a run's mesh with the same prompt, in a new run folder.",
    ),
    "resume": ("objects", "Continue a run from its last checkpoint."),
    "export": ("exports", "Write the mesh of a run again: with another texture, format or resolution."),
    "render": ("exports", "Render a run again, as a turntable video."),
    "view": ("viewing", "Show a run in a browser: mesh, splats, normals, opacity, depth and turntable."),
    "image": ("images", "Make an image from a prompt, with DDIM or any objective."),
    "compare": ("images", "Compare methods: one prompt and one seed, all images labeled in one, and a table."),
    "bench": ("bench", "Compare methods on objects: the same prompts, seeds, scene, cameras and budget for all."),
    "paper": (
        "paper",
        "Repeat an experiment of the paper (Lukoianov et al. 2024) on a prior of your choice.",
    ),
    "gallery": ("gallery", "Write one HTML page with turning models from any runs."),
    "recipes": ("recipes", "Show the recipes side by side, or write one as a configuration file."),
    "doctor": ("doctor", "Show what is installed, which devices and priors there are, and how fast a prior runs here."),
}

# How often a waiting thread polls before it sleeps. GNU's OpenMP, which the Linux wheels of torch bring, reads it; its
# default polls far longer and takes cores from other programs. The rule and its measurement: benchmarks/busy.py.
WAITING = {"GOMP_SPINCOUNT": "1000"}
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # a user who sets one of these has chosen


class _Commands(Mapping[str, "type[Command]"]):
    """The commands by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Command]:
        return getattr(import_module(f"distill3d.cli.{SUMMARIES[name][0]}"), name.capitalize())

    def __iter__(self) -> Iterator[str]:
        return iter(SUMMARIES)

    def __len__(self) -> int:
        return len(SUMMARIES)


COMMANDS = _Commands()
NESTED = "paper"  # it has subcommands
HELP = {"-h", "--help"}


class Command(Protocol):
    """The flags of a command, and what it does."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        ...


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `distill3d`; ends the process with its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # closed streams are None
            stream.reconfigure(errors="backslashreplace")  # a terminal need not know every letter
    choose_wait_policy(os.environ)
    raise_on_signals()
    status = run(sys.argv[1:] if argv is None else argv)
    if any(thread.name == THREADS for thread in threading.enumerate()):  # a second Ctrl-C left them at work
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)  # torch aborts the process where Python ends beside a thread that computes
    sys.exit(status)


def choose_wait_policy(environment: MutableMapping[str, str]) -> None:
    """Sets `WAITING` in an environment without a choice of its own; OpenMP reads it when torch is imported."""
    if not any(name in environment for name in OPENMP):
        environment.update(WAITING)


def run(argv: Sequence[str]) -> int:
    """Runs a command line and returns its exit status."""
    for word in argv:
        if CONTROL.search(word):
            _say(f"arguments must be UTF-8 text without control characters, got {word[:60]!a}")
            return 2
    status = 0
    try:
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is noticed here, and not when Python ends
    except OSError as error:
        if sys.stdout is not None:  # what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141  # 128 + SIGPIPE, as if the signal had ended the process
        if not status:
            _say(explain(error))
        return status or 2
    return status


def _run(argv: Sequence[str]) -> int:
    if list(argv) == ["--version"]:
        from distill3d import __version__

        print(f"distill3d {__version__}")
        return 0
    try:
        command = parse(argv)
    except SystemExit as stop:
        if stop.code and any(word.split("=")[0] == "--prompt" for word in argv):
            _say(f'the prompt needs no flag: distill3d {argv[0]} "a red mushroom"')
        return int(stop.code or 0)
    _show_warnings()
    try:
        return command.run()
    except KeyboardInterrupt as error:
        _say("interrupted")
        return 128 + signal_of(error)
    except BrokenPipeError:
        raise
    except Exception as error:
        return _explain(error, command)


def parse(argv: Sequence[str]) -> Command:
    """The command that a command line describes.

    Raises:
        SystemExit: with status 0 after --help, with 2 and tyro's message on stderr for anything wrong.
    """
    asked = argv[0] if argv else ""
    if asked in SUMMARIES and asked != NESTED and not HELP.isdisjoint(argv):
        argv = [asked, "--help"]  # tyro leaves arguments that are given out of its help
    completion = asked.startswith("--tyro")  # which lists the flags of all
    commands: list[Any] = [
        Annotated[
            COMMANDS[name] if completion or name == asked else make_dataclass(name.capitalize(), []),
            tyro.conf.subcommand(name, description=summary),
        ]
        for name, (_, summary) in SUMMARIES.items()
    ]
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(reduce(or_, commands), prog="distill3d", description=DESCRIPTION, args=argv, config=config)


def _explain(error: Exception, command: Command) -> int:
    """One line for an error that a user can do something about, and its status; others are raised again."""
    from distill3d.cli.shared import memory_advice
    from distill3d.distill.divergence import Diverged
    from distill3d.priors.components.folder import is_out_of_memory

    if is_out_of_memory(error):
        line, status = f"out of memory: {memory_advice(command)}", 5
    elif isinstance(error, Diverged):
        line, status = f"the run diverged {error}", 3
    elif isinstance(error, OSError):
        line, status = explain(error), 2
    elif isinstance(error, ImportError) and (error.name or "").startswith("distill3d"):
        raise error  # not an optional package that is missing
    elif isinstance(error, ValueError | ImportError):
        line, status = str(error), 2
    else:
        raise error
    _say("; ".join((line, *getattr(error, "__notes__", ()))))
    return status


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed, or full
        print(f"distill3d: {printable(message)}", file=sys.stderr, flush=True)


def _show_warnings() -> None:
    """Warnings of the package, once and in one line each; those of other libraries are about their own upkeep."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in shown:
            print(f"warning: {printable(str(message))}", file=sys.stderr)
        shown.add(str(message))

    warnings.showwarning = show
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", module=r"distill3d\.")
