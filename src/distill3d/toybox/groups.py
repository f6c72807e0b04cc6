"""Renders the training data of the multi-view prior: toys, each from eight cameras, as images with an alpha channel.

Training picks four or eight views of a toy and composites them over random gray backgrounds.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, default_accent, held_out_pairs
from distill3d.toybox.world import DISTANCES, View, build, cutout

VIEWS = 8  # images of a toy
SHARD = 200  # toys in a file
SHARDS = 32
ELEVATIONS = (-8.0, 45.0)  # degrees
OVERHEAD_ELEVATIONS = (45.0, 85.0)
LAYOUTS = ("ring", "two rings", "scattered")
LAYOUT_PROBABILITIES = (0.4, 0.25, 0.35)


@dataclass(frozen=True)
class Groups:
    """N toys, each rendered from `VIEWS` cameras."""

    cutouts: np.ndarray  # [N, VIEWS, 64, 64, 4] uint8: premultiplied color and coverage, see `world.cutout`
    attributes: np.ndarray  # [N, 3]: kind, color, accent (indices)
    cameras: np.ndarray  # [N, VIEWS, 3] float32: azimuth and elevation in degrees, distance in world units
    layouts: np.ndarray  # [N]: index into `LAYOUTS`

    def view_word(self, toy: int, view: int) -> int:
        """Index into `VIEW_WORDS` of the direction from which one image is rendered."""
        azimuth, elevation, _ = self.cameras[toy, view].tolist()
        return VIEW_WORDS.index(View(azimuth, elevation).word())


def random_cameras(rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """A layout and the azimuths, elevations and distances [VIEWS, 3] of the cameras around one toy.

    ring: 45 degrees apart at one elevation. two rings: two times four views 90 degrees apart, each ring with a start
    and an elevation of its own; views 0, 2, 4, 6 are the first ring. scattered: all angles are random, and one toy in
    seven has overhead views too. All cameras of a toy have the same distance.
    """
    layout = int(rng.choice(len(LAYOUTS), p=LAYOUT_PROBABILITIES))
    start, other = rng.uniform(-180, 180, 2)
    if LAYOUTS[layout] == "ring":
        azimuth = start + 45.0 * np.arange(VIEWS)
        elevation = np.full(VIEWS, rng.uniform(*ELEVATIONS))
    elif LAYOUTS[layout] == "two rings":
        first, second = rng.uniform(*ELEVATIONS, 2)
        azimuth = np.stack((start + 90.0 * np.arange(4), other + 90.0 * np.arange(4)), axis=1).ravel()
        elevation = np.tile((first, second), 4)
    else:
        azimuth = rng.uniform(-180, 180, VIEWS)
        elevation = rng.uniform(*ELEVATIONS, VIEWS)
        if rng.random() < 1 / 7:
            elevation = np.where(rng.random(VIEWS) < 0.5, rng.uniform(*OVERHEAD_ELEVATIONS, VIEWS), elevation)
    azimuth = (azimuth + 180) % 360 - 180
    distance = np.full(VIEWS, rng.uniform(*DISTANCES))
    return layout, np.stack((azimuth, elevation, distance), axis=1).astype(np.float32)


def render_groups(path: Path, seed: int, toys: int = SHARD) -> None:
    """Renders one shard of toys of the training pairs to `path` (.npz); the same seed gives the same file."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 1606])
    held_out = held_out_pairs()
    cutouts, attributes, cameras, layouts = [], [], [], []
    while len(cutouts) < toys:
        kind, color = int(rng.integers(len(KIND_NAMES))), int(rng.integers(len(COLOR_NAMES)))
        if (KIND_NAMES[kind], COLOR_NAMES[color]) in held_out:
            continue
        accent = int(rng.integers(len(COLOR_NAMES))) if rng.random() < 0.3 else default_accent(kind)
        toy = build(KIND_NAMES[kind], COLOR_NAMES[color], COLOR_NAMES[accent], int(rng.integers(2**31)))
        layout, angles = random_cameras(rng)
        images = np.stack([cutout(toy, View(*row)) for row in angles.tolist()])
        cutouts.append(np.round(images * 255).astype(np.uint8))
        attributes.append((kind, color, accent))
        cameras.append(angles)
        layouts.append(layout)
    temporary = path.with_suffix(".part.npz")
    np.savez(
        temporary,
        cutouts=np.stack(cutouts),
        attributes=np.array(attributes, dtype=np.int64),
        cameras=np.stack(cameras),
        layouts=np.array(layouts, dtype=np.int64),
    )
    temporary.replace(path)


def render_all_groups(folder: Path, processes: int, shards: int = SHARDS) -> None:
    """Renders the shards that are missing in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder / f"groups-{i:03d}.npz", i) for i in range(shards)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(render_groups, [job for job in jobs if not job[0].exists()], chunksize=1)


def load_groups(folder: Path) -> Groups:
    """Reads all shards in a folder.

    Raises:
        ValueError: if there are none.
    """
    paths = sorted(p for p in folder.glob("groups-*.npz") if ".part" not in p.name)
    if not paths:
        raise ValueError(
            f"no groups of views in {folder}; run: python -m distill3d.toybox.train multiview --folder {folder.parent}"
        )
    shards = [np.load(p) for p in paths]
    names = ("cutouts", "attributes", "cameras", "layouts")
    return Groups(*(np.concatenate([s[name] for s in shards]) for name in names))
