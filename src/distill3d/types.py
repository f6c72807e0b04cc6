"""What travels between the stages: frozen dataclasses and protocols, no computation.

Shapes use B for views (or samples), N for network rows, H and W for pixels, L and C for tokens and
channels of a text embedding. Images are floats in [0, 1], [B, 3, H, W]; latents are in the unit in which
the noise schedule is defined; time t lies in [0, 1] with 1 pure noise, one value per sample.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from distill3d.devices import at_once

if TYPE_CHECKING:  # these only name the arguments of a protocol; nothing here uses them
    from distill3d.export.options import ExportOptions
    from distill3d.meshes.mesh import Mesh
    from distill3d.texels import Texels


@dataclass(frozen=True)
class Rays:
    """Camera rays of B images in world space."""

    origins: Float[Tensor, "b h w 3"]
    directions: Float[Tensor, "b h w 3"]  # unit vectors


@dataclass(frozen=True)
class Cameras:
    """A batch of B pinhole cameras with square pixels and the principal point in the middle.

    The prompts of the views depend on the three spherical coordinates; a jittered camera keeps those it had before
    the jitter. Cameras come from `from_poses`, or from `cameras.orbit`, `cameras.turntable` and `CameraSampler`.
    """

    camera_to_world: Float[Tensor, "b 4 4"]
    fov_y: Float[Tensor, " b"]  # radians, the full vertical angle
    azimuth: Float[Tensor, " b"]  # degrees
    elevation: Float[Tensor, " b"]  # degrees
    distance: Float[Tensor, " b"]  # world units from the origin

    @classmethod
    def from_poses(cls, camera_to_world: Tensor, fov: float | Sequence[float] | Tensor) -> Cameras:
        """Cameras with given poses; azimuth, elevation and distance are those of their positions about the origin.

        A camera straight above or below the origin takes its azimuth from its up vector.

        Args:
            camera_to_world: [B, 4, 4] or [4, 4], OpenGL (x right, y up, looking along -z) in a world with z up.
            fov: full vertical angle in degrees, one number or B.

        Raises:
            ValueError: for matrices that are not rigid transforms, a camera at the origin, or an angle outside
                (0, 180).
        """
        pose = torch.as_tensor(camera_to_world)
        pose = pose[None] if pose.ndim == 2 else pose
        if pose.ndim != 3 or pose.shape[1:] != (4, 4) or not pose.is_floating_point():
            raise ValueError(f"poses must be floats [B, 4, 4], got {list(pose.shape)} {pose.dtype}")
        rotation, eye = pose[:, :3, :3], pose[:, :3, 3]
        identity = torch.eye(4).to(pose)
        rigid = torch.allclose(rotation @ rotation.mT, identity[:3, :3].expand_as(rotation), atol=1e-3)
        if not rigid or not bool((rotation.det() > 0).all() and (pose[:, 3] == identity[3]).all()):
            raise ValueError(
                "poses must be a rotation and a position with last row 0 0 0 1, without scale or reflection"
            )
        distance = eye.norm(dim=1)
        if not bool((distance > 0).all()):
            raise ValueError("a camera at the origin has no azimuth and elevation: move it, or use Cameras(...)")
        angles = torch.as_tensor(fov).to(pose).expand(len(pose)).contiguous()
        if not bool(((angles > 0) & (angles < 180)).all()):
            raise ValueError(f"field of view must lie in (0, 180) degrees, got {angles.tolist()}")
        pole = eye[:, :2].norm(dim=1, keepdim=True) < 1e-6 * distance[:, None]
        x, y = torch.where(pole, -eye[:, 2:].sign() * rotation[:, :2, 1], eye[:, :2]).unbind(1)
        elevation = torch.rad2deg(torch.asin((eye[:, 2] / distance).clamp(-1, 1)))
        return cls(pose, torch.deg2rad(angles), torch.rad2deg(torch.atan2(y, x)), elevation, distance)

    def __len__(self) -> int:
        return self.fov_y.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Cameras:
        """Some of the views, by slice, index tensor or mask."""
        return Cameras(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str) -> Cameras:
        """The same cameras on another device."""
        return Cameras(*at_once(device, *(getattr(self, f.name) for f in fields(self))))


@dataclass(frozen=True)
class Lighting:
    """How surfaces are shaded in B views: not at all ("albedo"), by a point light ("lambertian"), or by a point light
    and in white ("textureless"). The light's intensity is ambient + diffuse max(0, n.l)."""

    mode: Literal["albedo", "textureless", "lambertian"]
    position: Float[Tensor, "b 3"]  # of the light, world units
    ambient: float = 0.1
    diffuse: float = 0.9


@dataclass(frozen=True)
class Rendering:
    """Images of a scene. rgb is already composited over the background."""

    rgb: Float[Tensor, "b c h w"]  # 3 channels in [0, 1]; or latents of an `ImageScene`
    opacity: Float[Tensor, "b 1 h w"]  # in [0, 1]
    depth: Float[Tensor, "b 1 h w"]  # expected ray length, world units (0 where nothing is hit)
    depth_variance: Float[Tensor, "b 1 h w"]  # variance of the ray length under the weights
    normal: Float[Tensor, "b 3 h w"] | None = None  # world space, multiplied by the opacity like colors
    orientation: Float[Tensor, "b 1 h w"] | None = None  # sum of sg(w) max(0, n.d)^2 along the ray


@dataclass(frozen=True)
class Condition:
    """What each of N network rows is conditioned on. A prior ignores what it has no use for."""

    hidden: Float[Tensor, "n l c"]  # the text encoder's features of each token
    pooled: Float[Tensor, "n p"] | None = None  # its features of the whole text, which some model families use
    control: Float[Tensor, "n 3 h w"] | None = None  # the image for a ControlNet, in [0, 1]
    camera: Float[Tensor, "n 4 4"] | None = None  # camera to world

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
    perp_weights: Float[Tensor, "b k"] | None = None

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

    def with_control(self, images: Float[Tensor, "b 3 h w"]) -> Conditioning:
        """The same conditioning with an image in [0, 1] for the ControlNet in every row of a view."""
        return self._with(lambda condition, k: replace(condition, control=images.repeat_interleave(k, 0)))

    def with_camera(self, camera_to_world: Float[Tensor, "b 4 4"], negative: bool = True) -> Conditioning:
        """The same conditioning with its camera in every row of a view.

        negative=False: the negative row has no camera, which is a matrix of zeros, so that classifier-free guidance
        strengthens the camera too.
        """
        changed = self._with(lambda condition, k: replace(condition, camera=camera_to_world.repeat_interleave(k, 0)))
        if negative:
            return changed
        return replace(changed, negative=replace(changed.negative, camera=torch.zeros_like(camera_to_world)))

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
    gradient: Tensor  # w(t) (prediction - reference), times the method's step size if any; to be attached to x
    nfe: int  # network function evaluations: rows that the network was given


class Schedule(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps for t in [0, 1]."""

    def alpha(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The factor of the sample, in t's dtype."""
        ...

    def sigma(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The factor of the noise, in t's dtype."""
        ...


class Prior(Protocol):
    """A frozen 2D diffusion model; independent of scenes and objectives.

    A prior of your own may subclass it: everything without a default must then be given.
    """

    name: str
    image_size: int  # pixels per side of what `encode` expects
    device: torch.device
    schedule: Schedule
    sample_shape: tuple[int, ...]  # of one x: channels, height, width
    views: int = 1  # how many views the network sees jointly; more than 1 for a multi-view prior
    camera_conditioned: bool = False  # whether `predict` needs Condition.camera; prompts then name no view direction
    camera_guidance: bool = False  # whether it was trained without cameras too: the negative prompt then has none
    control: str | None = None  # the map that its ControlNet expects, "depth" or "normal"; None without ControlNet

    @abstractmethod
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b *x"]:
        """Images [B, 3, image_size, image_size] in [0, 1] to x [B, *sample_shape]; differentiable."""
        ...

    @abstractmethod
    def decode(self, x: Float[Tensor, " b *x"]) -> Float[Tensor, "b 3 h w"]:
        """x [B, *sample_shape] to images in [0, 1]."""
        ...

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Condition:
        """One row per text; the empty text is the unconditional row."""
        ...

    @abstractmethod
    def predict(
        self, x_t: Float[Tensor, " n *x"], t: Float[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, " n *x"]:
        """Noise eps [N, *sample_shape] in one network call, for x_t [N, *sample_shape], t [N], condition of N rows."""
        ...

    def join(self, views: int) -> None:
        """Sets how many views a multi-view prior denoises jointly.

        Raises:
            ValueError: for a prior of single views, which is the default.
        """
        raise ValueError(f"{self.name} sees single views, not {views} at once: use a multi-view prior")

    def matte(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"] | None:
        """Coverage in [0, 1] of the object in images in [0, 1]; None (default) if the prior has no network for it."""
        return None

    def prepare(self, texts: Sequence[str]) -> None:
        """Embeds all texts of a run, after which text encoders may be freed. By default nothing happens."""
        return None


class SceneOptions(Protocol):
    """The settings of a scene: a frozen dataclass that a recipe holds and `config.json` stores.

    Settings of your own inherit from this class and define `build`; a `Scene` can be used in their place.
    """

    @abstractmethod
    def build(self, device: torch.device | str | None = None) -> Scene:
        """A new scene with these settings."""
        ...

    def with_own_files(self, folder: Path) -> SceneOptions:
        """Copies the files that the scene is built from into `folder`; the result names them relative to it."""
        return self

    def located(self, folder: Path) -> SceneOptions:
        """The settings with the names of such files made absolute again."""
        return self


class Scene(SceneOptions, Protocol):
    """What is optimized: an nn.Module that renders itself. Ready to render after `eval()`.

    A scene of your own, `class MyScene(nn.Module, Scene)`, needs `render` only and inherits the other methods.
    As settings (see `SceneOptions`) it stands for a copy of itself.
    """

    unsupported_penalties: frozenset[str] = frozenset()
    """Regularizers of renderings that this kind of scene does not support."""
    export_settings: frozenset[str] = frozenset()
    """Fields of `ExportOptions`, apart from name and format, that `export` uses."""

    if TYPE_CHECKING:  # nn.Module brings these

        def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]: ...
        def train(self, mode: bool = True) -> Any: ...
        def eval(self) -> Any: ...
        def cpu(self) -> Any: ...

    @abstractmethod
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
        """Renders B square images.

        Args:
            size: pixels a side.
            background: colors [B, 3] or images [B, 3, size, size].
            generator: jitters the samples, for training.
            normals: whether to return normal and orientation too.
            lighting: how surfaces are shaded; None is the albedo.
        """
        ...

    def build(self, device: torch.device | str | None = None) -> Scene:
        """A copy of the scene on a device."""
        copied: Any = copy.deepcopy(self)
        return copied.to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For Adam: "params" and "scale", which multiplies the recipe's learning rate. Default: one group."""
        return [{"params": list(self.parameters()), "scale": 1.0}]

    def adapt(self, step: int, total: int, optimizer: torch.optim.Optimizer) -> None:
        """Called before each step, to refine or densify the scene. Default: nothing.

        Parameters that are replaced must be replaced in the optimizer too.
        """

    def noise_texels(self, cameras: Cameras, height: int, width: int) -> Texels | None:
        """Places of noise on the surface that B views of height x width latent pixels show.

        Default: None, for which places are found from the rendered depth.
        """
        return None

    def penalties(self) -> dict[str, Callable[[], Tensor]]:
        """The scene's own regularizers: unweighted scalars by their names in `Penalties`. Default: none."""
        return {}

    def init_from_mesh(self, mesh: Mesh) -> None:
        """Takes the shape and the colors of a mesh in world units. Call it before the optimizer is made.

        Raises:
            ValueError: where this kind of scene cannot start from a mesh, which is the default.
        """
        raise ValueError(f"a {type(self).__name__} cannot start from a mesh; fields and splats can")

    def export(self, folder: Path, options: ExportOptions) -> list[Path]:
        """Writes the scene into a folder as a file for other programs: mesh.glb, or splats.ply for splats.

        Call it on the CPU and after `eval()`.

        Returns:
            the files that were written, the main one first.

        Raises:
            ValueError: where there is nothing to export, which is the default, or not in this format.
        """
        raise ValueError(f"a {type(self).__name__} has nothing to export")
