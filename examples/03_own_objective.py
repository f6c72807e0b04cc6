"""Your own objective: Delta Denoising Score (Hertz et al. 2023), then a whole run with it.

    python examples/03_own_objective.py

An objective is five functions. Here the reference is new: the prediction for a source image and its prompt.
"""

import dataclasses

import torch

import distill3d as d3d
from distill3d.diffusion.guidance import guided_prediction
from distill3d.diffusion.schedule import coefficients
from distill3d.objectives import Query, noise, prediction, timesteps, weighting


def dds(source: torch.Tensor, source_conditioning: d3d.Conditioning, scale: float = 7.5) -> d3d.Objective:
    """g = sigma_t^2 (eps_s(x_t, prompt) - eps_s(source_t, source prompt)), both with the same noise."""

    def reference(query: Query, x_t: torch.Tensor, kappa: torch.Tensor) -> tuple[torch.Tensor, int]:
        alpha, sigma = coefficients(query.prior.schedule, query.t, query.x)
        noised = alpha * source.expand_as(x_t) + sigma * kappa
        return guided_prediction(query.prior, noised, query.t, source_conditioning, scale)

    return d3d.Objective(
        noise.gaussian(), timesteps.uniform(), prediction.guided(scale), reference, weighting.noise_variance
    )


def main(recipe: d3d.Recipe = d3d.RECIPES["distill"], out: str = "runs") -> d3d.Result:
    """Makes a 3D object with DDS, from the mean image of the source prompt."""
    prior = d3d.load_prior("toybox")
    sources = d3d.Conditioning(prior.embed(["a green mushroom"] * recipe.views), prior.embed([""] * recipe.views))
    objective = dds(torch.zeros(1, *prior.sample_shape), sources)
    recipe = dataclasses.replace(recipe, objective=objective)
    return d3d.generate(d3d.Config("a red mushroom", recipe), out, prior=prior)


if __name__ == "__main__":
    print(main().folder)
