"""Renders the training images: shards of uint8 images with their attributes, resumable, in parallel."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, default_accent, held_out_pairs
from distill3d.toybox.world import build, draw, random_view

SHARD = 2048
VIEWS_PER_TOY = 4
SPLITS = {"train": 24, "judge": 28, "test": 2}  # number of shards; all shards have different seeds


@dataclass(frozen=True)
class ImageSet:
    """Images [N, 64, 64, 3] uint8 and their attributes [N, 4]: kind, color, accent, view (indices)."""

    images: np.ndarray
    attributes: np.ndarray


def render_shard(path: Path, seed: int, with_held_out: bool) -> None:
    """Renders one shard of `SHARD` images to `path` (.npz); the same seed gives the same file."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 2405])
    held_out = held_out_pairs()
    images, attributes = [], []
    while len(images) < SHARD:
        kind, color = int(rng.integers(len(KIND_NAMES))), int(rng.integers(len(COLOR_NAMES)))
        if (KIND_NAMES[kind], COLOR_NAMES[color]) in held_out and not with_held_out:
            continue
        usual = default_accent(kind)
        accent = int(rng.integers(len(COLOR_NAMES))) if rng.random() < 0.3 else usual
        toy = build(KIND_NAMES[kind], COLOR_NAMES[color], COLOR_NAMES[accent], int(rng.integers(2**31)))
        for _ in range(VIEWS_PER_TOY):
            view = random_view(rng)
            image = draw(toy, view, background=float(rng.uniform(0.5, 1.0)))
            images.append(np.round(image * 255).astype(np.uint8))
            attributes.append((kind, color, accent, VIEW_WORDS.index(view.word())))
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, images=np.stack(images), attributes=np.array(attributes, dtype=np.int64))
    temporary.replace(path)


def render_splits(folder: Path, processes: int) -> None:
    """Renders the shards that are missing in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (folder / f"{split}-{i:03d}.npz", 1000 * s + i, split != "train")
        for s, (split, shards) in enumerate(SPLITS.items())
        for i in range(shards)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(render_shard, [job for job in jobs if not job[0].exists()], chunksize=1)


def load_split(folder: Path, split: str) -> ImageSet:
    """Reads all shards of a split.

    Raises:
        ValueError: if there are none.
    """
    paths = sorted(p for p in folder.glob(f"{split}-*.npz") if ".part" not in p.name)
    if not paths:
        raise ValueError(f"no {split} images in {folder}; run: python -m distill3d.toybox.train data --folder {folder}")
    shards = [np.load(p) for p in paths]
    return ImageSet(np.concatenate([s["images"] for s in shards]), np.concatenate([s["attributes"] for s in shards]))
