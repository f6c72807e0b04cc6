"""The critic: does an image look like a toy of this world? It was trained on failed objects too, and can say no."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

BUNDLED = Path(__file__).parents[1] / "assets" / "toybox" / "evaluator_critic"


class ToyCritic:
    """A classifier of true renders and failed objects, trained by `python -m distill3d.toybox.train critic`.

    Images are [B, 3, H, W] in [0, 1] of one toy each on a plain gray background between 0.5 and 1.
    """

    def __init__(self, folder: str | Path = BUNDLED, device: torch.device | str = "cpu"):
        """Loads the weights of a folder, by default the bundled ones.

        Raises:
            ValueError: if the folder holds no critic.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from distill3d.toybox.critic import FILE, SIZE, CriticNetwork

        folder, network = Path(folder), CriticNetwork()
        self.size, self.device = SIZE, torch.device(device)
        try:
            network.load_state_dict(load_file(folder / FILE))
            self.threshold: float = json.loads((folder / "config.json").read_text())["threshold"]
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"{folder} holds no critic: {str(error).splitlines()[0]}") from error
        self.network = network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """How much each image looks like a toy, in [0, 1]; one half is the calibrated threshold."""
        images = images.to(self.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return torch.sigmoid(self.network(images.clamp(0, 1)) - self.threshold).cpu()

    def accepts(self, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, " b"]:
        """Which images are accepted: those whose score is at least one half."""
        return self.score(images) >= 0.5


@lru_cache(maxsize=1)
def _bundled() -> ToyCritic:
    return ToyCritic()


def toy_rate(images: Float[Tensor, "v 3 h w"]) -> float:
    """Fraction of the views that the bundled critic takes for a toy of the toy world, in [0, 1]."""
    return float(_bundled().accepts(images).float().mean())
