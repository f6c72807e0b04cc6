"""SDI in your own training loop: your renderer, your optimizer.

    python examples/02_own_training_loop.py

The "renderer" here is an image that is optimized directly; put yours in its place. The loss is a mean over elements.
"""

import torch

import distill3d as d3d


def main(prior_name: str = "toybox", steps: int = 30) -> list[float]:
    """Optimizes one image; returns the mean brightness of each step."""
    prior = d3d.load_prior(prior_name)
    prompts = d3d.ViewPrompts("a red mushroom")
    prior.prepare(prompts.texts)  # embeds all texts once and frees the text encoder
    objective, generator = d3d.sdi(), torch.Generator().manual_seed(0)

    image = torch.full((1, 3, prior.image_size, prior.image_size), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([image], lr=0.05)
    brightness = []
    for step in range(steps):
        azimuth, elevation = torch.tensor([0.0]), torch.tensor([15.0])  # of your camera, in degrees
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
