"""Scenes that begin with a mesh look like it."""

import math

import numpy as np
import pytest
import torch
import trimesh

from distill3d.cameras import turntable
from distill3d.meshes.mesh import Mesh
from distill3d.render.raster import column_crossings
from distill3d.scenes.from_mesh import signed_distance
from distill3d.scenes.gaussians import GaussianOptions
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.hashgrid.layout import HashLayout
from distill3d.scenes.mesh import MeshOptions, MeshScene
from distill3d.scenes.voxels import VoxelOptions
from distill3d.toybox.world import build

VIEWS = turntable(3, 20, 2.8, 40)
GRAY = torch.full((3, 3), 0.8)


def toy(kind="chair"):
    return build(kind, "red").mesh()


def psnr(a, b):
    return -10 * math.log10(float((a - b).detach().square().mean()))


def box(**change):
    solid = trimesh.creation.box((1.0, 0.6, 1.4))
    return Mesh(np.array(solid.vertices), np.array(solid.faces), **change)


def box_distance(resolution):
    axis = np.linspace(-1, 1, resolution)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    q = np.abs(np.stack((x, y, z), -1)) - [0.5, 0.3, 0.7]
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)


def test_the_distance_to_a_box_is_that_of_its_formula():
    found, _ = signed_distance(box(), 33, 1.0)
    limit = 3 * 2 / 32
    np.testing.assert_allclose(found, box_distance(33).clip(-limit, limit), atol=0.01)


def test_holes_do_not_matter_and_an_open_sheet_is_a_cell_thick():
    whole = box()
    torn = Mesh(whole.vertices, whole.faces[1:])
    inside, _ = signed_distance(torn, 24, 1.0)
    deep = box_distance(24) < -0.1
    assert (inside[deep] < 0).mean() > 0.95
    corners = np.array([[-0.7, -0.7, 0], [0.7, -0.7, 0], [0.7, 0.7, 0], [-0.7, 0.7, 0]])
    sheet = Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]]))
    thin, _ = signed_distance(sheet, 33, 1.0)
    assert (thin[:, 8:25, 8:25] < 0).any(axis=0).all() and (thin < 0).sum(axis=0).max() <= 2


def test_lines_cross_a_closed_surface_in_and_out():
    corner = torch.tensor((box().vertices + 1)[box().faces]) * 10 + torch.tensor([0.01, 0.02, 0.0])
    pixel, z, sign = column_crossings(corner, 20, 20)
    assert len(pixel) == 2 * 10 * 6 and float(sign.sum()) == 0  # columns 5 to 14, rows 7 to 12
    torch.testing.assert_close(z, 10 + 7 * sign)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (VoxelOptions(resolution=64), 25.0),
        (HashOptions(layout=HashLayout(levels=8, log2_table=14, finest=96), first_levels=8), 20.0),
        (GaussianOptions(count=4000), 18.0),  # discs reach a little beyond every outline
    ],
)
def test_a_scene_that_begins_with_a_mesh_looks_like_it(options, least):
    source = toy()
    with torch.no_grad():
        wanted = MeshScene(source, MeshOptions(colors=True)).render(VIEWS, 64, GRAY).rgb
        scene = options.build()
        scene.init_from_mesh(source)
        scene.eval()
        assert psnr(scene.render(VIEWS, 64, GRAY).rgb, wanted) > least


def test_what_cannot_begin_with_a_mesh_says_so():
    with pytest.raises(ValueError, match="fields and splats can"):
        MeshScene(toy()).init_from_mesh(toy())
