"""Values on a surface without a UV map: lattices of several widths, of which only the points near the surface exist.

A value is the sum over the levels of a trilinear interpolation. Nothing knows of seams, so none can show; what no
picture has seen takes the coarse levels' value, which its surroundings have learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill3d.render.interpolate import weighted_rows

PART = 1 << 20  # points that are worked on at once
Rows = tuple[Tensor, Tensor]
"""Of each of N points, the 8 lattice points around it and their weights: both [N, 8]."""


class Shell(nn.Module):
    """C values at points near a surface in [-half_size, half_size]^3, 0 at first.

    The state holds one table [N, C] a level; which lattice points its rows are follows from the surface.
    """

    def __init__(self, points: Tensor, levels: Sequence[int], channels: int = 3, half_size: float = 1.0):
        """`points` [N, 3] must lie closer together on the surface than the cells of the finest level are wide.

        Raises:
            ValueError: for no level, or one with fewer than 2 or more than 4096 lattice points a side.
        """
        super().__init__()
        if not levels or min(levels) < 2 or max(levels) > 4096:
            raise ValueError(f"levels are lattice points a side, 2 to 4096 each, got {tuple(levels)}")
        self.levels, self.half_size = tuple(levels), half_size
        self.tables = nn.ParameterList()
        for i, level in enumerate(self.levels):
            keys = torch.cat([self._keys(part, level)[0].unique() for part in points.split(PART)]).unique()
            self.register_buffer(f"keys{i}", keys, persistent=False)
            self.tables.append(nn.Parameter(points.new_zeros(len(keys), channels)))

    def forward(self, points: Tensor) -> Tensor:
        """Values [N, C] at points [N, 3] on the surface; derivatives are in the tables only."""
        return self.mix(self.rows(points))

    def mix(self, rows: Sequence[Rows]) -> Tensor:
        """Values [N, C] at the points that `rows` was asked for."""
        parts = [weighted_rows(table, *row) for table, row in zip(self.tables, rows, strict=True)]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def rows(self, points: Tensor) -> list[Rows]:
        """Rows and weights in each level's table; where a corner of a cell is not there the others share its weight."""
        return [self._rows(i, points) for i in range(len(self.levels))]

    def _rows(self, i: int, points: Tensor) -> Rows:
        keys, weights = self._keys(points, self.levels[i])
        index, there = self._find(i, keys)
        weights = weights * there
        return index, weights / weights.sum(1, keepdim=True).clamp_min(1e-6)

    @torch.no_grad()
    def fit(self, points: Tensor, values: Tensor, rounds: int = 4) -> None:
        """Sets the tables so that the values at `points` [N, 3] are close to `values` [N, C], the coarse levels first.

        Each level takes the weighted mean of what is left around each lattice point. Memory is bounded by the rows of
        one level and by `PART` points at once.
        """
        left = values.clone()
        parts = [slice(first, first + PART) for first in range(0, len(points), PART)]
        for i, table in enumerate(self.tables):
            table.zero_()
            rows = [self._rows(i, points[part]) for part in parts]
            total = torch.zeros_like(table[:, :1])
            for index, weights in rows:
                total.index_add_(0, index.reshape(-1), weights.reshape(-1, 1))
            for _ in range(rounds):
                change = torch.zeros_like(table)
                for part, (index, weights) in zip(parts, rows, strict=True):
                    pull = (weights[..., None] * left[part, None]).reshape(-1, values.shape[1])
                    change.index_add_(0, index.reshape(-1), pull)
                change /= total.clamp_min(1e-6)
                table += change
                for part, row in zip(parts, rows, strict=True):
                    left[part] -= weighted_rows(change, *row)

    def roughness(self) -> Tensor:
        """Mean squared difference of neighboring lattice points, summed over levels and axes: a scalar."""
        total = self.tables[0].new_zeros(())
        for i, (table, level) in enumerate(zip(self.tables, self.levels, strict=True)):
            keys = getattr(self, f"keys{i}")
            for stride in (1, level, level * level):
                index, there = self._find(i, keys + stride)
                there &= keys.div(stride, rounding_mode="floor") % level < level - 1  # the last of a row has none
                total = total + (table[index[there]] - table[there]).square().sum() / max(1, table.numel())
        return total

    def _find(self, i: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        known = getattr(self, f"keys{i}")
        index = torch.searchsorted(known, keys).clamp_max(len(known) - 1)
        return index, known[index] == keys

    def _keys(self, points: Tensor, level: int) -> Rows:
        """Keys ((z R) + y) R + x and weights [N, 8] of the corners of the cells that points lie in."""
        at = ((points / self.half_size).clamp(-1, 1) + 1) * (0.5 * (level - 1))
        cell = at.floor().clamp_max(level - 2)
        share = at - cell
        x, y, z = torch.stack((1 - share, share)).unbind(-1)  # each [2, N]
        weights = (z[:, None, None] * y[:, None]) * x  # [2, 2, 2, N]
        column, row, layer = cell.long().unbind(1)
        first = (layer * level + row) * level + column  # CUDA has no product of integer matrices
        step = torch.arange(2, device=points.device)
        offsets = step[:, None, None] * level * level + step[:, None] * level + step
        return first[:, None] + offsets.reshape(-1), weights.reshape(8, -1).T.contiguous()
