"""Ten plain meshes get a texture on the bundled prior: five of the toybox's kinds, five of shapes
that it has never seen, with the prompt of the kind that is nearest.

    python benchmarks/texture.py --out bench-texture [--meshes 10] [--picture docs/images/textures.png]

Each is written as a gray GLB, painted and read back. It prints in how many of 8 views the second
evaluator names the right color (and, for the toybox's kinds, the right kind), whether the file's geometry is the
input's, how far the file's picture is from the painted surface's, and how much colors differ between places close to
either side of the UV map's seams, in the file and as they were painted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from unlit import unlit_views

from distill3d.cameras import turntable
from distill3d.distill.recipes import LAPTOP_TEXTURE
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.export.video import contact_sheet, save_image
from distill3d.files import nan_as_null
from distill3d.meshes.files import read_mesh, save_mesh
from distill3d.meshes.mesh import Mesh, placed, weld
from distill3d.priors.loading import load_prior
from distill3d.runs.objects import Config, generate, load_scene, render_views
from distill3d.scenes.mesh import MeshOptions, MeshScene
from distill3d.toybox.world import build

VIEWS, SIZE = 8, 64


def torus_knot(p: int = 2, q: int = 3, tube: float = 0.22) -> trimesh.Trimesh:
    """A closed tube along a (p, q) torus knot."""
    t = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    r = 1 + 0.45 * np.cos(q * t)
    path = np.stack((0.45 * np.sin(q * t), r * np.cos(p * t), r * np.sin(p * t)), axis=1)
    along = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = np.cross(along, [1.0, 0, 0])
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    ring = np.cos(angle)[:, None] * side[:, None] + np.sin(angle)[:, None] * np.cross(along, side)[:, None]
    vertices = (path[:, None] + tube * ring).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(160), np.arange(20), indexing="ij")
    a, b = (i * 20 + j).ravel(), (i * 20 + (j + 1) % 20).ravel()
    c, d = ((i + 1) % 160 * 20 + j).ravel(), ((i + 1) % 160 * 20 + (j + 1) % 20).ravel()
    mesh = trimesh.Trimesh(vertices, np.concatenate((np.stack((a, c, b), 1), np.stack((b, c, d), 1))), process=False)
    if mesh.volume < 0:
        mesh.invert()
    return mesh


def _together(parts: list[trimesh.Trimesh]) -> trimesh.Trimesh:
    first = np.cumsum([0] + [len(part.vertices) for part in parts])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, first, strict=False)])
    return trimesh.Trimesh(np.concatenate([part.vertices for part in parts]), faces, process=False)


def person() -> trimesh.Trimesh:
    """A figure of capsules."""
    body = trimesh.creation.capsule(height=0.7, radius=0.28)
    head = trimesh.creation.icosphere(3, radius=0.24).apply_translation([0, 0, 0.82])
    parts = [body, head]
    for y in (-0.16, 0.16):
        parts.append(trimesh.creation.capsule(height=0.6, radius=0.11).apply_translation([0, y, -0.85]))
    for y in (-0.4, 0.4):
        parts.append(trimesh.creation.capsule(height=0.5, radius=0.09).apply_translation([0, y, 0.1]))
    return _together(parts)


def teapot() -> trimesh.Trimesh:
    """A body, a spout, a handle and a lid."""
    body = trimesh.creation.icosphere(3, radius=0.7).apply_scale([1, 1, 0.8])
    spout = trimesh.creation.cylinder(0.1, 0.7, sections=24)
    spout.apply_transform(trimesh.transformations.rotation_matrix(-0.9, [1, 0, 0])).apply_translation([0, 0.8, 0.2])
    handle = trimesh.creation.torus(0.3, 0.07)
    handle.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0]))
    handle.apply_translation([0, -0.8, 0.05])
    lid = trimesh.creation.icosphere(2, radius=0.15).apply_translation([0, 0, 0.62])
    return _together([body, spout, handle, lid])


def stand() -> trimesh.Trimesh:
    """Boxes and a cone: flat faces and sharp edges."""
    base = trimesh.creation.box((1.2, 1.2, 0.25)).apply_translation([0, 0, -0.6])
    post = trimesh.creation.box((0.35, 0.35, 0.9))
    tip = trimesh.creation.cone(0.5, 0.7, sections=32).apply_translation([0, 0, 0.4])
    return _together([base, post, tip])


def meshes() -> list[tuple[str, str, str | None, str, trimesh.Trimesh]]:
    """(name, prompt, kind or None, color, mesh) of the ten."""
    toys = [("chair", "red"), ("car", "blue"), ("duck", "yellow"), ("house", "green"), ("mug", "purple")]
    ten = []
    for kind, color in toys:
        toy = build(kind, "red", seed=3)
        ten.append((kind, f"a {color} {kind}", kind, color, trimesh.Trimesh(toy.vertices, toy.faces, process=False)))
    others = [
        ("knot", "a red donut", "red", torus_knot()),
        ("person", "a blue robot", "blue", person()),
        ("teapot", "a green mug", "green", teapot()),
        ("stand", "an orange table lamp", "orange", stand()),
        ("ball", "a yellow apple", "yellow", trimesh.creation.icosphere(4)),
    ]
    return ten + [(name, prompt, None, color, mesh) for name, prompt, color, mesh in others]


def save_gray(path: Path, solid: trimesh.Trimesh) -> None:
    """Writes a mesh without a texture, gray all over."""
    save_mesh(path, Mesh(np.array(solid.vertices), np.array(solid.faces), np.full(solid.vertices.shape, 0.4)))


def geometry_error(found: Mesh, source: Mesh) -> float:
    """Largest difference of a corner's coordinate, in units of the source's extent; infinite if faces differ."""
    if len(found.faces) != len(source.faces):
        return float("inf")
    difference = np.abs(found.vertices[found.faces] - source.vertices[source.faces]).max()
    return float(difference / np.ptp(source.vertices, axis=0).max())


def seams(mesh: Mesh, scene: MeshScene, step: float = 0.01) -> tuple[float, float]:
    """Mean color difference between places close to either side of seams: in the file, and as painted.

    The places lie `step` (weight of the far corner) off the middle of each edge whose two faces lie apart in the map.
    """
    assert mesh.uv is not None and mesh.uv_faces is not None
    _, faces = weld(mesh.vertices, mesh.faces)
    sides: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for f, face in enumerate(faces.tolist()):
        for k in range(3):
            low, high = sorted((face[k], face[(k + 1) % 3]))
            sides.setdefault((low, high), []).append((f, k))
    index, weights = [], []
    for pair in sides.values():
        if len(pair) != 2:
            continue
        (f, k), (g, m) = pair
        own, other = mesh.uv[mesh.uv_faces[f, [k, (k + 1) % 3]]], mesh.uv[mesh.uv_faces[g, [(m + 1) % 3, m]]]
        if np.abs(own - other).max() < 1e-5:
            continue
        index += [f, g]
        weights += [np.roll([0.5 - step / 2, 0.5 - step / 2, step], first) for first in (k, m)]
    place = np.array(index), np.array(weights)
    found = mesh.colors(*place).reshape(-1, 2, 3)
    painted = scene.color(scene.positions(*place)).detach().numpy().reshape(-1, 2, 3)
    return float(np.abs(np.diff(found, axis=1)).mean()), float(np.abs(np.diff(painted, axis=1)).mean())


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the meshes and runs")
    parser.add_argument("--meshes", type=int, default=10, help="how many of the ten")
    parser.add_argument("--steps", type=int, default=LAPTOP_TEXTURE.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="write 4 views of each here")
    arguments = parser.parse_args()
    prior, judge = load_prior("toybox", dtype="auto"), ToyboxJudge()
    rows, sheet = [], []
    for name, prompt, kind, color, solid in meshes()[: arguments.meshes]:
        path = arguments.out / f"{name}.glb"
        save_gray(path, solid)
        options = MeshOptions(mesh=str(path))
        export = dataclasses.replace(LAPTOP_TEXTURE.export, texture=512)
        recipe = dataclasses.replace(LAPTOP_TEXTURE, scene=options, export=export, steps=arguments.steps, frames=8)
        began = time.monotonic()
        result = generate(Config(prompt, recipe, seed=arguments.seed), arguments.out, force=True, prior=prior)
        seconds = time.monotonic() - began
        assert result.mesh is not None
        source, found = read_mesh(path), read_mesh(result.mesh)
        scene = load_scene(result.folder)
        painted = render_views(scene, VIEWS, SIZE)
        pictures = baked_views(found)
        verdict = judge.verdict(pictures, kind or "apple", color)  # the color is judged whatever the kind
        across, as_painted = seams(found, scene)
        row = {
            "name": name,
            "prompt": prompt,
            "color": float(verdict.color.float().mean()),
            "kind": float(verdict.kind.float().mean()) if kind else None,
            "psnr": float(-10 * (pictures - painted).square().mean().log10()),
            "geometry": geometry_error(found, source),
            "seams": across,
            "seams_painted": as_painted,
            "seconds": seconds,
        }
        rows.append(row)
        print(json.dumps(nan_as_null(row), allow_nan=False), flush=True)
        sheet.append(pictures[::2])
    (arguments.out / "texture.json").write_text(json.dumps(nan_as_null(rows), indent=1, allow_nan=False))
    own = [row["color"] for row in rows if row["kind"] is not None]
    print(f"right color, toybox kinds: {100 * np.mean(own):.1f} % of {VIEWS} views of {len(own)}")
    if arguments.picture:
        save_image(arguments.picture, contact_sheet(torch.cat(sheet), columns=4))


def baked_views(mesh: Mesh) -> torch.Tensor:
    """Pictures [VIEWS, 3, SIZE, SIZE] of a file's mesh with the file's own texture, by another renderer."""
    return unlit_views(placed(mesh), turntable(VIEWS), SIZE)[:, :3]


if __name__ == "__main__":
    main()
