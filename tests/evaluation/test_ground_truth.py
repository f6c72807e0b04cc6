"""Surfaces and silhouettes against closed forms, brute force and scipy."""

import dataclasses

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial.distance import cdist

from distill3d.cameras import orbit, turntable
from distill3d.evaluation.ground_truth import (
    chamfer,
    chamfer_to_truth,
    foreground_mask,
    iou,
    silhouette_iou,
    silhouettes,
    surface_points,
    true_kind,
    true_mesh,
)
from distill3d.meshes.mesh import Mesh
from distill3d.toybox.world import View, build, draw


def mesh_of(solid) -> Mesh:
    return Mesh(np.asarray(solid.vertices), np.asarray(solid.faces))


def ball(radius: float) -> Mesh:
    return mesh_of(trimesh.creation.icosphere(4, radius))


def test_kinds_are_read_from_prompts():
    assert true_kind("a Yellow table lamp") == "table lamp" and true_kind("a corgi") is None


def test_iou_by_hand():
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True  # 4 of 12
    assert iou(a, b) == pytest.approx((4 / 12 + 1) / 2)  # the second pair is empty, and agrees
    assert iou(a, a) == 1 and iou(a, b) == iou(b, a) and iou(a[:1], ~a[:1]) == 0


def test_the_silhouette_of_a_ball_is_a_disc_of_its_angle():
    views = orbit([0, 77, 200], [0, 30, -80], 2.8, 40.0)
    masks = silhouettes(ball(0.5), views, 128)
    radius = 64 * np.tan(np.arcsin(0.5 / 2.8)) / np.tan(np.radians(20))
    assert masks.float().mean((1, 2)).numpy() == pytest.approx(np.pi * radius**2 / 128**2, rel=0.01)


def test_silhouettes_are_those_of_the_worlds_own_pictures():
    """The world draws front faces with supersampling; a pixel of it is covered where any sample is."""
    toy = build("robot", "red", seed=2)
    views = turntable(3, 15.0, 2.8, 40.0)
    drawn = np.stack([draw(toy, View(a, 15.0), 0.0) for a in views.azimuth.tolist()])
    seen = foreground_mask(torch.from_numpy(drawn).permute(0, 3, 1, 2), background=0.0, tolerance=1e-6)
    masks = silhouettes(true_mesh("robot", 2), views, 64)
    assert iou(masks, seen) > 0.92 and not (masks & ~seen).any()


def test_the_nearest_shape_of_the_kind_counts():
    views = turntable(4, 15.0, 2.8, 40.0)
    masks = silhouettes(true_mesh("chair", 3), views, 64)
    assert silhouette_iou(masks, views, "chair", shapes=4) == 1
    without = silhouette_iou(masks, views, "chair", shapes=3)
    assert 0.6 < without < 1 and silhouette_iou(masks, views, "fish", shapes=3) < without


def test_pictures_over_a_gray_tell_what_is_covered():
    picture = torch.full((1, 3, 2, 2), 0.9)
    picture[0, 2, 0, 1] = 0.5  # one channel is enough
    picture[0, :, 1, 0] = 0.91  # almost the background
    assert foreground_mask(picture, 0.9).tolist() == [[[False, True], [False, False]]]


def test_chamfer_is_that_of_brute_force_symmetric_and_zero_for_itself():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 3)), rng.normal(size=(70, 3))
    d = cdist(a, b)
    assert chamfer(a, b) == pytest.approx(0.5 * (d.min(1).mean() + d.min(0).mean()))
    assert chamfer(a, b) == chamfer(b, a) and chamfer(a, a) == 0
    assert chamfer(np.zeros((1, 3)), np.array([[3.0, 4.0, 0.0]])) == 5


def test_concentric_balls_are_as_far_apart_as_their_radii():
    inner, outer = surface_points(ball(0.5)), surface_points(ball(0.7), seed=1)
    assert chamfer(inner, outer) == pytest.approx(0.2, abs=0.005)


def test_points_lie_evenly_on_the_surface_and_repeat():
    points = surface_points(ball(0.6), count=4000)
    assert points.shape == (4000, 3) and np.array_equal(points, surface_points(ball(0.6), count=4000))
    assert np.linalg.norm(points, axis=1) == pytest.approx(0.6, abs=0.003)
    for axis in range(3):  # Archimedes: on a sphere every coordinate is uniform
        counts, _ = np.histogram(points[:, axis], bins=8, range=(-0.6, 0.6))
        assert counts == pytest.approx(500, abs=5 * 500**0.5)


def test_two_draws_of_one_surface_are_apart_by_the_spacing():
    a, b = surface_points(ball(0.6)), surface_points(ball(0.6), seed=1)
    assert chamfer(a, b) == pytest.approx(0.5 * np.sqrt(4 * np.pi * 0.36 / 8192), rel=0.05)


def test_walls_that_nobody_sees_do_not_count():
    outer, inner = trimesh.creation.icosphere(3, 0.8), trimesh.creation.icosphere(3, 0.5)
    both = mesh_of(trimesh.util.concatenate([outer, inner]))
    assert np.linalg.norm(surface_points(both, count=2000), axis=1).min() > 0.75


def test_a_true_shape_is_nearer_to_its_kind_than_to_another_and_farther_when_it_is_blown_up():
    mesh = true_mesh("apple", 1)
    own = chamfer_to_truth(mesh, "apple", shapes=2)
    assert own < 0.02
    assert chamfer_to_truth(dataclasses.replace(mesh, vertices=1.2 * mesh.vertices), "apple", shapes=2) > own + 0.05
    moved = dataclasses.replace(mesh, vertices=mesh.vertices + np.array([0.1, 0, 0]))
    assert chamfer_to_truth(moved, "apple", shapes=2) > own + 0.02  # nothing is aligned
    assert chamfer_to_truth(mesh, "airplane", shapes=1) > 0.1


def test_a_mesh_without_area_is_refused():
    with pytest.raises(ValueError, match="no surface"):
        surface_points(Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]])))
