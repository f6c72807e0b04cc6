"""Whether the views of one object belong together: the side that each seems to show, and what neighbors agree on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill3d.cameras import project, rays
from distill3d.evaluation.evaluator import Evaluator
from distill3d.types import Cameras

WORDS = ("front", "side", "back")
FRONT_ENDS, BACK_BEGINS = 45.0, 135.0  # degrees: the limits of `distill3d.prompts.direction_of`
MARGIN = 15.0  # degrees beside a limit where either word may be right


def words_seen(images: Tensor, prompt: str, evaluator: Evaluator) -> list[str]:
    """Which of "PROMPT, front view", "side view" and "back view" fits each picture [N, 3, H, W] best."""
    chosen = evaluator.choose(images, [f"{prompt}, {word} view" for word in WORDS])
    return [WORDS[i] for i in chosen.tolist()]


def janus_rate(images: Tensor, azimuths: Tensor, prompt: str, evaluator: Evaluator) -> float:
    """Share of the views from the side and from behind that are read as front views; 0 is best.

    Counted are views at least 15 degrees beyond the limit between front and side, |azimuth| >= 60. The evaluator
    chooses among front, side and back of the prompt. True renders give what the evaluator gets wrong, an object that
    looks from everywhere as from the front about 1, one with a second front behind the share of the views from there.
    It does not see fronts that stick out: four noses around a head show two in profile from anywhere, and are read as
    side views; `lost_back` sees those. And it is worth what the evaluator's view words are worth: measure it on true
    renders first. General CLIP models read view words badly.

    Args:
        images: [V, 3, H, W]; azimuths: [V] degrees.

    Raises:
        ValueError: where no view is from that far round.
    """
    beyond = _turned(azimuths) >= FRONT_ENDS + MARGIN
    if not bool(beyond.any()):
        raise ValueError("the Janus rate needs views beyond 60 degrees from the front, got none")
    seen = words_seen(images[beyond], prompt, evaluator)
    return seen.count("front") / len(seen)


def sees_behind(azimuths: Tensor) -> bool:
    """Whether any view is from behind, as `lost_back` needs it."""
    return bool((_turned(azimuths) >= BACK_BEGINS + MARGIN).any())


def lost_back(images: Tensor, azimuths: Tensor, prompt: str, evaluator: Evaluator) -> float:
    """Share of the views from behind, |azimuth| >= 150, that are not read as back views; 0 is best.

    Whatever stands where the back should be: a second front, a side, nothing that could be told. So it sees every
    kind of Janus, and cannot tell it from an object that is merely unclear. Arguments as in `janus_rate`.

    Raises:
        ValueError: where no view is from behind.
    """
    behind = _turned(azimuths) >= BACK_BEGINS + MARGIN
    if not sees_behind(azimuths):
        raise ValueError("the lost back needs views beyond 150 degrees from the front, got none")
    seen = words_seen(images[behind], prompt, evaluator)
    return 1 - seen.count("back") / len(seen)


def view_accuracy(images: Tensor, azimuths: Tensor, prompt: str, evaluator: Evaluator) -> float:
    """Share of the views whose word, front, side or back, the evaluator finds right; 1 is best, 1/3 is chance.

    Views within 15 degrees of a limit between two words are not counted. Arguments and the caution are those of
    `janus_rate`; this one also sees an object without a front, or one that is turned.

    Raises:
        ValueError: where no view is counted.
    """
    turned = _turned(azimuths)
    clear = ((turned - FRONT_ENDS).abs() >= MARGIN) & ((turned - BACK_BEGINS).abs() >= MARGIN)
    if not bool(clear.any()):
        raise ValueError("the view accuracy needs views at least 15 degrees away from the limits, got none")
    seen = words_seen(images[clear], prompt, evaluator)
    true = ["front" if a < FRONT_ENDS else "back" if a > BACK_BEGINS else "side" for a in turned[clear].tolist()]
    return sum(s == t for s, t in zip(seen, true, strict=True)) / len(true)


def neighbor_similarity(images: Tensor, evaluator: Evaluator) -> float:
    """Mean cosine between the evaluator's embeddings of each view and the next, the last and the first too.

    In [-1, 1]. High where the object turns smoothly; but also where nothing changes, so an object with its front on
    every side scores best. Compare at one number of views, and with that of true renders.
    """
    embedded = evaluator.pictures(images)
    return float((embedded * embedded.roll(-1, 0)).sum(-1).mean())


def warp_error(images: Tensor, depth: Tensor, opacity: Tensor, cameras: Cameras, tolerance: float = 0.05) -> float:
    """Mean absolute color difference of surface points seen in one view and in the next; 0 is best, in [0, 1].

    Each pixel of a view (opacity above 0.9) is placed in space by its depth and looked up in the next view. Pairs
    that are not the same place, by more than `tolerance`, are left out: something stands in between. It sees colors
    that depend on the viewer and depths that are wrong, so fog and floaters too as far as they pass the tolerance.
    Pictures that were rendered from one field with colors of its own agree by construction. The next view must show
    some of the same places: with views 45 degrees apart a third of a round object is left.

    Args:
        images: [V, 3, H, H]; depth: [V, 1, H, H] ray length; opacity: [V, 1, H, H]; cameras: V of them, in a circle.

    Returns:
        the difference, NaN where no point is seen twice.
    """
    count, size = len(images), images.shape[-1]
    order = torch.arange(count).roll(-1)
    ray = rays(cameras, size, size)
    points = (ray.origins + ray.directions * depth[:, 0, ..., None].to(ray.origins)).flatten(1, 2)
    after = cameras[order]
    pixels, along = project(after, points, size, size)
    grid = (pixels / size * 2 - 1)[:, None]  # grid_sample without aligned corners: -1 and 1 are the picture's borders
    distance = (points - after.camera_to_world[:, None, :3, 3]).norm(dim=-1)

    def look_up(values: Tensor, mode: str) -> Tensor:
        return F.grid_sample(values[order].to(grid), grid, mode, "border", align_corners=False)[:, :, 0]

    there = look_up(opacity, "nearest")[:, 0] > 0.9
    same = (distance - look_up(depth, "nearest")[:, 0]).abs() < tolerance
    inside = (grid.abs() < 1).all(-1)[:, 0] & (along > 0)
    seen = (opacity[:, 0] > 0.9).flatten(1) & there & same & inside
    difference = (look_up(images, "bilinear") - images.flatten(2)).abs().mean(1)
    return float(difference[seen].mean())


def _turned(azimuths: Tensor) -> Tensor:
    """Degrees from the front, in [0, 180]."""
    return ((azimuths + 180) % 360 - 180).abs()
