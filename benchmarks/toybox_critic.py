"""The critic: bad objects for its training, and how often it says yes and no.

    distill3d bench --methods sds --prompts FILE --seeds 7 --steps 100 --views 24 --out BENCH
    python benchmarks/toybox_critic.py collect BENCH [BENCH ...] --folder toybox-training
    python -m distill3d.toybox.train critic --folder toybox-training
    python benchmarks/toybox_critic.py measure --folder toybox-training [--sheet FILE] [--cells FOLDER]

`collect` takes the objects whose silhouettes are unlike those of true toys (IoU below `--below`) and writes
`failures/failures.npz` into the training folder. `measure` reports which share of true renders that training did not
see the critic accepts, as they are and through the autoencoder, which share of each corruption it rejects, and what
it says of a sheet with one object of each kind (`--picture` of `toybox_3d.py`) and of cells of `toybox_3d.py`. The
critic is the bundled one or that of `--critic FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from distill3d.bench.cells import read_maps, read_outcome
from distill3d.cameras import BACKGROUND, turntable
from distill3d.evaluation.critic import ToyCritic
from distill3d.evaluation.ground_truth import foreground_mask, silhouette_iou, true_kind
from distill3d.toybox.captions import KIND_NAMES
from distill3d.toybox.corruptions import CORRUPTIONS
from distill3d.toybox.critic import BUNDLED, split, through
from distill3d.toybox.groups import load_groups

OPAQUE = 0.5
SOFT = 0.06  # difference from the background that counts as covered on a sheet, whose opacity was not kept
GAP = 2  # pixels between the tiles of a sheet
MEASURED = 128  # of the held-out toys, the last ones; the first ones set the threshold


def collect(benches: list[Path], folder: Path, below: float) -> None:
    """Writes the views of the benches' bad objects as premultiplied color and coverage, uint8 [N, H, W, 4]."""
    kept, objects, seen = [], 0, 0
    for bench in benches:
        for cell in sorted((bench / "cells").iterdir()):
            outcome = read_outcome(cell)
            if outcome is None or outcome.failure:
                continue
            opacity, kind, seen = read_maps(cell)[0], true_kind(outcome.prompt), seen + 1
            views = tiles(cell / "views.png", opacity.shape[-1], gap=0)[: len(opacity)]
            assert kind is not None
            quality = silhouette_iou(opacity[:, 0] > OPAQUE, turntable(len(views)), kind)
            print(f"{outcome.prompt}, {outcome.variant}: IoU {quality:.2f}", flush=True)
            if quality < below:
                color = (views - (1 - opacity) * BACKGROUND).clamp(min=0).minimum(opacity)
                kept.append((255 * torch.cat((color, opacity), dim=1)).round().byte().movedim(1, -1).numpy())
                objects += 1
    (folder / "failures").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "failures" / "failures.npz", cutouts=np.concatenate(kept))
    print(f"{objects} of {seen} objects are below {below:g}: {sum(map(len, kept))} views")


def tiles(path: Path, size: int, gap: int = GAP) -> Tensor:
    """The tiles [N, 3, size, size] of a contact sheet, row by row."""
    sheet = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).float() / 255
    pitch = size + gap
    rows, columns = ((n + gap) // pitch for n in sheet.shape[1:])
    return torch.stack(
        [
            sheet[:, pitch * r : pitch * r + size, pitch * c : pitch * c + size]
            for r in range(rows)
            for c in range(columns)
        ]
    )


def measure(critic: ToyCritic, folder: Path, sheet: Path | None, views: int, cells: list[Path], below: float) -> None:
    """Prints what the critic accepts and rejects. The sheet has one object of each kind, `views` views of each."""
    autoencoder = AutoencoderTiny.from_pretrained(BUNDLED / "vae", local_files_only=True).float().eval()
    _, held_out = split(load_groups(folder / "groups"))
    layers = torch.from_numpy(held_out.cutouts[-MEASURED:]).movedim(-1, 2).float() / 255
    images = [x[:, :3] + (1 - x[:, 3:]) * BACKGROUND for x in layers.flatten(0, 1).split(256)]

    def share(answers: list[Tensor]) -> str:
        return f"{100 * torch.cat(answers).float().mean():.1f} %"

    print("true renders accepted:", share([critic.accepts(x) for x in images]), end=", ")
    print("through the autoencoder:", share([critic.accepts(through(autoencoder, x)) for x in images]))
    generator = torch.Generator().manual_seed(9)
    for name, corruption in CORRUPTIONS.items():
        bad = corruption(layers[:, 2], layers[:, 5], generator).clamp(0, 1)
        answers = ~critic.accepts(bad[:, :3] + (1 - bad[:, 3:]) * BACKGROUND)
        print(f"{name} rejected:", share([answers]))
    if sheet is not None:
        images = tiles(sheet, critic.size).unflatten(0, (-1, views))
        rejected = torch.stack([~critic.accepts(each) for each in images])
        quality = [
            silhouette_iou(foreground_mask(each, BACKGROUND, SOFT), turntable(views), kind)
            for each, kind in zip(images, KIND_NAMES, strict=True)
        ]
        bad = torch.tensor(quality) < below
        print(f"{sheet.name}: views rejected {share([rejected])}", end=", ")
        print(f"of the {int(bad.sum())} objects below {below:g} {share([rejected[bad]])}, of the others", end=" ")
        print(share([rejected[~bad]]))
    for path in cells:
        groups: dict[str, list[Tensor]] = {}
        for file in sorted(path.glob("*.npz")):
            groups.setdefault(file.stem.rsplit("-", 2)[1], []).append(
                critic.accepts(torch.from_numpy(np.load(file)["pictures"]).float())
            )
        for run, said in groups.items():
            objects = sum(bool(answers.float().mean() >= 0.5) for answers in said)
            print(f"{path.name}, {run}: views accepted {share(said)}, objects {objects} of {len(said)}")


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["collect", "measure"])
    parser.add_argument("benches", type=Path, nargs="*", help="folders of distill3d bench, for collect")
    parser.add_argument("--folder", type=Path, default=Path("toybox-training"), help="of the training")
    parser.add_argument("--below", type=float, default=0.75, help="silhouette IoU of an object that counts as bad")
    parser.add_argument("--critic", type=Path, default=BUNDLED / "evaluator_critic", help="folder of its weights")
    parser.add_argument("--sheet", type=Path, help="picture of objects")
    parser.add_argument("--views", type=int, default=4, help="of each object on the sheet")
    parser.add_argument("--cells", type=Path, nargs="*", default=[], help="folders of cells of toybox_3d.py")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        collect(arguments.benches, arguments.folder, arguments.below)
    else:
        critic = ToyCritic(arguments.critic)
        measure(critic, arguments.folder, arguments.sheet, arguments.views, arguments.cells, arguments.below)


if __name__ == "__main__":
    main()
