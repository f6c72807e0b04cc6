"""How good is the bundled prior? 500 prompts x 2 seeds, 30 DDIM steps, judged by the second evaluator.

python benchmarks/toybox_prior.py [--prompts 500] [--weights FOLDER] [--sheet docs/images/toybox_samples.png]
    [--world docs/images/toybox_world.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.images import psnr
from distill3d.export.video import contact_sheet, save_image
from distill3d.priors.loading import load_prior
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, Claim, held_out_pairs, sentence
from distill3d.toybox.world import View, build, draw, random_view
from distill3d.types import Conditioning, Prior

SCALE = 7.5  # what the pipeline of diffusers takes by default
BATCH = 50


@torch.inference_mode()
def sample(prior: Prior, texts: list[str], seed: int, scale: float = SCALE, steps: int = 30) -> torch.Tensor:
    """DDIM samples of a list of prompts, as pictures."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        x = torch.randn(len(part), *prior.sample_shape, generator=generator)
        model = Guided(prior, Conditioning(prior.embed(part), prior.embed([""] * len(part))), scale)
        pictures.append(prior.decode(ddim.sample(model, x, prior.schedule, ddim.descending(steps, start=0.999))))
    return torch.cat(pictures)


def judge_prompts(prior: Prior, judge: ToyboxJudge, count: int, scale: float) -> None:
    """Prints the shares of right kinds, colors and views, for trained and held-out pairs."""
    rng = np.random.default_rng(2024)
    held_out = sorted(held_out_pairs())
    trained = [(k, c) for k in KIND_NAMES for c in COLOR_NAMES if (k, c) not in held_out]
    for name, pairs, n in (("trained pairs", trained, count - count // 5), ("held-out pairs", held_out, count // 5)):
        chosen = [pairs[i] for i in rng.permutation(max(n, len(pairs))) % len(pairs)][:n]
        views = [VIEW_WORDS[i] for i in rng.choice(3, n)]
        claims = [
            Claim(KIND_NAMES.index(k), COLOR_NAMES.index(c), view=VIEW_WORDS.index(v))
            for (k, c), v in zip(chosen, views, strict=True)
        ]
        right = {"kind": [], "color": [], "both": [], "view": []}
        for seed in (0, 1):
            pictures = sample(prior, [sentence(c) for c in claims], seed, scale)
            for picture, (kind, color), view in zip(pictures.split(1), chosen, views, strict=True):
                verdict = judge.verdict(picture, kind, color, view)
                for key, values in right.items():
                    values.append(bool(getattr(verdict, key)))
        shares = ", ".join(f"{key} {100 * np.mean(values):.1f} %" for key, values in right.items())
        print(f"{name}: {n} prompts x 2 seeds: {shares}", flush=True)


def fresh_renders(count: int) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
    """Pictures of toys that no network has seen, with kind, color and view."""
    rng = np.random.default_rng(990)
    pictures, truth = [], []
    for _ in range(count):
        kind, color = KIND_NAMES[rng.integers(len(KIND_NAMES))], COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
        view = random_view(rng)
        toy = build(kind, color, seed=int(rng.integers(2**31)))
        pictures.append(torch.from_numpy(draw(toy, view, background=float(rng.uniform(0.5, 1.0)))).permute(2, 0, 1))
        truth.append((kind, color, view.word()))
    return torch.stack(pictures).float(), truth


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--weights", type=Path, help="another folder in the bundled prior's layout")
    parser.add_argument("--scale", type=float, default=SCALE, help="guidance scale of the samples")
    parser.add_argument("--sheet", type=Path, help="write samples of every kind from front, side and back here")
    parser.add_argument("--world", type=Path, help="write the world's own pictures of the same toys here")
    arguments = parser.parse_args()
    prior = load_prior(arguments.weights or "toybox", dtype="auto")
    renders, truth = fresh_renders(400)
    with torch.inference_mode():
        again = prior.decode(prior.encode(renders))
    print(f"autoencoder: {psnr(again, renders):.2f} dB on {len(renders)} unseen renders")
    folder = arguments.weights / "evaluator_judge" if arguments.weights else None
    judge = ToyboxJudge(folder)
    verdicts = [judge.verdict(p, k, c, v) for p, (k, c, v) in zip(renders.split(1), truth, strict=True)]
    for key in ("kind", "color", "both", "view"):
        share = np.mean([bool(getattr(v, key)) for v in verdicts])
        print(f"judge on true renders: {key} {100 * share:.1f} %")
    shown = [(k, (k + 3 * v) % len(COLOR_NAMES), v) for k in range(len(KIND_NAMES)) for v in range(3)]
    if arguments.world:
        true = [
            draw(build(KIND_NAMES[k], COLOR_NAMES[c], seed=10 * k + v), View((10, 75, 165)[v], 20)) for k, c, v in shown
        ]
        sheet = contact_sheet(torch.from_numpy(np.stack(true)).permute(0, 3, 1, 2), columns=12)
        save_image(arguments.world, sheet)
    if arguments.sheet:
        texts = [sentence(Claim(k, c, view=v)) for k, c, v in shown]
        save_image(arguments.sheet, contact_sheet(sample(prior, texts, 5, arguments.scale), columns=12))
    judge_prompts(prior, judge, arguments.prompts, arguments.scale)


if __name__ == "__main__":
    main()
