"""A run's log for TensorBoard: tensorboard --logdir runs shows all runs of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "tensorboard"  # in the run's folder


def open_writer(folder: Path, step: int) -> TensorBoard:
    """See `Writer`. What an interrupted run logged at `step` and after it is not shown any more."""
    return TensorBoard(folder / FOLDER, step)


class TensorBoard:
    """See `Writer`."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, values: Mapping[str, Image.Image]) -> None:
        """See `Writer`."""
        for name, image in values.items():
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See `Writer`."""
        self._writer.close()
