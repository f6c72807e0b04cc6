"""The voxel field: its start, its shortcuts, its refinement."""

import math

import pytest
import torch

from distill3d.cameras import rays, turntable
from distill3d.render.volume import Sampling, render_rays
from distill3d.scenes.voxels import VoxelField, VoxelOptions, total_variation

EXACT = VoxelOptions(resolution=16, sampling=Sampling(min_weight=0, min_transmittance=0), occupancy_threshold=0)


def scribbled(options=EXACT, seed=0):
    field = VoxelField(options)
    with torch.no_grad():
        field.raw.copy_(torch.randn(field.raw.shape, generator=torch.Generator().manual_seed(seed)))
    field.update_occupancy()
    return field


def render(field, **options):
    return field.render(turntable(2, 20, 2.8, 40), 16, torch.full((2, 3), 0.5), **options)


def test_it_starts_as_a_gray_ball_in_empty_space():
    field = VoxelField()
    density, rgb, normal = field.query(torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [1, 1, 1]]), normals=True)
    assert density[0] > 40 and 5 < density[1] < 10 and density[2] < 0.01
    torch.testing.assert_close(rgb, torch.full((3, 3), 0.5))
    torch.testing.assert_close(normal[1], torch.tensor([1.0, 0, 0]), atol=1e-3, rtol=0)
    out = render(field)
    assert out.opacity[:, :, 8, 8].min() > 0.99 and out.opacity[:, :, 0, 0].max() < 0.01


def test_the_axes_of_the_lattice_are_z_y_x():
    field = VoxelField(EXACT)
    with torch.no_grad():
        field.raw[-1, :, :, 1] = 9  # the upper face, red
    _, rgb, _ = field.query(torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]))
    assert rgb[0, 0] > 0.99 and rgb[1, 0] == rgb[2, 0] == 0.5


def test_its_pictures_are_those_of_its_query():
    field = scribbled()
    out = render(field, normals=True)
    bundle = rays(turntable(2, 20, 2.8, 40), 16, 16)
    slow = render_rays(bundle, lambda p: field.query(p, normals=True), field.bounds, torch.full((2, 3), 0.5))
    for name in ("rgb", "opacity", "depth", "normal", "orientation"):
        torch.testing.assert_close(getattr(out, name), getattr(slow, name), atol=1e-5, rtol=0)


def test_the_shortcuts_of_the_default_settings_are_hardly_visible():
    fine = VoxelField(VoxelOptions(sampling=Sampling(min_weight=0, min_transmittance=0), occupancy_threshold=0))
    fast = VoxelField()
    fast.march_bounds = fine.march_bounds  # the same samples
    assert (render(fine).rgb - render(fast).rgb).abs().max() < 0.01


def test_normals_point_down_the_density():
    field = scribbled()
    assert render(field).normal is None
    loss = render(field, normals=True).orientation.sum()
    loss.backward()
    assert bool(field.raw.grad[..., 0].abs().sum() > 0) and bool(field.raw.grad.isfinite().all())


def test_training_looks_at_the_occupancy_again_and_space_can_be_entered_again():
    field = VoxelField(VoxelOptions(resolution=16, blob_height=0, blob_floor=20, occupancy_interval=2))
    with torch.no_grad():
        field.raw[..., 0] = -20
        field.raw[7:9, 7:9, 7:9, 0] = 5
    render(field)
    before = field.cells.clone()
    assert before.sum() == 5**3  # three cells across hold something, and one more on either side
    with torch.no_grad():
        field.raw[7:9, 7:9, 9, 0] = 5
    render(field)
    assert torch.equal(field.cells, before)
    render(field)
    assert field.cells.sum() == 5 * 5 * 6 and bool((field.cells | ~before).all())


def test_evaluation_leaves_the_state_alone():
    field = scribbled().eval()
    before = {k: v.clone() for k, v in field.state_dict().items()}
    render(field)
    assert all(torch.equal(v, before[k]) for k, v in field.state_dict().items())


def test_upsampling_keeps_the_function():
    field = scribbled()
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1
    before = field.query(points)
    field.upsample(31)  # every old lattice point is a new one
    assert field.resolution == 31
    after = field.query(points)
    torch.testing.assert_close(after[0], before[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=0)


def test_a_density_gain_keeps_the_surface_and_clears_the_fog():
    field = scribbled()
    middle = field.options.density_scale * math.log(2)
    before = field.density_grid()
    field.scale_density(1.5)
    after = field.density_grid()
    assert bool(((after > before) == (before > middle)).all())
    logit = lambda d: torch.expm1(d / field.options.density_scale).log()  # noqa: E731  softplus backwards
    torch.testing.assert_close(logit(after.double()), 1.5 * logit(before.double()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("total", [1, 3, 10, 200])
def test_a_run_of_any_length_scales_the_density_once_at_each_fraction(total):
    field = VoxelField(VoxelOptions(resolution=4, density_gain=((0.3, 1.5), (0.7, 2.0))))
    begin = field._biased().detach().clone()
    optimizer = torch.optim.Adam(field.parameter_groups())
    for step in range(total):
        field.adapt(step, total, optimizer)
    reached = [factor for begin, factor in field.options.density_gain if begin <= (total - 1) / total]
    torch.testing.assert_close(field._biased()[..., 0], math.prod(reached) * begin[..., 0])
    assert torch.equal(field._biased()[..., 1:], begin[..., 1:])


def test_the_state_loads_into_a_field_of_another_resolution():
    field = scribbled()
    field.upsample(20)
    other = VoxelField(EXACT)
    other.load_state_dict(field.state_dict())
    assert torch.equal(render(field.eval()).rgb, render(other.eval()).rgb)


def test_a_few_steps_paint_it():
    field = VoxelField(VoxelOptions(resolution=16, sampling=Sampling(40)))
    optimizer = torch.optim.Adam(field.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        out = render(field, generator=generator)
        (out.rgb - out.opacity.detach() * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)).square().mean().backward()
        optimizer.step()
    red = render(field).rgb[:, :, 8, 8]
    assert red[:, 0].min() > 0.85 and red[:, 1:].max() < 0.15


@pytest.mark.parametrize("options", [{"resolution": 1}, {"half_size": 0.0}, {"density_gain": ((0.5, 0.0),)},
                                     {"occupancy_interval": 0}, {"refine": ((0.5, 0.0),)}])  # fmt: skip
def test_mistakes_are_value_errors(options):
    with pytest.raises(ValueError, match=r"resolution|half_size|density_gain|occupancy_interval|refine"):
        VoxelOptions(**options)


def test_total_variation_of_a_ramp_and_of_a_constant():
    assert total_variation(torch.ones(4, 4, 4, 3)).item() == 0
    ramp = 0.5 * torch.arange(4.0).view(4, 1, 1) + torch.arange(4.0)  # z slope 0.5, x slope 1
    assert total_variation(ramp.expand(4, 4, 4)).item() == pytest.approx(1.25)
