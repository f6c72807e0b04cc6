"""Every way to find the noise, and SDS, on one Gaussian N(m, std^2), where all of it can be written down.

    python examples/08_closed_forms.py

Prints what the theory says beside what the library computes (docs/theory.md).
"""

from dataclasses import replace

import torch

from distill3d.diffusion.schedule import Cosine, coefficients
from distill3d.objectives import Query, kappa_residual, noise, sds, timesteps
from distill3d.priors import MixturePrior
from distill3d.types import Conditioning


def rows(std: float = 0.5, level: float = 0.6, n: int = 50_000) -> list[tuple[str, float, float]]:
    """(what, expected, computed)."""
    x, mean = torch.tensor([[-0.8]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    prior, t = MixturePrior(mean, std, schedule=Cosine()), torch.tensor([level], dtype=torch.float64)
    conditioning = Conditioning(prior.embed([""]), prior.embed([""]))
    alpha, sigma = (c.item() for c in coefficients(prior.schedule, t, x))
    rho, offset = sigma / alpha, (x - mean).item()
    query = Query(x, t, prior, conditioning, torch.Generator().manual_seed(3), 0, 1)

    solved, inverted = (
        find(query)[0] for find in (noise.fixed_point(5, 1.0, memory=1),
                                    noise.ddim_inversion(1000, 1.0, 0.0, "heun", 0.0))
    )  # fmt: skip
    residuals = [kappa_residual(kappa, x, t, prior, conditioning, 1.0)[0].item() for kappa in (solved, inverted)]
    exact = ((1 + rho**2 / std**2) ** 0.5 - 1) / rho * offset
    many = Conditioning(prior.embed([""] * n), prior.embed([""] * n))
    generator = torch.Generator().manual_seed(4)
    objective = replace(sds(1.0), timesteps=timesteps.listed(t))
    g = objective.guidance(x.expand(n, 1), prior, many, step=0, total=1, generator=generator).gradient
    return [
        ("kappa of equation 8: rho / std^2 (x - m)", rho / std**2 * offset, solved.item()),
        ("its residual", 0.0, residuals[0]),
        ("exact inversion: (sqrt(1 + rho^2 / std^2) - 1) / rho (x - m)", exact, inverted.item()),
        ("its residual: not zero", (std**2 / (std**2 + rho**2) * (exact - rho / std**2 * offset)) ** 2, residuals[1]),
        ("SDS: mean gradient", sigma**3 * alpha / (alpha**2 * std**2 + sigma**2) * offset, g.mean().item()),
        ("SDS: standard deviation", sigma**2 * (1 - sigma**2 / (alpha**2 * std**2 + sigma**2)), g.std().item()),
    ]


if __name__ == "__main__":
    for what, expected, computed in rows():
        print(f"{what:<62} {expected:12.6g} {computed:12.6g}")
