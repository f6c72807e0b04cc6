"""One constant noise and the right step size: score distillation that is the DDIM sampler, with no inversion.

    python examples/09_constant_noise.py

Prints the distance of CFD's image to DDIM's, relative to its norm, for some scales and numbers of steps, and the same
with whole steps instead of CFD's (docs/theory.md). The score of the prior is exact. No network, no download.
"""

import dataclasses

import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import coefficients, from_eps, stable_diffusion
from distill3d.objectives import cfd
from distill3d.priors import MixturePrior
from distill3d.types import Conditioning


def differences(scale: float = 7.5, steps: int = 25) -> tuple[float, float]:
    """CFD against DDIM, and the same noise with whole steps against DDIM."""
    generator = torch.Generator().manual_seed(0)
    means, kappa = (torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) for n in (4, 2))
    prior = MixturePrior(means, 0.4, conditions={"left": [0, 1], "right": [2, 3]}, schedule=stable_diffusion())
    conditioning = Conditioning(prior.embed(["left", "right"]), prior.embed(["", ""]))
    times, model = torch.linspace(0.98, 0.02, steps, dtype=torch.float64), Guided(prior, conditioning, scale)

    x_t = ddim.sample(model, prior.schedule.sigma(times[:1]) * kappa, prior.schedule, times)
    t = times[-1:].expand(2)
    image = from_eps("x0", model(x_t, t), x_t, *coefficients(prior.schedule, t, x_t))
    found = []
    for objective in (cfd(scale, first=kappa), dataclasses.replace(cfd(scale, first=kappa), step_size=None)):
        x = torch.zeros_like(kappa)
        for step in range(steps):
            x = x - objective.guidance(x, prior, conditioning, step=step, total=steps, generator=generator).gradient
        found.append(((x - image).norm() / image.norm()).item())
    return found[0], found[1]


if __name__ == "__main__":
    for scale, steps in ((0.0, 10), (1.0, 25), (7.5, 50)):
        print("scale {}, {} steps: CFD {:.1e}, whole steps {:.1e}".format(scale, steps, *differences(scale, steps)))
