"""The family in 2D: each method on the same 100 prompts and seeds, judged against DDIM samples of other seeds.

    python benchmarks/toybox_2d.py --out bench2d [--methods ddim,sds:7.5,sdi] [--steps 150] [--picture FILE]

`sds:7.5` is a method at another guidance scale than its own, `sds:7.5@0.02` at another learning rate, too, `sdi:5:1`
is SDI of the effective guidance 5, inverted at 1, and `cfd+project` decodes, clamps and encodes the latents before
each step. `--prompts 16 --skip 100` are prompts for tuning, none of the first 100. Every method is one cell, a file in
the output folder; finished cells are not made again. `--steps` is for the family's methods; DDIM and SDI keep their
own. The reference is DDIM from two other seeds; DDIM's own distance to it is what chance alone gives. The PSNR is to
DDIM's picture from the same noise.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from distill3d.distill.image_recipes import IMAGE_RECIPES, image_recipe
from distill3d.evaluation.critic import toy_rate
from distill3d.evaluation.distances import frechet_distance
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.images import psnr, saturation, sharpness, spectrum_gap
from distill3d.export.video import contact_sheet, save_image
from distill3d.files import replacing
from distill3d.priors.loading import load_prior
from distill3d.runs.images import make_images
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, Claim, sentence
from distill3d.types import Prior

METHODS = "ddim,cfd,sds:7.5,sds:100,sjc,nfsd,csd,hifa,ism,vsd,sdi_cached,sdi"
BATCH = 20
REFERENCE_SEEDS = (1001, 1002)


def prompts(count: int, skip: int = 0) -> list[tuple[str, str, str]]:
    """(text, kind, color) of pairs spread over the world, without a view word."""
    pairs = [(k, c) for c in range(len(COLOR_NAMES)) for k in range(len(KIND_NAMES))]
    chosen = [pairs[i] for i in np.random.default_rng(7).permutation(len(pairs))[skip : skip + count]]
    return [(sentence(Claim(k, c)), KIND_NAMES[k], COLOR_NAMES[c]) for k, c in chosen]


def cell(
    folder: Path, prior: Prior, texts: list[str], name: str, seed: int, steps: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Pictures [N, 3, H, W] of one method from one seed, and what one picture cost; from the folder if there."""
    path = folder / f"{name.replace(':', '-')}-{seed}.npz"
    if not path.exists():
        settings, _, project = name.partition("+")
        settings, _, rate = settings.partition("@")
        method, scale, inversion = (*settings.split(":"), "", "")[:3]
        recipe = image_recipe(method)
        recipe = dataclasses.replace(recipe, project=recipe.project or project == "project")
        if rate:
            recipe = dataclasses.replace(recipe, rate=float(rate))
        if method not in IMAGE_RECIPES:
            recipe = dataclasses.replace(recipe, steps=steps)
        if scale:
            nominal = {"inversion_scale": float(inversion), "nominal": True} if inversion else {}
            objective = dataclasses.replace(recipe.objective, scale=float(scale), **nominal)
            recipe = dataclasses.replace(recipe, objective=objective)
        images, seconds, rows = [], 0.0, 0
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            generator = torch.Generator().manual_seed(seed + start)
            done = make_images(prior, part, recipe, generator)
            images.append(done.images)
            seconds, rows = seconds + done.seconds, rows + done.nfe
        with replacing(path) as draft:
            np.savez(draft, images=torch.cat(images).numpy(), cost=[seconds / len(texts), rows / len(texts)])
    saved = np.load(path)
    return torch.from_numpy(saved["images"]), dict(zip(("seconds", "rows"), saved["cost"].tolist(), strict=True))


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many prompts of the list")
    parser.add_argument("--steps", type=int, default=150, help="of sds, sjc and the others of the family")
    parser.add_argument("--weights", type=Path, help="another folder in the bundled prior's layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="write the first 12 pictures of every method here, a row each")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    asked = prompts(arguments.prompts, arguments.skip)
    texts = [text for text, _, _ in asked]
    prior, judge = load_prior(arguments.weights or "toybox", dtype="auto"), ToyboxJudge()
    reference = torch.cat([cell(arguments.out, prior, texts, "ddim", seed, 1)[0] for seed in REFERENCE_SEEDS])
    features = judge.embed_images(reference)
    ddim, _ = cell(arguments.out, prior, texts, "ddim", arguments.seed, 1)
    print(
        "| method | kind and color | toy | score | Frechet distance | sharpness | spectrum gap | PSNR to DDIM | "
        "saturation | seconds | NFE |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    sheet = []
    for name in arguments.methods.split(","):
        images, cost = cell(arguments.out, prior, texts, name, arguments.seed, arguments.steps)
        sheet.append(images[:12])
        pairs = zip(images.split(1), asked, strict=True)
        right = np.mean([bool(judge.verdict(image, kind, color).both) for image, (_, kind, color) in pairs])
        fidelity = np.mean([float(psnr(*pair)) for pair in zip(images, ddim, strict=True)])
        frechet = frechet_distance(judge.embed_images(images), features)
        print(
            f"| {name} | {100 * right:.0f} % | {100 * toy_rate(images):.0f} % | "
            f"{float(judge.score(images, texts).mean()):.1f} | "
            f"{100 * frechet:.1f} | {sharpness(images, reference):.2f} | "
            f"{spectrum_gap(images, reference):.2f} | {fidelity:.1f} | "
            f"{saturation(images):.2f} | {cost['seconds']:.1f} | {cost['rows']:.0f} |",
            flush=True,
        )
    if arguments.picture:
        save_image(arguments.picture, contact_sheet(torch.cat(sheet), columns=len(sheet[0])))


if __name__ == "__main__":
    main()
