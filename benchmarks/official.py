"""The official implementation of SDI beside `sdi(released=True)`: same weights, same numbers, time and memory.

    git clone https://github.com/threestudio-project/threestudio
    python benchmarks/official.py --checkout threestudio [--part tiny,true,memory] [--folder true-size] [--plain]

Both read one folder of weights, in float32 on the CPU with one thread: `tiny`, the recorded model of the parity tests,
and `true`, random weights of the size of Stable Diffusion 2.1-base, which are written to --folder first (4 GB). The
sides take turns in one process, and what is compared is CPU time, so that other work on the machine counts little:
"ratio" is the official time over ours, above 1 we are faster, as median and quartiles over the pairs. "difference" is
the largest one of the denoised images over their largest value. `memory` is the peak of a process of its own for each
side, after loading, after the guidance of one step, and after the gradient of that step on an image of 512 px.

Of the checkout nothing is changed: its guidance, prompt processor and helper functions run as they are. Only what they
import from third parties without computing with it (PyTorch Lightning, OmegaConf, tiny-cuda-nn, igl) is a stub, and
the packages' __init__ files, which import all of threestudio, do not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak
from true_size import SD21_UNET, VAE

from distill3d.objectives import attach, sdi, sdi_release, timesteps
from distill3d.objectives.objective import Objective
from distill3d.priors.base import FrozenPrior
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.prompts import ViewPrompts
from distill3d.types import Conditioning

TINY = Path(__file__).parents[1] / "tests" / "data" / "parity" / "tiny_sd"
PROMPT, ELEVATION, AZIMUTH, DISTANCE = "a red mushroom", 10.0, 70.0, 1.7
RANDOM = 0.37  # in place of random.random(): how far the inversion overshoots
FACTOR = {"tiny": 2, "SD 2.1": 8}  # of the autoencoders
PACKAGES = ("", ".models", ".models.guidance", ".models.prompt_processors")
Step = Callable[[], torch.Tensor]  # one guidance step -> the denoised latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the official code (threestudio)")
    parser.add_argument("--part", default="tiny,true,memory", help="tiny, true and memory, separated by commas")
    parser.add_argument("--folder", type=Path, help="where the true-size weights are, or are to be; default: temporary")
    parser.add_argument("--t", type=int, default=250, help="timestep, of 1000")
    parser.add_argument("--inversion-steps", type=int, help="default: 10 (tiny) and 4 (true, memory)")
    parser.add_argument("--pairs", type=int, help="default: 40 (tiny) and 3 (true)")
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents (true, memory)")
    parser.add_argument("--side", choices=("official", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help="our side with prior_options.packed=false")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    parts, steps = arguments.part.split(","), arguments.inversion_steps
    tiny = Setting(arguments.checkout, TINY, False, arguments.t, steps or 10, 16, arguments.plain)
    true = dataclasses.replace(tiny, steps=steps or 4, size=arguments.size)
    if arguments.side is not None:
        found = peaks(arguments.side, dataclasses.replace(true, folder=arguments.folder))
        print(json.dumps(found, allow_nan=False))
        return
    if "tiny" in parts:
        compare("tiny", tiny, arguments.pairs or 40)
    if {"true", "memory"} & set(parts):
        with tempfile.TemporaryDirectory() as temporary:
            true = dataclasses.replace(true, folder=arguments.folder or Path(temporary) / "true-size")
            if not (true.folder / "model_index.json").is_file():
                write = f"import official; official.write_true_size({str(true.folder.resolve())!r})"
                subprocess.run([sys.executable, "-c", write], cwd=Path(__file__).parent, check=True)
            if "memory" in parts:
                print_peaks(true)
            if "true" in parts:
                compare("SD 2.1", true, arguments.pairs or 3)


@dataclass(frozen=True)
class Setting:
    """What both sides compute."""

    checkout: Path  # of the official code
    folder: Path  # with the weights
    perp_neg: bool
    t: int  # timestep, of 1000
    steps: int  # of an inversion to t = 1000
    size: int  # height and width of the latents
    plain: bool  # whether our convolutions keep no reordered weights

    def options(self, factor: int) -> PriorOptions:
        """Those of our prior, whose autoencoder has this factor."""
        return PriorOptions(image_size=self.size * factor, packed=False if self.plain else None)


def compare(name: str, setting: Setting, pairs: int) -> None:
    """Prints the table of a model: without and with Perp-Neg."""
    print("| model | Perp-Neg | network rows | official, s | ours, s | ratio | difference |\n|" + "---|" * 7)
    for perp_neg in (False, True):
        each = dataclasses.replace(setting, perp_neg=perp_neg)
        prior = load_prior(each.folder, options=each.options(FACTOR[name]))
        guidance, theirs = official_step(each, prior)
        ours, rows = our_step(each, prior), Rows()
        hook = guidance.unet.register_forward_hook(rows)
        reference, found = theirs(), ours()
        hook.remove()
        official, own = take_turns(theirs, ours, pairs)
        ratio, low, high = np.quantile(official / own, (0.5, 0.25, 0.75))
        difference = float((found - reference).abs().max() / reference.abs().max())
        seconds = f"{np.median(official):.3f} | {np.median(own):.3f}"
        spread = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
        perp = "yes" if perp_neg else "no"
        print(f"| {name} | {perp} | {rows.count} | {seconds} | {spread} | {difference:.1e} |", flush=True)


class Rows:
    """Counts the rows of a network's calls."""

    count = 0

    def __call__(self, module: torch.nn.Module, inputs: object, output: Any) -> None:
        self.count += len(output[0])


def take_turns(first: Step, second: Step, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of CPU of both in each pair; each begins every other pair."""
    spent = np.zeros((2, pairs))
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            gc.collect()
            began = time.process_time()
            (first, second)[side]()
            spent[side, pair] = time.process_time() - began
    return spent[0], spent[1]


def our_step(setting: Setting, prior: FrozenPrior) -> Step:
    objective, conditioning = our_objective(setting), our_conditioning(setting, prior)
    x, generator = latents(setting), torch.Generator().manual_seed(0)
    return lambda: objective.guidance(x, prior, conditioning, step=0, total=10000, generator=generator).x0


def our_objective(setting: Setting) -> Objective:
    """The released SDI at the timestep t, with the given overshoot and without fresh noise."""
    found = sdi_release.inversion(setting.steps, -7.5, 0.0, random=RANDOM)
    released = sdi(inversion_steps=setting.steps, eta=0.0, released=True)
    return dataclasses.replace(released, noise=found, timesteps=timesteps.listed([setting.t / 1000]))


def our_conditioning(setting: Setting, prior: FrozenPrior) -> Conditioning:
    views = ViewPrompts(PROMPT, perp_neg=setting.perp_neg)
    return views.conditioning(torch.tensor([AZIMUTH]), torch.tensor([ELEVATION]), prior.embed)


def latents(setting: Setting) -> torch.Tensor:
    return torch.randn(1, 4, setting.size, setting.size, generator=torch.Generator().manual_seed(0))


def official_step(setting: Setting, prior: FrozenPrior) -> tuple[Any, Step]:
    """The official guidance and a step of it; the prior embeds the texts of both sides."""
    texts = {text: prior.embed([text]).hidden[0] for text in (PROMPT, *ViewPrompts(PROMPT).texts)}
    guidance, prompts = official(setting, texts)
    x, t, cameras = latents(setting), torch.tensor([setting.t]), camera()
    return guidance, lambda: guidance.compute_grad_sdi(x, t, prompts, *cameras)[0]


def camera() -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in (ELEVATION, AZIMUTH, DISTANCE)]


def official(setting: Setting, texts: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
    """The official guidance with the weights of a folder, and what its prompt processor makes of the embeddings."""
    modules = import_official(setting.checkout)
    options = dict(pretrained_model_name_or_path=str(setting.folder), half_precision_weights=False, guidance_scale=7.5)
    options |= dict(inversion_n_steps=setting.steps, inversion_eta=0.0)
    guidance = modules.guidance.StableDiffusionSDIGuidance(options)
    modules.guidance.random = types.SimpleNamespace(random=lambda: RANDOM)

    class Embedded(modules.prompts.PromptProcessor):
        def preprocess_prompt(self, prompt: str) -> str:
            return prompt

        def prepare_text_embeddings(self) -> None:
            pass

        def load_from_cache(self, prompt: str) -> torch.Tensor:
            return texts[prompt]

    return guidance, Embedded(dict(prompt=PROMPT, use_perp_neg=setting.perp_neg))()


def import_official(checkout: Path) -> types.SimpleNamespace:
    """The modules of the official guidance and prompt processor; ValueError if the folder is no checkout."""
    if not (checkout / "threestudio/models/guidance/stable_diffusion_sdi_guidance.py").is_file():
        raise ValueError(f"{checkout} has no official SDI guidance: clone github.com/threestudio-project/threestudio")
    if "threestudio" not in sys.modules:
        for name in ("pytorch_lightning.utilities.rank_zero", "tinycudann", "igl", "typeguard", "omegaconf",
                     "extern.ldm_zero123.guidance"):  # fmt: skip
            stub(name)
        for name in PACKAGES:  # without running their __init__
            package = types.ModuleType(f"threestudio{name}")
            package.__path__ = [str(checkout / "threestudio" / name[1:].replace(".", "/"))]
            sys.modules[package.__name__] = package
        root = sys.modules["threestudio"]
        vars(root).update(register=lambda name: lambda found: found, info=ignore, warn=ignore, debug=ignore)
    base: Any = importlib.import_module("threestudio.utils.base")
    base.get_device = lambda: torch.device("cpu")
    prompts: Any = importlib.import_module("threestudio.models.prompt_processors.base")
    prompts.barrier = ignore
    guidance = importlib.import_module("threestudio.models.guidance.stable_diffusion_sdi_guidance")
    return types.SimpleNamespace(guidance=guidance, prompts=prompts)


def ignore(*_: object) -> None:
    """Does nothing."""


class Stub(types.ModuleType):
    """A module whose every attribute is a class that returns its first argument, as decorators do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        options = {"structured": staticmethod(with_get), "register_new_resolver": staticmethod(ignore)}
        found = type(name, (), {"__new__": lambda cls, *given: given[0] if given else object.__new__(cls), **options})
        setattr(self, name, found)
        return found


def stub(name: str) -> None:
    """Makes a module and its packages importable as stubs."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:count]), Stub(".".join(parts[:count])))
        vars(module).setdefault("__path__", [])


def with_get(settings: Any) -> Any:
    """A dataclass with the method `get` of OmegaConf's configurations."""
    type(settings).get = lambda self, name, default=None: getattr(self, name, default)
    return settings


def write_true_size(folder: str) -> None:
    """Writes a Stable Diffusion folder of the size of 2.1-base with random weights; its text encoder has one layer."""
    import diffusers
    import transformers

    target = Path(folder)
    shutil.copytree(TINY, target, ignore=shutil.ignore_patterns("unet", "vae", "text_encoder", "model_index.json"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.UNet2DConditionModel(**SD21_UNET).save_pretrained(target / "unet")
        diffusers.AutoencoderKL(**VAE).save_pretrained(target / "vae")
        small = json.loads((TINY / "text_encoder" / "config.json").read_text())
        small |= {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**small)).save_pretrained(target / "text_encoder")
    shutil.copy(TINY / "model_index.json", target)


def print_peaks(setting: Setting) -> None:
    print("| peak of the process, GB | loaded | guidance | gradient on an image |\n|---|---|---|---|")
    for side in ("official", "ours"):
        command = [sys.executable, __file__, "--side", side, "--checkout", str(setting.checkout)]
        command += ["--folder", str(setting.folder), "--t", str(setting.t), "--size", str(setting.size)]
        command += ["--inversion-steps", str(setting.steps)] + ["--plain"] * setting.plain
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"| {side} | " + " | ".join(f"{value:.2f}" for value in found) + " |", flush=True)


def peaks(side: str, setting: Setting) -> list[float]:
    """Peak memory in GB after loading, after the guidance of a step on latents, and after one on an image."""
    images = torch.rand(1, 3, 8 * setting.size, 8 * setting.size, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    if side == "official":
        texts = dict.fromkeys((PROMPT, *ViewPrompts(PROMPT).texts), torch.zeros(77, 1024))
        guidance, prompts = official(setting, texts)
        found = [peak()]
        t, cameras = torch.tensor([setting.t]), camera()
        guidance.compute_grad_sdi(latents(setting), t, prompts, *cameras)
        found.append(peak())
        x = guidance.encode_images(images)
        target = guidance.compute_grad_sdi(x, t, prompts, *cameras)[0]
        loss = 0.5 * (x - target).square().mean()
    else:
        prior = load_prior(setting.folder, options=setting.options(8))
        objective, conditioning = our_objective(setting), our_conditioning(setting, prior)
        prior.text_cache.free_encoders()
        found = [peak()]

        def guided(x: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return objective.guidance(x, prior, conditioning, step=0, total=10000, generator=generator).gradient

        guided(latents(setting))
        found.append(peak())
        x = prior.encode(images)
        loss = attach(x, guided(x))
    loss.backward()
    return [*found, peak()]


if __name__ == "__main__":
    main()
