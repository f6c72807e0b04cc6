"""Frozen 2D diffusion models behind one protocol: encode, decode, embed, predict."""

from distill3d.priors.loading import load_prior
from distill3d.priors.mixture import MixturePrior
from distill3d.priors.stable_diffusion import LatentPrior

__all__ = ["LatentPrior", "MixturePrior", "load_prior"]
