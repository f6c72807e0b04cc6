"""DeepFloyd IF, first stage: a UNet on images of 64 pixels, conditioned on the tokens of a T5 encoder."""

from __future__ import annotations

from torch import Tensor

from distill3d.diffusion.schedule import Table
from distill3d.priors.base import FrozenPrior, Network, prediction_kind
from distill3d.priors.components.autoencoder import Pixels
from distill3d.priors.components.text_encoders import TextEncoders
from distill3d.priors.options import PriorBuilder, check_text_width
from distill3d.types import Condition

COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}
TOKENS = 77


class PixelPrior(FrozenPrior):
    """A pixel-space diffusion model behind the Prior protocol: x is the image in [-1, 1]."""

    def model_output(self, network: Network, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The predicted noise of the UNet, without the channels of its learned variance."""
        inputs = x_t.contiguous(memory_format=self.memory_format)
        return network(inputs, self.timestep(t), condition.hidden, return_dict=False)[0][:, : x_t.shape[1]]


def build(builder: PriorBuilder) -> PixelPrior:
    """The prior of an IFPipeline folder; ValueError for a later stage, or if components do not fit together."""
    options = builder.options
    builder.reject_options("--vae, --controlnet and --token", options.vae, options.controlnet, options.token)
    unet, scheduler, pixels = builder.network("unet"), builder.folder.config("scheduler"), Pixels()
    u = unet.config
    if u.in_channels != pixels.channels or u.out_channels not in (pixels.channels, 2 * pixels.channels):
        raise ValueError(
            f"the network maps {u.in_channels} channels to {u.out_channels}: of IF, only the first stage (text to "
            "image) is supported"
        )
    check_text_width(builder.folder.config("text_encoder").get("d_model"), u.encoder_hid_dim or u.cross_attention_dim)

    def load() -> TextEncoders:
        t5 = builder.t5("", TOKENS, masked=True)

        def encode(text: str) -> Condition:
            return Condition(t5.states(text.lower().strip()))  # IF was trained on lower-case texts

        return TextEncoders(encode, {"text_encoder": t5.encoder})

    schedule, kind = Table.from_config(scheduler), prediction_kind(scheduler)
    size = builder.sample_size(u.sample_size, pixels.factor, 2 ** (len(u.block_out_channels) - 1))
    return builder.assemble(PixelPrior, unet, pixels, load, schedule, kind, size)
