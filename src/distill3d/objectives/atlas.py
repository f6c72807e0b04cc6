"""Noise that stays where it is in 3D: an atlas of texels, of which each view shows some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar, get_args

import torch
from torch import Tensor

from distill3d.diffusion import random as draw
from distill3d.objectives.noise import Cached, Constant
from distill3d.objectives.objective import NoiseFrame, Prediction, Query, check_fraction
from distill3d.texels import Texels


class Atlas:
    """kappa(q) = sum of the texels that pixel q shows / sqrt(their number n); a fixed noise of the pixel where n = 0.

    Texels are N(0, I) vectors of as many channels as x. As a view shows a texel once at most, its kappa is white and
    of unit variance, and that of two pixels in two views correlates by |common texels| / sqrt(n n') (Yan et al. 2025,
    consistent flow distillation). What the texels are is `Query.texels`: places on the object, or pixels.

    An instance belongs to one run: its `noise` goes into an Objective, and it is the state of that. Everything is drawn
    at the first step.

    Args:
        refresh: the share of fresh variance at each step after the first,
            atlas <- sqrt(1 - refresh) atlas + sqrt(refresh) N(0, I); in [0, 1].
        eta: of the noise that `remember` writes; in [0, 1].
    """

    def __init__(self, refresh: float = 0.0, eta: float = 0.0):
        check_fraction("refresh", refresh)
        check_fraction("eta", eta)
        self.refresh, self.eta = refresh, eta
        self.state: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """The texels [N, C] and the background [C, H, W], for a checkpoint; empty before the first step."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.state = dict(state)

    def noise(self, query: Query) -> tuple[Tensor, int]:
        """The kappa of the views; nothing is evaluated. Raises ValueError without the texels of the views."""
        if query.texels is None:
            raise ValueError(
                "this noise is fixed in 3D and needs the texels of the views; for images set noise='image'"
            )
        owner = query.generator if isinstance(query.generator, torch.Generator) else query.generator[0]
        if not self.state:
            atlas = draw.normal(query.x.new_empty(query.texels.count, query.x.shape[1]), owner)
            self.state = {"atlas": atlas, "background": draw.normal(query.x[0], owner)}
        elif self.refresh:
            fresh = draw.normal(self.state["atlas"], owner)
            self.state["atlas"] = math.sqrt(1 - self.refresh) * self.state["atlas"] + math.sqrt(self.refresh) * fresh
        return self._read(query.x, query.texels)[0], 0

    def remember(self, prediction: Prediction) -> Prediction:
        """The same prediction; its result eps is written into the texels of the views.

        Each texel of q is moved by (eps(q) - kappa(q)) / sqrt(n), so the view then shows eps, other views what they
        share with it, and the differences between the texels of a pixel stay. The views of a batch are written one
        after the other. With eta = 0 the noise is eps exactly. Predictions are not quite N(0, I), and over many
        views the atlas would not be either; with eta > 0 it is sqrt(1 - eta^2) eps / rms + eta N(0, I), rms the root
        mean square of eps over the pixels of the view that show a texel.
        """

        def remembered(query: Query, x_t: Tensor) -> tuple[Tensor, int]:
            eps, nfe = prediction(query, x_t)
            fresh = draw.normal(eps, query.generator) if self.eta else None
            assert query.texels is not None, "noise comes first"
            for view in range(len(eps)):
                rows = slice(view, view + 1)
                self._write(
                    query.texels.of_view(view, eps[0, 0].numel()), eps[rows], None if fresh is None else fresh[rows]
                )
            return eps, nfe

        return remembered

    def _read(self, like: Tensor, texels: Texels) -> tuple[Tensor, Tensor]:
        """kappa [B, C, H, W], like `like`, and the number of texels of each pixel [B, 1, H, W]."""
        assert len(self.state["atlas"]) == texels.count, "texels of another atlas"
        atlas, background = (self.state[name].to(like) for name in ("atlas", "background"))
        batch, channels, height, width = like.shape
        # bincount would wait for its largest entry.
        count = like.new_zeros(batch * height * width).index_add_(0, texels.pixel, like.new_ones(len(texels.pixel)))
        total = atlas.new_zeros(len(count), channels).index_add_(0, texels.pixel, atlas[texels.texel])
        kappa = (total / count.clamp_min(1).sqrt()[:, None]).view(batch, height, width, channels).permute(0, 3, 1, 2)
        count = count.view(batch, 1, height, width)
        return torch.where(count > 0, kappa, background), count

    def _write(self, texels: Texels, eps: Tensor, fresh: Tensor | None) -> None:
        """Writes eps, or its mix with fresh noise, of one view [1, C, H, W]."""
        kappa, count = self._read(eps, texels)
        if fresh is not None:
            rms = eps.movedim(1, 3)[count[:, 0] > 0].square().mean().sqrt()
            eps = math.sqrt(1 - self.eta**2) * eps / rms + self.eta * fresh
        change = ((eps - kappa) / count.clamp_min(1).sqrt())[0].flatten(1).T
        self.state["atlas"] = self.state["atlas"].to(eps).index_add(0, texels.texel, change[texels.pixel])


Memory = TypeVar("Memory", Constant, Cached)


def memory_of(noise: NoiseFrame, images: Memory, atlas: Atlas) -> Memory | Atlas:
    """What keeps kappa: `images` in 2D, `atlas` in 3D. Raises ValueError for settings that do not go together."""
    if noise not in get_args(NoiseFrame):
        raise ValueError(f"unknown noise {noise!r}: choose {', '.join(get_args(NoiseFrame))}")
    if noise == "image" and (atlas.refresh or atlas.eta):
        raise ValueError("refresh and eta are for noise in 3D: set noise='surface' too, or leave them at 0")
    if noise != "image" and images.kappa is not None:
        raise ValueError(f"first is for images: with noise={noise!r} the atlas is drawn")
    return images if noise == "image" else atlas
