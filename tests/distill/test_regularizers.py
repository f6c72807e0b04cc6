"""Regularizers against values computed by hand."""

import math

import pytest
import torch

from distill3d.cameras import orbit, turntable
from distill3d.distill.regularizers import WeightSchedule, convexity, opaque, orientation, sparsity, z_variance
from distill3d.render.volume import Sampling
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.hashgrid.layout import HashLayout
from distill3d.scenes.voxels import VoxelOptions
from distill3d.types import Rendering


def rendering(opacity, variance=None, away=None):
    def image(values):
        return torch.tensor(values).view(1, 1, 1, -1).requires_grad_()

    o = image(opacity)
    facing = None if away is None else image(away)
    return Rendering(o.expand(1, 3, 1, -1), o, o, image(variance or opacity), None, facing)


def test_hand_values():
    assert sparsity(rendering([0.0, 1.0])).item() == pytest.approx((0.1 + math.sqrt(1.01)) / 2)
    assert opaque(rendering([0.5])).item() == pytest.approx(math.log(2))
    clamped = -0.001 * math.log(0.001) - 0.999 * math.log(0.999)
    assert opaque(rendering([0.0, 1.0])).item() == pytest.approx(clamped, rel=1e-3)
    assert z_variance(rendering([0.9, 0.4, 0.6], [2.0, 50.0, 4.0])).item() == pytest.approx(3)
    assert orientation(rendering([0.9, 0.0, 0.6], away=[0.2, 0.0, 0.4])).item() == pytest.approx(0.3)


def test_z_variance_of_nothing_is_zero_with_a_zero_gradient():
    picture = rendering([0.1, 0.2], [3.0, math.nan])
    value = z_variance(picture)
    value.backward()
    assert value.item() == 0 and torch.equal(picture.depth_variance.grad, torch.zeros(1, 1, 1, 2))


def test_gradients_are_finite_at_the_extremes():
    picture = rendering([0.0, 1.0, 0.5])
    (sparsity(picture) + opaque(picture)).backward()
    assert bool(picture.opacity.grad.isfinite().all())


def test_orientation_asks_for_normals():
    with pytest.raises(ValueError, match="normals"):
        orientation(rendering([0.5]))


def blocks(normals, seen, views):
    """Pictures whose 8 x 8 blocks are 2 x 2 pixels: camera-space normals [B, 3, 8, 8] as a renderer gives them."""
    world = torch.einsum("bij,bjhw->bihw", views.camera_to_world[:, :3, :3], normals).repeat_interleave(2, 2)
    o = seen.float().repeat_interleave(2, 2).repeat_interleave(2, 3).requires_grad_()
    return Rendering(o.expand(-1, 3, -1, -1), o, o, o, world.repeat_interleave(2, 3).requires_grad_())


def dome(sign):
    """Camera-space normals [1, 3, 8, 8] of a ball that fills the picture, or of a bowl (-1)."""
    at = (torch.arange(8) + 0.5) / 4 - 1
    y, x = torch.meshgrid(-at, at, indexing="ij")
    x, y = 0.7 * x, 0.7 * y
    return torch.stack((sign * x, sign * y, (1 - x**2 - y**2).sqrt()))[None]


@pytest.mark.parametrize("view", [orbit(0, 0, 2, 40), orbit(200, 35, 2, 40), orbit(90, -80, 2, 40)])
def test_a_ball_is_convex_and_a_bowl_is_not_from_anywhere(view):
    everything = torch.ones(1, 1, 8, 8)
    assert convexity(blocks(dome(1), everything, view), view.camera_to_world).item() == pytest.approx(0, abs=1e-6)
    # Every pair differs by 0.7 / 4, in a row and in a column.
    bowl = convexity(blocks(dome(-1), everything, view), view.camera_to_world)
    assert bowl.item() == pytest.approx(0.175, abs=1e-5)


def test_each_axis_of_convexity_counts_by_itself():
    view, everything = orbit(30, 20, 2, 40), torch.ones(1, 1, 8, 8)
    for axis in (0, 1):
        fold = dome(-1)
        fold[:, 1 - axis] = 0
        fold[:, 2] = (1 - fold[:, axis] ** 2).sqrt()
        found = convexity(blocks(fold, everything, view), view.camera_to_world).item()
        line = fold[0, axis, 0] if axis == 0 else fold[0, axis, :, 0]
        assert found == pytest.approx(float(line.diff().abs().mean()) / 2, rel=1e-4)


def test_convexity_looks_only_at_pairs_that_are_seen():
    view, seen = orbit(30, 20, 2, 40), torch.zeros(1, 1, 8, 8)
    seen[..., 3, 4] = seen[..., 5, 4] = seen[..., 4, 2] = 1  # no two are neighbors
    picture = blocks(dome(-1), seen, view)
    value = convexity(picture, view.camera_to_world)
    value.backward()
    assert value.item() == 0 and not picture.normal.grad.any()
    with pytest.raises(ValueError, match="normals"):
        convexity(rendering([0.5]), view.camera_to_world)


LAYOUT = HashLayout(levels=3, log2_table=8, coarsest=3, finest=12)
SAMPLING = Sampling(24, chunk=100)
SCENES = {
    "hash": lambda height: HashOptions(
        layout=LAYOUT, half_size=1.0, first_levels=3, occupancy_resolution=8, blob="dreamfusion", blob_height=height,
        blob_radius=0.3 if height == 10 else 9.0, sampling=SAMPLING,
    ),
    "voxel": lambda height: VoxelOptions(
        12, blob_height=height, blob_radius=0.5 if height == 10 else 99.0, blob_floor=99.0, sampling=SAMPLING
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize("height", [-60.0, 60.0, 10.0], ids=["empty", "full", "normal"])
def test_every_regularizer_is_finite_on_every_scene(kind, height):
    """Nothing anywhere, matter everywhere, a ball; values and gradients."""
    scene, views = SCENES[kind](height).build(), turntable(2, 20, 2.6, 50)
    picture = scene.render(views, 24, torch.full((2, 3), 0.5), normals=True)
    opacity = picture.opacity.mean().item()
    assert opacity < 1e-4 if height < 0 else opacity > 0.5 if height > 10 else 0.02 < opacity < 0.8
    terms = {f.__name__: (lambda f=f: f(picture)) for f in (orientation, sparsity, opaque, z_variance)}
    terms["convexity"] = lambda: convexity(picture, views.camera_to_world)
    for name, term in (terms | scene.penalties()).items():
        value = term()
        gradients = torch.autograd.grad(value, list(scene.parameters()), retain_graph=True, allow_unused=True)
        assert value.ndim == 0 and bool(value.isfinite()), name
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None), name


def test_a_weight_goes_from_start_to_end():
    weight = WeightSchedule(1.0, 3.0, 0.1, 0.2)
    assert [weight(s, 100) for s in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]
    assert WeightSchedule(0.1, 0.1)(0, 100) == 0.1
    assert [WeightSchedule(0.0, 1.0, 0.05, 0.05)(s, 100) for s in (4, 5)] == [0, 1]
    for wrong, message in (((0, 1, 0.5, 0.4), "begin <= finish"), ((0, 1, 0, 2), "<= 1"), ((-1, 0), "at least 0")):
        with pytest.raises(ValueError, match=message):
            WeightSchedule(*wrong)
