"""One resumable training loop for every network of the prior."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Fit:
    """Training steps, learning rate schedule, weight averaging and checkpoint interval of one network."""

    steps: int
    learning_rate: float
    warmup: int = 200
    decay: float = 0.3  # fraction of the steps, at the end, in which the learning rate falls to 0
    ema: float = 0.999  # decay of the averaged weights; 0 for none
    weight_decay: float = 1e-3
    save_every: int = 250

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up, constant, then linear decay."""
        fall = min(1.0, (self.steps - step) / max(1, self.decay * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * max(fall, 0.0)


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Matrix products in bfloat16. Attention is unfused: the backward pass of the fused kernel is slow on CPUs."""
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def initialize(network: nn.Module, seed: int) -> None:
    """Draws the weights for rectifiers (He et al. 2015), in place; biases are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def train(
    name: str, network: nn.Module, fit: Fit, loss_of: Callable[[int, torch.Generator], Tensor], folder: Path
) -> nn.Module:
    """Trains `network` in place and returns it with averaged weights; resumes from `folder`/NAME.pt if it exists.

    `loss_of(step, generator)` draws its batch from the generator, which is seeded with the step: a resumed run sees
    the same batches as an uninterrupted one.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, betas=(0.9, 0.99), weight_decay=fit.weight_decay)
    average = [p.detach().clone() for p in parameters]
    state_file, start, seconds = folder / f"{name}.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    began, running = time.monotonic(), math.nan
    network.train()
    for step in range(start, fit.steps):
        for group in optimizer.param_groups:
            group["lr"] = fit.rate(step)
        loss = loss_of(step, torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(fit.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        done = step + 1
        if done % fit.save_every == 0 or done == fit.steps:
            total = seconds + time.monotonic() - began
            print(f"{name}: step {done}/{fit.steps}, loss {running:.4f}, {total:.0f} s", flush=True)
            state = dict(network=network.state_dict(), optimizer=optimizer.state_dict(), average=average)
            torch.save(state | dict(step=done, seconds=total), state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    return network.eval()
