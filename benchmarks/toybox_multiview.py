"""How good are the samples of a multi-view prior of toys, and do they show the views that the cameras ask for?

    python benchmarks/toybox_multiview.py --weights FOLDER [--prompts 200] [--seeds 2] [--cameras 48]
        [--references FOLDER] [--sheet PNG]

1. Kind, color and view: the bundled judge classifies samples in groups of four views 90 degrees apart.
2. Camera error: the angle between the azimuth of the camera and that of the true render that is most similar to the
   sample, with cameras 90 and 45 degrees apart (groups of four and eight views).
3. Consistency: the visual hull of the silhouettes of eight views, every one of which must contain it, is seen from
   eight other sides and compared with true shapes (IoU). Views that contradict each other leave a smaller hull.
4. All for pairs of kind and color from the training data and for held-out pairs, and for true renders that were
   encoded and decoded, which show the limits of the measurement.

Two minutes: --prompts 8 --seeds 1 --cameras 8.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.cameras import FOV, orbit
from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.ground_truth import silhouette_iou, silhouettes
from distill3d.export.video import contact_sheet, save_image
from distill3d.priors.loading import load_prior
from distill3d.priors.stable_diffusion import MultiViewPrior
from distill3d.scenes.hull import Hull
from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, Claim, held_out_pairs, sentence
from distill3d.toybox.world import View, build, cutout, draw
from distill3d.types import Conditioning

ELEVATION, DISTANCE = 15.0, 2.85
SCALE, STEPS = 5.0, 30  # guidance scale, DDIM steps
BATCH = 32  # images that are sampled at once
SPACING = 5.0  # degrees between the true renders that samples are compared with
TOYS = 3  # toys of different proportions that the samples of a prompt are compared with


@dataclass(frozen=True)
class Prompt:
    """A kind and a color, and whether this pair is held out from training."""

    kind: str
    color: str
    held_out: bool

    @property
    def text(self) -> str:
        """The plain caption, without a view word."""
        return sentence(Claim(KIND_NAMES.index(self.kind), COLOR_NAMES.index(self.color)))


def prompts(count: int) -> list[Prompt]:
    """`count` pairs, every fourth one held out; all kinds are about equally frequent."""
    rng = np.random.default_rng(2026)
    pairs = held_out_pairs()
    chosen: list[Prompt] = []
    for i in range(count):
        held_out = i % 4 == 3
        kinds = [k for k in KIND_NAMES if not held_out or any(h == k for h, _ in pairs)]
        fewest = min(sum(p.kind == k for p in chosen) for k in kinds)
        kind = str(rng.choice([k for k in kinds if sum(p.kind == k for p in chosen) == fewest]))
        colors = [c for c in COLOR_NAMES if ((kind, c) in pairs) == held_out]
        chosen.append(Prompt(kind, str(rng.choice(colors)), held_out))
    return chosen


def first_azimuths(count: int, seed: int) -> Tensor:
    """Azimuths [count] in degrees of the first views, at most 30 from the front.

    Views at multiples of 90 degrees from them are not near the limits between two view words.
    """
    return 60 * torch.rand(count, generator=torch.Generator().manual_seed(100 + seed)) - 30


@torch.inference_mode()
def sample(prior: MultiViewPrior, chosen: Sequence[Prompt], azimuths: Tensor, seed: int) -> Tensor:
    """DDIM samples [N, V, 3, 64, 64] of N prompts from azimuths [N, V] in degrees."""
    views = azimuths.shape[1]
    prior.join(views)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for rows in torch.arange(len(chosen)).split(BATCH // views):
        texts = [chosen[i].text for i in rows.tolist() for _ in range(views)]
        cameras = orbit(azimuths[rows].flatten(), ELEVATION, DISTANCE, FOV)
        conditioning = Conditioning(prior.embed(texts), prior.embed([""] * len(texts)))
        conditioning = conditioning.with_camera(cameras.camera_to_world, negative=not prior.camera_guidance)
        model = Guided(prior, conditioning, SCALE)
        x = torch.randn(len(texts), *prior.sample_shape, generator=generator)
        images.append(prior.decode(ddim.sample(model, x, prior.schedule, ddim.descending(STEPS, start=0.999))))
    return torch.cat(images).clamp(0, 1).unflatten(0, (-1, views))


@torch.inference_mode()
def true_groups(prior: MultiViewPrior, chosen: Sequence[Prompt], azimuths: Tensor) -> Tensor:
    """Renders [N, V, 3, 64, 64] of toys that are in no training data, encoded and decoded."""
    rng = np.random.default_rng(77)
    images = []
    for prompt, row in zip(chosen, azimuths.tolist(), strict=True):
        toy = build(prompt.kind, prompt.color, seed=int(rng.integers(2**31)))
        images += [draw(toy, View(a, ELEVATION, DISTANCE), float(rng.uniform(0.5, 1))) for a in row]
    renders = torch.from_numpy(np.stack(images)).movedim(-1, 1).float()
    decoded = torch.cat([prior.decode(prior.encode(part)) for part in renders.split(BATCH)])
    return decoded.clamp(0, 1).view(*azimuths.shape, *renders.shape[1:])


def references(prompt: Prompt, folder: Path | None) -> Tensor:
    """Cutouts [TOYS, A, 4, 64, 64] of true toys from azimuths `SPACING` degrees apart; saved in `folder`."""
    path = folder / f"{prompt.kind.replace(' ', '-')}-{prompt.color}.npz" if folder else None
    if path and path.exists():
        cutouts = np.load(path)["cutouts"]
    else:
        views = [View(a, ELEVATION, DISTANCE) for a in np.arange(0, 360, SPACING).tolist()]
        toys = [build(prompt.kind, prompt.color, seed=900 + i) for i in range(TOYS)]
        cutouts = np.round(np.stack([cutout(toy, view) for toy in toys for view in views]) * 255).astype(np.uint8)
        if path:
            np.savez_compressed(path, cutouts=cutouts)
    return (torch.from_numpy(cutouts).movedim(-1, 1).float() / 255).unflatten(0, (TOYS, -1))


def estimate_azimuths(images: Tensor, cutouts: Tensor) -> Tensor:
    """Azimuths [V] in degrees of the true renders that are most similar to the images [V, 3, 64, 64] of one group.

    Images are compared by their squared difference at half size. The true render is composited over the background of
    the image, the median of its border. All views of a group are compared with the same toy, the most similar one.
    """
    border = torch.cat((images[..., :2, :].flatten(2), images[..., -2:, :].flatten(2)), dim=2)
    background = border.median(dim=2).values  # [V, 3]
    small, layers = F.avg_pool2d(images, 2), F.avg_pool2d(cutouts.flatten(0, 1), 2)
    true = layers[None, :, :3] + (1 - layers[None, :, 3:]) * background[:, None, :, None, None]  # [V, TOYS A, 3, h, w]
    distance = (small[:, None] - true).square().mean((2, 3, 4)).unflatten(1, cutouts.shape[:2])  # [V, TOYS, A]
    toy = distance.amin(2).sum(0).argmin()
    return SPACING * distance[:, toy].argmin(1).float()


def camera_errors(groups: Tensor, chosen: Sequence[Prompt], azimuths: Tensor, folder: Path | None) -> Tensor:
    """Angles [N, V] in degrees, in [0, 180], between the cameras' azimuths and the estimated ones.

    The light is fixed to the world, so its shading shows the azimuth even of toys that are nearly round.
    """
    found = [estimate_azimuths(g, references(p, folder)) for g, p in zip(groups, chosen, strict=True)]
    return ((torch.stack(found) - azimuths + 180) % 360 - 180).abs()


@torch.inference_mode()
def hull_agreement(prior: MultiViewPrior, groups: Tensor, chosen: Sequence[Prompt], azimuths: Tensor) -> Tensor:
    """IoU [N] of the silhouettes of the groups' visual hulls, from between their cameras, with those of true shapes."""
    agreement = []
    for images, prompt, row in zip(groups, chosen, azimuths, strict=True):
        matte = prior.matte(images)
        assert matte is not None
        cameras = orbit(row, ELEVATION, DISTANCE, FOV)
        radius = DISTANCE * math.sin(math.radians(FOV) / 2)
        between = orbit(row + (row[1] - row[0]) / 2, ELEVATION, DISTANCE, FOV)
        try:
            mesh = Hull(cameras, torch.cat((images * matte, matte), dim=1), radius, tolerance=0).mesh()
            masks = silhouettes(mesh, between, images.shape[-1])
            agreement.append(silhouette_iou(masks, between, prompt.kind))
        except ValueError:  # the views have no common part
            agreement.append(0.0)
    return torch.tensor(agreement)


def judge_groups(judge: ToyboxJudge, groups: Tensor, chosen: Sequence[Prompt], azimuths: Tensor) -> dict[str, Tensor]:
    """Whether kind, color, both and view are correct, each bool [N, V]."""
    verdicts = [
        judge.verdict(images, prompt.kind, prompt.color, [View(a, ELEVATION).word() for a in row])
        for images, prompt, row in zip(groups, chosen, azimuths.tolist(), strict=True)
    ]
    return {
        "kind": torch.stack([v.kind for v in verdicts]),
        "color": torch.stack([v.color for v in verdicts]),
        "both": torch.stack([v.both for v in verdicts]),
        "view": torch.stack([v.view for v in verdicts]),
    }


def report(name: str, chosen: Sequence[Prompt], correct: dict[str, Tensor] | None, errors: Tensor | None) -> None:
    """Prints one line each for all prompts, for trained and for held-out pairs."""
    held_out = torch.tensor([p.held_out for p in chosen])
    for label, rows in (("all", held_out | True), ("trained", ~held_out), ("held-out", held_out)):
        parts = []
        if correct is not None:
            parts += [f"{key} {100 * value[rows].float().mean():.1f} %" for key, value in correct.items()]
        if errors is not None:
            some = errors[rows]
            parts.append(f"camera error: median {some.median():.1f}, mean {some.mean():.1f} degrees")
            parts.append(f"{100 * (some > 45).float().mean():.1f} % above 45 degrees")
        print(f"{name}, {label} ({int(rows.sum())} groups): {', '.join(parts)}", flush=True)


def report_kinds(errors: Tensor, chosen: Sequence[Prompt]) -> None:
    """Prints the camera error of each kind."""
    for kind in KIND_NAMES:
        rows = torch.tensor([p.kind == kind for p in chosen])
        some = errors[rows].flatten()
        if len(some):
            print(f"  {kind}: median {some.median():.0f}, {100 * (some > 45).float().mean():.0f} % above 45 degrees")


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the multi-view prior")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts for the judge")
    parser.add_argument("--seeds", type=int, default=2, help="groups per prompt")
    parser.add_argument("--cameras", type=int, default=48, help="number of prompts for the camera error")
    parser.add_argument("--references", type=Path, help="folder in which true renders are saved for later runs")
    parser.add_argument("--sheet", type=Path, help="image file for the groups of eight views (24 prompts: all kinds)")
    arguments = parser.parse_args()
    folder: Path | None = arguments.references
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    prior = load_prior(arguments.weights, dtype="auto")
    if not isinstance(prior, MultiViewPrior):
        parser.error(f"{arguments.weights} is not a multi-view prior")
    judge, chosen = ToyboxJudge(), prompts(arguments.prompts)
    few = chosen[: arguments.cameras]

    azimuths = first_azimuths(len(chosen), 0)[:, None] + 90 * torch.arange(4)
    truth = true_groups(prior, chosen, azimuths)
    errors = camera_errors(truth[: len(few)], few, azimuths[: len(few)], folder)
    report("true renders, 90 degrees", chosen, judge_groups(judge, truth, chosen, azimuths), None)
    report("true renders, 90 degrees", few, None, errors)
    report_kinds(errors, few)
    for spacing, views, used in ((90, 4, chosen), (45, 8, few)):
        azimuths = torch.cat([first_azimuths(len(used), s) for s in range(arguments.seeds)])[:, None]
        azimuths = azimuths + spacing * torch.arange(views)
        groups = torch.cat([sample(prior, used, a, s) for s, a in enumerate(azimuths.split(len(used)))])
        if arguments.sheet and views == 8:
            save_image(arguments.sheet, contact_sheet(groups[: len(used)].flatten(0, 1), columns=16))
        repeated = used * arguments.seeds
        report(f"samples, {spacing} degrees", repeated, judge_groups(judge, groups, repeated, azimuths), None)
        rows = [i for i in range(len(repeated)) if i % len(used) < len(few)]
        measured = [repeated[i] for i in rows]
        errors = camera_errors(groups[rows], measured, azimuths[rows], folder)
        report(f"samples, {spacing} degrees", measured, None, errors)
        report_kinds(errors, measured)
        if views == 8:
            true = true_groups(prior, few, azimuths[: len(few)])
            for name, some in (("true renders", true), ("samples", groups[: len(few)])):
                hulls = hull_agreement(prior, some, few, azimuths[: len(few)])
                print(f"{name}, hull of eight views: IoU {hulls.mean():.3f} from between", flush=True)


if __name__ == "__main__":
    main()
