"""What a scene of one's own needs, and what it gets from the protocol."""

import numpy as np
import pytest
import torch
from torch import nn

from distill3d.cameras import rays, turntable
from distill3d.export.options import ExportOptions
from distill3d.meshes.files import read_mesh
from distill3d.render.volume import render_rays
from distill3d.scenes.field import FieldScene
from distill3d.scenes.fit import Fitting, fit
from distill3d.scenes.gaussians import GaussianOptions
from distill3d.scenes.mesh import MeshScene
from distill3d.scenes.voxels import VoxelOptions
from distill3d.toybox.world import build
from distill3d.types import Rendering, Scene


class Fog(nn.Module, Scene):
    """The same color everywhere: a scene that defines `render` only."""

    def __init__(self):
        super().__init__()
        self.color = nn.Parameter(torch.zeros(3))

    def render(self, cameras, size, background, *, generator=None, normals=False, lighting=None):
        one = torch.ones(len(cameras), 1, size, size)
        return Rendering(self.color[:, None, None] * one, one, one, 0 * one)


def test_a_scene_of_ones_own_needs_render_only():
    scene, views = Fog(), turntable(4, 0, 2.8, 40)
    fit(scene, views, torch.full((4, 3, 6, 6), 0.25), torch.ones(3), Fitting(steps=200, learning_rate=0.1))
    torch.testing.assert_close(scene.color.detach(), torch.full((3,), 0.25), atol=1e-3, rtol=0)
    assert scene.penalties() == {} and not scene.unsupported_penalties


class Ball(nn.Module, FieldScene):
    """A red ball, by closed forms."""

    half_size = 1.0

    def render(self, cameras, size, background, **how):
        bundle, bounds = rays(cameras, size, size), torch.tensor([[-1.0] * 3, [1.0] * 3])
        return render_rays(bundle, self.query, bounds, background)

    def query(self, points, normals=False):
        density = 20 * (0.5 - points.norm(dim=1, keepdim=True)).clamp_min(0)
        return density[:, 0], torch.tensor([[1.0, 0, 0]]).expand(len(points), 3), None


def test_a_field_of_ones_own_becomes_a_mesh(tmp_path):
    options = ExportOptions(texture=None, faces=500, resolution=32, level=2.0)
    (path,) = Ball().export(tmp_path, options)
    mesh = read_mesh(path)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert path.name == "mesh.glb" and abs(radius - 0.4).max() < 0.03  # where the density is 2
    assert mesh.corner_colors()[..., 0].min() > 0.95 > 0.05 > mesh.corner_colors()[..., 1:].max()


def test_a_scene_stands_for_copies_of_itself(tmp_path):
    scene = Fog()
    copy = scene.with_own_files(tmp_path).located(tmp_path).build("cpu")
    assert isinstance(copy, Fog) and copy is not scene
    with torch.no_grad():
        copy.color += 1
    assert float(scene.color.detach().sum()) == 0


def test_what_a_scene_cannot_do_says_so(tmp_path):
    mesh = build("chair", "red").mesh()
    with pytest.raises(ValueError, match="a Fog has nothing to export"):
        Fog().export(tmp_path, ExportOptions())
    for scene in (Fog(), MeshScene(mesh)):
        with pytest.raises(ValueError, match="cannot start from a mesh; fields and splats can"):
            scene.init_from_mesh(mesh)


def test_scenes_export_what_they_are(tmp_path):
    options = ExportOptions(texture=64, faces=500, resolution=24, fit=0)
    chair = MeshScene(build("chair", "red").mesh())
    splats = GaussianOptions(count=9).build().eval()
    for scene, name in (
        (VoxelOptions(resolution=16).build().eval(), "mesh.glb"),
        (chair, "mesh.glb"),
        (splats, "splats.ply"),
    ):
        assert scene.export(tmp_path, options) == [tmp_path / name]
    renamed = ExportOptions(texture=None, format="ply", name="red")
    assert chair.export(tmp_path, renamed) == [tmp_path / "red.ply"] == splats.export(tmp_path, renamed)
    with pytest.raises(ValueError, match="exported as PLY, not as glb: type --format ply"):
        splats.export(tmp_path, ExportOptions(format="glb"))
    empty = VoxelOptions(resolution=16).build()
    with torch.no_grad():
        empty.raw -= 100
    with pytest.raises(ValueError, match="nothing to export"):
        empty.eval().export(tmp_path, options)
