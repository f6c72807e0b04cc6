"""Control images and geometry images: depth and normals of a shape whose depth and normals are known."""

import dataclasses

import pytest
import torch

from distill3d import cameras
from distill3d.render.maps import control_image, geometry_image
from distill3d.types import Rendering

RADIUS = 0.7


def sphere(azimuths):
    """Exact renderings of a ball, seen from around: rays against the ball, in closed form."""
    n = len(azimuths)
    views = cameras.orbit(torch.tensor(azimuths), torch.full((n,), 20.0), torch.full((n,), 3.0), torch.full((n,), 40.0))
    rays = cameras.rays(views, 32, 32)
    o, d = rays.origins, rays.directions
    along = (o * d).sum(-1)
    root = along**2 - (o * o).sum(-1) + RADIUS**2
    hit = root > 0
    t = -along - root.clamp(min=0).sqrt()
    normal = torch.where(hit[..., None], (o + t[..., None] * d) / RADIUS, 0.0)
    opacity, depth = hit.float()[:, None], torch.where(hit, t, 0.0)[:, None]
    rendering = Rendering(torch.zeros(n, 3, 32, 32), opacity, depth, torch.zeros_like(depth),
                          normal.permute(0, 3, 1, 2))  # fmt: skip
    return rendering, views.camera_to_world


def test_depth_is_brightest_where_the_object_is_nearest():
    rendering, pose = sphere([0.0, 130.0])
    image = control_image(rendering, pose, "depth")
    assert image.shape == (2, 3, 32, 32) and torch.equal(image[:, 0], image[:, 2])
    seen = rendering.opacity[:, 0] > 0.5
    for one, depth, mask in zip(image[:, 0], rendering.depth[:, 0], seen, strict=True):
        assert (one[~mask] == 0).all() and one[mask].min() >= 0.1 and one.max() == 1
        order = depth[mask].argsort()
        assert (one[mask][order].diff() <= 1e-6).all()
    torch.testing.assert_close(image[0], image[1], rtol=0, atol=1e-3)  # a ball looks alike from everywhere


def test_normals_are_told_in_the_cameras_frame():
    """Red to the left, green up, blue to the viewer, from wherever the ball is seen."""
    rendering, pose = sphere([0.0, 130.0, -75.0])
    image = control_image(rendering, pose, "normal")
    assert image.min() >= 0 and image.max() <= 1
    torch.testing.assert_close(image[0], image[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(image[0], image[2], rtol=0, atol=1e-3)
    middle, left, top, corner = image[0, :, 16, 16], image[0, :, 16, 7], image[0, :, 7, 16], image[0, :, 0, 0]
    torch.testing.assert_close(middle, torch.tensor([0.5, 0.5, 1.0]), rtol=0, atol=0.05)
    assert left[0] > 0.8 and top[1] > 0.8
    torch.testing.assert_close(corner, torch.tensor([0.5, 0.5, 1.0]))


def test_a_solid_shape_is_shown_as_a_controlnet_is_told_it_but_for_the_side_of_red():
    rendering, pose = sphere([0.0, 130.0])
    shown, control = (f(rendering, pose, "normal") for f in (geometry_image, control_image))
    torch.testing.assert_close(shown[:, 1:], control[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(shown[:, 0], 1 - control[:, 0], atol=1e-5, rtol=0)
    assert shown[0, 0, 16, 25] > 0.8  # the right of the ball is red
    assert torch.equal(geometry_image(rendering, pose, "depth"), control_image(rendering, pose, "depth"))


def test_normals_are_shown_as_colors_are_composited():
    """Half of a pixel covered by a surface: half of its color, half of the background's."""
    rendering, pose = sphere([40.0])
    whole = geometry_image(rendering, pose, "normal")
    half = dataclasses.replace(rendering, opacity=rendering.opacity / 2, normal=rendering.normal / 2)
    empty = torch.tensor([0.5, 0.5, 1.0])[:, None, None]
    torch.testing.assert_close(geometry_image(half, pose, "normal"), (whole + empty) / 2)


@pytest.mark.parametrize("kind", ["depth", "normal"])
def test_gradients_of_the_pictures_are_finite_differences(kind):
    rendering, pose = sphere([30.0])
    pose = pose.double()
    g = torch.Generator().manual_seed(0)
    # A ball has many nearest pixels, and then no derivative: a rough one has one.
    rough = 1 + 0.01 * torch.rand(rendering.depth.shape, generator=g)
    rendering = dataclasses.replace(rendering, depth=rendering.depth * rough)
    names = ("opacity", "depth") if kind == "depth" else ("opacity", "normal")
    values = {n: (getattr(rendering, n).double() * 0.9).requires_grad_() for n in names}
    probe = torch.randn(1, 3, 32, 32, generator=g, dtype=torch.float64)

    def value(**changed):
        return (geometry_image(dataclasses.replace(rendering, **(values | changed)), pose, kind) * probe).sum()

    gradients = torch.autograd.grad(value(), list(values.values()))
    for (name, x), gradient in zip(values.items(), gradients, strict=True):
        for _ in range(3):
            way = 1e-6 * torch.randn(x.shape, generator=g, dtype=torch.float64) * (rendering.opacity > 0)
            change = (value(**{name: x + way}) - value(**{name: x - way})) / 2
            torch.testing.assert_close(change, (gradient * way).sum(), rtol=1e-4, atol=1e-9)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["depth", "normal"])
@pytest.mark.parametrize("opacity", [0.0, 1e-3, 1.0], ids=["empty", "faint", "full"])
def test_pictures_of_any_view_have_finite_gradients(kind, opacity):
    shape = (1, 1, 8, 8)
    parts = [torch.full(shape, opacity), torch.full(shape, 2.0 * (opacity > 0)), torch.zeros(shape),
             torch.zeros(1, 3, 8, 8)]  # fmt: skip
    parts = [p.requires_grad_() for p in parts]
    image = geometry_image(Rendering(torch.zeros(1, 3, 8, 8), *parts), torch.eye(4)[None], kind)
    assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    gradients = torch.autograd.grad(image.square().sum(), parts, allow_unused=True)
    assert all(g.isfinite().all() for g in gradients if g is not None)


def test_mistakes_are_named():
    rendering, pose = sphere([0.0])
    with pytest.raises(ValueError, match="a geometry image shows depth or normal, got 'canny'"):
        geometry_image(rendering, pose, "canny")
    with pytest.raises(ValueError, match="depth or normal, got 'canny'"):
        control_image(rendering, pose, "canny")
    bare = Rendering(rendering.rgb, rendering.opacity, rendering.depth, rendering.depth_variance)
    with pytest.raises(ValueError, match="render with normals=True"):
        control_image(bare, pose, "normal")


def test_an_empty_view_is_no_mistake():
    rendering, pose = sphere([0.0])
    empty = Rendering(rendering.rgb, 0 * rendering.opacity, 0 * rendering.depth, rendering.depth_variance,
                      0 * rendering.normal)  # fmt: skip
    assert (control_image(empty, pose, "depth") == 0).all()
    assert control_image(empty, pose, "normal").isfinite().all()
