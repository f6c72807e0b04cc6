"""Values on a surface without a UV map: a sparse multi-resolution grid of the lattice points near the surface.

A value is the sum over the levels of a trilinear interpolation. There are no seams, and places that no view shows take
the value of the coarse levels, which is learned from their surroundings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill3d.render.interpolate import corner_offsets, corner_products, spread_rows, weighted_rows

PART = 1 << 20  # points that are processed at once
DENSE = 1 << 24  # lattice points up to which a level has a table of all of them: 64 MiB
Rows = tuple[Int[Tensor, "n 8"], Float[Tensor, "n 8"]]
"""The 8 lattice points around each of N points, as rows of a table, and their weights."""


class SurfaceGrid(nn.Module):
    """C values at points near a surface in [-half_size, half_size]^3, initially 0.

    The state has one table [N, C] per level; which lattice points its rows belong to follows from the surface.
    """

    keys: list[Tensor]  # per level, the sorted keys [N] of its lattice points
    places: list[Tensor | None]  # per level, the row of each key or -1; None for levels above `DENSE`

    def __init__(self, points: Float[Tensor, "n 3"], levels: Sequence[int], channels: int = 3, half_size: float = 1.0):
        """Keeps the lattice points around `points`.

        Args:
            points: on the surface, closer together than the cells of the finest level.
            levels: lattice points a side of each level.

        Raises:
            ValueError: for no level, or one with fewer than 2 or more than 4096 lattice points a side.
        """
        super().__init__()
        if not levels or min(levels) < 2 or max(levels) > 4096:
            raise ValueError(f"levels must be 2 to 4096 lattice points a side each, got {tuple(levels)}")
        self.levels, self.half_size = tuple(levels), half_size
        self.keys, self.places = [], []
        self._neighbors: list[list[tuple[Tensor, Tensor]]] | None = None  # of `roughness`, found once
        self.tables = nn.ParameterList()
        for level in self.levels:
            keys = self._corners(points, level)
            self.keys.append(keys)
            self.places.append(_places(keys, level**3))
            self.tables.append(nn.Parameter(points.new_zeros(len(keys), channels)))

    def _apply(self, fn, recurse: bool = True) -> SurfaceGrid:
        """Moves the keys with the module: they are neither parameters nor part of its state."""
        self.keys, self._neighbors = [fn(keys) for keys in self.keys], None
        self.places = [None if place is None else fn(place) for place in self.places]
        return super()._apply(fn, recurse)

    def forward(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n c"]:
        """Values at points on the surface; differentiable in the tables only."""
        return self.mix(self.rows(points))

    def mix(self, rows: Sequence[Rows]) -> Float[Tensor, "n c"]:
        """Values at the points for which `rows` was computed."""
        parts = [weighted_rows(table, *row) for table, row in zip(self.tables, rows, strict=True)]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def rows(self, points: Float[Tensor, "n 3"]) -> list[Rows]:
        """Rows and weights for the table of each level. The weight of a missing corner is distributed to the others."""
        return [self._rows(i, points) for i in range(len(self.levels))]

    def _rows(self, i: int, points: Tensor) -> Rows:
        keys, weights = self._keys(points, self.levels[i])
        index, found = self._find(i, keys)
        weights = weights * found
        return index, weights / weights.sum(1, keepdim=True).clamp_min(1e-6)

    @torch.no_grad()
    def fit(self, points: Float[Tensor, "n 3"], values: Float[Tensor, "n c"], rounds: int = 4) -> None:
        """Sets the tables so that the values at `points` approximate `values`, coarse levels first.

        Each level takes the weighted mean of the residuals around each lattice point. Memory is bounded by the rows of
        one level and by `PART` points at once.
        """
        residual = values.clone()
        parts = [slice(first, first + PART) for first in range(0, len(points), PART)]
        for i, table in enumerate(self.tables):
            table.zero_()
            rows = [self._rows(i, points[part]) for part in parts]
            total = torch.zeros_like(table[:, :1])
            for index, weights in rows:
                total += spread_rows(index, weights, torch.ones_like(weights[:, :1]), len(table))
            for _ in range(rounds):
                change = torch.zeros_like(table)
                for part, (index, weights) in zip(parts, rows, strict=True):
                    change += spread_rows(index, weights, residual[part], len(table))
                change /= total.clamp_min(1e-6)
                table += change
                for part, row in zip(parts, rows, strict=True):
                    residual[part] -= weighted_rows(change, *row)

    def roughness(self) -> Float[Tensor, ""]:
        """Mean squared difference of neighboring lattice points, summed over levels and axes."""
        if self._neighbors is None:
            self._neighbors = [[self._pairs(i, s) for s in (1, n, n * n)] for i, n in enumerate(self.levels)]
        total = self.tables[0].new_zeros(())
        for table, pairs in zip(self.tables, self._neighbors, strict=True):
            for first, second in pairs:
                total = total + (table[second] - table[first]).square().sum() / max(1, table.numel())
        return total

    def _pairs(self, i: int, stride: int) -> tuple[Tensor, Tensor]:
        """Rows of the table of level i that are neighbors along one axis."""
        level, keys = self.levels[i], self.keys[i]
        index, found = self._find(i, keys + stride)
        found &= keys.div(stride, rounding_mode="floor") % level < level - 1  # the last of a row has none
        first = found.nonzero()[:, 0]
        return first, index[first]

    def _find(self, i: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table of level i that have these keys, and whether they exist."""
        places = self.places[i]
        if places is not None:
            index = places[keys.clamp_max(len(places) - 1)].long()
            return index.clamp_min(0), (index >= 0) & (keys < len(places))
        index = torch.searchsorted(self.keys[i], keys).clamp_max(len(self.keys[i]) - 1)
        return index, self.keys[i][index] == keys

    def _corners(self, points: Tensor, level: int) -> Int[Tensor, " n"]:
        """The keys of the corners of all cells that contain points, sorted."""
        parts = (self._keys(part, level)[0] for part in points.split(PART))
        if level**3 > DENSE:
            return torch.cat([part.unique() for part in parts]).unique()
        near = torch.zeros(level**3, dtype=torch.bool, device=points.device)
        for part in parts:
            near.index_fill_(0, part.reshape(-1), True)
        return near.nonzero()[:, 0]

    def _keys(self, points: Tensor, level: int) -> Rows:
        """Keys ((z R) + y) R + x and weights [N, 8] of the corners of the cells that contain points."""
        at = ((points / self.half_size).clamp(-1, 1) + 1) * (0.5 * (level - 1))
        cell = at.floor().clamp_max(level - 2)
        local = at - cell
        x, y, z = torch.stack((1 - local, local)).unbind(-1)  # each [2, N]
        column, row, layer = cell.long().unbind(1)
        first = (layer * level + row) * level + column  # CUDA has no product of integer matrices
        return first[:, None] + corner_offsets(level, level, points.device), corner_products(x, y, z)


def _places(keys: Int[Tensor, " n"], count: int) -> Int[Tensor, " m"] | None:
    """The row of each of `count` keys (int32), -1 for those that are not in `keys`; None for more than `DENSE`."""
    if count > DENSE:
        return None
    return torch.full((count,), -1, dtype=torch.int32, device=keys.device).index_copy_(
        0, keys, torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    )
