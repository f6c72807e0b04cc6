"""A prior in front of another one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill3d.types import Condition, Prior


class WrappedPrior(Prior):
    """Behaves as the prior behind it; a subclass changes some of that."""

    def __init__(self, prior: Prior):
        self.prior = prior
        self.name, self.image_size, self.device = prior.name, prior.image_size, prior.device
        self.schedule, self.sample_shape, self.views = prior.schedule, prior.sample_shape, prior.views
        self.camera_conditioned, self.camera_guidance = prior.camera_conditioned, prior.camera_guidance
        self.control = prior.control

    def encode(self, images: Tensor) -> Tensor:
        """As the prior."""
        return self.prior.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        """As the prior."""
        return self.prior.decode(x)

    def embed(self, texts: Sequence[str]) -> Condition:
        """As the prior."""
        return self.prior.embed(texts)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As the prior."""
        return self.prior.predict(x_t, t, condition)

    def join(self, views: int) -> None:
        """As the prior."""
        self.prior.join(views)
        self.views = views

    def matte(self, images: Tensor) -> Tensor | None:
        """As the prior."""
        return self.prior.matte(images)

    def prepare(self, texts: Sequence[str]) -> None:
        """As the prior."""
        self.prior.prepare(texts)
