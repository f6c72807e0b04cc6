"""What is exported of a soft field: a mesh that was fitted to the field's images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from unlit import unlit_views

from distill3d.cameras import turntable
from distill3d.export.options import ExportOptions
from distill3d.scenes.to_mesh import field_to_mesh
from distill3d.scenes.voxels import VoxelField, VoxelOptions

SMALL = ExportOptions(texture=256, faces=3000, resolution=48, fit=0)


@pytest.fixture(scope="module")
def field():
    """A soft striped egg: its outlines fade over a lattice step or two."""
    field = VoxelField(VoxelOptions(resolution=32))
    axis = torch.linspace(-1, 1, 32)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    radius = (x.square() / 0.5 + y.square() / 0.3 + z.square() / 0.4).sqrt()
    with torch.no_grad():
        field.raw[..., 0] = 40 * (1 - radius) - field.blob
        for i, wave in enumerate((x, y, z)):
            field.raw[..., 1 + i] = 1.5 * torch.sin(8 * wave)
    return field.eval()


def psnr(field, mesh):
    """Of whole images from sides that the fit does not look from."""
    views = turntable(3, 25.0, 2.8, 40.0)
    with torch.no_grad():
        wanted = field.render(views, 96, torch.full((3, 3), 0.9)).rgb
    return float(-10 * (unlit_views(mesh, views, 96)[:, :3] - wanted).square().mean().log10())


def closed(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces).is_watertight


def test_a_fitted_mesh_looks_more_like_the_field(field):
    baked = field_to_mesh(field, SMALL)
    with torch.no_grad():  # as where the end of a run is written
        fitted = field_to_mesh(field, replace(SMALL, fit=ExportOptions.fit))
    assert psnr(field, fitted) > psnr(field, baked) > 28
    assert np.array_equal(fitted.faces, baked.faces) and closed(baked) and closed(fitted)
    assert np.linalg.norm(fitted.vertices - baked.vertices, axis=1).mean() < 0.02  # a lattice step is 0.043


def test_fitting_finds_the_outlines_from_a_surface_that_lies_too_deep(field):
    best = field_to_mesh(field, SMALL)
    deep, fitted = (field_to_mesh(field, replace(SMALL, level=40.0, fit=steps)) for steps in (0, ExportOptions.fit))
    assert psnr(field, fitted) - 9 > psnr(field, deep) and psnr(field, fitted) > psnr(field, best) - 1.5
    small, grown, wanted = (trimesh.Trimesh(mesh.vertices, mesh.faces).volume for mesh in (deep, fitted, best))
    assert wanted - grown < 0.4 * (wanted - small)


def test_the_same_field_gives_the_same_mesh(field):
    first, second = (field_to_mesh(field, replace(SMALL, fit=2)) for _ in range(2))
    assert np.array_equal(first.vertices, second.vertices) and np.array_equal(first.textures[0], second.textures[0])


def test_an_export_leaves_the_threads_as_they_were(field, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        field_to_mesh(field, replace(SMALL, fit=1))
        assert torch.get_num_threads() == 3
        monkeypatch.setattr("distill3d.meshes.texture.LIMIT", (0.001, 0.0))
        with pytest.raises(ValueError, match="no UV map was found"):
            field_to_mesh(field, replace(SMALL, fit=1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_fitted_ball_stays_smooth():
    ball = VoxelField(VoxelOptions(resolution=48))
    axis = torch.linspace(-1, 1, 48)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    with torch.no_grad():
        ball.raw[..., 0] = 25 * (0.6 - (x.square() + y.square() + z.square()).sqrt()) - ball.blob
    mesh = field_to_mesh(ball.eval(), replace(SMALL, fit=ExportOptions.fit))
    normals = trimesh.Trimesh(mesh.vertices, mesh.faces).vertex_normals
    radial = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    angle = np.degrees(np.arccos(np.clip((normals * radial).sum(1), -1, 1)))
    assert angle.mean() < 2
