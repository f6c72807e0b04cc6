"""Pictures show what the client's camera sees, and the most urgent one that can be afforded is made first."""

import math
from dataclasses import replace

import pytest
import torch

from distill3d.cameras import orbit, project
from distill3d.scenes.voxels import VoxelOptions
from distill3d.viewer.pictures import MAPS, MOVING, ROWS, STILL, Eye, Painter, picture


@pytest.fixture(scope="module")
def scene():
    """A small dark ball at (0, 0.25, 0.1), in training mode, as the scene of a run is."""
    field = VoxelOptions(resolution=24, blob_height=0.0).build()
    axis = torch.linspace(-1, 1, 24)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    with torch.no_grad():
        field.raw[..., 0] = 40 * (0.15 - (x**2 + (y - 0.25) ** 2 + (z - 0.1) ** 2).sqrt())
        field.raw[..., 1:] = -8
    return field


def eye(azimuth=0.0, distance=2.8, width=300, height=200, client=0, moved=0.0, fov=40.0):
    pose = orbit(azimuth, 15.0, distance, fov).camera_to_world[0]
    return Eye(client, pose, math.radians(fov), width, height, moved)


@pytest.mark.parametrize("distance", [2.8, 1.8], ids=["the object fits", "it does not"])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 200), (150, 200)])
def test_the_object_is_where_the_clients_camera_sees_it(width, height, distance, scene):
    """The canvas has the client's aspect and its vertical angle, whichever square was rendered."""
    one, rows = eye(30.0, distance, width, height), 80
    image = picture(scene, one, rows, "color").float() / 255
    assert image.shape == (rows, round(rows * width / height), 3)
    dark = (image.mean(2) < 0.5).nonzero().float().mean(0) + 0.5
    columns = image.shape[1]
    ((column, row),) = project(one.cameras(), torch.tensor([[0.0, 0.25, 0.1]]), rows, columns)[0][0]
    assert torch.allclose(dark, torch.stack((row, column)), atol=1.5)
    assert image[0, 0].tolist() == pytest.approx([0.9] * 3, abs=0.01)


def test_a_wide_canvas_shows_what_lies_beside_its_middle_square(scene):
    image = picture(scene, eye(0.0, 1.3, 400, 200, fov=20.0), 60, "color")
    assert int(image[:, 95:].min()) < 100  # the square is 60 of the 120 columns


@pytest.mark.parametrize("shown", MAPS)
def test_a_picture_of_each_map_leaves_the_scene_as_it_is(shown, scene):
    before = {name: value.clone() for name, value in scene.state_dict().items()}
    image = picture(scene, eye(), 48, shown)
    assert image.dtype == torch.uint8 and len(image.flatten(0, 1).unique(dim=0)) > 1
    assert scene.training and all(torch.equal(value, before[name]) for name, value in scene.state_dict().items())


COST = 2e-5  # seconds a pixel: 48 rows while the camera moves, 128 at rest


class Table:
    """What was sent to whom, on a clock that the test moves."""

    def __init__(self):
        self.now, self.sent = 1000.0, []
        self.painter = Painter(lambda client, image: self.sent.append((client, len(image))), lambda: self.now)
        self.painter._learn = lambda shown, rows, seconds: None
        self.painter._second_per_pixel = {"color": COST, "depth": COST}

    def paint(self, scene, eyes, version=0, shown="color", allowance=math.inf, most=math.inf):
        return self.painter.paint(scene, eyes, version, shown, allowance, most)


def test_small_pictures_while_the_camera_moves_larger_ones_at_rest(scene):
    table, one = Table(), eye(height=300)
    assert max(rows for rows in ROWS if COST * rows**2 <= MOVING) == 48
    assert table.paint(scene, [replace(one, moved=1000.0)]) and table.sent == [(0, 48)]
    assert not table.paint(scene, [replace(one, moved=1000.0)])  # nothing new to see yet
    table.now += 2 * STILL
    assert table.paint(scene, [replace(one, moved=1000.0)]) and table.sent[1] == (0, 128)
    assert not table.paint(scene, [one])
    assert table.paint(scene, [one], version=1) and table.sent[2] == (0, 128)
    assert table.paint(scene, [one], version=1, shown="depth") and table.sent[3] == (0, 48)
    small = eye(client=1, height=100, width=100)
    table.paint(scene, [small])
    assert table.paint(scene, [small]) and table.sent[5] == (1, 96)  # no larger than its canvas


def test_nothing_is_made_that_costs_more_than_allowed(scene):
    table, one = Table(), eye(height=300)
    assert not table.paint(scene, [one], allowance=-0.1)
    assert not table.paint(scene, [one], allowance=COST * 40**2)
    assert table.paint(scene, [one], allowance=COST * 50**2) and table.sent == [(0, 48)]
    table.now += 1
    assert not table.paint(scene, [one], allowance=COST * 90**2, most=COST * 100**2)  # waits for 96
    assert table.paint(scene, [one], allowance=COST * 96**2, most=COST * 100**2) and table.sent[1] == (0, 96)


def test_a_scene_too_slow_for_any_budget_is_still_shown(scene):
    """Each of its pictures costs more than can be saved up: it then comes as often as the savings are full."""
    table, one = Table(), eye(height=300)
    for version in range(3):
        assert not table.paint(scene, [one], version, allowance=0.009, most=0.01)
        assert table.paint(scene, [one], version, allowance=0.01, most=0.01)
    assert table.sent == [(0, 48)] * 3


def test_who_waits_longest_is_first_and_a_new_view_before_a_better_one(scene):
    table, eyes = Table(), [eye(client=0), eye(client=1), eye(client=2)]
    for client in range(3):
        assert table.paint(scene, eyes)
        assert table.sent[-1][0] == client
        table.now += 1
    turned = [eyes[0], eyes[1], replace(eyes[2], camera_to_world=eye(50.0).camera_to_world)]
    assert table.paint(scene, turned, version=1) and table.sent[-1][0] == 2
    assert table.paint(scene, turned, version=1) and table.sent[-1][0] == 0
    assert table.paint(scene, turned[1:], version=1) and table.sent[-1][0] == 1


def test_what_a_picture_costs_is_learned_from_the_ones_before(scene):
    painter = Painter(lambda client, image: None)
    assert painter._due(eye(height=512), 0, "color", 1.0, 1.0) == ROWS[0]
    painter._learn("color", 48, 0.04)
    assert painter._due(eye(height=512), 0, "color", 1.0, 1.0) == 48
    for _ in range(20):
        painter._learn("color", 48, 0.001)
    assert painter._due(eye(height=512), 0, "color", 1.0, 1.0) == 256
