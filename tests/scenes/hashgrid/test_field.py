"""The hash field against the layout stated, its normals against derivatives, its filters against the long way."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill3d.cameras import rays, turntable
from distill3d.render.volume import Sampling, render_rays
from distill3d.scenes.hashgrid.encoding import reference
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.hashgrid.layout import HashLayout
from distill3d.types import Lighting

LAYOUT = HashLayout(levels=4, features=2, log2_table=10, coarsest=4, finest=32)
SAMPLING = Sampling(samples=64, min_weight=0, min_transmittance=0)


def a_field(dtype=torch.float32, **options):
    """A field whose networks matter as much as its blob."""
    chosen = {
        "layout": LAYOUT,
        "half_size": 1.0,
        "first_levels": 4,
        "occupancy_resolution": 16,
        "sampling": SAMPLING,
    } | options
    field = HashOptions(**chosen).build().to(dtype)
    with torch.no_grad():
        field.table += torch.randn(field.table.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        field.occupancy.update(field.density, reset=True)
    return field


def some_points(count, reach=0.9, dtype=torch.float64):
    return reach * (2 * torch.rand(count, 3, generator=torch.Generator().manual_seed(2), dtype=dtype) - 1)


def raw_density(field, points):
    encoded = reference(field.table, points / 2 + 0.5, LAYOUT, 4, False)[0]
    hidden = torch.relu(encoded @ field.density_in.T)
    return hidden @ field.density_out + 10 * (1 - points.norm(dim=1) / 0.5), encoded


def test_density_and_color_are_the_stated_networks():
    field, points = a_field(torch.float64), some_points(50)
    density, color, normal = field.query(points)
    raw, encoded = raw_density(field, points)
    torch.testing.assert_close(density, torch.log1p(raw.exp()))
    hidden = torch.relu(encoded @ field.color_in.T)
    torch.testing.assert_close(color, 1 / (1 + torch.exp(-hidden @ field.color_out.T)))
    torch.testing.assert_close(density, field.density(points))
    assert normal is None and not any("bias" in name for name, _ in field.named_parameters())


@pytest.mark.parametrize("blob", ["magic3d", "dreamfusion"])
def test_analytic_normals_are_minus_the_gradient_of_density(blob):
    field, points = a_field(torch.float64, blob=blob), some_points(60)
    normal = field.query(points, normals=True)[2]
    step = 1e-6
    ahead, behind = ([field.density(points + s * step * axis) for axis in torch.eye(3).double()] for s in (1, -1))
    expected = F.normalize(torch.stack(behind, 1) - torch.stack(ahead, 1), dim=1)
    torch.testing.assert_close(normal, expected, atol=1e-4, rtol=0)


def test_gradients_through_normals_are_those_of_autograd():
    field, points = a_field(torch.float64), some_points(30)
    weights = torch.randn(30, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = [field.table, field.density_in, field.density_out]
    at = points.clone().requires_grad_()
    raw, _ = raw_density(field, at)
    slope = torch.autograd.grad(raw.sum(), at, create_graph=True)[0]
    expected = torch.autograd.grad((F.normalize(-slope, dim=1) * weights).sum(), parameters)
    found = torch.autograd.grad((field.query(points, normals=True)[2] * weights).sum(), parameters)
    torch.testing.assert_close(found, expected)


def test_blobs_have_their_formulas():
    points = some_points(20)
    for blob, law in (
        ("magic3d", lambda r: 10 * (1 - r / 0.5)),
        ("dreamfusion", lambda r: 10 * torch.exp(-(r**2) / (2 * 0.5**2))),
    ):
        field = HashOptions(layout=LAYOUT, blob=blob).build().double()
        with torch.no_grad():
            field.table.zero_()
        torch.testing.assert_close(field.density(points), F.softplus(law(points.norm(dim=1))))


def test_gradients_of_a_picture_agree_with_finite_differences():
    layout = HashLayout(levels=2, features=2, log2_table=6, coarsest=2, finest=5)
    field = a_field(torch.float64, layout=layout, first_levels=2, hidden=4, sampling=Sampling(12))
    view = turntable(1, 20, 2.5, 30)
    view = type(view)(*(value.double() for value in vars(view).values()))
    names = ["table", "density_in", "density_out", "color_in", "color_out"]

    def image(*values):
        out = torch.func.functional_call(field, dict(zip(names, values, strict=True)), (view,))
        return out.rgb, out.opacity, out.normal

    def forward(cameras):
        light = Lighting("lambertian", torch.ones(1, 3).double())
        return field.render(cameras, 3, torch.full((1, 3), 0.5).double(), normals=True, lighting=light)

    field.forward = forward
    inputs = [getattr(field, n).detach().clone().requires_grad_() for n in names]
    # In one random direction of each parameter: all of them would be 200 renders.
    assert torch.autograd.gradcheck(image, inputs, fast_mode=True, atol=1e-4)


def test_a_rendering_is_what_the_query_says_and_skipping_costs_nothing():
    field = a_field().eval()
    views = turntable(2, 20, 2.5, 40)
    fast = field.render(views, 12, torch.full((2, 3), 0.5), normals=True)
    slow = render_rays(rays(views, 12, 12), lambda p: field.query(p, True), field.bounds, torch.full((2, 3), 0.5),
                       Sampling(64))  # fmt: skip
    assert 0.05 < slow.opacity.mean() < 0.95
    # A skipped cell holds at most the density `occupancy_threshold`, over a way of at most sqrt(12).
    assert (fast.opacity - slow.opacity).abs().max() < 1 - math.exp(-0.03 * math.sqrt(12))
    assert (fast.rgb - slow.rgb).abs().mean() < 2e-3


def test_the_recipes_levels_by_step():
    options = HashOptions()
    assert [options.levels_at(s, 10000) for s in (0, 2000, 2499, 2500, 2999, 3000, 5999, 6000, 10000)] == [
        8, 8, 8, 9, 9, 10, 15, 16, 16,
    ]  # fmt: skip
    assert [options.levels_at(s, 1000) for s in (0, 249, 250, 600, 999)] == [8, 8, 9, 16, 16]  # at any length of run
    field = a_field(first_levels=2, level_start=0.1, level_interval=0.05)
    optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
    points, seen = some_points(20, dtype=torch.float32), []
    for step in (0, 14, 15, 20, 99):
        field.adapt(step, 100, optimizer)
        seen.append(int(field.levels))
        field.zero_grad()
        field.query(points)[0].sum().backward()
        off = field.table.grad[LAYOUT.starts[seen[-1]] :] if seen[-1] < 4 else torch.zeros(1)
        assert not off.any() and field.table.grad.any()
    assert seen == [2, 2, 3, 4, 4]


def test_an_emptied_cell_is_forgotten_and_a_filled_one_comes_back():
    field = a_field(occupancy_resolution=8)
    ball = field.occupancy.occupancy().cells.clone()
    assert ball.any() and not ball.all()
    optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
    for _ in range(200):
        field.occupancy.update(lambda p: torch.zeros(len(p)))
    assert field.occupancy.occupancy().cells.all()  # nothing is seen, so everything is asked
    field.adapt(16, 100, optimizer)  # at other points of the cells than before
    back = field.occupancy.occupancy().cells
    assert not back.all() and (ball ^ back).sum() < 0.2 * ball.sum()


def test_fresh_points_find_a_wall_thinner_than_their_distance():
    field = a_field(occupancy_resolution=4)

    def wall(points):
        return ((points[:, 0] - 0.2).abs() < 0.01).to(points)

    field.occupancy.update(wall, reset=True)  # the middle of no octant lies in it
    assert not (field.occupancy.max_density > 0).any()
    for step in range(30):
        field.occupancy.update(wall, torch.Generator().manual_seed(step))
    found = field.occupancy.max_density > 0.03
    assert found[:, :, 2].all() and found.sum() == 16


def test_a_run_that_goes_on_has_the_same_field():
    field, other = a_field(), a_field(seed=5)
    field.adapt(0, 10, torch.optim.SGD(field.parameters(), lr=0.1))
    other.load_state_dict(field.state_dict())
    points = some_points(10, dtype=torch.float32)
    assert torch.equal(field.query(points)[0], other.query(points)[0])
    assert torch.equal(field.occupancy.max_density, other.occupancy.max_density)
    ids = [id(p) for group in field.parameter_groups() for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in field.parameters())


@pytest.mark.parametrize("wrong", [{"half_size": 0}, {"hidden": 0}, {"blob": "ball"}, {"level_interval": 0}])
def test_mistakes_are_value_errors(wrong):
    with pytest.raises(ValueError, match=r"must be|got"):
        HashOptions(**wrong)
