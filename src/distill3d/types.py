"""What travels between the stages: frozen dataclasses and protocols, no computation.

Shapes use B for views (or samples), N for network rows, H and W for pixels, L and C for tokens and
channels of a text embedding. Images are floats in [0, 1], [B, 3, H, W]; latents are in the unit in which
the noise schedule is defined; time t lies in [0, 1] with 1 pure noise, one value per sample.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rays:
    """Camera rays in world space: origins and unit directions [B, H, W, 3]."""

    origins: Tensor
    directions: Tensor


@dataclass(frozen=True)
class Cameras:
    """A batch of B pinhole cameras with square pixels and the principal point in the middle.

    The three spherical coordinates are what the prompts are told; a jittered camera keeps those it had before
    the jitter.
    """

    camera_to_world: Tensor  # [B, 4, 4]
    fov_y: Tensor  # [B] radians, the full vertical angle
    azimuth: Tensor  # [B] degrees
    elevation: Tensor  # [B] degrees
    distance: Tensor  # [B] world units from the point looked at

    def __len__(self) -> int:
        return self.fov_y.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Cameras:
        """Some of the views, by slice, index tensor or mask."""
        return Cameras(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str) -> Cameras:
        """The same cameras on another device."""
        return Cameras(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Lighting:
    """How surfaces are shaded in B views: the bare color ("albedo"), lit by a point light ("lambertian"), or lit
    and white ("textureless"). The light falls as ambient + diffuse max(0, n.l)."""

    mode: Literal["albedo", "textureless", "lambertian"]
    position: Tensor  # [B, 3] of the light, world units
    ambient: float = 0.1
    diffuse: float = 0.9


@dataclass(frozen=True)
class Rendering:
    """Pictures of a scene. rgb is already composited over the background."""

    rgb: Tensor  # [B, 3, H, W] in [0, 1]
    opacity: Tensor  # [B, 1, H, W] in [0, 1]
    depth: Tensor  # [B, 1, H, W] expected ray length, world units (0 where nothing is hit)
    depth_variance: Tensor  # [B, 1, H, W] variance of the ray length under the weights
    normal: Tensor | None = None  # [B, 3, H, W] world space, times the opacity as colors are
    orientation: Tensor | None = None  # [B, 1, H, W] sum of sg(w) max(0, n.d)^2 along the ray


@dataclass(frozen=True)
class Condition:
    """What each of N network rows is conditioned on.

    hidden [N, L, C] are the text encoder's token features and pooled [N, P] its features of the whole text (only
    some model families have them). control [N, 3, H, W] in [0, 1] is the image for a ControlNet, camera [N, 4, 4]
    the camera-to-world matrix of the view; a prior that has no use for them ignores them.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    control: Tensor | None = None
    camera: Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """Selects rows by slice, index tensor or boolean mask."""
        return self._each(lambda x: x[rows])

    def to(self, dtype: torch.dtype) -> Condition:
        """Converts everything but the camera, which stays as precise as it is."""
        return replace(self._each(lambda x: x.to(dtype)), camera=self.camera)

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenates along the rows; all parts must come from one prior.

        A text with fewer tokens is repeated until it is as long as the others: attention over n copies of a text
        equals attention over the text.
        """
        length = math.lcm(*(p.hidden.shape[1] for p in parts))
        hidden = [p.hidden.repeat(1, length // p.hidden.shape[1], 1) for p in parts]
        others = zip(*((p.pooled, p.control, p.camera) for p in parts), strict=True)
        return Condition(torch.cat(hidden), *map(_cat, others))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        others = (None if x is None else change(x) for x in (self.pooled, self.control, self.camera))
        return Condition(change(self.hidden), *others)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [p for p in parts if p is not None]
    assert len(given) in (0, len(parts)), "conditions of different priors"
    return torch.cat(given) if given else None


@dataclass(frozen=True)
class Conditioning:
    """The conditions of B views (or images): the prompt, the negative prompt and, for Perp-Neg, more negatives.

    Perp-Neg (Armandpour et al. 2023) has K negative directions for each view: `perp` has B*K rows ordered by view,
    and `perp_weights` [B, K] holds their (negative) weights.
    """

    positive: Condition  # B rows
    negative: Condition  # B rows: the empty (or the user's negative) prompt
    perp: Condition | None = None
    perp_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, rows: Tensor) -> Conditioning:
        """Selects views by an index tensor or a boolean mask [B]."""
        perp = weights = None
        if self.perp is not None and self.perp_weights is not None:
            b, k = self.perp_weights.shape
            index = torch.arange(b * k, device=self.perp_weights.device).view(b, k)[rows]
            perp, weights = self.perp[index.reshape(-1)], self.perp_weights[rows]
        return Conditioning(self.positive[rows], self.negative[rows], perp, weights)

    def with_control(self, images: Tensor) -> Conditioning:
        """The same conditioning with an image for a ControlNet per view: images [B, 3, H, W] in [0, 1]."""
        return self._with(lambda condition, k: replace(condition, control=images.repeat_interleave(k, 0)))

    def with_camera(self, camera_to_world: Tensor) -> Conditioning:
        """The same conditioning with a camera per view: camera_to_world [B, 4, 4]."""
        return self._with(lambda condition, k: replace(condition, camera=camera_to_world.repeat_interleave(k, 0)))

    def _with(self, change: Callable[[Condition, int], Condition]) -> Conditioning:
        """Applies change(condition, rows per view) to all conditions."""
        perp = self.perp
        if perp is not None and self.perp_weights is not None:
            perp = change(perp, self.perp_weights.shape[1])
        return Conditioning(change(self.positive, 1), change(self.negative, 1), perp, self.perp_weights)


@dataclass(frozen=True)
class Guidance:
    """One evaluation of an objective on x [B, ...]; every tensor has the shape of x."""

    x_t: Tensor  # the noised sample the network saw
    t: Tensor  # [B] times in [0, 1]
    noise: Tensor  # kappa: the noise in x_t = alpha x + sigma kappa
    prediction: Tensor  # guided noise prediction at (x_t, t)
    x0: Tensor  # one-step denoised sample: the target that x is pulled towards
    gradient: Tensor  # w(t) (prediction - reference), to be attached to x
    nfe: int  # network function evaluations: rows that the network was given


class Schedule(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps for t [B] in [0, 1]; both return [B] in t's dtype."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...


class Prior(Protocol):
    """A frozen 2D diffusion model; knows nothing of scenes or objectives.

    A prior of your own may subclass it: everything without a default must then be given.
    """

    name: str
    image_size: int  # pixels per side of what `encode` expects
    device: torch.device
    schedule: Schedule
    sample_shape: tuple[int, ...]  # of one x: channels, height, width
    views: int = 1  # how many views the network sees jointly; more than 1 for a multi-view prior
    camera_conditioned: bool = False  # whether `predict` needs Condition.camera; prompts then name no view direction
    control: str | None = None  # the map that its ControlNet expects, "depth" or "normal"; None without ControlNet

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, image_size, image_size] in [0, 1] to x [B, *sample_shape]; differentiable."""
        ...

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """x [B, *sample_shape] to images in [0, 1]."""
        ...

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Condition:
        """One row per text; the empty text is the unconditional row."""
        ...

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Noise eps [N, *sample_shape] in one network call, for x_t [N, *sample_shape], t [N], condition of N rows."""
        ...

    def prepare(self, texts: Sequence[str]) -> None:
        """Embeds all texts of a run, after which text encoders may be freed. By default nothing happens."""
        return None


class Scene(Protocol):
    """Owns parameters and renders them; an nn.Module, see scenes/. Ready to render after `eval()`."""

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
        """B square pictures of `size` pixels over a background [B, 3] or [B, 3, size, size].

        With a generator samples are jittered (for training); `normals` asks for normal and orientation too.
        """
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For Adam: "params" and "scale", which multiplies the recipe's learning rate."""
        ...

    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """What the scene does to itself before a step: refine, densify. New parameters are put into the optimizer."""
        ...

    def penalties(self) -> dict[str, Callable[[], Tensor]]:
        """Regularizers of its own, scalar and unweighted, by the names that a recipe gives weights to."""
        ...
