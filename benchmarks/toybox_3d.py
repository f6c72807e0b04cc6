"""Objects from sentences on the bundled priors: 24 prompts, recipes and methods, judged by 8 views.

    python benchmarks/toybox_3d.py --out bench3d [--runs laptop,sdi] [--prompts 24] [--seeds 0,1]
        [--picture docs/images/objects.png]

A run is a recipe, with the prior that it was made for, or a method, with recipe `distill`. Half of the prompts name
pairs that the priors were not trained on. Every object is one cell, a file in the output folder; finished cells are
not made again, so the benchmark can be stopped and continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

from distill3d.cameras import BACKGROUND, ELEVATION, turntable
from distill3d.distill.loop import Progress, optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import DISTILL, PRIORS, RECIPES, Recipe, method_settings
from distill3d.evaluation.critic import toy_rate
from distill3d.evaluation.evaluator import Evaluator, ToyboxJudge
from distill3d.evaluation.ground_truth import foreground_mask, silhouette_iou
from distill3d.evaluation.images import edge_concentration, sharpness
from distill3d.evaluation.views import janus_rate, lost_back
from distill3d.export.video import contact_sheet, save_image
from distill3d.files import nan_as_null, replacing
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.runs.config import to_plain
from distill3d.runs.objects import render_views
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, Claim, held_out_pairs, sentence
from distill3d.toybox.world import View, build, draw
from distill3d.types import Prior

VIEWS, SIZE = 8, 64


def prompts() -> list[tuple[str, str, bool]]:
    """One (kind, color, held out) for each kind: every other one is a held-out pair."""
    held_out = sorted(held_out_pairs(), key=lambda p: (KIND_NAMES.index(p[0]), COLOR_NAMES.index(p[1])))
    chosen = []
    for i, kind in enumerate(KIND_NAMES):
        unseen = [c for k, c in held_out if k == kind]
        colors = unseen if i % 2 else [c for c in COLOR_NAMES if c not in unseen]
        chosen.append((kind, colors[(7 * i) % len(colors)], bool(i % 2)))
    return chosen


def setting(name: str) -> tuple[Recipe, str]:
    """The recipe and the prior of a run by its name."""
    if name in RECIPES:
        return RECIPES[name], PRIORS[name]
    return dataclasses.replace(DISTILL, objective=method_settings(name)), PRIORS["distill"]


def make(prior: Prior, kind: str, color: str, recipe: Recipe, seed: int) -> tuple[torch.Tensor, dict[str, float]]:
    """One object: 8 views of it and what it took. Seconds are those of this process, on all of its threads."""
    claim = Claim(KIND_NAMES.index(kind), COLOR_NAMES.index(color))
    run = object_run(recipe, ViewPrompts(sentence(claim)), prior, seed)
    history: list[Progress] = []
    began = time.process_time()
    optimize(run, range(recipe.steps), history.append)
    seconds = time.process_time() - began
    run.scene.eval()
    pictures = render_views(run.scene, VIEWS, SIZE)
    with torch.no_grad():
        opacity = run.scene.render(turntable(VIEWS), SIZE, torch.zeros(VIEWS, 3)).opacity
    seen = opacity > 0.1
    return pictures, {
        "seconds": seconds,
        "rows": history[-1].nfe,
        "filled": float(((pictures - BACKGROUND).abs().amax(1) > 0.05).float().mean()),
        "veil": float((seen & (opacity < 0.9)).sum() / seen.sum().clamp_min(1)),
    }


def world_views(kind: str, color: str) -> torch.Tensor:
    """The same 8 views of a true toy."""
    toy = build(kind, color, seed=5)
    pictures = [draw(toy, View(i * 360 / VIEWS, ELEVATION), size=SIZE) for i in range(VIEWS)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


def judge_cell(pictures: torch.Tensor, kind: str, color: str, judge: ToyboxJudge, clip: Evaluator) -> dict[str, float]:
    """What the judge says of 8 views of one object."""
    verdict, world = judge.verdict(pictures, kind, color), world_views(kind, color)
    text = [sentence(Claim(KIND_NAMES.index(kind), COLOR_NAMES.index(color)))] * len(pictures)
    azimuths = turntable(VIEWS).azimuth
    return {
        "janus": janus_rate(pictures, azimuths, text[0], judge),
        "lost_back": lost_back(pictures, azimuths, text[0], judge),
        "toy": toy_rate(pictures),
        "right": float(verdict.both.float().mean()),
        "kind": float(verdict.kind.float().mean()),
        "color": float(verdict.color.float().mean()),
        "score": float(judge.score(pictures, text).mean()),
        "clip_score": float(clip.score(pictures, text).mean()),
        "sharpness": sharpness(pictures, world),
        "edges": edge_concentration(pictures, world),
        "iou": silhouette_iou(foreground_mask(pictures, BACKGROUND), turntable(VIEWS), kind),
    }


def table(cells: list[dict], names: list[str]) -> str:
    """Markdown: a row a run."""
    lines = [
        "| run | toy | both right | held-out pairs | score (judge) | score (`evaluator_clip`) | sharpness | edges | "
        "silhouette IoU | veil | Janus | lost back | empty or full | CPU seconds | rows |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        rows = [c for c in cells if c["run"] == name]
        if not rows:
            continue

        def mean(key: str, rows: list[dict] = rows) -> float:
            return float(np.mean([r[key] for r in rows]))

        held = [r["right"] for r in rows if r["held_out"]]
        bad = sum(not 0.02 < r["filled"] < 0.9 for r in rows)
        lines.append(
            f"| {name} | {100 * mean('toy'):.0f} % | {100 * mean('right'):.1f} % | "
            f"{100 * np.mean(held or [float('nan')]):.1f} % | "
            f"{mean('score'):.1f} | {mean('clip_score'):.1f} | "
            f"{mean('sharpness'):.2f} | {mean('edges'):.2f} | {mean('iou'):.3f} | "
            f"{mean('veil'):.2f} | {mean('janus'):.2f} | "
            f"{mean('lost_back'):.2f} | {bad} of {len(rows)} | "
            f"{mean('seconds'):.0f} | {mean('rows'):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--runs", default="laptop,sdi", help="recipes, or methods with recipe distill")
    parser.add_argument("--prompts", type=int, default=24, help="how many of the 24")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--picture", type=Path, help="write all objects of the first run and seed here, 4 views each")
    arguments = parser.parse_args()
    names, seeds = arguments.runs.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    settings = {name: setting(name) for name in names}
    arguments.out.mkdir(parents=True, exist_ok=True)
    priors = {prior: load_prior(prior, dtype="auto") for _, prior in settings.values()}
    judge = ToyboxJudge()
    clip = Evaluator(judge.folder.parent / "evaluator_clip")
    cells, sheet = [], []
    chosen = itertools.product(seeds, prompts()[: arguments.prompts], settings.items())
    for seed, (kind, color, held_out), (name, (recipe, prior)) in chosen:
        stem = f"{kind.replace(' ', '-')}-{color}-{name}-{seed}"
        path = arguments.out / f"{stem}.npz"
        if not path.exists():
            pictures, cost = make(priors[prior], kind, color, recipe, seed)
            with replacing(path) as draft:
                np.savez(draft, pictures=pictures.numpy(), cost=json.dumps(cost, allow_nan=False))
        saved = np.load(path)
        pictures, cost = torch.from_numpy(saved["pictures"]), json.loads(str(saved["cost"]))
        cell = judge_cell(pictures, kind, color, judge, clip) | cost
        cells.append(cell | {"kind_name": kind, "color_name": color, "held_out": held_out, "run": name, "seed": seed})
        print(f"{stem}: IoU {cell['iou']:.3f}, right {cell['right']:.2f}, {cost['seconds']:.0f} s", flush=True)
        if name == names[0] and seed == seeds[0]:
            sheet.append(pictures[::2])
    recipes = {name: to_plain(recipe) for name, (recipe, _) in settings.items()}
    (arguments.out / "cells.json").write_text(
        json.dumps(nan_as_null({"cells": cells, "recipes": recipes}), indent=1, allow_nan=False)
    )
    print("\n" + table(cells, names))
    if arguments.picture:
        save_image(arguments.picture, contact_sheet(torch.cat(sheet), columns=12))


if __name__ == "__main__":
    main()
