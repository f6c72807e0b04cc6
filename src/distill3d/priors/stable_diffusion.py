"""Priors with a UNet on latents: Stable Diffusion 1.x and 2.x, SDXL, and multi-view Stable Diffusion (MVDream).

Two changes turn a Stable Diffusion UNet into a multi-view one (MVDream, Shi et al. 2023, section 3.1): its
self-attention sees the tokens of all views of a group, and the 16 numbers of a camera matrix, through two linear
layers, are added to the time embedding. In the format of diffusers, this is a StableDiffusionPipeline folder whose
`unet/config.json` contains

    "views": 4, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16

diffusers builds the two linear layers from the last two; "views" marks the model as a multi-view one for this library.
Two more things are optional: "camera_dropout": true marks a model that was trained without cameras too, and a folder
`matting` holds a network for the coverage of the object (see components/matting.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.diffusion.schedule import Table
from distill3d.priors.base import FrozenPrior, Network, prediction_kind
from distill3d.priors.components.autoencoder import Autoencoder
from distill3d.priors.components.matting import MattingNetwork, load_matting
from distill3d.priors.components.sharing import share_equal_rows
from distill3d.priors.components.text_encoders import TextEncoders
from distill3d.priors.options import PriorBuilder, check_text_width
from distill3d.types import Condition

COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
SDXL_COMPONENTS = {
    **COMPONENTS,
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": COMPONENTS["tokenizer"],
}
TAESD, TAESDXL = "madebyollin/taesd", "madebyollin/taesdxl"
VIEWS_KEY = "views"  # in unet/config.json of a multi-view model
CAMERA_DROPOUT_KEY = "camera_dropout"  # in unet/config.json
CAMERA_SIZE = 16  # entries of a camera matrix
UNetPrior = TypeVar("UNetPrior", bound="LatentPrior")


class LatentPrior(FrozenPrior):
    """Stable Diffusion 1.x or 2.x behind the Prior protocol; base class of all priors with a UNet on latents.

    `controlnet`, if there is one, adds its residuals, weighted by `control_scale`, to those of the UNet.
    """

    controlnet: nn.Module | None = None
    control_scale: float = 1.0

    def model_output(self, network: Network, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction of the UNet [N, *sample_shape]."""
        inputs = x_t.contiguous(memory_format=self.memory_format)
        timestep, options = self.timestep(t), self.unet_options(condition)
        residuals = self._control_residuals(inputs, timestep, condition, options)
        return network(inputs, timestep, condition.hidden, return_dict=False, **options, **residuals)[0]

    def unet_options(self, condition: Condition) -> dict[str, object]:
        """Keyword arguments of the UNet's forward besides sample, timestep and text."""
        return {}

    def modules(self) -> dict[str, nn.Module]:
        """The networks in memory by name."""
        return super().modules() | ({} if self.controlnet is None else {"controlnet": self.controlnet})

    def _control_residuals(
        self, x_t: Tensor, timestep: Tensor, condition: Condition, options: dict[str, object]
    ) -> dict[str, object]:
        if self.controlnet is None:
            return {}
        if condition.control is None:
            raise ValueError(f"{self.name} has a ControlNet: add an image for it with Conditioning.with_control")
        size = (self.image_size, self.image_size)
        down, middle = self.controlnet(
            x_t,
            timestep,
            condition.hidden,
            controlnet_cond=nn.functional.interpolate(condition.control, size, mode="bilinear", antialias=True),
            conditioning_scale=self.control_scale,
            return_dict=False,
            **options,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


class SDXLPrior(LatentPrior):
    """Stable Diffusion XL behind the Prior protocol."""

    def unet_options(self, condition: Condition) -> dict[str, object]:
        """The pooled text, and the sizes of an image that was neither resized nor cropped (section 2.2 of SDXL)."""
        sizes = condition.hidden.new_full((len(condition), 6), self.image_size)
        sizes[:, 2:4] = 0
        return {"added_cond_kwargs": {"text_embeds": condition.pooled, "time_ids": sizes}}


class MultiViewPrior(LatentPrior):
    """Multi-view Stable Diffusion behind the Prior protocol: `views` consecutive rows are denoised jointly.

    Every row carries its camera, and the rows of a group have one time. Their texts may differ, but such models are
    trained with one text for all views and learn the view direction from the camera.
    """

    views: int = 4
    camera_conditioned: bool = True
    matting: MattingNetwork | None = None

    def join(self, views: int) -> None:
        """Sets how many views are denoised jointly; it may be more than in training, if the cameras are near enough."""
        self.views = views
        join_views(self.network, views)

    @torch.no_grad()
    def matte(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"] | None:
        """Coverage in [0, 1] of the object, from the matting network; None without one."""
        return None if self.matting is None else self.matting(images)

    def predict(
        self, x_t: Float[Tensor, " n *x"], t: Float[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, " n *x"]:
        """Noise as `FrozenPrior.predict`; ValueError without cameras, or if the rows are not whole groups.

        That the views of a group have one time is checked on the CPU only: elsewhere it would wait for the device.
        """
        if condition.camera is None:
            raise ValueError(
                f"{self.name} is conditioned on cameras, and there are none: use it for 3D, or add them with "
                "Conditioning.with_camera"
            )
        groups = t[:: self.views].repeat_interleave(self.views)[: len(t)]
        if len(x_t) % self.views or (t.device.type == "cpu" and not torch.equal(t, groups)):
            raise ValueError(
                f"{self.name} denoises groups of {self.views} views at one time t each, got {len(x_t)} rows at t = "
                f"{t.tolist()}: set views={self.views} in the objective and pass whole groups"
            )
        return super().predict(x_t, t, condition)

    def unet_options(self, condition: Condition) -> dict[str, object]:
        """The cameras [N, 16]."""
        assert condition.camera is not None
        return {"class_labels": camera_embedding_input(condition.camera).to(condition.hidden.dtype)}


def camera_embedding_input(camera_to_world: Float[Tensor, "n 4 4"]) -> Float[Tensor, "n 16"]:
    """Flattens cameras row by row, their positions scaled to length 1.

    World and camera axes are those of `cameras.py`, which are MVDream's: z up, the camera looks along its -z.
    """
    scale = camera_to_world.new_ones(len(camera_to_world), 4, 4)
    scale[:, :3, 3] = 1 / camera_to_world[:, :3, 3].norm(dim=1, keepdim=True).clamp(min=1e-8)
    return (camera_to_world * scale).flatten(1)


class JointAttention:
    """An attention processor for self-attention over the tokens of all views of a group.

    Reshapes tokens [N, L, C] to [N / views, views L, C] and calls the `inner` processor.
    """

    def __init__(self, views: int, inner: Callable[..., Tensor]):
        self.views, self.inner = views, inner

    def __call__(
        self, attn: nn.Module, hidden_states: Float[Tensor, "n l c"], *args: object, **options: object
    ) -> Float[Tensor, "n l c"]:
        """Joint self-attention."""
        joint = hidden_states.unflatten(0, (-1, self.views)).flatten(1, 2)
        return self.inner(attn, joint, *args, **options).view_as(hidden_states)


def join_views(unet: Any, views: int) -> None:
    """Makes the self-attention of a UNet's transformer blocks joint over groups of `views`, in place."""

    def joined(processor: Any) -> JointAttention:
        return JointAttention(views, processor.inner if isinstance(processor, JointAttention) else processor)

    processors = {
        name: joined(processor) if name.endswith("attn1.processor") else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)


def build_stable_diffusion(builder: PriorBuilder) -> LatentPrior:
    """The prior of a StableDiffusionPipeline folder, a multi-view one if its UNet is marked so.

    Raises ValueError if components do not fit together, and for a multi-view model with a ControlNet.
    """
    views = _marked_views(builder.folder.config("unet"))
    if views is not None:
        builder.reject_options("--controlnet", builder.options.controlnet)
    unet, autoencoder = builder.network("unet"), builder.autoencoder(TAESD)
    _check_unet(unet, autoencoder.channels)
    class_embed_type = None if views is None else "projection"
    if unet.config.addition_embed_type is not None or unet.config.class_embed_type != class_embed_type:
        raise ValueError(
            "the network needs more conditions than a text (unCLIP, a camera): use a text-to-image model, or mark a "
            "multi-view model as described in docs/priors.md"
        )
    check_text_width(builder.folder.config("text_encoder").get("hidden_size"), unet.config.cross_attention_dim)

    def load() -> TextEncoders:
        clip = builder.clip("")
        builder.add_tokens({"": clip})
        return TextEncoders(lambda text: Condition(clip.states(text)[-1]), {"text_encoder": clip.encoder})

    if views is None:
        share_equal_rows(unet)
        return _assemble(LatentPrior, builder, unet, autoencoder, load)
    prior = _assemble(MultiViewPrior, builder, unet, autoencoder, load)
    prior.join(views)
    prior.camera_guidance = bool(builder.folder.config("unet").get(CAMERA_DROPOUT_KEY, False))
    prior.matting = load_matting(builder.folder.path / "matting", builder.config.device)
    return prior


def build_sdxl(builder: PriorBuilder) -> SDXLPrior:
    """The prior of a StableDiffusionXLPipeline folder; ValueError if components do not fit together."""
    unet, autoencoder = builder.network("unet"), builder.autoencoder(TAESDXL)
    _check_unet(unet, autoencoder.channels)
    width = sum(builder.folder.config(f"text_encoder{n}").get("hidden_size", 0) for n in ("", "_2"))
    check_text_width(width, unet.config.cross_attention_dim)

    def load() -> TextEncoders:
        first, second = builder.clip(""), builder.clip("_2")
        builder.add_tokens({"clip_l": first, "clip_g": second})
        zero_if_empty = bool(builder.folder.index.get("force_zeros_for_empty_prompt", True))

        def encode(text: str) -> Condition:
            # SDXL uses the layers before the last, and was trained with zeros in place of the empty prompt.
            hidden = torch.cat([clip.states(text)[-2] for clip in (first, second)], dim=-1)
            pooled = second.pooled(text)
            if text == "" and zero_if_empty:
                return Condition(torch.zeros_like(hidden), torch.zeros_like(pooled))
            return Condition(hidden, pooled)

        return TextEncoders(encode, {"text_encoder": first.encoder, "text_encoder_2": second.encoder})

    return _assemble(SDXLPrior, builder, unet, autoencoder, load)


def _assemble(
    prior_class: type[UNetPrior],
    builder: PriorBuilder,
    unet: Any,
    autoencoder: Autoencoder,
    load: Callable[[], TextEncoders],
) -> UNetPrior:
    """A prior of this class with its ControlNet, if one is wanted; `load` loads the text encoders."""
    scheduler = builder.folder.config("scheduler")
    schedule, kind = Table.from_config(scheduler), prediction_kind(scheduler)
    downsampling = 2 ** (len(unet.config.block_out_channels) - 1)
    size = builder.sample_size(unet.config.sample_size, autoencoder.factor, downsampling)
    prior = builder.assemble(prior_class, unet, autoencoder, load, schedule, kind, size)
    if builder.options.controlnet is not None:
        prior.controlnet = builder.controlnet(unet)
        prior.control, prior.control_scale = builder.options.control, builder.options.control_scale
    return prior


def _marked_views(config: dict[str, Any]) -> int | None:
    """The number of views in a UNet's configuration, None for a plain model; ValueError if the rest does not fit."""
    if VIEWS_KEY not in config:
        return None
    views = config[VIEWS_KEY]
    if not isinstance(views, int) or views < 1:
        raise ValueError(f'"{VIEWS_KEY}" in unet/config.json must be an integer of at least 1, got {views!r}')
    kind, width = (config.get(k) for k in ("class_embed_type", "projection_class_embeddings_input_dim"))
    if (kind, width) != ("projection", CAMERA_SIZE):
        raise ValueError(
            f'unet/config.json contains "{VIEWS_KEY}", so class_embed_type must be "projection" and '
            f"projection_class_embeddings_input_dim {CAMERA_SIZE}, got {kind!r} and {width!r}"
        )
    return views


def _check_unet(unet: Any, channels: int) -> None:
    """Raises ValueError unless the UNet maps the autoencoder's latents to latents."""
    u = unet.config
    if u.time_cond_proj_dim is not None:
        raise ValueError(
            "the network is conditioned on a guidance scale, as of LCM: use the model it was distilled from"
        )
    if not u.in_channels == u.out_channels == channels:
        raise ValueError(
            f"the network maps {u.in_channels} channels to {u.out_channels}, the autoencoder has {channels}: "
            "inpainting, depth and upscaling models are not supported, use a text-to-image model"
        )
