"""Weights that are mapped from their file, read without making them resident.

A library that maps a file reads a page when a value on it is used, and from then on the page counts as memory of the
process. Code that looks at all weights once would make the whole file resident, so it reads the file instead, one
tensor at a time. Linux lists the mappings of a process; elsewhere no tensor is known to be mapped.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, order=True)
class _Mapping:
    begin: int  # addresses
    end: int
    offset: int  # of the first byte in the file
    file: str


@dataclass(frozen=True)
class Mappings:
    """The files that this process has mapped, in the order of their addresses."""

    entries: tuple[_Mapping, ...]

    @classmethod
    def of_this_process(cls) -> Mappings:
        """The present ones; none where the system does not list them."""
        found = []
        for line in MAPS.read_text().splitlines() if MAPS.is_file() else ():
            words = line.split(maxsplit=5)
            private = len(words) == 6 and words[1].endswith("p")
            if private and Path(words[5]).is_file():  # the name of a removed or replaced file ends in (deleted)
                begin, end = (int(address, 16) for address in words[0].split("-"))
                found.append(_Mapping(begin, end, int(words[2], 16), words[5]))
        return cls(tuple(sorted(found)))

    def read(self, x: Tensor) -> Tensor | None:
        """A copy of the values of x, read from its file; None if x is not mapped from one.

        x must be as it was loaded: what was written to it since is not in the file.
        """
        if x.device.type != "cpu" or type(x.data) is not Tensor or not x.is_contiguous() or not x.numel():
            return None
        size, address = x.numel() * x.element_size(), x.data_ptr()
        place = bisect.bisect([entry.begin for entry in self.entries], address) - 1
        if place < 0 or address + size > self.entries[place].end:
            return None
        entry = self.entries[place]
        values = np.fromfile(entry.file, np.uint8, size, offset=entry.offset + address - entry.begin)
        return None if len(values) != size else torch.from_numpy(values).view(x.dtype).view(x.shape)
