"""The surface of a field: closed, outward, where the density says, and the same with fewer faces."""

import numpy as np
import pytest
import torch
import trimesh

from distill3d.meshes import surface
from distill3d.meshes.mesh import Mesh
from distill3d.meshes.surface import outline_level, repair, shrink_box, simplify, smooth_lattice


def egg(points, floater=False):
    """Long along x, red in front, green behind; with a small ball far up if asked for."""
    distance = (points / torch.tensor([0.8, 0.4, 0.2])).norm(dim=1)
    if floater:
        distance = torch.minimum(distance, (points - torch.tensor([0, 0, 0.9])).norm(dim=1) / 0.06)
    front = (points[:, :1] > 0).float()
    rgb = front * torch.tensor([0.5, 0.1, 0.1]) + (1 - front) * torch.tensor([0.1, 0.5, 0.1])
    return 10 * torch.exp(4 * (1 - distance)), rgb, None


def solid(mesh):
    """For trimesh's measures."""
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def extract_surface(*args, **kwargs):
    return solid(surface.extract_surface(*args, **kwargs))


@pytest.fixture(scope="module")
def mesh():
    return extract_surface(egg, level=10, resolution=48)


def test_the_surface_is_where_the_density_says(mesh):
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.8 * 0.4 * 0.2, rel=0.02)
    np.testing.assert_allclose(mesh.bounds, [[-0.8, -0.4, -0.2], [0.8, 0.4, 0.2]], atol=0.01)
    assert (np.einsum("ij,ij->i", mesh.vertex_normals, mesh.vertices) > 0).mean() > 0.99


def test_floaters_are_dropped_unless_wanted(mesh):
    def both(points):
        return egg(points, floater=True)

    assert len(extract_surface(both, resolution=48).split()) == 1
    assert len(extract_surface(both, resolution=48, min_fraction=0).split()) == 2


def noisy(points):
    """A ball whose density varies by a factor of twenty from place to place, with a hollow inside."""
    radius = points.norm(dim=1)
    wobble = torch.sin(points @ torch.tensor([[61.0, 23.0, 41.0], [17.0, 57.0, -29.0], [-37.0, 31.0, 59.0]]).T / 3).sum(
        1
    )
    shell = torch.where(radius < 0.3, -4.0, 8 * (0.7 - radius))
    return 10 * torch.exp(shell + wobble), points.clamp(0, 1), None


def test_softening_takes_tunnels_and_keeps_the_size(mesh):
    rough, soft = extract_surface(noisy, resolution=64), extract_surface(noisy, resolution=64, soften=0.7)
    assert soft.is_watertight and 2 - soft.euler_number <= 2 - rough.euler_number
    assert soft.area < rough.area
    smooth = extract_surface(egg, resolution=48, soften=0.7)
    assert smooth.volume == pytest.approx(mesh.volume, rel=0.02)


def test_smoothing_keeps_quadratics_and_takes_the_finest_detail():
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 21)] * 3, indexing="ij")
    quadratic = 1 + x - 2 * z + 3 * x * x - y * y + x * y
    inner = (slice(8, -8),) * 3  # where the lattice's edge is out of reach of both Gaussians
    np.testing.assert_allclose(smooth_lattice(quadratic, 0.7)[inner], quadratic[inner], atol=1e-6)
    checkered = np.indices(x.shape).sum(0) % 2 * 2.0 - 1
    assert np.abs(smooth_lattice(checkered, 0.7)[inner]).max() < 0.02


def test_a_box_that_is_much_too_large_is_halved():
    """So that the lattice's points are spent where something is; an object that fills its box keeps it."""

    def ball(radius):
        return lambda p: (50.0 * (p.norm(dim=1) < radius), p, None)

    assert [shrink_box(ball(radius), 2.0, 48, 0.1) for radius in (1.5, 0.9, 0.4, 0.0)] == [2.0, 1.0, 0.5, 2.0]
    large, small = (extract_surface(ball(0.4), resolution=48, half_size=half) for half in (2.0, 0.5))
    np.testing.assert_allclose(large.vertices, small.vertices)


def test_what_cannot_be_looked_into_is_filled():
    def hollow(points):
        radius = points.norm(dim=1)
        return torch.where((radius > 0.4) & (radius < 0.7), 100.0, 0.01), points.clamp(0, 1), None

    full = extract_surface(hollow, resolution=48)
    assert full.body_count == 1 and full.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.05)

    def open_bowl(points):
        density, color, _ = hollow(points)
        return torch.where(points[:, 2] > 0.3, 0.01, density), color, None

    bowl = extract_surface(open_bowl, resolution=48)
    assert bowl.volume < 0.75 * full.volume  # its inside can be seen


@pytest.mark.parametrize("faces", [200, 2000])
def test_fewer_faces_keep_the_shape(mesh, faces):
    given = Mesh(np.array(mesh.vertices), np.array(mesh.faces))
    small = solid(simplify(given, faces))
    assert len(small.faces) <= 1.02 * faces
    assert small.is_watertight and small.is_winding_consistent
    assert small.volume == pytest.approx(mesh.volume, rel=0.03)
    assert simplify(given, 10**6) is given


def test_a_noisy_surface_stays_closed_with_fewer_faces():
    given = surface.extract_surface(noisy, resolution=64)
    rough, small = solid(given), solid(simplify(given, 8000))
    assert rough.is_watertight and small.is_watertight
    assert small.volume == pytest.approx(rough.volume, rel=0.05)


@pytest.mark.parametrize("density", [3.0, 400.0])
def test_the_level_is_where_the_outlines_are(density):
    """A soft ball: a grazing ray at x beyond the edge passes density e^(-x / w) over sqrt(2 pi r w)."""
    r, w, n = 0.6, 0.02, 81
    axis = torch.linspace(-1, 1, n)
    radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
    field = density * torch.exp(-(radius - r).clamp_min(0) / w)
    level = outline_level(field.numpy(), 2 / (n - 1))
    expected = np.log(2) / np.sqrt(2 * np.pi * r * w)  # the density where such a ray is half opaque
    assert level == pytest.approx(expected, rel=0.5) if density > 100 else level < density


def test_sheets_that_touch_along_an_edge_are_parted():
    box = trimesh.creation.box()
    twin = box.copy()
    twin.apply_translation([1, 1, 0])
    both = trimesh.util.concatenate([box, twin])
    both.merge_vertices()
    assert not both.is_watertight
    parted = solid(repair(Mesh(np.array(both.vertices), np.array(both.faces))))
    assert parted.is_watertight and parted.is_winding_consistent
    assert parted.volume == pytest.approx(2)


def test_what_reaches_the_box_is_closed():
    full = extract_surface(lambda p: (torch.full((len(p),), 99.0), p * 0 + 0.5, None), resolution=8)
    assert full.is_watertight and full.volume > 8


def test_an_empty_volume_is_a_clear_value_error():
    with pytest.raises(ValueError, match=r"nothing to export.*reaches 0.*level is 10"):
        extract_surface(lambda p: (torch.zeros(len(p)), p, None), resolution=8)


def test_mistakes_are_value_errors(mesh):
    with pytest.raises(ValueError, match="level"):
        extract_surface(egg, level=0)
    with pytest.raises(ValueError, match=r"at least 4 faces, got 0; 20000 is usual"):
        simplify(mesh, 0)
