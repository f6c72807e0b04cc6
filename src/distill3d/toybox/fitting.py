"""One resumable training loop for every network of the prior."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fit:
    """How long and how fast a network is trained."""

    steps: int
    learning_rate: float
    warmup: int = 200
    decay: float = 0.3  # share of the steps, at the end, over which the rate falls to 0
    ema: float = 0.999  # decay of the averaged weights; 0 for none
    weight_decay: float = 1e-3
    save_every: int = 250

    def rate(self, step: int) -> float:
        """Learning rate: warm-up, constant, then a linear fall. Longer runs begin as shorter ones do."""
        fall = min(1.0, (self.steps - step) / max(1, self.decay * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * max(fall, 0.0)


def train(
    name: str, network: nn.Module, fit: Fit, loss_of: Callable[[int, torch.Generator], Tensor], folder: Path
) -> nn.Module:
    """Trains `network` in place and returns it with averaged weights; continues from `folder`/NAME.pt if there.

    `loss_of(step, generator)` draws its batch from the generator, which is seeded by the step: a run that was
    interrupted and continued sees the same batches as one that was not.
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
