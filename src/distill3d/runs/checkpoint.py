"""State of a run on disk: safetensors for numbers, JSON for everything else, no pickle.

A checkpoint is a folder with `scene.safetensors`, `optimizer.safetensors`, for methods that train one
`student.safetensors`, and `state.json`; together they let a run continue as if it had not been interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.files import replacing
from distill3d.priors.student import Student

PARTS = ("scene.safetensors", "optimizer.safetensors", "state.json")
STUDENT = "student.safetensors"


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of a step: halfway through one, what is drawn and moved already would count twice.

    Yields the function to call after each step; there KeyboardInterrupt is raised where Ctrl-C was pressed. Pressed
    once more, it is raised at once, and the state is not one to continue from.
    """
    asked = False

    def heard(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, heard)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save_checkpoint(
    folder: str | os.PathLike[str],
    scene: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    generator: torch.Generator,
    student: Student | None = None,
) -> None:
    """Writes the state after `step` finished steps; state.json comes last and makes the checkpoint valid."""
    from safetensors.torch import save_file

    folder = Path(folder)
    (folder / PARTS[2]).unlink(missing_ok=True)
    with replacing(folder / PARTS[0]) as draft:
        save_file({k: v.contiguous() for k, v in scene.state_dict().items()}, draft)
    with replacing(folder / PARTS[1]) as draft:
        save_file(_optimizer_tensors(optimizer), draft)
    if student is not None:
        student.save(folder / STUDENT)
    state = {"step": step, "generator": generator.get_state().tolist()}
    with replacing(folder / PARTS[2]) as draft:
        draft.write_text(json.dumps(state))


def load_checkpoint(
    folder: str | os.PathLike[str], scene: nn.Module, generator: torch.Generator, student: Student | None = None
) -> tuple[int, dict[str, Tensor]]:
    """Restores scene, generator and student in place; returns the number of finished steps and the optimizer's tensors.

    The optimizer is restored with `restore_optimizer` once it has been made for the restored scene.

    Raises:
        ValueError: where the folder holds no complete checkpoint.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    missing = [name for name in PARTS if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no complete checkpoint: {', '.join(missing)} missing")
    try:
        scene.load_state_dict(load_file(folder / PARTS[0]))
        tensors = load_file(folder / PARTS[1])
        state: dict[str, Any] = json.loads((folder / PARTS[2]).read_text())
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"the checkpoint in {folder} is damaged: {str(error).splitlines()[0]}") from error
    if student is not None:
        student.load(folder / STUDENT)
    generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
    return int(state["step"]), tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts saved moments back; the optimizer must belong to a scene of the saved shape."""
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": torch.as_tensor(value).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
