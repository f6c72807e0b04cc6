"""Lambert's law by hand, the recipe's shares, and shading through the renderer."""

import math

import pytest
import torch

from distill3d.cameras import orbit, rays, turntable
from distill3d.render.shading import ShadingOptions, needs_normals, shade
from distill3d.render.volume import render_rays
from distill3d.types import Lighting

ALBEDO = torch.tensor([[0.8, 0.4, 0.2]])


@pytest.mark.parametrize(("angle", "cosine"), [(0, 1.0), (60, 0.5), (90, 0.0), (180, 0.0)])
def test_lambert(angle, cosine):
    a = math.radians(angle)
    normal, point, light = torch.tensor([[0.0, 0, 1]]), torch.tensor([[1.0, 2, 3]]), torch.zeros(1, 3)
    light = point + 1.7 * torch.tensor([[math.sin(a), 0, math.cos(a)]])
    lit = 0.1 + 0.9 * cosine
    found = shade(ALBEDO, normal, point, light, Lighting("lambertian", light))
    torch.testing.assert_close(found, lit * ALBEDO, atol=1e-6, rtol=0)
    white = shade(ALBEDO, normal, point, light, Lighting("textureless", light))
    torch.testing.assert_close(white, torch.full((1, 3), lit), atol=1e-6, rtol=0)
    assert torch.equal(shade(ALBEDO, None, point, light, Lighting("albedo", light)), ALBEDO)


def test_the_recipes_shares_and_lights():
    generator, views, options = torch.Generator().manual_seed(0), turntable(3, 20, 1.7, 50), ShadingOptions()
    assert {options.draw(s, 10000, views, generator).mode for s in range(999)} == {"albedo"}
    drawn = [options.draw(1000, 10000, views, generator) for _ in range(4000)]
    for mode, share in (("albedo", 0.7), ("textureless", 0.225), ("lambertian", 0.075)):
        found = sum(light.mode == mode for light in drawn) / len(drawn)
        assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(drawn)))
    assert {(light.ambient, light.diffuse) for light in drawn} == {(0.1, 0.9)}
    distance = torch.stack([light.position for light in drawn]).norm(dim=-1)
    assert 0.8 <= distance.min() < 0.81 and 1.49 < distance.max() <= 1.5 + 1e-6


def test_lights_stand_around_the_camera():
    views = orbit(30, 10, 1.7, 50)
    eye = views.camera_to_world[0, :3, 3]
    on_axis = ShadingOptions(jitter=0).draw(0, 10000, views, torch.Generator().manual_seed(0)).position[0]
    torch.testing.assert_close(on_axis / on_axis.norm(), eye / eye.norm())
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([ShadingOptions().draw(0, 10000, views, generator).position[0] for _ in range(2000)]).mean(0)
    assert torch.nn.functional.cosine_similarity(mean, eye, dim=0) > 0.99


def test_each_view_is_lit_by_its_own_light():
    """An opaque white wall across the x axis, seen twice; one light in front of it, one behind."""
    bundle = rays(orbit([0.0, 0.0], 0, 3, 20), 6, 6)

    def wall(points):
        inside = (points[:, 0].abs() < 0.1).to(points)
        return 1e4 * inside, torch.ones_like(points), points.new_tensor([[1.0, 0, 0]]).expand_as(points)

    box, light = torch.tensor([[-1.0] * 3, [1.0] * 3]), torch.tensor([[2.0, 0, 0], [-2.0, 0, 0]])
    out = render_rays(bundle, wall, box, torch.zeros(2, 3), lighting=Lighting("lambertian", light))
    assert out.rgb[0].amin() > 0.9 and out.rgb[1].sub(0.1).abs().max() < 1e-5
    bare = render_rays(bundle, wall, box, torch.zeros(2, 3), lighting=Lighting("albedo", light))
    assert torch.equal(bare.rgb, render_rays(bundle, wall, box, torch.zeros(2, 3)).rgb)
    flat = lambda points: (*wall(points)[:2], None)  # noqa: E731
    with pytest.raises(ValueError, match="lambertian shading needs normals"):
        render_rays(bundle, flat, box, torch.zeros(2, 3), lighting=Lighting("lambertian", light))


def test_mistakes_are_value_errors():
    for make in (lambda: ShadingOptions(textureless=0.9, lambertian=0.2), lambda: ShadingOptions(distance=(2.0, 1.0))):
        with pytest.raises(ValueError, match="got"):
            make()
    assert not needs_normals(None)
