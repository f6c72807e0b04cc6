"""A trainable companion of a frozen latent prior, for VSD and ESD: the prior's network plus LoRA and a camera.

It shares the prior's weights and adds a few of its own, so that it costs little memory and starts as the
prior: all that is added is zero at first. It learns the distribution of the pictures that are being made.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.diffusion import random as draw
from distill3d.diffusion.random import Generators
from distill3d.diffusion.schedule import coefficients, from_eps
from distill3d.files import replacing
from distill3d.priors.stable_diffusion import LatentPrior
from distill3d.types import Conditioning

POSE = 16  # numbers that describe a camera: its 4 x 4 camera-to-world matrix
WHERE = ["to_q", "to_k", "to_v", "to_out.0"]  # the projections of every attention


class Student:
    """The student of reference.student: predicts, learns, is saved and loaded; its prior stays as it is.

    The camera enters as in ProlificDreamer: its matrix through a two-layer network, added to the embedding of
    the time; "no camera" is the zero matrix, and so is that of conditions without one (2D). Unlike there,
    the camera's last layer starts at zero, so that the student starts as the prior exactly. Also unlike
    there, its text is the condition's positive one as it is, view words included.
    """

    def __init__(
        self, prior: LatentPrior, generator: torch.Generator, rank: int = 4,
        learning_rate: float = 1e-4, camera_dropout: float = 0.1,
    ):  # fmt: skip
        """LoRA of the given rank on the attention of prior's network, drawn from generator; AdamW.

        camera_dropout is the share of samples that learn without their camera, which ESD needs. Defaults as
        in threestudio's ProlificDreamer. Raises ImportError with the command to type if peft is missing,
        ValueError for settings out of range, for an offloaded prior, and for one that is told a camera itself.
        """
        if prior.offload:  # its layers are bound to hooks that a copy would share
            raise ValueError("a companion of the prior cannot be trained beside an offloaded one: leave --offload away")
        if prior.network.config.class_embed_type is not None:  # what is told there is the student's camera
            raise ValueError(f"a companion of {prior.name} cannot be trained: it is told a camera itself")
        if rank < 1 or learning_rate <= 0 or not 0.0 <= camera_dropout <= 1.0:
            raise ValueError(
                f"got rank={rank}, learning_rate={learning_rate}, camera_dropout={camera_dropout}: "
                "rank must be 1 or more, learning_rate above 0, camera_dropout in [0, 1]"
            )
        self.prior, self.rank, self.camera_dropout = prior, rank, camera_dropout
        self.unet = _with_lora(prior.network, rank, generator)
        self.unet.class_embedding = _CameraEmbedding(prior.network.time_embedding.linear_2.out_features, generator)
        self.unet.class_embedding.to(prior.device)
        self.optimizer = torch.optim.AdamW(self._trained().values(), lr=learning_rate)

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, posed: Tensor) -> Tensor:
        """Noise [N, *sample_shape] at x_t, t [N]; posed [N] (bool): which rows are told their camera."""
        return self._predict(x_t, t, conditioning, posed)

    def learn(self, x: Tensor, conditioning: Conditioning, generator: Generators) -> int:
        """One step of AdamW on `loss`; returns the rows that the network was shown."""
        t = draw.uniform(len(x), generator).to(x)
        noise = draw.normal(x, generator)
        posed = draw.uniform(len(x), generator).to(x.device) >= self.camera_dropout
        with torch.enable_grad():
            loss = self.loss(x, t, noise, conditioning, posed)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return len(x)

    def loss(self, x: Tensor, t: Tensor, noise: Tensor, conditioning: Conditioning, posed: Tensor) -> Tensor:
        """Mean squared error of the network on x noised to t, in what it predicts (eps, v or x0)."""
        x = x.detach()
        alpha, sigma = coefficients(self.prior.schedule, t, x)
        x_t = alpha * x + sigma * noise
        predicted = self._predict(x_t, t, conditioning, posed)
        wanted, got = (from_eps(self.prior.kind, e, x_t, alpha, sigma) for e in (noise, predicted))
        return (got - wanted).square().mean()

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights and the optimizer's moments, named weight.*, step.*, exp_avg.* and exp_avg_sq.*."""
        tensors = {f"weight.{name}": p.detach() for name, p in self._trained().items()}
        for name, p in self._trained().items():
            tensors |= {f"{key}.{name}": torch.as_tensor(v) for key, v in self.optimizer.state.get(p, {}).items()}
        return tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` gave, in place. Raises ValueError if it does not fit this student."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `state_dict` to a safetensors file."""
        from safetensors.torch import save_file

        with replacing(path) as draft:
            save_file({k: v.cpu().contiguous() for k, v in self.state_dict().items()}, draft)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restores what `save` wrote, in place. Raises ValueError if the file is not one or does not fit."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            self.load_state_dict(load_file(Path(path)))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no student's checkpoint: {error}") from error

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def _predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, posed: Tensor) -> Tensor:
        """What prior.predict would say if the student's network were its own."""
        camera = conditioning.positive.camera
        pose = x_t.new_zeros(len(x_t), POSE) if camera is None else camera.to(x_t).flatten(1) * posed[:, None]
        twin = copy.copy(self.prior)
        twin.network = partial(self.unet, class_labels=pose)
        return twin.predict(x_t, t, conditioning.positive)


class _CameraEmbedding(nn.Module):
    """Camera [N, 16] to what is added to the time's embedding [N, D]; zero at first."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.first, self.last = (nn.Linear(n, width, device="meta").to_empty(device="cpu") for n in (POSE, width))
        _draw_uniform(self.first.weight, generator)
        for zero in (self.first.bias, self.last.weight, self.last.bias):
            nn.init.zeros_(zero)

    def forward(self, camera: Tensor) -> Tensor:
        """Always in float32: a camera is told in a few numbers."""
        return self.last(nn.functional.silu(self.first(camera.float())))


def _with_lora(unet: Any, rank: int, generator: torch.Generator) -> Any:
    """A copy of the network with LoRA in its attention. The frozen weights are shared, not copied."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: type  pip install 'distill3d[student]'") from error
    shared = {id(tensor): tensor for tensor in _tensors(unet)}
    twin = copy.deepcopy(unet, shared)
    before = torch.get_rng_state()  # peft draws from the global generator; ours are drawn below
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=WHERE), twin)
    torch.set_rng_state(before)
    for name, p in twin.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
            _draw_uniform(p, generator) if "lora_A" in name else nn.init.zeros_(p)
    return twin


def _draw_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """U[-1, 1) / sqrt(inputs), PyTorch's own choice for a linear layer."""
    values = torch.rand(weight.shape, generator=generator, device=generator.device)
    with torch.no_grad():
        weight.copy_((2 * values - 1) / weight.shape[1] ** 0.5)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
