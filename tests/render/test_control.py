"""What a ControlNet is told: rendered depth and normals of a shape whose depth and normals are known."""

import pytest
import torch

from distill3d import cameras
from distill3d.render.control import control_picture
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
    picture = control_picture(rendering, pose, "depth")
    assert picture.shape == (2, 3, 32, 32) and torch.equal(picture[:, 0], picture[:, 2])
    seen = rendering.opacity[:, 0] > 0.5
    for image, depth, mask in zip(picture[:, 0], rendering.depth[:, 0], seen, strict=True):
        assert (image[~mask] == 0).all() and image[mask].min() >= 0.1 and image.max() == 1
        order = depth[mask].argsort()
        assert (image[mask][order].diff() <= 1e-6).all()
    torch.testing.assert_close(picture[0], picture[1], rtol=0, atol=1e-3)  # a ball looks alike from everywhere


def test_normals_are_told_in_the_cameras_frame():
    """Red to the left, green up, blue to the viewer, from wherever the ball is seen."""
    rendering, pose = sphere([0.0, 130.0, -75.0])
    picture = control_picture(rendering, pose, "normal")
    assert picture.min() >= 0 and picture.max() <= 1
    torch.testing.assert_close(picture[0], picture[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(picture[0], picture[2], rtol=0, atol=1e-3)
    middle, left, top, corner = picture[0, :, 16, 16], picture[0, :, 16, 7], picture[0, :, 7, 16], picture[0, :, 0, 0]
    torch.testing.assert_close(middle, torch.tensor([0.5, 0.5, 1.0]), rtol=0, atol=0.05)
    assert left[0] > 0.8 and top[1] > 0.8
    torch.testing.assert_close(corner, torch.tensor([0.5, 0.5, 1.0]))


def test_mistakes_are_named():
    rendering, pose = sphere([0.0])
    with pytest.raises(ValueError, match="depth or normal, got 'canny'"):
        control_picture(rendering, pose, "canny")
    bare = Rendering(rendering.rgb, rendering.opacity, rendering.depth, rendering.depth_variance)
    with pytest.raises(ValueError, match="were not asked for"):
        control_picture(bare, pose, "normal")


def test_an_empty_view_is_no_mistake():
    rendering, pose = sphere([0.0])
    empty = Rendering(rendering.rgb, 0 * rendering.opacity, 0 * rendering.depth, rendering.depth_variance,
                      0 * rendering.normal)  # fmt: skip
    assert (control_picture(empty, pose, "depth") == 0).all()
    assert control_picture(empty, pose, "normal").isfinite().all()
