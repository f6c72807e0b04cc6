"""Score distillation is DDIM with another noise: the theorem in numbers, on a prior whose score is exact.

    python examples/01_sdi_is_ddim.py

From x = 0, with the noise that the network predicted one step before and the whole target taken, SDI's x is DDIM's
denoised image at every step (docs/theory.md). No network, no download.
"""

import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import Cosine, coefficients, from_eps
from distill3d.objectives import sdi_cached
from distill3d.priors import MixturePrior
from distill3d.types import Conditioning


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded noise in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theorem(steps: int = 25, scale: float = 7.5) -> float:
    """The largest difference between SDI's x and DDIM's denoised images over all steps."""
    prior = MixturePrior(draw(4, 3, 8, 8), 0.4, conditions={"left": [0, 1], "right": [2, 3]}, schedule=Cosine())
    conditioning = Conditioning(prior.embed(["left", "right"]), prior.embed(["", ""]))
    first, times = draw(2, 3, 8, 8, seed=1), torch.linspace(0.98, 0.02, steps, dtype=torch.float64)
    model, denoised = Guided(prior, conditioning, scale), []

    def recording(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        eps = model(x_t, t)
        denoised.append(from_eps("x0", eps, x_t, *coefficients(prior.schedule, t, x_t)))
        return eps

    x_t = prior.schedule.sigma(times[:1]) * first
    ddim.sample(recording, x_t, prior.schedule, torch.cat([times, times.new_zeros(1)]))
    x, difference, objective = torch.zeros_like(first), 0.0, sdi_cached(scale, 0.98, 0.02, first)
    for step in range(steps):
        generator = torch.Generator()
        x = x - objective.guidance(x, prior, conditioning, step=step, total=steps, generator=generator).gradient
        difference = max(difference, (x - denoised[step]).abs().max().item())
    return difference


if __name__ == "__main__":
    print(f"SDI against DDIM, largest difference in 25 steps: {theorem():.2g} (0 up to rounding)")
