"""Checkpoints: safetensors for numbers, JSON for everything else, no pickle.

A checkpoint is a folder with `scene.safetensors`, `optimizer.safetensors`, for objectives that learn
`objective.safetensors`, and `state.json`. With them a run continues as if it had not been interrupted. A new checkpoint
is written beside the old one and switched in by a rename, so that there is a complete one at any moment.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from distill3d.objectives import Stateful
from distill3d.priors.components.folder import check_finite

SCENE, OPTIMIZER = "scene.safetensors", "optimizer.safetensors"
OBJECTIVE, STATE = "objective.safetensors", "state.json"


class Checkpointed(Protocol):
    """What a checkpoint holds: parameters, optimizer, random state, and what the run has learned."""

    generator: torch.Generator

    @property
    def state(self) -> Stateful | None:
        """What the run has learned or remembers beside its parameters; None if nothing."""
        ...

    @property
    def module(self) -> nn.Module:
        """All parameters and buffers."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the parameters."""
        ...

    def restart_optimizer(self) -> None:
        """Makes a new optimizer for the present parameters."""
        ...


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Delays Ctrl-C to the end of a step, since half a step cannot be continued.

    Yields the function to call after each step, which raises KeyboardInterrupt if Ctrl-C was pressed. A second Ctrl-C
    raises at once, and the state then is not one to continue from.
    """
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save_checkpoint(folder: Path, run: Checkpointed, step: int) -> None:
    """Writes the state after `step` finished steps; the checkpoint before it is kept until this one is complete."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    new, old = _beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors = {SCENE: run.module.state_dict(), OPTIMIZER: _optimizer_tensors(run.optimizer)}
    if run.state is not None:
        tensors[OBJECTIVE] = run.state.state_dict()
    for name, values in tensors.items():
        try:
            save_file({key: value.contiguous() for key, value in values.items()}, new / name)
        except SafetensorError as error:  # what it raises on a full disk
            raise OSError(f"cannot write {new / name}: {error}") from error
    state = {"step": step, "generator": run.generator.get_state().tolist()}
    (new / STATE).write_text(json.dumps(state, allow_nan=False))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint, this one or the one before it."""
    return any((place / STATE).is_file() for place in (folder, _beside(folder)[1]))


def checkpointed_steps(folder: Path) -> int:
    """The number of finished steps of a checkpoint; 0 where there is none."""
    return int(json.loads((_place(folder) / STATE).read_text())["step"]) if has_checkpoint(folder) else 0


def load_checkpoint(folder: Path, run: Checkpointed) -> int:
    """Restores a run in place and returns the number of finished steps.

    Raises:
        ValueError: where the folder holds no complete checkpoint.
    """
    place = _place(folder)
    load_module(folder, run.module)
    run.restart_optimizer()
    _restore_optimizer(run.optimizer, _read(place / OPTIMIZER))
    if run.state is not None:
        run.state.load_state_dict(_read(place / OBJECTIVE))
    try:
        state = json.loads((place / STATE).read_text())
        run.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        return int(state["step"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{place / STATE} is damaged: {error}") from error


def load_module(folder: Path, module: nn.Module) -> None:
    """Restores the parameters alone; ValueError where they are missing, damaged or of another scene."""
    path = _place(folder) / SCENE
    tensors = _read(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this run: {str(error).splitlines()[-1].strip()}") from error


def _place(folder: Path) -> Path:
    """The folder of the complete checkpoint: between two renames that is the one before."""
    old = _beside(folder)[1]
    place = old if not (folder / STATE).is_file() and (old / STATE).is_file() else folder
    missing = [name for name in (SCENE, OPTIMIZER, STATE) if not (place / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no complete checkpoint: {', '.join(missing)} missing")
    return place


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the checkpoint file {path} is damaged: {str(error).splitlines()[0]}") from error
    check_finite(tensors.items(), path)
    return tensors


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts saved moments back; the optimizer must belong to a scene of the saved shape."""
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
