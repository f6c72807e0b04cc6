"""What each kind of scene can do without a diffusion model: fitted to 32 views of toys, judged on views held out.

    python benchmarks/reconstruction.py [--scenes voxels,hash,splats,mesh] [--toys "red mushroom,yellow duck"]
        [--size 64] [--threads 2] [--picture fits.png]

Prints a Markdown table: PSNR in dB on 16 views that were not fitted, and the seconds of the fit. Views are drawn by
the toy world's own rasterizer with 16 samples a pixel, over white.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill3d.cameras import DISTANCE, FOV, orbit
from distill3d.export.video import contact_sheet, save_image
from distill3d.render.volume import Sampling
from distill3d.scenes.fit import Fitting, fit, psnr
from distill3d.scenes.gaussians import Densification, GaussianOptions
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.hashgrid.layout import HashLayout
from distill3d.scenes.mesh import MeshOptions, MeshScene
from distill3d.scenes.voxels import VoxelOptions
from distill3d.toybox.world import ToyMesh, View, build, draw
from distill3d.types import Cameras

TRAINED, HELD_OUT = 32, 16
WHITE = torch.ones(3)
GOLDEN = 137.508  # degrees: azimuths that never repeat


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kind of scene and how it is fitted."""

    name: str
    make: Callable[[ToyMesh], Any]  # given the toy, of which only the mesh makes use
    fitting: Fitting
    penalties: dict[str, float] = dataclasses.field(default_factory=dict)


def entries() -> dict[str, Entry]:
    """All kinds of scenes, by the word on the command line."""
    voxels = VoxelOptions(resolution=64, refine=((0.4, 1.5),), sampling=Sampling(samples=80))
    hashed = HashOptions(
        layout=HashLayout(levels=8, log2_table=15, finest=128),
        half_size=1.0,
        first_levels=8,
        sampling=Sampling(samples=80),
    )
    splats = GaussianOptions(count=2000, densification=Densification(max_splats=6000))
    return {
        "voxels": Entry("voxel field", lambda toy: voxels.build(), Fitting(600, 2, 0.1), {"smooth_density": 1e-3}),
        "hash": Entry("hash field", lambda toy: hashed.build(), Fitting(200, 2, 0.01)),
        "splats": Entry("Gaussian splats", lambda toy: splats.build(), Fitting(400, 2, 0.03)),
        "mesh": Entry("texture of the true mesh", textured, Fitting(100, 2, 0.1)),
    }


def textured(toy: ToyMesh) -> Any:
    """The toy's own surface, still to be painted."""
    return MeshScene(toy.mesh(), MeshOptions(refit=False))


def views(toy: ToyMesh, count: int, first: float, size: int) -> tuple[Cameras, Tensor]:
    """Cameras all around a toy, from -8 to 60 degrees up, and its pictures [count, 3, size, size]."""
    azimuth = (first + GOLDEN * np.arange(count)) % 360 - 180
    elevation = np.linspace(-8, 60, count)
    pictures = [
        draw(toy, View(float(a), float(e)), 1.0, size, supersample=4) for a, e in zip(azimuth, elevation, strict=True)
    ]
    cameras = orbit(torch.from_numpy(azimuth).float(), torch.from_numpy(elevation).float(), DISTANCE, FOV)
    return cameras, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


@torch.no_grad()
def pairs(scene: Any, cameras: Cameras, images: Tensor) -> Tensor:
    """Four held-out pictures above the scene's: [8, 3, S, S]."""
    rows = torch.arange(0, len(images), len(images) // 4)[:4]
    made = scene.render(cameras[rows], images.shape[-1], WHITE.expand(4, 3)).rgb
    return torch.cat((images[rows], made.clamp(0, 1)))


def main() -> None:
    """See the top of this file."""
    known = entries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", default=",".join(known))
    parser.add_argument("--toys", default="red mushroom,yellow duck,blue chair")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, help="instead of each kind's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", help="PNG with held-out views above the fitted ones, a column pair per fit")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sheets = []
    print(f"Threads: {torch.get_num_threads()}; {TRAINED} views of {arguments.size} px fitted, {HELD_OUT} held out.\n")
    print("| scene | toy | PSNR, fitted views | PSNR, held-out views | seconds |\n|---|---|---|---|---|")
    for name in arguments.toys.split(","):
        color, _, kind = name.strip().partition(" ")
        toy = build(kind, color)
        fitted, held_out = (views(toy, *n, arguments.size) for n in ((TRAINED, 0.0), (HELD_OUT, 40.0)))
        for word in arguments.scenes.split(","):
            entry = known[word]
            scene = entry.make(toy)
            fitting = dataclasses.replace(entry.fitting, steps=arguments.steps or entry.fitting.steps)
            began = time.monotonic()
            fit(scene, *fitted, WHITE, fitting, entry.penalties)
            seconds = time.monotonic() - began
            figures = (psnr(scene, *fitted, WHITE), psnr(scene, *held_out, WHITE))
            print(
                f"| {entry.name} | {name.strip()} | {figures[0]:.1f} | {figures[1]:.1f} | {seconds:.0f} |", flush=True
            )
            sheets.append(pairs(scene, *held_out))
    if arguments.picture:
        save_image(arguments.picture, contact_sheet(torch.cat(sheets), columns=4))


if __name__ == "__main__":
    main()
