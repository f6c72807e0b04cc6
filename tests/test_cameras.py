"""Laws of the cameras: the axis convention, inverses, ranges."""

import math

import pytest
import torch

from distill3d.cameras import Cameras, CameraSampler, look_at, orbit, project, rays, turntable, unproject

SIZE = (48, 64)


def some_views(batch=5, seed=0):
    sampler = CameraSampler(fov=(30, 60), position_jitter=0.1, target_jitter=0.1, up_jitter=0.02)
    return sampler.sample(batch, torch.Generator().manual_seed(seed))


def test_azimuth_0_looks_from_plus_x_with_plus_y_to_the_right_and_z_up():
    pose = orbit(0, 0, 2.5, 40).camera_to_world[0]
    expected = torch.tensor([[0.0, 0, 1, 2.5], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(pose, expected)


def test_azimuth_grows_towards_plus_y_and_elevation_upwards():
    eye = orbit([90, 0, 180], [0, 90, 0], 2, 40).camera_to_world[:, :3, 3]
    torch.testing.assert_close(eye, torch.tensor([[0.0, 2, 0], [0, 0, 2], [-2, 0, 0]]), atol=1e-6, rtol=0)


def test_points_to_the_right_and_above_fall_to_the_right_and_above():
    view = orbit(0, 0, 3, 40)
    pixel, depth = project(view, torch.tensor([[0.0, 0, 0], [0, 0.5, 0.5]]), *SIZE)
    torch.testing.assert_close(pixel[0, 0], torch.tensor([32.0, 24.0]))
    assert pixel[0, 1, 0] > 32 and pixel[0, 1, 1] < 24
    torch.testing.assert_close(depth[0], torch.tensor([3.0, 3.0]))


def test_poses_are_rotations_even_at_the_poles():
    pose = orbit([10, 20, 300], [90, -90, 30], 2, 40).camera_to_world[:, :3, :3]
    torch.testing.assert_close(pose @ pose.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(pose), torch.ones(3))


def test_unproject_inverts_project():
    points = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    views = some_views()
    pixels, depth = project(views, points, *SIZE)
    torch.testing.assert_close(unproject(views, pixels, depth, *SIZE), points, atol=1e-5, rtol=0)


def test_a_point_on_a_ray_projects_to_the_center_of_its_pixel():
    views = some_views()
    bundle = rays(views, *SIZE)
    points = (bundle.origins + 2.5 * bundle.directions).flatten(1, 2)
    pixels, _ = project(views, points, *SIZE)
    row, column = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    expected = torch.stack((column, row), -1).view(1, -1, 2).expand(5, -1, -1)
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(bundle.directions.norm(dim=-1), torch.ones(5, *SIZE))


def test_the_field_of_view_spans_the_height():
    view = orbit(0, 0, 2, 90)
    top = torch.tensor([[0.0, 0.0, 2.0]])
    torch.testing.assert_close(project(view, top, *SIZE)[0][0, 0], torch.tensor([32.0, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_samples_stay_in_their_ranges(batch):
    sampler = CameraSampler(azimuth=(-60, 90), elevation=(5, 30), distance=(2, 3), fov=(30, 50))
    generator = torch.Generator().manual_seed(batch)
    for _ in range(50):
        c = sampler.sample(batch, generator)
        for value, (low, high) in ((c.azimuth, (-60, 90)), (c.elevation, (5, 30)), (c.distance, (2, 3))):
            assert bool(((value >= low) & (value <= high)).all())
        degrees = torch.rad2deg(c.fov_y)
        assert bool(((degrees >= 30 - 1e-4) & (degrees <= 50 + 1e-4)).all())


def test_half_of_the_elevations_are_even_in_angle_and_half_on_the_sphere():
    """DreamFusion, appendix A: P(elevation < 30 of 90) = (1/3 + sin 30) / 2."""
    sampler = CameraSampler(elevation=(0, 90))
    elevation = sampler.sample(20000, torch.Generator().manual_seed(0)).elevation
    for angle in (15, 30, 60):
        expected = (angle / 90 + math.sin(math.radians(angle))) / 2
        assert float((elevation < angle).float().mean()) == pytest.approx(expected, abs=4 * 0.5 / 20000**0.5)


def test_jitters_are_independent():
    """What a pose shows of the three: where the eye is, which point it looks at, how it rolls."""
    settings = {"elevation": (0, 0), "distance": (3, 3), "azimuth": (0, 0)}
    sampler = CameraSampler(**settings, position_jitter=0.05, target_jitter=0.05, up_jitter=0.05)
    pose = sampler.sample(4000, torch.Generator().manual_seed(0)).camera_to_world
    eye, forward = pose[:, :3, 3] - torch.tensor([3.0, 0, 0]), -pose[:, :3, 2]
    target = pose[:, :3, 3] - forward * (pose[:, :1, 3] / forward[:, :1])  # where the view crosses the plane x = 0
    roll = pose[:, 1, 1]
    shown = torch.stack((eye[:, 1], eye[:, 2], target[:, 1], target[:, 2], roll))
    torch.testing.assert_close(shown.std(1), torch.full((5,), 0.05), rtol=0.1, atol=0)
    correlation = torch.corrcoef(shown)
    assert (correlation - torch.eye(5)).abs().max() < 5 / 4000**0.5  # 5 standard errors


def test_orthogonal_views_are_one_view_turned_by_quarters():
    sampler = CameraSampler(distance=(2, 3), fov=(30, 50), orthogonal=True)
    views = sampler.sample(12, torch.Generator().manual_seed(0))
    quarter = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    pose = views.camera_to_world.view(3, 4, 4, 4)
    for k in range(1, 4):
        torch.testing.assert_close(pose[:, k], quarter @ pose[:, k - 1], atol=1e-5, rtol=0)
    for value in (views.elevation, views.distance, views.fov_y):
        groups = value.view(3, 4)
        assert (groups == groups[:, :1]).all() and groups[0, 0] != groups[1, 0]
    first = views.azimuth.view(3, 4)[:, 0]
    torch.testing.assert_close(first.diff(), torch.full((2,), 30.0))  # groups share the quarter evenly
    assert bool(((views.azimuth >= -180) & (views.azimuth <= 180)).all())


def test_orthogonal_views_stay_in_their_ranges_and_repeat():
    sampler = CameraSampler(azimuth=(0, 360), elevation=(5, 30), distance=(2, 3), fov=(30, 50), orthogonal=True)
    c = sampler.sample(400, torch.Generator().manual_seed(3))
    for value, (low, high) in ((c.azimuth, (0, 360)), (c.elevation, (5, 30)), (c.distance, (2, 3))):
        assert bool(((value >= low) & (value <= high)).all())
    again = sampler.sample(400, torch.Generator().manual_seed(3))
    assert torch.equal(c.camera_to_world, again.camera_to_world)


@pytest.mark.parametrize(
    ("settings", "batch", "match"),
    [
        ({}, 6, "come in fours: .* got 6"),
        ({"azimuth": (0, 180)}, 4, "full circle"),
        ({"up_jitter": 0.1}, 4, "take no jitter"),
    ],
)
def test_orthogonal_views_that_cannot_be_are_refused(settings, batch, match):
    with pytest.raises(ValueError, match=match):
        CameraSampler(orthogonal=True, **settings).sample(batch, torch.Generator())


def test_a_batch_sees_the_object_from_all_around():
    azimuth = some_views(4).azimuth.sort().values
    torch.testing.assert_close(azimuth.diff(), torch.full((3,), 90.0))


def test_sampling_repeats_with_its_seed():
    assert torch.equal(some_views(3, 5).camera_to_world, some_views(3, 5).camera_to_world)
    assert not torch.equal(some_views(3, 5).camera_to_world, some_views(3, 6).camera_to_world)


def test_a_turntable_starts_in_front_and_closes_the_circle():
    table = turntable(8, 15, 2.8, 40)
    assert table.azimuth.tolist() == [45.0 * i for i in range(8)]
    assert isinstance(table[2:4], Cameras) and len(table[2:4]) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: orbit(0, 91, 2, 40),
        lambda: orbit(0, 0, 0, 40),
        lambda: orbit(0, 0, 2, 180),
        lambda: turntable(0, 0, 2, 40),
        lambda: CameraSampler(elevation=(30, 10)),
        lambda: CameraSampler().sample(0, torch.Generator()),
        lambda: look_at(torch.tensor([0.0, 0, 2]), torch.zeros(3), torch.tensor([0.0, 0, 1])),
    ],
)
def test_mistakes_are_value_errors(call):
    with pytest.raises(ValueError, match=r"\w+ .*"):
        call()


def test_poses_give_the_cameras_that_they_came_from():
    made = orbit(
        [0.0, 90, 200, -30, 10, 20], [0.0, 45, -60, 10, 90, -90], [1.0, 2, 3, 4, 5, 6], [40.0, 50, 60, 70, 80, 90]
    )
    again = Cameras.from_poses(made.camera_to_world, torch.rad2deg(made.fov_y))
    turned = (again.azimuth - made.azimuth + 180) % 360 - 180
    torch.testing.assert_close(turned, torch.zeros(6), atol=1e-4, rtol=0)
    for name in ("camera_to_world", "fov_y", "elevation", "distance"):
        torch.testing.assert_close(getattr(again, name), getattr(made, name), atol=1e-4, rtol=1e-5)
    one = Cameras.from_poses(made.camera_to_world[1], 50)
    assert len(one) == 1 and float(one.fov_y) == pytest.approx(math.radians(50))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pose: pose[:, :3], r"\[B, 4, 4\], got \[1, 3, 4\]"),
        (lambda pose: pose.long(), r"floats \[B, 4, 4\]"),
        (lambda pose: pose * 2, "rotation and a position"),
        (lambda pose: pose * torch.tensor([1.0, 1, -1, 1]), "without scale or reflection"),
        (lambda pose: pose * torch.tensor([1.0, 1, 1, 0]), "last row"),
        (lambda pose: pose * torch.tensor([[1.0, 1, 1, 0]] * 3 + [[1.0] * 4]), "at the origin"),
    ],
)
def test_what_is_no_pose_says_so(change, words):
    with pytest.raises(ValueError, match=words):
        Cameras.from_poses(change(orbit(10, 20, 3, 40).camera_to_world), 40)
    with pytest.raises(ValueError, match="field of view"):
        Cameras.from_poses(orbit(10, 20, 3, 40).camera_to_world, 180)
