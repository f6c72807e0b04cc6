"""Checkpoints: safetensors for numbers, JSON for everything else, no pickle.

A checkpoint is a folder with `scene.safetensors`, `optimizer.safetensors`, for objectives that learn
`objective.safetensors`, and `state.json` with a checksum of each. With them a run continues as if it had not been
interrupted. A new checkpoint is written beside the old one (`checkpoint.new`), brought to the disk and switched in by a
rename; the old one (`checkpoint.old`) goes last, so that there is a complete one at any moment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from distill3d.files import checksum, explain, sync
from distill3d.objectives import Stateful
from distill3d.priors.components.folder import check_finite
from distill3d.runs.config import from_plain

SCENE, OPTIMIZER = "scene.safetensors", "optimizer.safetensors"
OBJECTIVE, STATE = "objective.safetensors", "state.json"
FORMAT = 2  # of state.json; raised when checkpoints are written differently


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


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not complete, was changed, or is of another format."""


@dataclass(frozen=True)
class State:
    """What state.json holds beside its format and its own checksum."""

    step: int  # finished steps
    nfe: int  # network evaluations until then
    seconds: float
    generator: str  # its state, as hexadecimal digits
    files: dict[str, str]  # SHA-256 of the checkpoint's other files
    around: dict[str, str]  # and of what else belongs to the run, see `RunFolder`
    lines: int  # of metrics.jsonl


def save_checkpoint(
    folder: Path,
    run: Checkpointed,
    step: int,
    nfe: int = 0,
    seconds: float = 0.0,
    around: Mapping[str, str] = MappingProxyType({}),
    lines: int = 0,
) -> None:
    """Writes the state after `step` finished steps; the checkpoint before it is kept until this one is complete.

    Raises:
        OSError: where it cannot be written; the checkpoint before it is then still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tidy(folder)
    new, old = _beside(folder)
    new.mkdir(parents=True)
    tensors = {SCENE: run.module.state_dict(), OPTIMIZER: _optimizer_tensors(run.optimizer)}
    if run.state is not None:
        tensors[OBJECTIVE] = run.state.state_dict()
    files: dict[str, str] = {}
    try:
        for name, values in tensors.items():
            try:
                save_file({key: value.contiguous() for key, value in values.items()}, new / name)
            except SafetensorError as error:  # what it raises on a full disk
                raise OSError(f"cannot write {new / name}: {error}") from error
            sync(new / name)
            files[name] = checksum(new / name)
        state = State(step, nfe, seconds, bytes(run.generator.get_state().tolist()).hex(), files, dict(around), lines)
        content = {"format": FORMAT, **dataclasses.asdict(state)}
        (new / STATE).write_text(json.dumps({"sha256": json_checksum(content), **content}, allow_nan=False))
        sync(new / STATE)
        sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # a full disk needs the space
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Removes what a killed process left beside a checkpoint; of a switch that it had begun, the old one is kept."""
    new, old = _beside(folder)
    if (old / STATE).is_file() and not (folder / STATE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        old.rename(folder)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint, this one or the one before it."""
    return any((place / STATE).is_file() for place in (folder, _beside(folder)[1]))


def load_checkpoint(folder: Path, run: Checkpointed) -> State:
    """Restores a run in place and returns the rest of the checkpoint.

    Raises:
        DamagedCheckpoint: where there is no complete one, or a file of it was changed.
        ValueError: for the checkpoint of another run.
    """
    state, tensors = _read(folder, (SCENE, OPTIMIZER, *([] if run.state is None else [OBJECTIVE])))
    _load(folder, run.module, tensors[SCENE])
    run.restart_optimizer()
    try:
        _restore_optimizer(run.optimizer, tensors[OPTIMIZER])
        if run.state is not None:
            run.state.load_state_dict(tensors[OBJECTIVE])
        run.generator.set_state(torch.tensor(list(bytes.fromhex(state.generator)), dtype=torch.uint8))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error
    return state


def load_module(folder: Path, module: nn.Module) -> None:
    """Restores the parameters alone; raises as `load_checkpoint` does."""
    _load(folder, module, _read(folder, (SCENE,))[1][SCENE])


def read_state(folder: Path) -> State:
    """The state.json of a checkpoint; raises `DamagedCheckpoint`."""
    return _read(folder, ())[0]


def _load(folder: Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder / SCENE} does not fit this run: {str(error).splitlines()[-1].strip()}") from error


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _read(folder: Path, names: Sequence[str]) -> tuple[State, dict[str, dict[str, Tensor]]]:
    """The state and the tensors of these files, all verified."""
    for attempt in range(3):  # a run that is at work may put a new checkpoint in place meanwhile
        # Between two renames the complete one is the one before.
        place = next((one for one in (folder, _beside(folder)[1]) if (one / STATE).is_file()), folder)
        try:
            state = _parse_state(place / STATE)
            return state, {name: _parse_tensors(place / name, state) for name in names}
        except FileNotFoundError as error:
            failure = DamagedCheckpoint(f"{folder} is no complete checkpoint: {Path(error.filename).name} missing")
        except OSError as error:
            failure = DamagedCheckpoint(f"{folder} cannot be read: {explain(error)}")
        except DamagedCheckpoint as error:
            failure = error
        if attempt == 2:
            raise failure
    raise AssertionError


def _parse_state(path: Path) -> State:
    try:
        content = json.loads(path.read_bytes())
        written, stated = content["format"], content.pop("sha256", None)
        found = json_checksum(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {type(error).__name__} {error}") from None
    if written != FORMAT:
        raise DamagedCheckpoint(f"{path} has format {written!r}; this version of distill3d reads format {FORMAT}")
    if stated != found:
        raise DamagedCheckpoint(f"{path} is damaged: it does not have the checksum that it states")
    try:
        return from_plain(State, {name: value for name, value in content.items() if name != "format"})
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error


def _parse_tensors(path: Path, state: State) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != state.files.get(path.name):
        raise DamagedCheckpoint(f"the checkpoint file {path} is damaged: it does not have the checksum in {STATE}")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"the checkpoint file {path} is damaged: {str(error).splitlines()[0]}") from error
    check_finite(tensors.items(), path)
    return tensors


def json_checksum(content: object) -> str:
    """SHA-256 of JSON values, however they are laid out in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


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
