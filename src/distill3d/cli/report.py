"""What is installed, which devices there are, and how fast a prior runs on this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator

import torch

import distill3d
from distill3d.priors.base import FrozenPrior
from distill3d.priors.components import hub
from distill3d.priors.families import check_folder
from distill3d.priors.options import PriorOptions
from distill3d.types import Condition

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "trimesh", "scikit-image", "av", "tyro", "rich")
ROWS = 4  # of the network in one timed call
OPTIONAL = {
    "viser": "viewer",
    "gsplat": "splats",
    "torchmetrics": "bench",
    "matplotlib": "bench",
    "ray": "ray",
    "peft": "student",
    "sentencepiece": "t5",
    "protobuf": "t5",
}


def report(
    prior: str | None = "toybox", device: str = "cpu", dtype: str = "float32", options: PriorOptions | None = None
) -> Iterator[str]:
    """Lines for people; loads and times `prior` last, unless it is None."""
    yield f"distill3d {distill3d.__version__}, Python {platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        yield f"  {name:<14} {_version(name) or 'MISSING: pip install ' + name}"
    for name, extra in OPTIONAL.items():
        yield f"  {name:<14} {_version(name) or f'not installed (optional: pip install distill3d[{extra}])'}"
    yield f"devices: {', '.join(_devices())}"
    yield "priors:"
    for name in hub.BUNDLED:
        yield f"  {name:<14} bundled"
    for name, hub_id in hub.SHORT_NAMES.items():
        yield f"  {name:<14} {hub_id} ({_state(name)})"
    if prior:
        yield from _time_prior(prior, device, getattr(torch, dtype), options)


def _state(name: str) -> str:
    folder = hub.cached(name)
    if folder is None:
        return "not downloaded"
    try:
        check_folder(folder)
    except (ValueError, ImportError):  # an interrupted download, or the configuration alone, for a single file
        return "in the local cache in part"
    return "in the local cache"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    yield f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"cuda:{i} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    if torch.backends.mps.is_available():
        yield "mps"


def _time_prior(name: str, device: str, dtype: torch.dtype, options: PriorOptions | None) -> Iterator[str]:
    from distill3d.priors.loading import load_prior

    began = time.monotonic()
    prior = load_prior(name, device, dtype, options or PriorOptions())
    text = prior.embed([""] * ROWS)
    prior.text_cache.encoders()  # embeddings kept on disk would hide what it weighs
    seconds = time.monotonic() - began
    yield f"prior {name}: loaded in {seconds:.1f} s, pictures of {prior.image_size} px, x {prior.sample_shape}"
    for part, module in prior.modules().items():
        parameters = list(module.parameters())
        count, size = (sum(f(p) for p in parameters) for f in (torch.Tensor.numel, _bytes))
        precision = str(parameters[0].dtype).removeprefix("torch.")
        yield f"  {part:<14} {count / 1e6:8.1f} M parameters {size / 2**20:8.1f} MiB {precision}"
    yield from _speed(prior, text)


def _bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


@torch.no_grad()
def _speed(prior: FrozenPrior, text: Condition) -> Iterator[str]:
    """Network rows a second, and the same for the encoder."""
    x = torch.zeros(ROWS, *prior.sample_shape, device=prior.device)
    t = torch.full((ROWS,), 0.5, device=prior.device)
    images = torch.full((1, 3, prior.image_size, prior.image_size), 0.5, device=prior.device)
    if prior.control is not None:
        text = dataclasses.replace(text, control=images.expand(ROWS, -1, -1, -1))
    rate = _a_second(lambda: prior.predict(x, t, text), prior.device)
    yield f"  network: {ROWS * rate:.3g} evaluations a second (rows, batches of {ROWS})"
    rate = _a_second(lambda: prior.encode(images), prior.device)
    yield f"  encoder: {rate:.3g} pictures a second (without its gradient)"


def _a_second(call: Callable[[], object], device: torch.device) -> float:
    call()  # the first one also compiles and allocates
    _wait(device)
    began, calls = time.monotonic(), 0
    while calls == 0 or time.monotonic() - began < 0.5:
        call()
        _wait(device)
        calls += 1
    return calls / (time.monotonic() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
