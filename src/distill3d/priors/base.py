"""What the priors built on diffusers have in common: a frozen network, an autoencoder, and cached text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.diffusion.schedule import Kind, Table, coefficients, to_eps
from distill3d.priors.components.autoencoder import Codec
from distill3d.priors.components.folder import first_line, freeze
from distill3d.priors.components.layout import in_format, network_format
from distill3d.priors.components.text_cache import TextCache
from distill3d.types import Condition, Prior, Schedule

PREDICTION_KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
Network = Callable[..., tuple[Tensor, ...]]  # called as diffusers' networks with return_dict=False
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class DeviceConfig:
    """Device and precision of the denoising network."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    offload: bool = False  # keep the network in main memory and send its layers to the device one by one

    @property
    def network_device(self) -> torch.device:
        """The device that holds the network between its calls."""
        return torch.device("cpu") if self.offload else self.device


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of this name: "cpu", "cuda", "cuda:0", "mps"; ValueError if this machine does not have it."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"cannot compute on {str(device)!r}: {first_line(error).split('. ')[0]}; use cpu, cuda, cuda:N or mps "
            "(distill3d doctor lists the devices of this machine)"
        ) from error


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """The floating-point type of this name; ValueError for any other.

    "auto" is bfloat16 if the device computes it in hardware, which is about twice as fast, else float32. The
    parameters of a scene stay float32, and the results of a prior change less than they do between two seeds.
    """
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(str(device).partition(":")[0]) else torch.float32
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {str(dtype)!r}: use auto, {', '.join(DTYPES)}")
    return found


def _has_bfloat16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # What torch knows about the CPU is not part of its public interface and may disappear.
    probes = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device_type == "cpu" and any(probe() for probe in probes)


class FrozenPrior(Prior):
    """A model of diffusers behind the Prior protocol, float32 in and out.

    A model family is a subclass with one method, `model_output`: how its network is called.
    """

    def __init__(
        self,
        network: Any,
        codec: Codec,
        text_cache: TextCache,
        schedule: Schedule,
        kind: Kind,
        size: int,
        config: DeviceConfig | None = None,
        name: str = "prior",
    ):
        """Freezes the network in place. kind is what the network predicts, size the height and width of x."""
        config = config or DeviceConfig()
        self.name, self.device, self.dtype, self.offload = name, config.device, config.dtype, config.offload
        self.memory_format = network_format(config.device)
        self.network = in_format(freeze(network, config.network_device, config.dtype), self.memory_format)
        # On a CPU, and not while a run is only planned, with weights that have no values.
        self._plain = self.device.type == "cpu" and all(type(p.data) is Tensor for p in network.parameters())
        self.codec, self.text_cache = codec, text_cache
        self.schedule: Schedule = schedule
        self.kind: Kind = kind
        self.sample_shape = (codec.channels, size, size)
        self.image_size = size * codec.factor

    def encode(
        self, images: Float[Tensor, "b c h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, " b *x"]:
        """Images [B, 3, image_size, image_size] in [0, 1] to x [B, *sample_shape]; differentiable.

        The mean of the posterior, or a draw from it if a generator is given. Raises ValueError for images of
        another shape.
        """
        shape = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"{self.name} encodes images [B, {', '.join(map(str, shape))}], got {list(images.shape)}: "
                "resize them first"
            )
        return self.codec.encode(images, generator)

    def decode(self, x: Float[Tensor, " b *x"]) -> Float[Tensor, "b 3 h w"]:
        """x [B, *sample_shape] to images [B, 3, image_size, image_size] in [0, 1]."""
        return self.codec.decode(x)

    def embed(self, texts: Sequence[str]) -> Condition:
        """One row per text; each text is encoded only once."""
        return self.text_cache.embed(texts)

    def prepare(self, texts: Sequence[str]) -> None:
        """Embeds all texts of a run, then frees the text encoders; a new text would load them again."""
        self.embed(texts)
        self.text_cache.free_encoders()

    def predict(
        self, x_t: Float[Tensor, " n *x"], t: Float[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, " n *x"]:
        """Noise eps [N, *sample_shape] in x_t's dtype: one network call for x_t, t [N] and a condition of N rows."""
        return self.predict_with(self.network, x_t, t, condition)

    def predict_with(
        self, network: Network, x_t: Float[Tensor, " n *x"], t: Float[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, " n *x"]:
        """As `predict`, with another network that is called in the same way."""
        out = self._model_output(network, x_t.to(self.dtype), t, condition.to(self.dtype)).to(x_t.dtype)
        if self.kind == "eps":  # needs no noise level
            return out.contiguous()
        return to_eps(self.kind, out, x_t, *coefficients(self.schedule, t, x_t)).contiguous()

    def _model_output(self, network: Network, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `model_output`; on a CPU without gradients in inference mode, in which torch does less per operation."""
        if torch.is_grad_enabled() or not self._plain or torch.is_inference_mode_enabled():
            return self.model_output(network, x_t, t, condition)
        with torch.inference_mode():
            out = self.model_output(network, x_t, t, condition)
        return out.clone()  # a tensor that may take part in a gradient

    def model_output(self, network: Network, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The raw output of the network, of the kind `self.kind`; x_t and condition are in the network's dtype."""
        raise NotImplementedError

    def timestep(self, t: Tensor) -> Tensor:
        """Times t [N] in [0, 1] as timesteps of the training schedule; only for a schedule with a table."""
        assert isinstance(self.schedule, Table)
        return self.schedule.timestep(t)

    def modules(self) -> dict[str, nn.Module]:
        """The networks in memory by name: the denoiser, the autoencoder, and the text encoders if they are loaded."""
        return {"network": self.network, **self.codec.modules(), **self.text_cache.modules()}


def prediction_kind(config: dict[str, Any]) -> Kind:
    """What a network trained with this scheduler configuration predicts; ValueError if that is not supported."""
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_KINDS:
        raise ValueError(f"prediction_type {kind!r} is not supported: it must be {', '.join(PREDICTION_KINDS)}")
    return PREDICTION_KINDS[kind]
