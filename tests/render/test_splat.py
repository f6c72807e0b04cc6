"""Splats against their formula, the fast path against the reference, and what any compositing keeps."""

from dataclasses import fields, replace

import pytest
import torch

from distill3d.cameras import orbit, project, rays, turntable
from distill3d.render.splat import Splats, reference, render_splats
from distill3d.render.splat_compositing import SplatSampling, by_pixel_counted, by_pixel_sorted, composite

ENTRIES = ("rgb", "opacity", "depth", "depth_variance", "normal")
PARTS = tuple(f.name for f in fields(Splats))


def scattered(n, seed=0, spread=0.4, scale=0.05):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Splats(
        spread * draw(n, 3), draw(n, 4), 0.3 * draw(n, 3) + torch.tensor(scale).log(), draw(n), draw(n, 3).sigmoid()
    )


def views(n=2):
    return around(torch.arange(n, dtype=torch.float64) * (360 / n) + 10)


def around(azimuth):
    return orbit(azimuth, 20.0, 2.8, 40.0)


def gray(cameras):
    return torch.full((len(cameras), 3), 0.5, dtype=cameras.fov_y.dtype)


def leaves(splats):
    return [getattr(splats, name).clone().requires_grad_() for name in PARTS]


def test_one_splat_is_its_formula():
    splats, cameras, size = scattered(1, seed=3, scale=0.2), views(1), 24
    out = render_splats(splats, cameras, size, gray(cameras), normals=True)

    mean = splats.means[None]
    jacobian = torch.autograd.functional.jacobian(lambda p: project(cameras, p, size, size)[0][0, 0], mean)[:, 0, 0]
    axes = splats.axes()[0]
    covariance = axes @ torch.diag((2 * splats.log_scales[0]).exp()) @ axes.T
    footprint = jacobian @ covariance @ jacobian.T + 0.3 * torch.eye(2)
    pixels, depth = project(cameras, mean, size, size)
    axis = torch.arange(size) + 0.5
    offset = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) - pixels[0, 0]
    power = -0.5 * torch.einsum("hwi,ij,hwj->hw", offset, footprint.inverse(), offset)
    alpha = torch.sigmoid(splats.opacities) * power.exp()
    alpha = torch.where(alpha >= 1 / 255, alpha, 0.0)

    assert 20 < (alpha > 0).sum() < size * size
    torch.testing.assert_close(out.opacity[0, 0], alpha)
    torch.testing.assert_close(out.rgb[0], alpha * splats.colors[0, :, None, None] + (1 - alpha) * 0.5)
    # The plane at the mean's depth, along the pixel's ray.
    forward = -cameras.camera_to_world[0, :3, 2]
    length = depth[0, 0] / (rays(cameras, size, size).directions[0] @ forward)
    torch.testing.assert_close(out.depth[0, 0], torch.where(alpha > 0, length, 0.0))
    assert out.depth_variance.max() < 1e-12
    shortest = axes[:, splats.log_scales[0].argmin()]
    normal = out.normal[0, :, alpha > 0.1] / alpha[alpha > 0.1]
    torch.testing.assert_close((normal.T @ shortest).abs(), torch.ones(normal.shape[1], dtype=torch.float64))
    assert (normal.T @ (cameras.camera_to_world[0, :3, 3] - splats.means[0])).min() > 0


@pytest.mark.parametrize("chunk", [1 << 22, 500])
def test_the_fast_path_is_the_reference(chunk):
    """The spread puts splats outside the image and behind the camera; a small chunk makes bands of rows."""
    splats, cameras, size = scattered(150, spread=1.5, scale=0.1), views(2), 20
    depth = project(cameras, splats.means, size, size)[1]
    assert (depth < 0).any() and (depth > 1).any()
    g = torch.Generator().manual_seed(1)
    results = []
    for compositor in (composite, reference):
        inputs = leaves(splats)
        sampling, how = SplatSampling(chunk=chunk), {"normals": True, "compositor": compositor}
        out = render_splats(Splats(*inputs), cameras, size, gray(cameras), sampling, **how)
        g.manual_seed(1)
        loss = sum((getattr(out, e) * torch.randn(getattr(out, e).shape, generator=g)).sum() for e in ENTRIES)
        results.append((out, torch.autograd.grad(loss, inputs)))
    (fast, fast_gradients), (slow, slow_gradients) = results
    for entry in ENTRIES:
        torch.testing.assert_close(getattr(fast, entry), getattr(slow, entry), atol=1e-12, rtol=1e-9)
    for name, a, b in zip(PARTS, fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_single_precision_is_enough():
    """Cumulative sums run over all fragments of a view, here 160 thousand."""
    splats, cameras = scattered(3000, scale=0.04), views(1)
    exact = render_splats(splats, cameras, 64, gray(cameras))
    single = Splats(*(getattr(splats, name).float() for name in PARTS))
    cameras = around(cameras.azimuth.float())
    out = render_splats(single, cameras, 64, gray(cameras))
    assert (out.rgb - exact.rgb).abs().mean() < 1e-5 and (out.depth - exact.depth).abs().mean() < 1e-4


def test_gradients_are_those_of_finite_differences():
    # A threshold so low that crossing it cannot be seen.
    sampling = SplatSampling(min_alpha=1e-12)
    splats, cameras = scattered(2, scale=0.3), views(1)
    background = gray(cameras).requires_grad_()

    def render(background, *inputs):
        out = render_splats(Splats(*inputs), cameras, 4, background, sampling, normals=True)
        return tuple(getattr(out, entry) for entry in ENTRIES)

    assert torch.autograd.gradcheck(render, (background, *leaves(splats)))


def test_the_order_of_the_splats_does_not_matter():
    splats, cameras = scattered(100), views(2)
    mixed = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    other = Splats(*(getattr(splats, name)[mixed] for name in PARTS))
    for entry in ENTRIES:
        a, b = (getattr(render_splats(s, cameras, 16, gray(cameras), normals=True), entry) for s in (splats, other))
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_a_batch_is_its_views():
    splats, cameras = scattered(60), views(3)
    background = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = render_splats(splats, cameras, 16, background, normals=True)
    for i in range(3):
        alone = render_splats(splats, cameras[i : i + 1], 16, background[i : i + 1], normals=True)
        for entry in ENTRIES:
            torch.testing.assert_close(getattr(alone, entry)[0], getattr(together, entry)[i], atol=1e-12, rtol=0)


def test_what_the_splats_leave_the_background_gets():
    """Opacity is 1 - prod (1 - alpha_i), whatever the order; color and background share a pixel completely."""
    splats, cameras = scattered(20, scale=0.2), views(1)
    white, black = torch.ones(1, 3).double(), torch.zeros(1, 3).double()
    ones, zeros = (replace(splats, colors=torch.full_like(splats.colors, v)) for v in (1.0, 0.0))
    out = render_splats(ones, cameras, 16, black)
    through = render_splats(zeros, cameras, 16, white)
    torch.testing.assert_close(out.rgb + through.rgb, torch.ones_like(out.rgb))
    singles = [Splats(*(getattr(splats, name)[i : i + 1] for name in PARTS)) for i in range(20)]
    left = torch.stack([1 - render_splats(s, cameras, 16, black).opacity for s in singles]).prod(0)
    torch.testing.assert_close(1 - out.opacity, left)


def test_the_near_one_hides_the_far_one():
    means = torch.tensor([[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0]])
    rest = (torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2, 3), 0.3).log(), torch.full((2,), 9.0))
    colors = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    cameras = orbit([0.0, 180.0], 0.0, 2.8, 40.0)  # from +x, then from -x
    out = render_splats(Splats(means, *rest, colors), cameras, 17, torch.zeros(2, 3))
    torch.testing.assert_close(out.rgb[:, :, 8, 8], colors.flip(0), atol=5e-3, rtol=0)
    torch.testing.assert_close(out.depth[:, 0, 8, 8], torch.full((2,), 2.3), atol=5e-3, rtol=0)


@pytest.mark.parametrize("compositor", [composite, reference])
@pytest.mark.parametrize("kind", ["none", "behind", "transparent"])
def test_nothing_to_be_seen_is_the_background_with_legal_gradients(compositor, kind):
    splats, cameras = scattered(0 if kind == "none" else 5), views(2)
    if kind == "behind":
        splats = replace(splats, means=splats.means + 10 * cameras.camera_to_world[0, :3, 3])
        cameras = cameras[:1]
    if kind == "transparent":
        splats = replace(splats, opacities=splats.opacities - 20)
    inputs = leaves(splats)
    out = render_splats(Splats(*inputs), cameras, 8, gray(cameras), normals=True, compositor=compositor)
    assert out.opacity.max() == 0 and out.depth.max() == 0 and bool((out.rgb == 0.5).all())
    sum(getattr(out, entry).sum() for entry in ENTRIES).backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in inputs)


def test_the_watch_sees_how_the_picture_pulls():
    """For a ball on the axis a step in space is a step on the screen of focal length / depth pixels."""
    cameras, size, seen = orbit(torch.zeros(1).double(), 0.0, 2.8, 40.0), 16, []
    mean = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    ball = replace(scattered(1), means=mean, log_scales=torch.full((1, 3), -1.5, dtype=torch.float64))
    out = render_splats(ball, cameras, size, gray(cameras), watch=seen.append)
    (out.rgb * torch.arange(size)).sum().backward()
    focal = 0.5 * size / torch.tan(0.5 * cameras.fov_y)
    assert seen[0].shape == (1, 1, 2) and seen[0][0, 0, 0].abs() > 1e-3
    torch.testing.assert_close(mean.grad[0, 1:], seen[0][0, 0] * torch.tensor([1.0, -1.0]) * focal / 2.8)


def test_both_sorts_agree():
    g = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 50, (2000,), generator=g, dtype=torch.int32).sort().values
    pixel = torch.randint(0, 90, (2000,), generator=g, dtype=torch.int32)
    # A splat meets a pixel once.
    pairs = torch.unique(owner * 100 + pixel)
    owner, pixel = pairs // 100, pairs % 100
    fast, slow = by_pixel_counted(owner, pixel, 50, 90), by_pixel_sorted(pixel, 90)
    assert torch.equal(fast[0].long(), slow[0]) and torch.equal(fast[1].long(), slow[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same():
    """With gsplat where that is installed; its thresholds on what is left of the light differ a little."""
    splats, cameras = scattered(500, scale=0.08), turntable(2, 20, 2.8, 40)
    splats = Splats(*(getattr(splats, name).float() for name in PARTS))
    expected = render_splats(splats, cameras, 64, gray(cameras), normals=True)
    moved = Splats(*(getattr(splats, name).cuda() for name in PARTS))
    out = render_splats(moved, cameras.to("cuda"), 64, gray(cameras).cuda(), normals=True)
    for entry in ("rgb", "opacity", "normal"):
        torch.testing.assert_close(getattr(out, entry).cpu(), getattr(expected, entry), atol=5e-3, rtol=0)
