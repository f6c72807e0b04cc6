"""Does the exported mesh look like the field it came from? Pictures of both, compared.

    python benchmarks/bake.py RUN [RUN ...] [--texture 1024] [--faces 20000] [--picture bake.png]

For each run folder the field is rendered from 8 views as `distill3d render` does, and the baked mesh by the
project's own rasterizer, unlit and with 4 x 4 samples a pixel. Printed are PSNR over whole pictures, and over the
pixels that both fill: what is missing between the two is the edge, soft in a field and hard in a mesh.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unlit import unlit_views

from distill3d.cameras import BACKGROUND, turntable
from distill3d.export.options import ExportOptions
from distill3d.export.video import contact_sheet, save_image
from distill3d.meshes.mesh import Mesh
from distill3d.runs.objects import load_scene
from distill3d.scenes.to_mesh import field_to_mesh

VIEWS = 8


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise in dB of values in [0, 1]."""
    return float(-10 * (a - b).square().mean().log10())


@torch.no_grad()
def compare(scene: Any, mesh: Mesh, size: int) -> tuple[float, float, Tensor]:
    """PSNR of whole pictures and of their insides, and the pictures, field above mesh [2 VIEWS, 3, size, size]."""
    views = turntable(VIEWS)
    field = [scene.render(views[i : i + 1], size, torch.full((1, 3), BACKGROUND)) for i in range(VIEWS)]
    rgb, opacity = torch.cat([r.rgb for r in field]), torch.cat([r.opacity for r in field])
    shown = unlit_views(mesh, views, size)
    inside = ((opacity > 0.99) & (shown[:, 3:] == 1)).expand_as(rgb)
    pictures = torch.cat((rgb, shown[:, :3]))
    return psnr(rgb, shown[:, :3]), psnr(rgb[inside], shown[:, :3][inside]), pictures


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--texture", type=int, default=1024)
    parser.add_argument("--faces", type=int, default=20_000)
    parser.add_argument("--resolution", type=int, default=ExportOptions.resolution)
    parser.add_argument("--level", type=float, default=ExportOptions.level, help="default: fitted to the outlines")
    parser.add_argument("--soften", type=float, default=ExportOptions.soften)
    parser.add_argument("--fit", type=int, default=ExportOptions.fit, help="steps; 0: as it was baked")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--picture", type=Path, help="write fields (upper rows) and meshes (lower) here")
    arguments = parser.parse_args()
    a = arguments
    options = ExportOptions(a.texture, a.faces, a.resolution, a.level, a.soften, a.fit)
    wholes, insides, sheet = [], [], []
    for folder in arguments.runs:
        scene = load_scene(folder)
        began = time.process_time()
        mesh = field_to_mesh(scene, options)
        seconds = time.process_time() - began
        whole, inside, pictures = compare(scene, mesh, arguments.size)
        print(f"{folder.name}: {whole:.1f} dB, inside {inside:.1f} dB; {len(mesh.faces)} faces, {seconds:.1f} s of CPU")
        wholes.append(whole)
        insides.append(inside)
        sheet.append(pictures)
    count = len(wholes)
    print(
        f"mean of {count}: {sum(wholes) / count:.1f} dB, inside {sum(insides) / count:.1f} dB; lowest {min(wholes):.1f}"
    )
    if arguments.picture:
        save_image(arguments.picture, contact_sheet(torch.cat(sheet), columns=VIEWS))


if __name__ == "__main__":
    main()
