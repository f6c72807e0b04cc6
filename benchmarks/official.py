"""The official implementation of SDI beside `sdi(released=True)`: same weights, same numbers, time and memory.

    git clone https://github.com/threestudio-project/threestudio
    python benchmarks/official.py --checkout threestudio [--part tiny,true,memory] [--folder true-size]

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
from collections.abc import Callable, Mapping, Sequence
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
from distill3d.prompts import ViewPrompts
from distill3d.types import Conditioning

TINY = Path(__file__).parents[1] / "tests" / "data" / "parity" / "tiny_sd"
PROMPT, ELEVATION, AZIMUTH, DISTANCE = "a red mushroom", 10.0, 70.0, 1.7
RANDOM = 0.37  # in place of random.random(): how far the inversion overshoots
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
    parser.add_argument("--side", choices=("official", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    parts = arguments.part.split(",")
    steps = arguments.inversion_steps
    if arguments.side is not None:
        print(
            json.dumps(
                peaks(arguments.side, arguments.checkout, arguments.folder, arguments.t, steps or 4), allow_nan=False
            )
        )
        return
    if "tiny" in parts:
        print(HEADER)
        for perp_neg in (False, True):
            compare("tiny", TINY, arguments.checkout, perp_neg, arguments.t, steps or 10, arguments.pairs or 40)
    if {"true", "memory"} & set(parts):
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.folder or Path(temporary) / "true-size"
            if not (folder / "model_index.json").is_file():
                subprocess.run([sys.executable, "-c", f"import official; official.write_true_size({str(folder)!r})"],
                               cwd=Path(__file__).parent, check=True)  # fmt: skip
            if "memory" in parts:
                print_peaks(arguments.checkout, folder, arguments.t, steps or 4)
            if "true" in parts:
                print(HEADER)
                for perp_neg in (False, True):
                    pairs = arguments.pairs or 3
                    compare("SD 2.1", folder, arguments.checkout, perp_neg, arguments.t, steps or 4, pairs)


HEADER = "| model | Perp-Neg | network rows | official, s | ours, s | ratio | difference |\n|" + "---|" * 7


def compare(name: str, folder: Path, checkout: Path, perp_neg: bool, t: int, steps: int, pairs: int) -> None:
    """Prints one line of the table."""
    prior = load_prior(folder)
    theirs, guidance = official_step(checkout, folder, prior, perp_neg, t, steps)
    rows: list[int] = []
    hook = guidance.unet.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    ours = our_step(prior, perp_neg, t, steps)
    reference, found = theirs(), ours()
    hook.remove()
    spent = {"official": [], "ours": []}
    for pair in range(pairs):
        order = [("official", theirs), ("ours", ours)]
        for side, step in order if pair % 2 else order[::-1]:
            gc.collect()
            began = time.process_time()
            step()
            spent[side].append(time.process_time() - began)
    ratios = np.quantile(np.divide(spent["official"], spent["ours"]), (0.5, 0.25, 0.75))
    middle = [np.median(spent[side]) for side in ("official", "ours")]
    difference = float((found - reference).abs().max() / reference.abs().max())
    print(
        f"| {name} | {'yes' if perp_neg else 'no'} | {sum(rows)} | {middle[0]:.3f} | {middle[1]:.3f} | "
        f"{ratios[0]:.3f} ({ratios[1]:.3f} to {ratios[2]:.3f}) | {difference:.1e} |",
        flush=True,
    )


def our_step(prior: FrozenPrior, perp_neg: bool, t: int, steps: int) -> Step:
    objective, conditioning = our_objective(t, steps), our_conditioning(prior, perp_neg)
    x, generator = latents(prior), torch.Generator().manual_seed(0)
    return lambda: objective.guidance(x, prior, conditioning, step=0, total=10000, generator=generator).x0


def our_objective(t: int, steps: int) -> Objective:
    """The released SDI at the timestep t, with the given overshoot and without fresh noise."""
    found = sdi_release.inversion(steps, -7.5, 0.0, random=RANDOM)
    released = sdi(inversion_steps=steps, eta=0.0, released=True)
    return dataclasses.replace(released, noise=found, timesteps=timesteps.listed([t / 1000]))


def our_conditioning(prior: FrozenPrior, perp_neg: bool) -> Conditioning:
    views = ViewPrompts(PROMPT, perp_neg=perp_neg)
    return views.conditioning(torch.tensor([AZIMUTH]), torch.tensor([ELEVATION]), prior.embed)


def latents(prior: FrozenPrior) -> torch.Tensor:
    return torch.randn(1, *prior.sample_shape, generator=torch.Generator().manual_seed(0))


def official_step(
    checkout: Path, folder: Path, prior: FrozenPrior, perp_neg: bool, t: int, steps: int
) -> tuple[Step, Any]:
    """One step of the official guidance, and the guidance itself; `prior` embeds the texts of both sides."""
    guidance, prompts = official(checkout, folder, embeddings(prior), perp_neg, steps)
    x, cameras = latents(prior), [torch.tensor([value]) for value in (ELEVATION, AZIMUTH, DISTANCE)]
    return lambda: guidance.compute_grad_sdi(x, torch.tensor([t]), prompts, *cameras)[0], guidance


def embeddings(prior: FrozenPrior) -> dict[str, torch.Tensor]:
    """The embedding [L, C] of each text of the prompt."""
    return {text: prior.embed([text]).hidden[0] for text in (PROMPT, *ViewPrompts(PROMPT).texts)}


def official(
    checkout: Path, folder: Path, texts: Mapping[str, torch.Tensor], perp_neg: bool, steps: int
) -> tuple[Any, Any]:
    """The official guidance with the weights of a folder, and what its prompt processor makes of the embeddings."""
    modules = import_official(checkout)
    settings = dict(pretrained_model_name_or_path=str(folder), half_precision_weights=False, guidance_scale=7.5)
    settings |= dict(inversion_n_steps=steps, inversion_eta=0.0)
    guidance = modules.guidance.StableDiffusionSDIGuidance(settings)
    modules.guidance.random = types.SimpleNamespace(random=lambda: RANDOM)

    class Embedded(modules.prompts.PromptProcessor):
        def preprocess_prompt(self, prompt: str) -> str:
            return prompt

        def prepare_text_embeddings(self) -> None:
            pass

        def load_from_cache(self, prompt: str) -> torch.Tensor:
            return texts[prompt]

    return guidance, Embedded(dict(prompt=PROMPT, use_perp_neg=perp_neg))()


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
        diffusers.AutoencoderKL(**VAE, scaling_factor=0.18215).save_pretrained(target / "vae")
        small = json.loads((TINY / "text_encoder" / "config.json").read_text())
        small |= {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**small)).save_pretrained(target / "text_encoder")
    shutil.copy(TINY / "model_index.json", target)


def print_peaks(checkout: Path, folder: Path, t: int, steps: int) -> None:
    print("| peak of the process, GB | loaded | guidance | gradient on an image |\n|---|---|---|---|")
    for side in ("official", "ours"):
        command = [sys.executable, __file__, "--side", side, "--checkout", str(checkout), "--folder", str(folder)]
        command += ["--t", str(t), "--inversion-steps", str(steps)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"| {side} | " + " | ".join(f"{value:.2f}" for value in found) + " |", flush=True)


def peaks(side: str, checkout: Path, folder: Path, t: int, steps: int) -> Sequence[float]:
    """Peak memory in GB after loading, after the guidance of a step on latents, and after one on an image."""
    images = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if side == "official":
        texts = dict.fromkeys((PROMPT, *ViewPrompts(PROMPT).texts), torch.zeros(77, 1024))
        guidance, prompts = official(checkout, folder, texts, False, steps)
        found = [peak()]
        guidance.set_min_max_steps(t / 1000, t / 1000)
        cameras = [torch.tensor([value]) for value in (ELEVATION, AZIMUTH, DISTANCE)]
        guidance.compute_grad_sdi(torch.randn(1, 4, 64, 64), torch.tensor([t]), prompts, *cameras)
        found.append(peak())
        loss = guidance(images.permute(0, 2, 3, 1), prompts, *cameras)["loss_sdi"]
    else:
        prior = load_prior(folder)
        objective, conditioning = our_objective(t, steps), our_conditioning(prior, False)
        prior.text_cache.free_encoders()
        found = [peak()]
        run = dict(step=0, total=10000, generator=torch.Generator().manual_seed(0))
        objective.guidance(latents(prior), prior, conditioning, **run)
        found.append(peak())
        x = prior.encode(images)
        loss = attach(x, objective.guidance(x, prior, conditioning, **run).gradient)
    loss.backward()
    return [*found, peak()]


if __name__ == "__main__":
    main()
