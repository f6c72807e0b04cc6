"""What the diffusers families share: a frozen network behind the Prior protocol, float32 in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.diffusion.schedule import Kind, coefficients, to_eps
from distill3d.priors.components.autoencoder import Codec
from distill3d.priors.components.folder import freeze
from distill3d.priors.components.text_cache import Texts
from distill3d.types import Condition, Prior, Schedule

PREDICTION_KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class Where:
    """On which device and in which precision the denoising network computes."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    offload: bool = False  # it stays in main memory, and its layers visit the device

    @property
    def home(self) -> torch.device:
        """Where the denoising network lies between its calls."""
        return torch.device("cpu") if self.offload else self.device


class FrozenPrior(Prior):
    """A model of diffusers as a prior. Each family is a subclass with one method, `ask`: the network's own call."""

    def __init__(
        self, network: Any, codec: Codec, texts: Texts, schedule: Schedule, kind: Kind, size: int,
        where: Where | None = None, name: str = "prior",
    ):  # fmt: skip
        """Freezes the network in place. kind says what it predicts, size is that of x (not of the pictures)."""
        where = where or Where()
        self.name, self.device, self.dtype, self.offload = name, where.device, where.dtype, where.offload
        self.network = freeze(network, where.home, where.dtype).to(memory_format=torch.channels_last)
        self.codec, self.texts = codec, texts
        self.schedule: Schedule = schedule
        self.kind: Kind = kind
        self.sample_shape = (codec.channels, size, size)
        self.image_size = size * codec.factor

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, 3, image_size, image_size] in [0, 1] to x [B, *sample_shape]; differentiable.

        The mean of the posterior, or a draw from it if a generator is given. Raises ValueError for images of
        another shape.
        """
        wanted = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(f"{self.name} encodes images [B, {', '.join(map(str, wanted))}], "
                             f"got {list(images.shape)}: resize them first")  # fmt: skip
        return self.codec.encode(images, generator)

    def decode(self, x: Tensor) -> Tensor:
        """x [B, *sample_shape] to images [B, 3, image_size, image_size] in [0, 1]."""
        return self.codec.decode(x)

    def embed(self, texts: Sequence[str]) -> Condition:
        """One row per text; each text is encoded once in the life of the prior."""
        return self.texts.embed(texts)

    def prepare(self, texts: Sequence[str]) -> None:
        """Embeds all texts of a run, then frees the text encoders; another text would load them again."""
        self.embed(texts)
        self.texts.drop()

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Noise eps [N, *sample_shape] in x_t's dtype: one network call for x_t, t [N] and N rows of text."""
        out = self.ask(x_t.to(self.dtype), t, condition.to(self.dtype))
        alpha, sigma = coefficients(self.schedule, t, x_t)
        return to_eps(self.kind, out.to(x_t.dtype), x_t, alpha, sigma).contiguous()

    def ask(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network says at x_t [N, ...] and text in its own precision, t [N] as it came; in its kind."""
        raise NotImplementedError

    def modules(self) -> dict[str, nn.Module]:
        """The networks in memory by part: denoiser, autoencoder, text encoders as far as they are loaded."""
        return {"network": self.network, **self.codec.modules(), **self.texts.modules()}


def prediction_kind(config: dict[str, Any]) -> Kind:
    """What a network trained with this scheduler configuration predicts; ValueError if that is not supported."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_KINDS:
        allowed = ", ".join(PREDICTION_KINDS)
        raise ValueError(f"prediction_type {kind!r} is not supported: it must be {allowed}")
    return PREDICTION_KINDS[kind]
