"""Multi-view Stable Diffusion (MVDream): a UNet that sees the views of a group together and is told their cameras.

Two changes make a Stable Diffusion UNet one of these (MVDream, Shi et al. 2023, section 3.1): its self-attention goes
over the tokens of all views of a group, and a camera's 16 numbers, through two linear layers, are added to the time's
embedding. In the format of diffusers that is a StableDiffusionPipeline folder whose `unet/config.json` says

    "views": 4, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16

the first being the marker that other tools do not know, the other two what diffusers builds the two layers from.
ImageDream (Wang & Shi 2023) sees its camera the same way, and a picture besides, which a prior here is not told.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill3d.priors import stable_diffusion as latent
from distill3d.priors.options import Setup
from distill3d.priors.stable_diffusion import LatentPrior, build_kind
from distill3d.types import Condition

CAMERA = 16  # numbers that tell a camera
MARKER = "views"  # in unet/config.json


class MultiViewPrior(LatentPrior):
    """Shows its network groups of `views` neighboring rows together; each row carries its camera.

    Rows of a group must have one time. They may be told different texts, but such models are trained with one text
    for all and learn direction from the camera.
    """

    views: int = 4
    camera_conditioned: bool = True

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Noise as `FrozenPrior.predict`; ValueError for rows that are no whole groups, or carry no cameras."""
        if condition.camera is None:
            raise ValueError(f"{self.name} is told cameras, and these conditions carry none: it makes objects, not "
                             "single pictures")  # fmt: skip
        if len(x_t) % self.views or not bool((t == t[:: self.views].repeat_interleave(self.views)[: len(t)]).all()):
            raise ValueError(
                f"{self.name} sees groups of {self.views} views at one time each, got {len(x_t)} rows at t = "
                f"{t.tolist()}: set views={self.views} in the objective and give it whole groups"
            )
        return super().predict(x_t, t, condition)

    def told(self, condition: Condition) -> dict[str, Any]:
        """The cameras [N, 16]."""
        assert condition.camera is not None
        return {"class_labels": told_camera(condition.camera).to(condition.hidden.dtype)}


def told_camera(camera_to_world: Tensor) -> Tensor:
    """What the network is told of cameras [N, 4, 4]: their entries [N, 16], row by row, position of length 1.

    World and camera axes are those of `cameras.py`, which are MVDream's: z up, the camera looks along its -z.
    """
    scale = camera_to_world.new_ones(len(camera_to_world), 4, 4)
    scale[:, :3, 3] = 1 / camera_to_world[:, :3, 3].norm(dim=1, keepdim=True).clamp(min=1e-8)
    return (camera_to_world * scale).flatten(1)


class JointAttention:
    """An attention processor that lets the tokens of all views of a group attend to each other.

    [N, L, C] is taken as [N / views, views L, C]; what is computed there is left to `inner`.
    """

    def __init__(self, views: int, inner: Any):
        self.views, self.inner = views, inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """Self-attention over each group; shapes as they came."""
        joint = hidden_states.unflatten(0, (-1, self.views)).flatten(1, 2)
        return self.inner(attn, joint, *args, **options).view_as(hidden_states)


def join_views(unet: Any, views: int) -> None:
    """Makes the self-attention of a UNet's transformer blocks joint over groups of `views`, in place."""
    processors = {
        name: JointAttention(views, processor) if name.endswith("attn1.processor") else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)


def build(setup: Setup) -> LatentPrior:
    """The prior of a StableDiffusionPipeline folder: of many views if its UNet is marked so, else the plain one.

    Raises ValueError where the marker and the network do not agree, and for a ControlNet, which sees one view.
    """
    config = setup.parts.config("unet")
    if MARKER not in config:
        return latent.build(setup)
    views = config[MARKER]
    if not isinstance(views, int) or views < 1:
        raise ValueError(f'"{MARKER}" in unet/config.json must be a whole number of 1 or more, got {views!r}')
    kind, width = (config.get(k) for k in ("class_embed_type", "projection_class_embeddings_input_dim"))
    if (kind, width) != ("projection", CAMERA):
        raise ValueError(
            f'unet/config.json says "{MARKER}": a camera of {CAMERA} numbers needs class_embed_type "projection" and '
            f"projection_class_embeddings_input_dim {CAMERA}, got {kind!r} and {width!r}"
        )
    setup.refuse("--controlnet", setup.options.controlnet)
    prior = build_kind(MultiViewPrior, setup, "projection")
    prior.views = views
    join_views(prior.network, views)
    return prior
