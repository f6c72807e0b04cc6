"""Does the second evaluator rank objects as ground truth does? Spearman's correlation over toybox objects.

    python benchmarks/ranking.py FOLDER [FOLDER ...]    # of runs, of `distill3d bench`, of the cells of toybox_3d.py
    python benchmarks/ranking.py --make DIR [--prompts 12] [--methods sdi,sds]

A folder of runs (`distill3d generate`) is rendered anew and gives silhouettes and, where there is a mesh, surfaces; a
cell of toybox_3d.py keeps pictures only, and its silhouettes are guessed from the gray behind them; of a bench its
own scores are read (made with --metrics all). --make distils objects and looks at each along the way, so that there
are all qualities from fog to finished; the looks are kept in DIR as `*.npz`, and finished runs are not made again.

Printed are correlations over all objects and, since some kinds are easier to read and their shapes vary more, the
mean of those within each prompt, and the share of the pairs of one prompt that score and truth put in one order (with
a truth that is a distance, a good score puts them in the opposite one: rho -1, share 0).
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from distill3d.cameras import BACKGROUND, ELEVATION, turntable
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.ground_truth import foreground_mask, true_kind
from distill3d.evaluation.metrics import RunResult, measure
from distill3d.meshes.mesh import Mesh
from distill3d.meshes.surface import extract_surface

VIEWS, SIZE = 8, 64
CAMERAS = turntable(VIEWS)
LOOKS = (15, 30, 45, 60, 80, 100, 130, 160, 200)  # steps
TRUTHS, SCORES = ("silhouette_iou", "chamfer"), ("clip_score", "edge_concentration", "sharpness", "spectrum_gap")


def seen(scene: Any, prompt: str) -> RunResult:
    """What is seen of a scene from 8 sides, and its surface if it has one."""
    with torch.no_grad():
        out = scene.render(CAMERAS, SIZE, torch.full((VIEWS, 3), BACKGROUND))
        try:
            mesh = extract_surface(scene.query, resolution=64, half_size=scene.half_size)
        except ValueError:  # there is no surface yet
            mesh = None
    return RunResult(prompt, out.rgb.clamp(0, 1), CAMERAS, opacity=out.opacity, mesh=mesh)


def save(path: Path, cell: RunResult) -> None:
    """Keeps a look."""
    surface = {} if cell.mesh is None else {"vertices": cell.mesh.vertices, "faces": cell.mesh.faces}
    np.savez(path, prompt=cell.prompt, images=cell.images, opacity=cell.opacity, **surface)


def read(path: Path) -> RunResult:
    """A look, a cell of toybox_3d.py (its name says kind and color), or a run folder."""
    if path.is_dir():
        from distill3d.runs.objects import load_scene, read_config

        return seen(load_scene(path), read_config(path).prompt)
    kept = np.load(path)
    pictures = torch.from_numpy(kept["images" if "images" in kept else "pictures"])
    if "prompt" in kept:
        mesh = Mesh(kept["vertices"], kept["faces"]) if "vertices" in kept else None
        opacity = torch.from_numpy(kept["opacity"])
        return RunResult(str(kept["prompt"]), pictures, CAMERAS, opacity=opacity, mesh=mesh)
    *kind, color, _, _ = path.stem.split("-")
    masks = foreground_mask(pictures, BACKGROUND).float()[:, None]
    cameras = turntable(len(pictures))
    return RunResult(f"a {color} {' '.join(kind)}", pictures, cameras, opacity=masks)


def judged(path: Path, judge: ToyboxJudge) -> dict[str, Any] | None:
    """The numbers of one object; None for a prompt of another world."""
    if (path / "scores.json").is_file():
        values = json.loads((path / "scores.json").read_text())["scores"]
        prompt = json.loads((path / "cell.json").read_text())["prompt"]
        return None if true_kind(prompt) is None else values | {"prompt": prompt}
    cell = read(path)
    if true_kind(cell.prompt) is None:
        return None
    cell = replace(cell, evaluator=judge, reference=truth_pictures(cell.prompt))
    with warnings.catch_warnings(action="ignore"):  # no mesh in cells and in fog
        return measure(cell, [*SCORES, *TRUTHS]) | {"prompt": cell.prompt}


def make(folder: Path, methods: list[str], count: int) -> None:
    """Distils `count` prompts by each method, and keeps a look at each of LOOKS."""
    from toybox_3d import prompts

    from distill3d.distill.loop import ObjectRun, optimize
    from distill3d.distill.recipes import DISTILL, method_settings
    from distill3d.priors.loading import load_prior
    from distill3d.prompts import ViewPrompts

    folder.mkdir(parents=True, exist_ok=True)
    prior = load_prior("toybox")
    step = max(1, 24 // count)
    for kind, color, _ in prompts()[::step][:count]:
        for method in methods:
            stem = f"{kind.replace(' ', '_')}-{color}-{method}"
            if (folder / f"{stem}-{LOOKS[-1]}.npz").exists():
                continue
            prompt = f"a {color} {kind}"
            run = ObjectRun(replace(DISTILL, objective=method_settings(method)), ViewPrompts(prompt), prior, seed=1)
            for begin, end in zip((0, *LOOKS[:-1]), LOOKS, strict=True):
                optimize(run, range(begin, end), lambda progress: None)
                run.scene.eval()
                save(folder / f"{stem}-{end}.npz", seen(run.scene, prompt))
                run.scene.train()
            print(stem, flush=True)


def correlation(rows: list[dict], score: str, truth: str) -> tuple[float, float, float, int]:
    """Spearman's rho over all rows that have both, the mean of rho within each prompt of five objects or more, the
    share of the pairs of one prompt that both put in the same order of values, and how many rows."""
    both = [r for r in rows if score in r and truth in r]
    groups = [[r for r in both if r["prompt"] == prompt] for prompt in sorted({r["prompt"] for r in both})]

    def rho(part: list[dict]) -> float:
        if len(part) < 3:
            return float("nan")
        return float(spearmanr([r[score] for r in part], [r[truth] for r in part]).statistic)

    pairs = [(a, b) for group in groups for i, a in enumerate(group) for b in group[:i]]
    pairs = [(a, b) for a, b in pairs if a[score] != b[score] and a[truth] != b[truth]]  # fog ties at no overlap
    alike = [(a[score] > b[score]) == (a[truth] > b[truth]) for a, b in pairs]
    within = [rho(group) for group in groups if len(group) >= 5]
    return rho(both), _mean(within), _mean(alike), len(both)


def _mean(values: list) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def truth_pictures(prompt: str, size: int = SIZE) -> torch.Tensor:
    """What the world's own toy looks like from the same views [VIEWS, 3, size, size]."""
    from distill3d.toybox.captions import read_prompt
    from distill3d.toybox.world import View, build, draw

    reading = read_prompt(prompt)
    toy = build(reading.kind or "", reading.color or "red", seed=5)
    pictures = [draw(toy, View(a, ELEVATION), size=size) for a in CAMERAS.azimuth.tolist()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--make", type=Path, help="distil objects into this folder first")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--methods", default="sdi,sds")
    arguments = parser.parse_args()
    folders = [*arguments.folders, *([arguments.make] if arguments.make else [])]
    if not folders:
        parser.error("name a folder of runs or cells, or --make one")
    if arguments.make:
        make(arguments.make, arguments.methods.split(","), arguments.prompts)
    judge, rows = ToyboxJudge(), []
    for folder in folders:
        inside = folder / "cells" if (folder / "cells").is_dir() else folder
        paths = [p for p in sorted(inside.iterdir()) if p.suffix == ".npz" or (p / "config.json").is_file()]
        rows += [row for path in paths if (row := judged(path, judge)) is not None]
    print(f"{len(rows)} objects of {len({r['prompt'] for r in rows})} prompts\n")
    print("| score | truth | objects | rho over all | mean rho within a prompt | pairs in one order |")
    print("|---|---|---|---|---|---|")
    for truth in TRUTHS:
        for score in SCORES:
            over, within, alike, count = correlation(rows, score, truth)
            print(f"| {score} | {truth} | {count} | {over:.2f} | {within:.2f} | {100 * alike:.0f} % |")


if __name__ == "__main__":
    main()
