"""Baking: the mesh has the colors that rays see, whatever the UV map does."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from unlit import unlit_views

from distill3d.cameras import rays, turntable
from distill3d.export.options import ExportOptions
from distill3d.meshes.bake import BakeRays, bake, paint_vertices, surface_colors
from distill3d.meshes.mesh import faces_per_edge
from distill3d.meshes.surface import extract_surface, simplify
from distill3d.meshes.texture import rasterize_uv
from distill3d.render.volume import Sampling, render_rays
from distill3d.scenes.to_mesh import field_to_mesh


def ball(points):
    """A firm ball of radius 0.6 in soft stripes."""
    radius = points.norm(dim=1)
    return 200 * torch.sigmoid(80 * (0.6 - radius)), 0.5 + 0.4 * torch.sin(6 * points), None


class Ball(torch.nn.Module):
    half_size = 1.0
    query = staticmethod(ball)


@pytest.fixture(scope="module")
def surface():
    return simplify(extract_surface(ball, level=4, resolution=48), 2000)


@pytest.fixture(scope="module")
def baked(surface):
    return bake(ball, surface, 256)


def psnr(a, b):
    return float(-10 * (a - b).square().mean().log10())


def test_the_baked_mesh_looks_like_the_field(baked):
    views = turntable(3, elevation=20.0, distance=2.8, fov=40.0)
    bounds = torch.tensor([[-1.0] * 3, [1.0] * 3])
    gray = torch.full((3, 3), 0.9)
    field = render_rays(rays(views, 96, 96), ball, bounds, gray, Sampling(samples=256, min_weight=0))
    shown = unlit_views(baked, views, 96)
    inside = ((field.opacity > 0.99) & (shown[:, 3:] == 1)).expand(-1, 3, -1, -1)
    assert inside.float().mean() > 0.1
    assert psnr(field.rgb[inside], shown[:, :3][inside]) > 30
    assert psnr(field.rgb, shown[:, :3]) > 28  # the edges are soft in one and hard in the other


def test_seams_do_not_show(baked):
    # Without padding the gaps between the islands would be black, and be seen along every seam.
    shown = unlit_views(baked, turntable(4, 0.0, 2.8, 40.0), 96)
    inside = shown[:, 3] == 1
    darkest = shown[:, :3].amin(1)[inside].min()
    assert darkest > 0.08  # the colors reach down to 0.1
    holes = np.where(island(baked)[:, :, None], baked.textures[0], np.uint8(0))
    gaps = replace(baked, textures=(holes,))
    dark = unlit_views(gaps, turntable(4, 0.0, 2.8, 40.0), 96)
    assert dark[:, :3].amin(1)[inside].min() < darkest  # the test sees what it looks for


def island(mesh):
    return rasterize_uv(mesh.uv, mesh.uv_faces, len(mesh.textures[0]))[0] >= 0


def test_the_texture_is_the_fields_color_at_each_texel(baked, surface):
    at_vertices = baked.with_vertex_colors().vertex_colors
    expected = ball(torch.from_numpy(baked.vertices).float())[1].numpy()
    np.testing.assert_allclose(at_vertices, expected, atol=0.1)  # seen a little below the vertex
    painted = paint_vertices(ball, surface).vertex_colors
    np.testing.assert_allclose(painted, expected, atol=0.1)  # seen a little below the vertex


def test_a_ray_through_layers_sees_their_closed_form():
    """Red down to depth a, blue behind it, homogeneous density s: red has the share 1 - exp(-s a)."""

    def layers(points):
        red = (points[:, 2] > -0.1).float()[:, None]
        inside = (points[:, 2] < 0).float()
        return 8 * inside, red * torch.tensor([1.0, 0, 0]) + (1 - red) * torch.tensor([0, 0, 1.0]), None

    point, up = np.zeros((1, 3)), np.array([[0.0, 0.0, 1.0]])
    seen = surface_colors(layers, point, up, bake_rays=BakeRays(above=0.1, below=0.9, samples=1000, slanted=0))
    total = 1 - math.exp(-8 * 0.9)
    red = (1 - math.exp(-0.8)) / total
    torch.testing.assert_close(seen, torch.tensor([[red, 0, 1 - red]]), atol=1e-3, rtol=0)


def test_slanted_rays_pass_a_layer_on_a_longer_way():
    """A layer of depth a is passed on a / cos(slant)."""

    def layers(points):
        red = (points[:, 2] > -0.1).float()[:, None]
        return 8 * (points[:, 2] < 0).float(), red.expand(-1, 3), None

    bake_rays = BakeRays(above=0.1, below=0.9, samples=1000, slanted=3, slant=60.0)
    seen = surface_colors(layers, np.zeros((1, 3)), np.array([[0.0, 0.0, 5.0]]), bake_rays=bake_rays)
    total = 1 - math.exp(-8 * 0.9)
    straight, slanted = ((1 - math.exp(-8 * way)) / total for way in (0.1, 0.2))
    torch.testing.assert_close(seen, torch.full((1, 3), (straight + 3 * slanted) / 4), atol=2e-3, rtol=0)


def test_where_nothing_is_seen_the_color_at_the_point_is_taken():
    seen = surface_colors(lambda p: (p[:, 0] * 0, p.abs(), None), np.full((1, 3), 0.5), np.eye(3)[:1])
    torch.testing.assert_close(seen, torch.full((1, 3), 0.5), atol=0.03, rtol=0)


def test_export_gives_what_was_asked_for():
    mesh = field_to_mesh(Ball(), ExportOptions(texture=64, faces=500, resolution=40, fit=0))
    assert mesh.textures[0].shape == (64, 64, 3) and 400 < len(mesh.faces) <= 510
    painted = field_to_mesh(Ball(), ExportOptions(texture=None, faces=500, resolution=40))
    assert painted.vertex_colors is not None and not painted.textures and (faces_per_edge(painted) == 2).all()


def test_mistakes_are_value_errors():
    with pytest.raises(ValueError, match=r"got 0; 1024 is usual"):
        ExportOptions(texture=0)
    with pytest.raises(ValueError, match=r"got 2; 20000 is usual"):
        ExportOptions(faces=2)
    with pytest.raises(ValueError, match=r"got -1; 50 is usual"):
        ExportOptions(fit=-1)
    for wrong in ({"resolution": 7}, {"level": 0.0}, {"level": math.nan}, {"soften": -1.0}, {"soften": math.nan}):
        with pytest.raises(ValueError, match=f"got {next(iter(wrong.values()))}"):
            ExportOptions(**wrong)  # at once, not after the run whose recipe it is
