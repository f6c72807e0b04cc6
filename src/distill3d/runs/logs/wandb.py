"""A run's log for Weights & Biases, offline unless the user is logged in: wandb sync RUN/wandb/offline-* uploads it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

PROJECT = "distill3d"  # unless WANDB_PROJECT says otherwise
LONGEST = 64  # characters of an id


def open_writer(folder: Path, step: int) -> WeightsAndBiases:
    """See `Writer`. A run that goes on has the same id."""
    return WeightsAndBiases(folder)


class WeightsAndBiases:
    """See `Writer`. The program's output, machine and source code are not logged."""

    def __init__(self, folder: Path):
        import wandb

        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
        )
        name = folder.resolve().name
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=name[-LONGEST:].strip("-"),
            resume="allow",
            dir=folder,
            config=config,
            mode=mode(),
            settings=quiet,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, values: Mapping[str, Image.Image]) -> None:
        """See `Writer`."""
        self._run.log({name: self._image(image) for name, image in values.items()}, step=step)

    def close(self) -> None:
        """See `Writer`."""
        self._run.finish()


def mode() -> Literal["online", "offline", "disabled", "shared"]:
    """What WANDB_MODE says; else online where the user is logged in (`wandb login`, WANDB_API_KEY), else offline."""
    import wandb

    said = os.environ.get("WANDB_MODE")
    if said in ("online", "offline", "disabled", "shared"):
        return said
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
