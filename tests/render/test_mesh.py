"""What pixels see of a mesh: planes, coverage; and the silhouettes' derivative in the vertices."""

import math

import pytest
import torch

from distill3d.cameras import orbit, project, rays, turntable, world_to_camera
from distill3d.render.edges import antialias, mesh_edges
from distill3d.render.mesh import clip_coordinates, downsample, rasterize_views, vertex_normals
from distill3d.render.raster import in_front

SQUARE = torch.tensor([[0.0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5]])  # faces +x
TWO = torch.tensor([[0, 1, 2], [0, 2, 3]])
FRONT = orbit(0.0, 0.0, 3.0, 40.0)


def soup(count=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    center = 0.6 * torch.randn(count, 1, 3, generator=generator)
    corners = center + 0.4 * torch.randn(count, 3, 3, generator=generator)
    return corners.view(-1, 3), torch.arange(3 * count).view(-1, 3)


def coverage(vertices, faces, cameras, size):
    """Antialiased opacity [B, size, size]."""
    seen = rasterize_views(cameras, vertices, faces, size, size)
    pixels, along = project(cameras, vertices, size, size)
    depth = torch.where(seen.hit, seen.image(seen.depth[:, None]).detach()[..., 0], math.inf)
    return antialias(seen.hit[..., None].float(), depth, pixels, along, mesh_edges(faces))[..., 0]


def polygon_area(pixels):
    following = pixels.roll(-1, 0)
    return 0.5 * (pixels[:, 0] * following[:, 1] - following[:, 0] * pixels[:, 1]).sum().abs()


def test_a_pixel_sees_the_face_that_its_ray_meets_first():
    vertices, faces = soup()
    views = turntable(2, 20, 4.0, 40)
    seen = rasterize_views(views, vertices, faces, 24, 24)
    bundle = rays(views, 24, 24)
    a, b, c = vertices.double()[faces].unbind(1)
    origin = bundle.origins.reshape(-1, 1, 3).double()
    ray = bundle.directions.reshape(-1, 1, 3).double().expand(-1, len(faces), -1)
    edge1, edge2 = (b - a).expand_as(ray), (c - a).expand_as(ray)
    normal = torch.linalg.cross(ray, edge2)
    determinant = (edge1 * normal).sum(-1)
    u = ((origin - a) * normal).sum(-1) / determinant
    other = torch.linalg.cross(origin - a, edge1)
    v = (ray * other).sum(-1) / determinant
    length = (edge2 * other).sum(-1) / determinant  # Moeller and Trumbore 1997
    length[(u < 0) | (v < 0) | (u + v > 1)] = math.inf
    nearest, face = length.min(1)
    expected = torch.where(nearest.isfinite(), face, -1).view_as(seen.face)
    assert (expected == seen.face).float().mean() > 0.995  # a ray through an edge may go either way
    same = ((expected == seen.face) & seen.hit).view(-1)
    weights = seen.image(seen.weights).view(-1, 3)[same].double()
    rows = torch.arange(len(nearest))[same]
    torch.testing.assert_close(weights[:, 1], u[rows, face[rows]], atol=2e-4, rtol=0)
    torch.testing.assert_close(weights[:, 2], v[rows, face[rows]], atol=2e-4, rtol=0)


def test_the_depth_of_a_tilted_plane_is_that_of_its_formula():
    tilt = torch.tensor([[0.3, 0, 0], [0, 0, 0], [-0.3, 0, 0], [0, 0, 0]])
    vertices = SQUARE + tilt
    normal = torch.linalg.cross(vertices[1] - vertices[0], vertices[2] - vertices[0])
    seen = rasterize_views(FRONT, vertices, TWO, 32, 32)
    bundle = rays(FRONT, 32, 32)
    ray, origin = bundle.directions[seen.hit], bundle.origins[seen.hit]
    length = ((vertices[0] - origin) @ normal) / (ray @ normal)
    torch.testing.assert_close(seen.depth, (length[:, None] * ray)[:, 0].neg(), atol=1e-5, rtol=0)


def test_places_interpolate_to_the_point_on_the_ray():
    vertices, faces = soup()
    views = turntable(3, 20, 4.0, 40)
    seen = rasterize_views(views, vertices, faces, 20, 20)
    points = seen.interpolate(vertices, faces)
    bundle = rays(views, 20, 20)
    offset = points - bundle.origins[seen.hit]
    torch.testing.assert_close(
        torch.nn.functional.normalize(offset, dim=1), bundle.directions[seen.hit], atol=1e-5, rtol=0
    )


def test_both_sides_are_drawn_and_the_weights_belong_to_the_corners():
    front = rasterize_views(FRONT, SQUARE, TWO, 16, 16)
    turned = rasterize_views(FRONT, SQUARE, TWO.flip(1), 16, 16)
    assert torch.equal(front.hit, turned.hit) and front.hit.any()
    torch.testing.assert_close(front.interpolate(SQUARE, TWO), turned.interpolate(SQUARE, TWO.flip(1)))


def test_a_batch_is_its_views_one_by_one():
    vertices, faces = soup()
    views = turntable(3, 20, 4.0, 40)
    together = rasterize_views(views, vertices, faces, 16, 16)
    single = [rasterize_views(views[i : i + 1], vertices, faces, 16, 16) for i in range(3)]
    assert torch.equal(together.face, torch.cat([s.face for s in single]))
    assert torch.equal(together.weights, torch.cat([s.weights for s in single]))
    smooth = coverage(vertices, faces, views, 16)
    assert torch.equal(smooth, torch.cat([coverage(vertices, faces, views[i : i + 1], 16) for i in range(3)]))


def test_faces_behind_the_camera_are_left_out():
    vertices, faces = soup()
    behind = vertices + torch.tensor([8.0, 0, 0])
    seen = rasterize_views(FRONT, torch.cat((vertices, behind)), torch.cat((faces, faces + len(vertices))), 16, 16)
    assert torch.equal(seen.face, rasterize_views(FRONT, vertices, faces, 16, 16).face)


def test_the_places_derive_in_the_vertices():
    vertices, faces = soup(4)
    vertices = vertices.double().requires_grad_()
    cameras = orbit(torch.tensor([10.0], dtype=torch.float64), 20.0, 4.0, 40.0)

    def depth(moved):
        return rasterize_views(cameras, moved, faces, 12, 12).depth

    with torch.no_grad():
        face = rasterize_views(cameras, vertices, faces, 12, 12).face
    (gradient,) = torch.autograd.grad(depth(vertices).sum(), vertices)
    for index in (0, 4, 9):
        for axis in range(3):
            step = torch.zeros_like(vertices)
            step[index, axis] = 1e-7
            with torch.no_grad():
                assert torch.equal(rasterize_views(cameras, vertices + step, faces, 12, 12).face, face)
                slope = (depth(vertices + step).sum() - depth(vertices - step).sum()) / 2e-7
            assert float(gradient[index, axis]) == pytest.approx(float(slope), rel=1e-4, abs=1e-5)


def test_an_upright_square_covers_exactly_its_area_but_for_the_corner_pixels():
    """n^2 pixels whole and 4 n of which a strip is covered; where two edges meet in one pixel neither is followed."""
    for size in (24, 25, 31):
        pixels, _ = project(FRONT, SQUARE[None], size, size)
        total = coverage(SQUARE, TWO, FRONT, size)
        side = float(polygon_area(pixels[0])) ** 0.5
        inside = 2 * round(side / 2) if size % 2 == 0 else 2 * round((side - 1) / 2) + 1
        assert float(total.sum()) == pytest.approx(inside**2 + 2 * inside * (side - inside), rel=1e-5)
        assert float(total.max()) <= 1 and float(total.min()) >= 0


@pytest.mark.parametrize("turn", [5.0, 25.0, 45.0, 70.0])
def test_a_turned_square_covers_its_area_and_the_derivative_is_that_of_the_area(turn):
    """Exact but for the four corners, at which an edge ends inside a pixel."""
    size, angle = 48, math.radians(turn)
    spin = torch.tensor([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    vertices = (SQUARE @ spin.T + torch.tensor([0.0, 0.013, 0.007])).requires_grad_()
    pixels, _ = project(FRONT, vertices[None], size, size)
    area = polygon_area(pixels[0])
    total = coverage(vertices, TWO, FRONT, size).sum()
    assert float(total.detach()) == pytest.approx(float(area.detach()), rel=4e-3)
    (expected,) = torch.autograd.grad(area, vertices)
    (gradient,) = torch.autograd.grad(total, vertices)
    assert (gradient - expected).norm() < 0.12 * expected.norm()


def test_only_outlines_are_smoothed_however_fine_the_mesh():
    """A square of faces smaller than pixels has the coverage of a square of two."""
    axis = torch.linspace(-0.5, 0.5, 60)
    z, y = torch.meshgrid(axis, axis, indexing="ij")
    vertices = torch.stack((torch.zeros_like(y), y, z), -1).view(-1, 3)
    first = (torch.arange(59)[:, None] * 60 + torch.arange(59)).view(-1, 1)
    faces = torch.cat((first + torch.tensor([0, 1, 61]), first + torch.tensor([0, 61, 60])))
    views = orbit([0.0, 30.0], [0.0, 20.0], 3.0, 40.0)
    torch.testing.assert_close(
        coverage(vertices, faces, views, 24), coverage(SQUARE, TWO, views, 24), atol=2e-3, rtol=0
    )


def test_a_hidden_outline_changes_nothing():
    behind = torch.cat((SQUARE, 0.5 * SQUARE - torch.tensor([0.5, 0, 0])))
    faces = torch.cat((TWO, TWO + 4))
    assert torch.equal(coverage(behind, faces, FRONT, 24), coverage(SQUARE, TWO, FRONT, 24))


def test_an_outline_before_another_surface_has_a_gradient():
    vertices = torch.cat((SQUARE, 0.5 * SQUARE + torch.tensor([0.5, 0, 0]))).requires_grad_()
    faces = torch.cat((TWO, TWO + 4))
    seen = rasterize_views(FRONT, vertices, faces, 24, 24)
    pixels, along = project(FRONT, vertices[None], 24, 24)
    white = seen.image((seen.face[seen.hit] >= 2).float()[:, None])
    depth = torch.where(seen.hit, seen.image(seen.depth[:, None]).detach()[..., 0], math.inf)
    out = antialias(white, depth, pixels, along, mesh_edges(faces)).sum()
    assert float(out.detach()) == pytest.approx(float(polygon_area(pixels[0, 4:]).detach()), rel=0.01)
    (gradient,) = torch.autograd.grad(out, vertices)
    assert gradient[6, 1] > 0 and gradient[6, 2] > 0 and gradient[4, 1] < 0  # outwards makes it larger


def test_downsampling_is_a_mean_and_normals_of_a_ball_point_outwards():
    images = torch.arange(16.0).view(1, 4, 4, 1)
    torch.testing.assert_close(downsample(images, 2)[0, :, :, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert downsample(images, 1) is images
    import trimesh

    ball = trimesh.creation.icosphere(3)
    vertices, faces = torch.tensor(ball.vertices).float(), torch.tensor(ball.faces)
    torch.testing.assert_close(vertex_normals(vertices, faces), vertices, atol=0.02, rtol=0)


def test_the_camera_frame_is_that_of_project():
    vertices, _ = soup()
    views = turntable(2, 20, 4.0, 40)
    _, along = project(views, vertices.expand(2, -1, -1), 8, 8)
    torch.testing.assert_close(-world_to_camera(views, vertices)[..., 2], along)


def test_faces_that_reach_behind_the_camera_are_dropped_on_every_device():
    """nvdiffrast, which would clip them, gets the faces in front only, and clip coordinates that it does not clip."""
    vertices = torch.cat(
        (soup(4)[0], torch.tensor([[2.0, -0.5, 0], [4.0, 0.5, 0], [2.0, 0.5, 0.5]]))
    )  # the eye is at 3
    faces = torch.arange(len(vertices)).view(-1, 3)
    points = world_to_camera(FRONT, vertices)[0]
    kept = in_front(points, faces)
    assert kept.tolist() == [True] * 4 + [False]
    seen = rasterize_views(FRONT, vertices, faces, 24, 24)
    assert torch.equal(seen.face, rasterize_views(FRONT, vertices, faces[kept], 24, 24).face)

    corners = faces[kept].reshape(-1)
    clip = clip_coordinates(points, faces[kept], float(FRONT.fov_y), 24, 32)[corners]
    x, y, z = (clip[:, :3] / clip[:, 3:]).unbind(1)
    assert z.abs().max() < 1
    pixels, depth = project(FRONT, vertices[corners], 24, 32)
    torch.testing.assert_close(torch.stack((16 + 16 * x, 12 - 12 * y), 1), pixels[0])
    assert torch.equal(z.argsort(), depth[0].argsort())
