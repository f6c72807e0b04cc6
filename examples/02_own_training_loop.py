"""SDI in your own training loop: your renderer, your optimizer.

    python examples/02_own_training_loop.py

The "renderer" here is the prior's decoder, which draws one picture from latents; put yours in its place. The loss is a
mean over elements.
"""

import torch

import distill3d as d3d


def main(prior_name: str = "toybox", steps: int = 30) -> list[float]:
    """Optimizes one picture; returns the mean brightness of each step."""
    prior = d3d.load_prior(prior_name)
    prompts = d3d.ViewPrompts("a red mushroom")
    prior.prepare(prompts.texts)  # embeds all texts once and frees the text encoder
    objective, generator = d3d.sdi(), torch.Generator().manual_seed(0)

    latents = torch.zeros(1, *prior.sample_shape, requires_grad=True)  # the parameters of your scene
    optimizer = torch.optim.Adam([latents], lr=0.05)
    brightness = []
    for step in range(steps):
        azimuth, elevation = torch.tensor([0.0]), torch.tensor([15.0])  # of your camera, in degrees
        image = prior.decode(latents)  # your renderer: [B, 3, H, W] in [0, 1], with gradients
        x = prior.encode(image)
        conditioning = prompts.conditioning(azimuth, elevation, prior.embed)
        loss = objective.loss(x, prior, conditioning, step=step, total=steps, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        brightness.append(image.mean().item())
    return brightness


if __name__ == "__main__":
    print(*(f"{value:.3f}" for value in main()))
