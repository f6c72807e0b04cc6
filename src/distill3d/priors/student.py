"""The student of VSD and ESD: a trainable copy of a frozen latent prior, its network plus LoRA and a camera input.

The student shares the prior's weights and adds few of its own, so it costs little memory; all that is added is zero at
first, so it starts as the prior. It learns the distribution of the images that are being made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill3d.devices import at_once
from distill3d.diffusion import random as draw
from distill3d.diffusion.random import Generators
from distill3d.diffusion.schedule import coefficients, from_eps
from distill3d.priors.stable_diffusion import CAMERA_SIZE, LatentPrior
from distill3d.types import Conditioning

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # the projections of every attention layer


class Student:
    """The student of `objectives.reference.student`: it predicts and learns, and leaves its prior unchanged.

    As in ProlificDreamer, the camera matrix passes through a two-layer network and is added to the time embedding; the
    zero matrix stands for "no camera", also if conditions have none (2D). In contrast to ProlificDreamer, the last of
    these layers starts at zero, so that the student starts exactly as the prior, and the text of the student is the
    positive one as it is, view direction included.
    """

    def __init__(
        self,
        prior: LatentPrior,
        generator: torch.Generator,
        rank: int = 4,
        learning_rate: float = 1e-4,
        camera_dropout: float = 0.1,
    ):
        """Adds LoRA to the attention layers of the prior's network, to be trained with AdamW.

        Args:
            prior: stays unchanged.
            generator: draws the initial LoRA weights.
            rank: of the LoRA.
            learning_rate: of AdamW.
            camera_dropout: fraction of the samples that are learned without their camera; ESD needs it.

        The defaults are those of ProlificDreamer in threestudio. Raises ImportError with the command to type if peft is
        missing, ValueError for settings out of range, an offloaded prior, or one that is conditioned on cameras.
        """
        if prior.offload:  # its layers have hooks that a copy would share
            raise ValueError(f"a student of {prior.name} cannot be trained with --offload")
        if prior.network.config.class_embed_type is not None:  # the student's camera needs this input
            raise ValueError(f"a student of {prior.name} cannot be trained: the prior is conditioned on cameras itself")
        if rank < 1 or learning_rate <= 0 or not 0.0 <= camera_dropout <= 1.0:
            raise ValueError(
                f"got rank={rank}, learning_rate={learning_rate}, camera_dropout={camera_dropout}: rank must be at "
                "least 1, learning_rate above 0, camera_dropout in [0, 1]"
            )
        self.prior, self.rank, self.camera_dropout = prior, rank, camera_dropout
        self.unet = _with_lora(prior.network, rank, generator)
        self.unet.class_embedding = _CameraEmbedding(prior.network.time_embedding.linear_2.out_features, generator)
        self.unet.class_embedding.to(prior.device)
        self.optimizer = torch.optim.AdamW(self._trained().values(), lr=learning_rate)

    @torch.no_grad()
    def predict(
        self,
        x_t: Float[Tensor, " n *x"],
        t: Float[Tensor, " n"],
        conditioning: Conditioning,
        with_camera: Bool[Tensor, " n"],
    ) -> Float[Tensor, " n *x"]:
        """Noise at x_t and t; with_camera says which rows use their camera."""
        return self._predict(x_t, t, conditioning, with_camera)

    def learn(self, x: Float[Tensor, " b *x"], conditioning: Conditioning, generator: Generators) -> int:
        """One step of AdamW on `loss` with random t and noise for x; returns its network evaluations."""
        t = draw.uniform(len(x), generator).to(x.dtype)
        noise = draw.standard_normal(tuple(x.shape), generator).to(x.dtype)
        with_camera = draw.uniform(len(x), generator) >= self.camera_dropout
        t, noise, with_camera = at_once(x.device, t, noise, with_camera)
        with torch.enable_grad():
            loss = self.loss(x, t, noise, conditioning, with_camera)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return len(x)

    def loss(
        self,
        x: Float[Tensor, " b *x"],
        t: Float[Tensor, " b"],
        noise: Float[Tensor, " b *x"],
        conditioning: Conditioning,
        with_camera: Bool[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of the network on x noised to t, in what it predicts (eps, v or x0)."""
        x = x.detach()
        alpha, sigma = coefficients(self.prior.schedule, t, x)
        x_t = alpha * x + sigma * noise
        predicted = self._predict(x_t, t, conditioning, with_camera)
        target, output = (from_eps(self.prior.kind, e, x_t, alpha, sigma) for e in (noise, predicted))
        return (output - target).square().mean()

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights and the optimizer's moments, named weight.*, step.*, exp_avg.* and exp_avg_sq.*."""
        tensors = {f"weight.{name}": p.detach() for name, p in self._trained().items()}
        for name, p in self._trained().items():
            tensors |= {f"{key}.{name}": torch.as_tensor(v) for key, v in self.optimizer.state.get(p, {}).items()}
        return tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the result of `state_dict`, in place. Raises ValueError if it does not fit this student."""
        trained = self._trained()
        shapes = {name: state[f"weight.{name}"].shape for name in trained if f"weight.{name}" in state}
        if shapes != {name: p.shape for name, p in trained.items()}:
            raise ValueError(f"the state does not fit this student: another prior, or another rank than {self.rank}")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state[f"weight.{name}"])
        groups = self.optimizer.state_dict()
        groups["state"] = {}
        for i, name in enumerate(trained):
            keys = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(found in state for found in keys.values()):
                groups["state"][i] = {key: state[found].clone() for key, found in keys.items()}
        self.optimizer.load_state_dict(groups)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def _predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, with_camera: Tensor) -> Tensor:
        condition = conditioning.positive
        camera = x_t.new_zeros(len(x_t), CAMERA_SIZE)
        if condition.camera is not None:
            camera = condition.camera.to(x_t).flatten(1) * with_camera[:, None]
        return self.prior.predict_with(partial(self.unet, class_labels=camera), x_t, t, condition)


class _CameraEmbedding(nn.Module):
    """From a camera [N, 16] to an addend of the time embedding [N, D]; zero at first."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.first, self.last = (
            nn.Linear(n, width, device="meta").to_empty(device="cpu") for n in (CAMERA_SIZE, width)
        )
        _init_uniform(self.first.weight, generator)
        for zero in (self.first.bias, self.last.weight, self.last.bias):
            nn.init.zeros_(zero)

    def forward(self, camera: Tensor) -> Tensor:
        """Computes in float32, because low precision would round the camera."""
        return self.last(nn.functional.silu(self.first(camera.float())))


def _with_lora(unet: Any, rank: int, generator: torch.Generator) -> Any:
    """A copy of the network with LoRA in its attention layers; the frozen weights are shared, not copied."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: type  pip install 'distill3d[student]'") from error
    shared = {id(tensor): tensor for tensor in _tensors(unet)}
    network = copy.deepcopy(unet, shared)
    before = torch.get_rng_state()  # peft draws from the global generator; the weights are drawn again below
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), network)
    torch.set_rng_state(before)
    for name, p in network.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
            _init_uniform(p, generator) if "lora_A" in name else nn.init.zeros_(p)
    return network


def _init_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """U[-1, 1) / sqrt(inputs), PyTorch's own choice for a linear layer."""
    values = torch.rand(weight.shape, generator=generator, device=generator.device)
    with torch.no_grad():
        weight.copy_((2 * values - 1) / weight.shape[1] ** 0.5)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
