"""The command that shows what is installed, which devices there are, and how fast a prior runs on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from distill3d.cli.objects import Generate, Quality
from distill3d.cli.plan import show_plan
from distill3d.cli.settings import nested
from distill3d.cli.shared import Flag, Model, Settings

if TYPE_CHECKING:
    import torch

    from distill3d.priors.base import FrozenPrior
    from distill3d.runs.config import PriorConfig
    from distill3d.types import Condition

BATCH = 4  # network rows in one timed call


@dataclass(frozen=True)
class Doctor:
    """Show what is installed, which devices and priors there are, and how fast a prior runs here.

    --prior none skips the last part. --plan prints what a run needs instead, without a download:
    distill3d doctor --plan --recipe paper --prior sdxl --device cuda:H100
    """

    plan: Flag = False
    """What distill3d generate needs with these flags: memory by part, network evaluations, time on a card, and flags
    with which it fits."""
    model: Model = field(default_factory=Model)
    quality: Quality = field(default_factory=Quality)
    other: Settings = field(default_factory=Settings)

    def run(self) -> int:
        """Prints all findings; returns the exit status."""
        from distill3d.runs.config import PriorConfig, from_plain

        if self.plan:
            run = Generate("a red mushroom", quality=self.quality, model=self.model, other=self.other)
            return show_plan(run.config(), run)
        if (self.quality, self.other) != (Quality(), Settings()):
            raise ValueError("settings of a run go with --plan: distill3d doctor --plan --recipe paper")
        config = from_plain(PriorConfig, nested(self.model.changes()))
        for part in (_packages(), _devices(), _priors(), _timed(config) if config.prior.lower() != "none" else ()):
            for line in part:
                print(line, flush=True)
        return 0


def _packages() -> Iterator[str]:
    """What the package requires and what its extras add, each with the version that is installed."""
    import distill3d

    yield f"distill3d {distill3d.__version__}, Python {platform.python_version()}, {platform.platform()}"
    for requirement in importlib.metadata.requires("distill3d") or ():
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name is None or (extra and extra[1] in ("dev", "docs")):
            continue
        missing = f"not installed (optional: pip install distill3d[{extra[1]}])" if extra else "MISSING"
        yield f"  {name[0]:<20} {_version(name[0]) or missing}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    import torch

    yield "devices:"
    yield f"  cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"  cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "  mps"


def _priors() -> Iterator[str]:
    from distill3d.priors.components import hub

    yield "priors:"
    for name in hub.BUNDLED:
        yield f"  {name:<14} bundled"
    for name, hub_id in hub.SHORT_NAMES.items():
        yield f"  {name:<14} {hub_id} ({_state(name)})"


def _state(name: str) -> str:
    from distill3d.priors.components import hub
    from distill3d.priors.families import check_folder

    folder = hub.cached(name)
    if folder is None:
        return "not downloaded"
    try:
        check_folder(folder)
    except (ValueError, ImportError):  # an interrupted download, or the configuration alone, for a single file
        return "partly in the local cache"
    return "in the local cache"


def _timed(config: PriorConfig) -> Iterator[str]:
    """Parameters and memory of each part of a prior, and its speed."""
    import torch

    from distill3d.priors.loading import load_prior

    began = time.monotonic()
    prior = load_prior(config.prior, config.device, config.dtype, config.prior_options)
    condition = prior.embed([""] * BATCH)
    prior.text_cache.encoders()  # embeddings in the cache would hide its size
    seconds = time.monotonic() - began
    yield f"prior {config.prior}: loaded in {seconds:.1f} s, image size {prior.image_size}, x {prior.sample_shape}"
    for part, module in prior.modules().items():
        parameters = list(module.parameters())
        count = sum(p.numel() for p in parameters) / 1e6
        size = sum(p.numel() * p.element_size() for p in parameters) / 2**20
        precision = str(parameters[0].dtype).removeprefix("torch.")
        yield f"  {part:<14} {count:8.1f} M parameters {size:8.1f} MiB {precision}"
    with torch.no_grad():
        yield from _speed(prior, condition)


def _speed(prior: FrozenPrior, condition: Condition) -> Iterator[str]:
    """Network evaluations and encoded images per second."""
    import torch

    x = torch.zeros(BATCH, *prior.sample_shape, device=prior.device)
    t = torch.full((BATCH,), 0.5, device=prior.device)
    images = torch.full((1, 3, prior.image_size, prior.image_size), 0.5, device=prior.device)
    if prior.camera_conditioned:
        condition = replace(condition, camera=torch.eye(4, device=prior.device).expand(BATCH, 4, 4))
    if prior.control is not None:
        condition = replace(condition, control=images.expand(BATCH, -1, -1, -1))
    rate = _per_second(lambda: prior.predict(x, t, condition), prior.device)
    yield f"  network: {BATCH * rate:.3g} NFE per second, in batches of {BATCH}"
    rate = _per_second(lambda: prior.encode(images), prior.device)
    yield f"  encoder: {rate:.3g} images per second, without gradient"


def _per_second(call: Callable[[], object], device: torch.device) -> float:
    import torch

    def finished() -> None:
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    finished()  # the first one also compiles and allocates
    began, calls = time.monotonic(), 0
    while calls == 0 or time.monotonic() - began < 0.5:
        finished()
        calls += 1
    return calls / (time.monotonic() - began)
