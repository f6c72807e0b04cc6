"""The visual hull of a ball, whose silhouettes are discs, and scenes that start from it."""

import math

import pytest
import torch

from distill3d.cameras import orbit, rays
from distill3d.scenes import GaussianOptions, VoxelOptions
from distill3d.scenes.hull import Hull, start_from_hull

RADIUS, BOUND, SIZE = 0.5, 0.9, 64


def ball(views=16):
    """Cameras and cutouts of a red ball about the origin; its outline is where rays come near enough."""
    azimuth, elevation = torch.arange(views) * 360.0 / views, torch.arange(views) % 3 * 25.0 - 10
    cameras = orbit(azimuth, elevation, 2.8, 40.0)
    view = rays(cameras, SIZE, SIZE)
    nearest = torch.linalg.cross(view.origins, view.directions).norm(dim=-1)
    coverage = (nearest < RADIUS).float()[:, None]
    return cameras, torch.cat((coverage, 0 * coverage, 0 * coverage, coverage), dim=1)


def test_the_hull_contains_the_object_and_ends_where_all_views_see_the_background():
    hull = Hull(*ball(), BOUND, tolerance=0)
    directions = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    inside, color = hull.query(0.93 * RADIUS * directions)
    outside, _ = hull.query(torch.cat([r * directions for r in (1.35 * RADIUS, 0.95, 2.0)]))
    assert (inside > 0.5).all() and (outside < 0.5).all()
    torch.testing.assert_close(
        color[inside > 0.99], torch.tensor([1.0, 0.0, 0.0]).expand(int((inside > 0.99).sum()), 3)
    )


def test_its_mesh_faces_outward_and_has_the_balls_volume_or_a_little_more():
    mesh = Hull(*ball(), BOUND, tolerance=0).mesh()
    a, b, c = (torch.from_numpy(mesh.vertices[mesh.faces[:, i]]) for i in range(3))
    volume = float((torch.linalg.cross(a, b) * c).sum() / 6)
    assert 0.97 < volume / (4 / 3 * math.pi * RADIUS**3) < 1.25


def test_as_many_views_as_the_tolerance_may_miss_the_object():
    cameras, cutouts = ball()
    cutouts[3] = 0
    with pytest.raises(ValueError, match="no object"):
        Hull(cameras, cutouts, BOUND, tolerance=0).mesh()
    assert len(Hull(cameras, cutouts, BOUND, tolerance=1).mesh().faces) > 500
    with pytest.raises(ValueError, match="from 0 to 15 views, got 16"):
        Hull(cameras, cutouts, BOUND, tolerance=16)


@pytest.mark.parametrize("options", [VoxelOptions(resolution=40), GaussianOptions(count=3000)])
@torch.no_grad()
def test_a_scene_that_starts_from_a_hull_shows_the_views_it_was_made_of(options):
    cameras, cutouts = ball()
    scene = options.build()
    start_from_hull(scene, Hull(cameras, cutouts, BOUND))
    scene.eval()
    views = scene.render(cameras[:4], SIZE, torch.zeros(4, 3))
    seen, true = views.opacity[:, 0] > 0.5, cutouts[:4, 3] > 0.5
    assert float((seen & true).sum() / (seen | true).sum()) > 0.8
    assert views.rgb[:, 0][seen & true].mean() > 0.7 and views.rgb[:, 1:].mean() < 0.05


@pytest.mark.parametrize("options", [VoxelOptions(resolution=12), GaussianOptions(count=50)])
def test_without_an_object_a_scene_stays_as_it_is(options):
    cameras, cutouts = ball()
    scene, other = options.build(), options.build()
    with pytest.raises(ValueError, match="no object"):
        start_from_hull(scene, Hull(cameras, 0 * cutouts, BOUND))
    for a, b in zip(scene.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
