"""Where the features of a hash grid lie: the lattice of each level, and the rows of the table."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

PRIMES = (1, 2654435761, 805459861)  # Instant-NGP, equation 4


@dataclass(frozen=True)
class HashLayout:
    """The table is stored level after level, `rows` rows in all.

    Level l has a lattice of floor(coarsest * growth^l) cells a side; the last level has `finest`.
    """

    levels: int = 16
    features: int = 2  # per level
    log2_table: int = 19  # at most 2^log2_table rows per level
    coarsest: int = 16  # cells a side
    finest: int = 4096

    def __post_init__(self) -> None:
        if self.levels < 1 or self.features < 1:
            raise ValueError(f"levels and features must be at least 1, got {self.levels} and {self.features}")
        if not 1 <= self.coarsest <= self.finest:
            raise ValueError(f"cells must satisfy 1 <= coarsest <= finest, got {self.coarsest} and {self.finest}")
        if not 1 <= self.log2_table <= 24:
            raise ValueError(f"log2_table must lie in [1, 24], got {self.log2_table}")

    @property
    def channels(self) -> int:
        """Length of the encoding of a point."""
        return self.levels * self.features

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """Cells a side of each level."""
        growth = (self.finest / self.coarsest) ** (1 / max(1, self.levels - 1))
        return tuple(int(self.coarsest * growth**level + 1e-6) for level in range(self.levels))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of table rows of each level."""
        return tuple(min((n + 1) ** 3, 2**self.log2_table) for n in self.cells)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each level."""
        return tuple(itertools.accumulate(self.sizes, initial=0))[:-1]

    @property
    def rows(self) -> int:
        """Number of rows of the whole table."""
        return sum(self.sizes)

    def dense(self, level: int) -> bool:
        """Whether every lattice point of a level has its own row."""
        return (self.cells[level] + 1) ** 3 <= 2**self.log2_table

    def lattice_rows(self, level: int, corner: Int[Tensor, "n 3"]) -> Int[Tensor, " n"]:
        """Rows within a level of lattice points (int64, each coordinate in [0, cells]): x fastest, or hashed."""
        x, y, z = corner.unbind(1)
        if self.dense(level):
            side = self.cells[level] + 1
            return x + side * (y + side * z)
        mixed = (x * PRIMES[0]) ^ (y * PRIMES[1]) ^ (z * PRIMES[2])
        return mixed % 2**self.log2_table
