"""Consistency of the views of one object: which side each view shows, and whether neighboring views agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill3d.cameras import project, rays
from distill3d.evaluation.evaluator import Evaluator
from distill3d.prompts import BACK_LIMIT, FRONT_LIMIT, direction_of
from distill3d.types import Cameras

VIEW_WORDS = ("front", "side", "back")
MARGIN = 15.0  # degrees around a limit where either word may be correct


def classify_views(images: Float[Tensor, "n 3 h w"], prompt: str, evaluator: Evaluator) -> list[str]:
    """Which of "PROMPT, front view", "side view" and "back view" matches each image best."""
    chosen = evaluator.classify(images, [f"{prompt}, {word} view" for word in VIEW_WORDS])
    return [VIEW_WORDS[i] for i in chosen.tolist()]


def janus_rate(
    images: Float[Tensor, "v 3 h w"], azimuths: Float[Tensor, " v"], prompt: str, evaluator: Evaluator
) -> float:
    """Fraction of the side and back views that the evaluator classifies as front views; 0 is best.

    Counts views at least 15 degrees beyond the limit between front and side, |azimuth| >= 60. Ground-truth renders
    give the error rate of the evaluator. An object that looks like its front from everywhere gives about 1, one with
    a second front behind gives the fraction of views of it. Fronts that stick out escape: of four noses around a head
    two are in profile from anywhere, and the evaluator says side view; `lost_back` detects those. The result is only
    as good as the evaluator's view words, so measure it on ground-truth renders first. General CLIP models are poor
    at view words.

    Args:
        images: views of one object.
        azimuths: degrees, 0 is the front.

    Raises:
        ValueError: if no view has |azimuth| >= 60.
    """
    beyond = _from_front(azimuths) >= FRONT_LIMIT + MARGIN
    if not bool(beyond.any()):
        raise ValueError("the Janus rate needs views beyond 60 degrees from the front, got none")
    words = classify_views(images[beyond], prompt, evaluator)
    return words.count("front") / len(words)


def has_back_views(azimuths: Float[Tensor, " v"]) -> bool:
    """Whether any view is from behind, |azimuth| >= 150, which `lost_back` needs."""
    return bool((_from_front(azimuths) >= BACK_LIMIT + MARGIN).any())


def lost_back(
    images: Float[Tensor, "v 3 h w"], azimuths: Float[Tensor, " v"], prompt: str, evaluator: Evaluator
) -> float:
    """Fraction of the back views, |azimuth| >= 150, that are not classified as back views; 0 is best.

    Anything in place of the back counts: a second front, a side, or nothing recognizable. So it detects every kind of
    Janus, but cannot tell a Janus from an object that is merely unclear. For the arguments see `janus_rate`.

    Raises:
        ValueError: if no view is from behind.
    """
    behind = _from_front(azimuths) >= BACK_LIMIT + MARGIN
    if not bool(behind.any()):
        raise ValueError("the lost back needs views beyond 150 degrees from the front, got none")
    words = classify_views(images[behind], prompt, evaluator)
    return 1 - words.count("back") / len(words)


def view_accuracy(
    images: Float[Tensor, "v 3 h w"], azimuths: Float[Tensor, " v"], prompt: str, evaluator: Evaluator
) -> float:
    """Fraction of the views that are classified correctly as front, side or back; 1 is best, chance is 1/3.

    Views within 15 degrees of a limit between two words are not counted. Also detects an object without a front or
    one that is rotated. For the arguments and limitations see `janus_rate`.

    Raises:
        ValueError: if no view is counted.
    """
    angle = _from_front(azimuths)
    clear = ((angle - FRONT_LIMIT).abs() >= MARGIN) & ((angle - BACK_LIMIT).abs() >= MARGIN)
    if not bool(clear.any()):
        raise ValueError("the view accuracy needs views at least 15 degrees away from the limits, got none")
    words = classify_views(images[clear], prompt, evaluator)
    correct = [direction_of(a, 0.0) for a in angle[clear].tolist()]
    return sum(a == b for a, b in zip(words, correct, strict=True)) / len(correct)


def neighbor_similarity(images: Float[Tensor, "v 3 h w"], evaluator: Evaluator) -> float:
    """Mean cosine between the embeddings of each view and the next, around the full circle, in [-1, 1].

    High where the object changes smoothly with the view, but also where nothing changes, so an object with its front
    on every side scores best. Compare only at one number of views, and with ground-truth renders.
    """
    embedded = evaluator.embed_images(images)
    return float((embedded * embedded.roll(-1, 0)).sum(-1).mean())


def warp_error(
    images: Float[Tensor, "v 3 h h"],
    depth: Float[Tensor, "v 1 h h"],
    opacity: Float[Tensor, "v 1 h h"],
    cameras: Cameras,
    tolerance: float = 0.05,
) -> float:
    """Mean absolute color difference of surface points between one view and the next, in [0, 1]; 0 is best.

    Each pixel with opacity above 0.9 is placed in space by its depth and looked up in the next view. Occluded points,
    whose distances differ by more than `tolerance`, are skipped. It detects view-dependent colors and wrong depths,
    and fog and floaters within the tolerance. Images rendered from one field with view-independent colors agree by
    construction. Neighboring views must overlap: at 45 degrees apart a third of a round object remains.

    Args:
        images: views in a circle.
        depth: distance along each ray, world units.
        opacity: in [0, 1].
        cameras: the cameras of the views.

    Returns:
        The difference, NaN if no point is visible in two views.
    """
    count, size = len(images), images.shape[-1]
    order = torch.arange(count).roll(-1)
    ray = rays(cameras, size, size)
    points = (ray.origins + ray.directions * depth[:, 0, ..., None].to(ray.origins)).flatten(1, 2)
    after = cameras[order]
    pixels, along = project(after, points, size, size)
    grid = (pixels / size * 2 - 1)[:, None]  # grid_sample without aligned corners: -1 and 1 are the image borders
    distance = (points - after.camera_to_world[:, None, :3, 3]).norm(dim=-1)

    def look_up(values: Tensor, mode: str) -> Tensor:
        return F.grid_sample(values[order].to(grid), grid, mode, "border", align_corners=False)[:, :, 0]

    solid = look_up(opacity, "nearest")[:, 0] > 0.9
    same = (distance - look_up(depth, "nearest")[:, 0]).abs() < tolerance
    inside = (grid.abs() < 1).all(-1)[:, 0] & (along > 0)
    visible = (opacity[:, 0] > 0.9).flatten(1) & solid & same & inside
    difference = (look_up(images, "bilinear") - images.flatten(2)).abs().mean(1)
    return float(difference[visible].mean())


def _from_front(azimuths: Tensor) -> Tensor:
    """Degrees from the front, in [0, 180]."""
    return ((azimuths + 180) % 360 - 180).abs()
