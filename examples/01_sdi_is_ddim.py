"""Score distillation is DDIM with another noise: the theorem in numbers, on a prior whose score is exact.

    python examples/01_sdi_is_ddim.py

Prints what the theory says beside what the library computes; docs/theory.md has the equations. No network, no
download, a few seconds on one core.
"""

from dataclasses import replace

import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import Cosine, coefficients, from_eps
from distill3d.objectives import Query, kappa_residual, noise, sdi_cached, sds, timesteps
from distill3d.priors import MixturePrior
from distill3d.types import Conditioning


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded noise in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def show(what: str, expected: float, computed: float) -> None:
    """One line of the table."""
    print(f"{what:<62} {expected:12.6g} {computed:12.6g}")


def theorem(steps: int = 25, scale: float = 7.5) -> None:
    """From x = 0, kappa cached and the target taken whole: SDI's x is DDIM's denoised image, step by step."""
    prior = MixturePrior(draw(4, 3, 8, 8), 0.4, conditions={"left": [0, 1], "right": [2, 3]}, schedule=Cosine())
    conditioning = Conditioning(prior.embed(["left", "right"]), prior.embed(["", ""]))
    first, times = draw(2, 3, 8, 8, seed=1), torch.linspace(0.98, 0.02, steps, dtype=torch.float64)
    model, denoised = Guided(prior, conditioning, scale), []

    def watched(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        eps = model(x_t, t)
        denoised.append(from_eps("x0", eps, x_t, *coefficients(prior.schedule, t, x_t)))
        return eps

    sigma = prior.schedule.sigma(times[:1])
    ddim.sample(watched, sigma * first, prior.schedule, torch.cat([times, times.new_zeros(1)]))
    x, furthest = torch.zeros_like(first), 0.0
    objective = sdi_cached(scale, 0.98, 0.02, first)
    for step in range(steps):
        x = x - objective.guidance(x, prior, conditioning, step=step, total=steps, generator=torch.Generator()).gradient
        furthest = max(furthest, (x - denoised[step]).abs().max().item())
    show(f"theorem: SDI against DDIM, largest difference in {steps} steps", 0.0, furthest)
    show("         both end at the same pixel, for instance", denoised[-1][0, 0, 0, 0].item(), x[0, 0, 0, 0].item())


def closed_forms(std: float = 0.5, level: float = 0.6) -> None:
    """One Gaussian N(m, std^2): everything that score distillation does to it can be written down."""
    prior = MixturePrior(draw(1, 1), std, schedule=Cosine())
    n, x = 50_000, draw(1, 1, seed=2)
    t = torch.tensor([level], dtype=torch.float64)
    conditioning = Conditioning(prior.embed([""]), prior.embed([""]))
    alpha, sigma = (c.item() for c in coefficients(prior.schedule, t, x))
    rho, offset = sigma / alpha, (x - prior.means).item()
    query = Query(x, t, prior, conditioning, torch.Generator().manual_seed(3), 0, 1)

    solved, _ = noise.fixed_point(5, 1.0, memory=1, overshoot=0.0)(query)
    show("kappa of eq. 8: rho / std^2 (x - m)", rho / std**2 * offset, solved.item())
    show("its residual", 0.0, kappa_residual(solved, x, t, prior, conditioning, 1.0)[0].item())
    inverted, _ = noise.ddim_inversion(1000, 1.0, 0.0, "heun", 0.0)(query)
    exact = ((1 + rho**2 / std**2) ** 0.5 - 1) / rho * offset
    show("exact inversion: (sqrt(1 + rho^2 / std^2) - 1) / rho (x - m)", exact, inverted.item())
    residual = (std**2 / (std**2 + rho**2) * (exact - rho / std**2 * offset)) ** 2
    show("its residual: not zero", residual, kappa_residual(inverted, x, t, prior, conditioning, 1.0)[0].item())

    many = Conditioning(prior.embed([""] * n), prior.embed([""] * n))
    objective = replace(sds(1.0), timesteps=timesteps.listed(t))
    out = objective.guidance(x.expand(n, 1), prior, many, step=0, total=1, generator=torch.Generator().manual_seed(4))
    mean = sigma**3 * alpha / (alpha**2 * std**2 + sigma**2) * offset
    show(f"SDS: mean gradient over {n} draws of the noise", mean, out.gradient.mean().item())
    spread = sigma**2 * (1 - sigma**2 / (alpha**2 * std**2 + sigma**2))
    show("SDS: standard deviation of one draw, which inversion has not", spread, out.gradient.std().item())


if __name__ == "__main__":
    print(f"{'':<62} {'expected':>12} {'computed':>12}")
    theorem()
    closed_forms()
