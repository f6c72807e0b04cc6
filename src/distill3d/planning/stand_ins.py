"""What plays in the loop of a planned run: a scene that renders gray, and a small prior that only counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.planning.measure import Profile, Stage, profile
from distill3d.render.shading import needs_normals
from distill3d.render.volume import AT_ONCE, Sampling
from distill3d.texels import Texels
from distill3d.types import Cameras, Condition, Lighting, Prior, Rendering, Scene, SceneOptions

MEASURED = 16384  # pixels that the renderer really renders; more are extrapolated
WIDTHS = 64, 96  # pixels a side of the two images of one view that they are extrapolated from
MARCH_BYTES = 64  # of a sample while an accelerator marches through many at once, an upper bound
SMALL = 8  # pixels of an image that is only counted


@dataclass(frozen=True)
class StandInOptions(SceneOptions):
    """The settings of a scene, for its stand-in at so many pixels a side."""

    scene: SceneOptions
    stage: Stage
    size: int
    accelerator: bool  # whether it is to be rendered on one

    def build(self, device: torch.device | str | None = None) -> StandInScene:
        """The stand-in of a new scene."""
        scenes, key = self.stage.known.scenes, repr(self.scene)
        with self.stage.meter.pause():
            if key not in scenes:
                scenes[key] = self.scene.build(device)
        scene: Scene = scenes[key]
        return StandInScene(scene, self.stage, self.size, self.accelerator)


class StandInScene(nn.Module, Scene):
    """Renders gray images at the cost of rendering `scene` at `size` pixels a side."""

    counted: bool = False  # whether it plays in a loop that only counts, without regularizers of the scene

    def __init__(self, scene: Scene, stage: Stage, size: int, accelerator: bool):
        super().__init__()
        assert isinstance(scene, nn.Module)
        self.scene, self.stage, self.size, self.accelerator = scene, stage, size, accelerator
        self.unsupported_penalties, self.export_settings = scene.unsupported_penalties, scene.export_settings

    def build(self, device: torch.device | str | None = None) -> StandInScene:
        """The stand-in itself."""
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the scene."""
        return self.scene.parameter_groups()

    def penalties(self) -> dict[str, Callable[[], Tensor]]:
        """Those of the scene."""
        found = self.scene.penalties()
        return {name: lambda: torch.zeros(()) for name in found} if self.counted else found

    def noise_texels(self, cameras: Cameras, height: int, width: int) -> Texels | None:
        """Those of the scene."""
        return self.scene.noise_texels(cameras, height, width)

    def render(
        self,
        cameras: Cameras,
        size: int,
        background: Tensor,
        *,
        generator: torch.Generator | None = None,
        normals: bool = False,
        lighting: Lighting | None = None,
    ) -> Rendering:
        """Gray images of the size that is asked for, half covered."""
        normals = normals or needs_normals(lighting)
        views, channels = len(cameras), 10 if normals else 6
        behind = background if background.ndim == 4 else background[:, :, None, None]
        gradient = torch.is_grad_enabled()
        with self.stage.meter.pause():
            found = self._profile(cameras, normals, lighting)
            found = replace(found, shapes=torch.empty(views, channels, size, size, device="meta"))
            inputs = [torch.zeros(1, requires_grad=True)] if gradient else []
        out = self.stage.play("renderer", found, inputs)
        with self.stage.meter.within("renderer"):
            opacity, rgb = out[:, 3:4] + 0.5, out[:, :3] + 0.25 + 0.5 * behind
            normal = (out[:, 6:9] + 0.5, out[:, 9:10] + 0.1) if normals else (None, None)
            return Rendering(rgb, opacity, out[:, 4:5] + 1.0, out[:, 5:6] + 0.01, *normal)

    def _profile(self, cameras: Cameras, normals: bool, lighting: Lighting | None) -> Profile:
        """What rendering needs: measured, or extrapolated from one view at two small sizes."""
        pixels = len(cameras) * self.size**2
        if pixels <= MEASURED:
            found = self._measured(cameras, self.size, normals, lighting)
        else:
            small, large = (self._measured(cameras[:1], width, normals, lighting) for width in WIDTHS)
            found = large.scaled(small, (pixels - WIDTHS[1] ** 2) / (WIDTHS[1] ** 2 - WIDTHS[0] ** 2))
        sampling = getattr(getattr(self.scene, "options", None), "sampling", None)
        if self.accelerator and isinstance(sampling, Sampling):
            march = MARCH_BYTES * min(pixels * (sampling.samples + sampling.importance), AT_ONCE)
            found = replace(found, forward=found.forward + march)
        return found

    def _measured(self, cameras: Cameras, size: int, normals: bool, lighting: Lighting | None) -> Profile:
        views, gradient, profiles = len(cameras), torch.is_grad_enabled(), self.stage.known.profiles
        key = ("renderer", repr(getattr(self.scene, "options", "")), views, size, normals, gradient)

        def call() -> Tensor:
            found = self.scene.render(
                cameras,
                size,
                torch.full((views, 3), 0.5),
                generator=torch.Generator().manual_seed(0),
                normals=normals,
                lighting=lighting,
            )
            maps = (getattr(found, one.name) for one in fields(found))
            return torch.cat([x for x in maps if x is not None], 1)

        if key not in profiles:
            profiles[key] = profile(call, gradient)
        return profiles[key]


class CountingPrior(Prior):
    """Small images for a loop that only counts: each call has the cost that it has on the planned prior."""

    def __init__(self, prior: Prior):
        self.prior = prior
        self.name, self.device, self.schedule, self.views = prior.name, prior.device, prior.schedule, prior.views
        self.camera_conditioned, self.camera_guidance = prior.camera_conditioned, prior.camera_guidance
        self.image_size, self.sample_shape = SMALL, (prior.sample_shape[0], SMALL, SMALL)

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, 8, 8] to [B, C, 8, 8]."""
        gradient, size = torch.is_grad_enabled() and images.requires_grad, self.prior.image_size
        full = self.prior.encode(torch.zeros(len(images), 3, size, size, requires_grad=gradient))
        if gradient:
            full.sum().backward()
        return images.mean(1, keepdim=True).expand(-1, self.sample_shape[0], -1, -1)

    def decode(self, x: Tensor) -> Tensor:
        """[B, C, 8, 8] to gray images."""
        self.prior.decode(torch.zeros(len(x), *self.prior.sample_shape))
        return x.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0 + 0.5

    def embed(self, texts: Sequence[str]) -> Condition:
        """As the prior."""
        return self.prior.embed(texts)

    def prepare(self, texts: Sequence[str]) -> None:
        """As the prior."""
        self.prior.prepare(texts)

    def join(self, views: int) -> None:
        """As the prior."""
        self.prior.join(views)
        self.views = views

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Zeros."""
        with torch.no_grad():
            self.prior.predict(torch.zeros(len(x_t), *self.prior.sample_shape), t, condition)
        return torch.zeros_like(x_t)
