"""MVDream as it was published: multi-view Stable Diffusion in the two layouts of its public weights.

Both are rewritten to the layout of `stable_diffusion`, whose UNet adds the camera through its class embedding:

- The UNet is a MultiViewUNetModel with the names and settings of MVDream's own code (ashawkey/mvdream-sd2.1-diffusers),
  or a MultiViewUNetWrapperModel around it (KokeCacao/mvdream-hf). Its camera layers are `camera_embed`.
- The UNet has the names of diffusers, and its camera layers are a component `camera_proj` of their own
  (mindazhao/mvdream-sd15-diffusers).

The weights were trained on groups of four views with cameras beside the empty text too (Shi et al. 2023, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from distill3d.priors.base import FrozenPrior
from distill3d.priors.components.folder import ModelFolder, build_model, libraries, read_weights, remember_files
from distill3d.priors.options import PriorBuilder
from distill3d.priors.stable_diffusion import COMPONENTS as PLAIN
from distill3d.priors.stable_diffusion import VIEWS_KEY, build_stable_diffusion

OWN_CLASSES = ("MultiViewUNetModel", "MultiViewUNetWrapperModel")  # with the names of MVDream's own code
CAMERA = "camera_proj"
COMPONENTS = {**PLAIN, "unet": (*OWN_CLASSES, *PLAIN["unet"]), CAMERA: ()}
VIEWS = 4
# What the wrapper leaves out of its configuration, and what the other class always does.
DEFAULTS = {
    "MultiViewUNetWrapperModel": {"num_heads": 8, "use_linear_in_transformer": False},
    "MultiViewUNetModel": {"use_linear_in_transformer": True},
}
REQUIRED = ("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions")


def is_mvdream(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json is of one of these layouts; the names of their pipelines differ."""
    unet = index.get("unet")
    return CAMERA in index or (isinstance(unet, list) and len(unet) == 2 and unet[1] in OWN_CLASSES)


class MVDreamFolder(ModelFolder):
    """The components of a folder in one of the two layouts."""

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component; that of the UNet in the terms of diffusers, with the marker of its views.

        Raises ValueError for a UNet that needs an image (ImageDream), and for settings that are missing.
        """
        config = super().config(component)
        if component != "unet":
            return config
        camera = config.get("camera_dim")
        if self._is_own:
            config = _translated(config, self.index["unet"][1])
        else:
            camera = super().config(CAMERA).get("in_channels")
        marker = {VIEWS_KEY: VIEWS, "class_embed_type": "projection", "projection_class_embeddings_input_dim": camera}
        return {**config, **marker}

    def model(self, component: str) -> nn.Module:
        """A network with its weights; ValueError if these do not match its configuration."""
        if component != "unet":
            return super().model(component)
        config, weights = self.config("unet"), read_weights(self.path / "unet")
        if self._is_own:
            weights = _renamed(weights, config)
        else:
            weights |= {f"class_embedding.{name}": w for name, w in read_weights(self.path / CAMERA).items()}
        network_class = libraries()[0].UNet2DConditionModel
        weights = {name: w.to(self.dtype) for name, w in weights.items()}
        network = build_model(network_class, config, weights, str(self.path / "unet"))
        remember_files(network, (f for name in ("unet", CAMERA) for f in (self.path / name).glob("*.safetensors")))
        return network

    @property
    def _is_own(self) -> bool:
        return self.index["unet"][1] in OWN_CLASSES


def build(builder: PriorBuilder) -> FrozenPrior:
    """The prior of such a folder; ValueError if components do not fit together."""
    folder = builder.folder
    if folder.checkpoint is not None:
        raise ValueError("MVDream is read from a folder, not from a single file: use mvdream or mvdream15")
    return build_stable_diffusion(replace(builder, folder=MVDreamFolder(folder.path, folder.dtype)))


def _translated(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of MVDream's UNet as those of a UNet2DConditionModel."""
    c = {"num_head_channels": -1, "transformer_depth": 1, "ip_dim": 0, **DEFAULTS[name], **config}
    if c["ip_dim"]:
        raise ValueError("the network is ImageDream's, which needs an image besides the text: use mvdream")
    if missing := [key for key in (*REQUIRED, "context_dim", "image_size") if c.get(key) is None]:
        raise ValueError(f"unet/config.json lacks {', '.join(missing)}: download the model again")
    widths = [c["model_channels"] * m for m in c["channel_mult"]]
    attention = ["CrossAttn" * (2**level in c["attention_resolutions"]) for level in range(len(widths))]
    by_width = c["num_head_channels"] != -1
    return {
        "sample_size": c["image_size"],
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
        "layers_per_block": c["num_res_blocks"],
        "transformer_layers_per_block": c["transformer_depth"],
        "cross_attention_dim": c["context_dim"],
        # In diffusers' UNets, this is the number of heads.
        "attention_head_dim": [w // c["num_head_channels"] for w in widths] if by_width else c.get("num_heads"),
        "use_linear_projection": c["use_linear_in_transformer"],
    }


def _renamed(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights with the names of MVDream's own code under those of diffusers, which are the same but for the camera."""
    try:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    except ImportError as error:
        raise ValueError(
            "the installed version of diffusers cannot rename these weights: type  pip install 'diffusers>=0.37,<1'"
        ) from error
    # The camera takes the place of the label, which the conversion knows.
    names = {name: name.removeprefix("unet.").replace("camera_embed.", "label_emb.0.") for name in weights}
    try:
        return convert_ldm_unet_checkpoint({f"model.diffusion_model.{names[n]}": w for n, w in weights.items()}, config)
    except KeyError as error:
        raise ValueError(f"weights in unet do not match its config.json: {error} missing") from None
