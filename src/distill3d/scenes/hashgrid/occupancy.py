"""Which cells of a box may hold density, estimated from random points of a field that has no lattice of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill3d.render.volume import Occupancy

Density = Callable[[Tensor], Tensor]
OCTANTS = torch.tensor([[(i >> axis & 1) for axis in range(3)] for i in range(8)], dtype=torch.float32)


class OccupancyGrid(nn.Module):
    """A running maximum of the density in each cell of a box, and which cells count as occupied.

    After Instant-NGP (Mueller et al. 2022, appendix C): at each update the stored maximum is multiplied by `decay`
    and compared with fresh samples, one in each octant of every cell, empty cells included. So a thin wall is found
    sooner or later, and an emptied cell can be filled again.
    """

    max_density: Tensor  # [R, R, R] by (z, y, x)
    bounds: Tensor  # [2, 3]

    def __init__(self, resolution: int, half_size: float, threshold: float, decay: float = 0.95):
        super().__init__()
        self.threshold, self.decay = threshold, decay
        self.register_buffer("max_density", torch.zeros([resolution] * 3))
        self.register_buffer("bounds", half_size * torch.tensor([[-1.0] * 3, [1.0] * 3]))

    def occupancy(self) -> Occupancy:
        """The cells whose maximum exceeds the threshold; all cells if there are none, so that density can grow."""
        cells = self.max_density > self.threshold
        return Occupancy(cells | ~cells.any(), self.bounds)

    @torch.no_grad()
    def update(self, density: Density, generator: torch.Generator | None = None, reset: bool = False) -> None:
        """Samples the density [N] at points [N, 3], by default at the middle of each octant.

        The density is asked in one layer of cells at a time to bound the memory.

        Args:
            density: maps points [N, 3] to densities [N].
            generator: draws the points, uniformly in each octant.
            reset: drops the stored maxima.
        """
        side = len(self.max_density)
        unit = torch.stack([self._points(z, generator) for z in range(side)]).to(self.bounds)
        low, high = self.bounds
        layers = torch.stack([density((low + (high - low) * layer).view(-1, 3)) for layer in unit])
        layers = layers.view(side, side, side, 8).amax(3).to(self.max_density)
        self.max_density.copy_(layers if reset else torch.maximum(self.decay * self.max_density, layers))

    def _points(self, z: int, generator: torch.Generator | None) -> Tensor:
        """The points [R, R, 8, 3] of a layer of cells, of a box [0, 1]^3, on the host."""
        side = self.max_density.shape[0]
        within = torch.full((side, side, 8, 3), 0.5)
        if generator is not None:
            within = torch.rand(within.shape, generator=generator, device=generator.device)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        cell = torch.stack((x, y, torch.full_like(x, z)), -1)[:, :, None].to(within)
        return (cell + 0.5 * (OCTANTS.to(within) + within)) / side
