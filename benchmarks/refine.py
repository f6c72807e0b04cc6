"""Does `distill3d refine` improve an object? Its mesh before and after, as the judge and the true shapes see them.

    python benchmarks/refine.py RUN [RUN ...] [--steps 60] [--start 0.5] [--move 0.03] [--picture refine.png]

Each run's mesh.glb is refined into a folder beside the others of --out, unless it is there, and drawn from 24 views
before and after, without light and with its texture as paint on a lattice of 128 points. Printed are the means over
the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

import torch

from distill3d.cameras import BACKGROUND, turntable
from distill3d.cli import main as cli
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.metrics import RunResult, measure
from distill3d.export.video import contact_sheet, save_image
from distill3d.meshes.files import read_mesh
from distill3d.meshes.mesh import Mesh
from distill3d.runs.objects import read_config
from distill3d.scenes.mesh import MeshOptions, MeshScene

VIEWS, SIZE, SHOWN = 24, 128, 4
CAMERAS = turntable(VIEWS)
SCORES = (
    "clip_score", "edge_concentration", "sharpness", "spectrum_gap", "janus_rate", "lost_back", "silhouette_iou",
    "chamfer",
)  # fmt: skip


def refined(run: Path, out: Path, flags: dict[str, float]) -> Path:
    """The mesh of a run after `distill3d refine` with these flags; made where it is not there yet."""
    folder = out / "-".join((run.name, *(f"{value:g}" for value in flags.values())))
    if not (found := sorted(folder.glob("*/mesh.glb"))):
        words = [word for flag, value in flags.items() for word in (f"--{flag}", f"{value:g}")]
        with contextlib.redirect_stdout(io.StringIO()):
            if cli.run(["refine", str(run), *words, "--out", str(folder)]):
                raise SystemExit(f"{run} could not be refined")
        found = sorted(folder.glob("*/mesh.glb"))
    return found[0]


@torch.no_grad()
def judged(path: Path, prompt: str, judge: ToyboxJudge, reference: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """The scores of a mesh, and some of its views."""
    scene = MeshScene(read_mesh(path), MeshOptions(mesh=str(path), refit=False, colors=True, levels=(32, 64, 128)))
    out = scene.render(CAMERAS, SIZE, torch.full((VIEWS, 3), BACKGROUND))
    cell = RunResult(
        prompt,
        out.rgb.clamp(0, 1),
        CAMERAS,
        opacity=out.opacity,
        mesh=Mesh(scene.vertices.numpy(), scene.faces.numpy()),
        evaluator=judge,
        reference=reference,
    )
    return measure(cell, SCORES), out.rgb[:: VIEWS // SHOWN]


def main() -> None:
    """Command line; see the module docstring."""
    from ranking import truth_pictures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of toybox prompts, with mesh.glb")
    parser.add_argument("--out", type=Path, default=Path("refined"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--start", type=float, default=0.5)
    parser.add_argument("--move", type=float, default=0.03)
    parser.add_argument("--picture", type=Path, help="four views of each before (left) and after")
    arguments = parser.parse_args()
    flags = {name: getattr(arguments, name) for name in ("steps", "start", "move")}
    judge, sheet = ToyboxJudge(), []
    totals: dict[str, list[dict]] = {"before": [], "after": []}
    for run in arguments.runs:
        prompt = read_config(run).prompt
        reference = truth_pictures(prompt, SIZE)
        for name, path in (("before", run / "mesh.glb"), ("after", refined(run, arguments.out, flags))):
            scores, views = judged(path, prompt, judge, reference)
            totals[name].append(scores)
            sheet.append(views)
            print(prompt, name, {k: round(v, 3) for k, v in scores.items()}, flush=True)
    print(f"\n| {len(arguments.runs)} objects | {' | '.join(SCORES)} |\n|{'---|' * (len(SCORES) + 1)}")
    for name, rows in totals.items():
        means = (sum(row[score] for row in rows) / len(rows) for score in SCORES)
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    if arguments.picture:
        save_image(arguments.picture, contact_sheet(torch.cat(sheet), columns=2 * SHOWN))


if __name__ == "__main__":
    main()
