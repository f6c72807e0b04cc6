"""Volume rendering against closed forms, and every shortcut against the long way."""

import math
from dataclasses import fields

import pytest
import torch

from distill3d.cameras import orbit, rays, turntable
from distill3d.render.volume import Filters, Occupancy, Sampling, alpha_weights, intersect_box, render_rays
from distill3d.types import Rays

BOX = torch.tensor([[-1.0] * 3, [1.0] * 3])
COLOR = torch.tensor([0.8, 0.4, 0.1])


def ray(origin, direction, dtype=torch.float32):
    o, d = (torch.tensor(v, dtype=dtype).view(1, 1, 1, 3) for v in (origin, direction))
    return Rays(o, d / d.norm())


def solid(inside, density):
    def field(points):
        return density * inside(points).to(points), COLOR.to(points).expand(len(points), 3), None

    return field


def ball(points):
    return points.norm(dim=1) < 0.6


def blob(points):
    """A smooth ball with normals, exactly empty outside radius 0.7."""
    radius = points.norm(dim=1)
    density = 20 * (0.7 - radius).clamp_min(0)
    return density, 0.5 + 0.4 * torch.sin(5 * points), points / radius[:, None].clamp_min(1e-6)


def same(a, b, atol=1e-6):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, atol=atol, rtol=0)


def test_a_homogeneous_box_has_its_closed_form():
    out = render_rays(ray([3.0, 0.2, 0.1], [-1.0, 0, 0]), solid(lambda p: p[:, 0] < 9, 0.7), BOX, torch.ones(1, 3))
    opacity = 1 - math.exp(-0.7 * 2)
    assert out.opacity.item() == pytest.approx(opacity, abs=1e-5)
    torch.testing.assert_close(out.rgb.flatten(), opacity * COLOR + 1 - opacity)
    # Depth from the box's face at length 2: the mean of a truncated exponential over [0, 2].
    expected = 2 + 1 / 0.7 - 2 * math.exp(-1.4) / opacity
    assert out.depth.item() == pytest.approx(expected, abs=1e-3)


def test_a_homogeneous_ball_has_its_closed_form():
    offset = 0.3
    out = render_rays(ray([3.0, offset, 0], [-1.0, 0, 0]), solid(ball, 1.5), BOX, torch.zeros(1, 3), Sampling(4000))
    chord = 2 * math.sqrt(0.6**2 - offset**2)
    assert out.opacity.item() == pytest.approx(1 - math.exp(-1.5 * chord), abs=1e-3)


def test_an_opaque_box_is_a_surface():
    out = render_rays(ray([3.0, 0, 0], [-1.0, 0, 0]), solid(lambda p: p[:, 0] < 9, 1e5), BOX, torch.zeros(1, 3))
    assert out.opacity.item() == pytest.approx(1)
    assert out.depth.item() == pytest.approx(2, abs=1 / 80 + 1e-6)  # half a stratum
    assert out.depth_variance.item() == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(out.rgb.flatten(), COLOR)


def test_two_opaque_walls_show_the_nearer():
    def walls(points):
        near = points[:, 0] > 0
        return torch.full_like(points[:, 0], 1e4), near[:, None] * COLOR, None

    out = render_rays(ray([3.0, 0, 0], [-1.0, 0, 0]), walls, BOX, torch.ones(1, 3))
    torch.testing.assert_close(out.rgb.flatten(), COLOR)


def test_a_miss_shows_the_background_and_an_inner_origin_starts_at_itself():
    field = solid(lambda p: p[:, 0] < 9, 3.0)
    out = render_rays(ray([3.0, 5, 0], [-1.0, 0, 0]), field, BOX, torch.tensor([[0.1, 0.2, 0.3]]))
    torch.testing.assert_close(out.rgb.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert out.opacity.item() == out.depth.item() == out.depth_variance.item() == 0
    near, far = intersect_box(torch.zeros(1, 3), torch.tensor([[0.0, 0, 1]]), BOX)
    assert (near.item(), far.item()) == (0, 1)


def test_weights_and_the_last_transmittance_sum_to_one():
    depth = 3 * torch.rand(50, 30, generator=torch.Generator().manual_seed(0)).pow(6)
    depth[0], depth[1] = 0, 1e6
    weights, before = alpha_weights(depth)
    torch.testing.assert_close(weights.sum(1) + torch.exp(-depth.sum(1)), torch.ones(50))
    assert bool((weights >= 0).all()) and bool((before[:, 0] == 1).all())


def test_gradients_agree_with_finite_differences():
    bundle = rays(orbit([20.0], [10.0], [2.8], torch.tensor([40.0], dtype=torch.float64)), 3, 3)

    def image(density, rgb, background):
        def field(points):
            bump = torch.exp(-4 * points.square().sum(1))
            normal = torch.nn.functional.normalize(points, dim=1)
            return density * bump, rgb.sigmoid() * (0.5 + 0.5 * bump[:, None]), normal

        out = render_rays(bundle, field, BOX.double(), background, Sampling(12))
        return out.rgb, out.opacity, out.depth, out.depth_variance, out.normal

    inputs = [torch.tensor(v, dtype=torch.float64) for v in (3.0, [0.1, -0.4, 0.9], [[0.3, 0.6, 0.9]])]
    assert torch.autograd.gradcheck(image, [v.requires_grad_() for v in inputs])


def test_skipping_empty_cells_changes_nothing():
    axis = (torch.arange(16) + 0.5) / 8 - 1
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    cells = torch.stack((x, y, z), -1).norm(dim=-1) < 0.7 + 0.125  # more than half a cell's diagonal
    bundle, background = rays(turntable(3, 20, 2.8, 40), 24, 24), torch.linspace(0, 1, 9).view(3, 3)
    dense = render_rays(bundle, blob, BOX, background)
    same(dense, render_rays(bundle, blob, BOX, background, filters=Filters(occupancy=Occupancy(cells, BOX))))


def test_the_occupied_box_is_tight():
    cells = torch.zeros(4, 4, 4, dtype=torch.bool)
    cells[1, 2:, 3] = True  # z, y, x
    expected = torch.tensor([[0.5, 0.0, -0.5], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(Occupancy(cells, BOX).tight(), expected)
    torch.testing.assert_close(Occupancy(cells & False, BOX).tight(), BOX)


def test_dropping_faint_samples_stays_within_its_bound():
    bundle, background = rays(turntable(2, 20, 2.8, 40), 24, 24), torch.linspace(0, 1, 6).view(2, 3)
    dense = render_rays(bundle, blob, BOX, background)
    everything = Sampling(min_weight=0, min_transmittance=0)
    exact = render_rays(bundle, blob, BOX, background, everything, filters=Filters(lambda p: blob(p)[0]))
    same(dense, exact)
    pruned = render_rays(bundle, blob, BOX, background, filters=Filters(lambda p: blob(p)[0]))
    assert (pruned.opacity - dense.opacity).abs().max() <= 80 * 1e-4 + 1e-3


def test_chunks_and_batches_change_nothing():
    bundle, background = rays(turntable(3, 20, 2.8, 40), 20, 20), torch.linspace(0, 1, 9).view(3, 3)
    whole = render_rays(bundle, blob, BOX, background)
    same(whole, render_rays(bundle, blob, BOX, background, Sampling(chunk=37)))
    for i in range(3):
        one = render_rays(
            Rays(bundle.origins[i : i + 1], bundle.directions[i : i + 1]), blob, BOX, background[i : i + 1]
        )
        part = type(whole)(*(getattr(whole, f.name)[i : i + 1] for f in fields(whole)))
        same(one, part)


def test_a_picture_as_background_is_seen_pixel_by_pixel():
    bundle = rays(turntable(2, 20, 2.8, 40), 16, 16)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = render_rays(bundle, blob, BOX, image)
    black = render_rays(bundle, blob, BOX, torch.zeros(2, 3))
    torch.testing.assert_close(out.rgb, black.rgb + (1 - black.opacity) * image)
    same(render_rays(bundle, blob, BOX, image[:, :, :1, :1].expand_as(image)),
         render_rays(bundle, blob, BOX, image[:, :, 0, 0]))  # fmt: skip


def test_memory_bounds_change_neither_pictures_nor_gradients():
    bundle, background = rays(turntable(2, 20, 2.8, 40), 12, 12), torch.linspace(0, 1, 6).view(2, 3)

    def run(sampling):
        asked, scale = [], torch.tensor(1.3, requires_grad=True)

        def field(points):
            asked.append(len(points))
            density, rgb, normal = blob(points)
            return density * scale, rgb * scale.sigmoid(), normal * scale

        out = render_rays(bundle, field, BOX, background, sampling, filters=Filters(lambda p: 1.3 * blob(p)[0]))
        (out.rgb.square().sum() + out.depth.sum() + out.normal.square().sum() + out.orientation.sum()).backward()
        return out, scale.grad, asked

    whole, gradient, asked = run(Sampling())
    assert len(asked) == 1
    for sampling in (Sampling(points=300), Sampling(points=300, chunk=50, checkpoint=True), Sampling(points=1)):
        out, other, calls = run(sampling)
        same(whole, out)
        torch.testing.assert_close(other, gradient)
        assert max(calls) <= max(sampling.points, 80)
        assert sum(calls) == sum(asked) * (2 if sampling.checkpoint else 1)


def shell(points):
    """A thin hollow sphere with sharp edges: few even samples see it."""
    density = 20 * ((points.norm(dim=1) - 0.5).abs() < 0.05).to(points)
    return density, 0.5 + 0.5 * torch.sin(9 * points), None


def test_importance_sampling_has_less_error_from_as_many_samples():
    bundle = rays(turntable(2, 20, 2.8, 40), 16, 16)
    density = Filters(lambda p: shell(p)[0])

    def image(sampling):
        return render_rays(bundle, shell, BOX, torch.zeros(2, 3), sampling, filters=density).rgb

    exact = image(Sampling(3000, min_weight=0, min_transmittance=0))
    even, drawn = image(Sampling(96)), image(Sampling(48, importance=48))
    assert (drawn - exact).square().mean() < 0.2 * (even - exact).square().mean()


def step(points):
    """Half of the box is dense, its face off the lattice of samples."""
    return (points[:, 0] > 0.37).to(points), None, None


@pytest.mark.parametrize(
    ("shape", "density", "sampling"),
    [
        (shell, lambda p: shell(p)[0], Sampling(12, 6, 0, 0)),
        # Few samples with cuts in empty space: wrong if a sample and the edges of its stratum shift together.
        (step, lambda p: 5 * (1 + p[:, 0]), Sampling(4, 2, 0, 0)),
    ],
)
def test_importance_sampling_is_unbiased(shape, density, sampling):
    """The optical depth of one ray, its mean over many draws; 1e-4 of a faint shape, so that alpha is linear."""
    count, generator = 20000, torch.Generator().manual_seed(0)
    one = ray([3.0, 0.1, 0.2], [-1.0, 0, 0])
    many = Rays(one.origins.expand(1, count, 1, 3), one.directions.expand(1, count, 1, 3))

    def faint(points):
        return 1e-4 * shape(points)[0], points, None

    filters = Filters(density)  # where it cuts, whatever its height
    drawn = render_rays(many, faint, BOX, torch.zeros(1, 3), sampling, filters=filters, generator=generator).opacity
    exact = render_rays(one, faint, BOX, torch.zeros(1, 3), Sampling(20000)).opacity
    error = drawn.std() / count**0.5
    assert error < 0.02 * exact and (drawn.mean() - exact).abs() < 4 * error


def test_importance_sampling_covers_the_ray_and_asks_for_a_density():
    def lengths(points):
        return torch.full_like(points[:, 0], 0.7), points, None

    out = render_rays(
        ray([3.0, 0.2, 0.1], [-1.0, 0, 0]), lengths, BOX, torch.zeros(1, 3), Sampling(7, 5, 0, 0),
        filters=Filters(lambda p: 50 * (p[:, 0] > 0.4)), generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert out.opacity.item() == pytest.approx(1 - math.exp(-1.4), abs=1e-5)  # the strata's widths sum to 2
    with pytest.raises(ValueError, match="pass Filters\\(density="):
        render_rays(ray([3.0, 0, 0], [-1.0, 0, 0]), lengths, BOX, torch.zeros(1, 3), Sampling(7, 5))


def test_jitter_stays_in_its_strata_and_repeats_with_its_seed():
    bundle = rays(orbit(0, 0, 3, 40), 8, 8)

    def lengths(seed):
        seen = []

        def field(points):
            seen.append(points)
            return torch.ones(len(points)), points, None

        render_rays(bundle, field, BOX, torch.ones(1, 3), Sampling(4), generator=torch.Generator().manual_seed(seed))
        return torch.cat(seen)

    points = lengths(0)
    assert bool((points.abs() <= 1 + 1e-5).all())
    assert torch.equal(points, lengths(0)) and not torch.equal(points, lengths(1))
    near, far = intersect_box(bundle.origins.view(-1, 3), bundle.directions.view(-1, 3), BOX)
    along = (points.view(-1, 4, 3) - bundle.origins.view(-1, 1, 3)[far > near]).norm(dim=-1)
    stratum = (along - near[far > near, None]) / (far - near)[far > near, None] * 4
    assert torch.equal(stratum.floor(), torch.arange(4.0).expand_as(stratum))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("side", [0, -1])
def test_the_outermost_cells_are_cells_too(axis, side):
    cells = torch.zeros(4, 5, 6, dtype=torch.bool)
    cells.transpose(0, 2).select(axis, side).fill_(True)
    width = 2 / (6, 5, 4)[axis]

    def layer(points):
        inside = points[:, axis] < width - 1 if side == 0 else points[:, axis] > 1 - width
        return 2 * inside.to(points), points, None

    origin = [0.31, 0.13, 0.07]
    origin[axis] = 3.0
    along = [-1.0 * (i == axis) for i in range(3)]
    whole, skipped = (
        render_rays(ray(origin, along), layer, BOX, torch.zeros(1, 3), Sampling(120), filters=filters).opacity.item()
        for filters in (Filters(), Filters(occupancy=Occupancy(cells, BOX)))
    )
    assert skipped == pytest.approx(whole, abs=1e-6) and whole == pytest.approx(1 - math.exp(-2 * width), rel=0.02)


def test_the_orientation_term_moves_normals_and_not_weights():
    """sg(w) max(0, n.d)^2: hiding a surface that looks away is no way to lower it (Ref-NeRF, equation 11)."""
    density = torch.tensor(3.0, requires_grad=True)
    away = torch.tensor([-1.0, 0.2, 0.0], requires_grad=True)

    def field(points):
        return density.expand(len(points)), points * 0, away.expand_as(points)

    out = render_rays(ray([3.0, 0, 0], [-1.0, 0, 0]), field, BOX, torch.zeros(1, 3))
    on_density, on_normal = torch.autograd.grad(out.orientation.sum(), (density, away))
    assert on_density == 0
    torch.testing.assert_close(on_normal, out.opacity.detach().flatten() * torch.tensor([-2.0, 0, 0]))


def test_only_surfaces_that_look_away_are_penalized():
    def sheet(sign):
        def field(points):
            return torch.full_like(points[:, 0], 1e3), points * 0, points.new_tensor([sign, 0, 0]).expand_as(points)

        return render_rays(ray([3.0, 0, 0], [-1.0, 0, 0]), field, BOX, torch.zeros(1, 3)).orientation.item()

    assert sheet(1.0) == 0 and sheet(-1.0) == pytest.approx(1)


def test_an_empty_volume_can_be_differentiated():
    density = torch.zeros((), requires_grad=True)
    out = render_rays(
        rays(orbit(0, 0, 3, 40), 4, 4),
        lambda p: (density.expand(len(p)), density.expand(len(p), 3), None),
        BOX,
        torch.ones(1, 3),
        filters=Filters(lambda p: torch.zeros(len(p))),
    )
    (out.rgb.sum() + out.depth.sum() + out.depth_variance.sum()).backward()
    assert density.grad.item() == 0


def test_an_impossible_sampling_is_a_value_error():
    with pytest.raises(ValueError, match="got 0"):
        Sampling(samples=0)
