"""Which cells of a box may hold density, learned by looking at random points of a field that has no lattice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill3d.render.volume import Occupancy

Density = Callable[[Tensor], Tensor]
OCTANTS = torch.tensor([[(i >> axis & 1) for axis in range(3)] for i in range(8)], dtype=torch.float32)


class OccupancyGrid(nn.Module):
    """The highest density seen in each cell of a box, fading, and which cells count as occupied.

    After Instant-NGP (Mueller et al. 2022, appendix C): what was seen is multiplied by `decay` before each look, and
    the greater of it and of what is seen now is kept. Every look is at fresh points, one in each octant of every
    cell, empty ones too, so that a thin wall is found sooner or later and an emptied cell comes back.
    """

    held: Tensor  # [R, R, R] by (z, y, x)
    bounds: Tensor  # [2, 3]

    def __init__(self, resolution: int, half_size: float, threshold: float, decay: float = 0.95):
        super().__init__()
        self.threshold, self.decay = threshold, decay
        self.register_buffer("held", torch.zeros([resolution] * 3))
        self.register_buffer("bounds", half_size * torch.tensor([[-1.0] * 3, [1.0] * 3]))

    def occupancy(self) -> Occupancy:
        """The cells in which density above the threshold was seen; all, if there is none, so that it may come."""
        cells = self.held > self.threshold
        return Occupancy(cells | ~cells.any(), self.bounds)

    @torch.no_grad()
    def look(self, density: Density, generator: torch.Generator | None = None, forget: bool = False) -> None:
        """Looks at the density [N] at points [N, 3]; without a generator in the middle of each octant.

        `forget` drops all that was seen before. Cells are looked at a layer at a time, to bound the memory.
        """
        layers = torch.stack([self._layer(density, z, generator) for z in range(len(self.held))])
        self.held.copy_(layers if forget else torch.maximum(self.decay * self.held, layers))

    def _layer(self, density: Density, z: int, generator: torch.Generator | None) -> Tensor:
        """The highest density [R, R] that is seen in a layer of cells."""
        side = self.held.shape[0]
        within = torch.full((side, side, 8, 3), 0.5)
        if generator is not None:
            within = torch.rand(within.shape, generator=generator, device=generator.device)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        cell = torch.stack((x, y, torch.full_like(x, z)), -1)[:, :, None].to(within)
        share = (cell + 0.5 * (OCTANTS.to(within) + within)) / side
        low, high = self.bounds
        points = low + (high - low) * share.to(low)
        return density(points.view(-1, 3)).view(side, side, 8).amax(2).to(self.held)
