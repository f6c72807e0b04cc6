"""A mesh as a scene: paint without seams, geometry that stays or follows its silhouettes."""

import math

import numpy as np
import pytest
import torch
import trimesh

from distill3d.cameras import turntable
from distill3d.meshes.mesh import Mesh
from distill3d.render.edges import mesh_edges
from distill3d.scenes.mesh import MeshOptions, MeshScene, bending
from distill3d.scenes.surface_grid import SurfaceGrid
from distill3d.types import Lighting

VIEWS = turntable(3, 20, 2.8, 40)
GRAY = torch.full((3, 3), 0.8)


def ball(color=None, radius=1.0, levels=(8, 16, 32), **options):
    """A ball scene; color maps places [N, 3] to sRGB."""
    solid = trimesh.creation.icosphere(3, radius=radius)
    places = np.asarray(solid.vertices) / radius
    colors = np.full_like(places, 0.5) if color is None else color(places)
    source = Mesh(np.array(solid.vertices), np.array(solid.faces), colors)
    return MeshScene(source, MeshOptions(colors=color is not None, levels=levels, **options))


def striped(places):
    return 0.5 + 0.4 * np.sin(3 * places)


def psnr(a, b):
    return -10 * math.log10(float((a - b).detach().square().mean()))


def adam(scene, rate):
    """Adam with each group's own rate."""
    optimizer = torch.optim.Adam(scene.parameter_groups())
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return optimizer


def test_a_new_mesh_is_gray_and_covers_the_disc_of_its_ball():
    out = ball().render(VIEWS, 48, GRAY)
    torch.testing.assert_close(out.rgb, 0.8 - 0.3 * out.opacity.expand(-1, 3, -1, -1), atol=1e-5, rtol=0)
    # A ball of radius r at distance d is a disc of tan^2 = r^2 / (d^2 - r^2).
    disc = math.pi * 0.9**2 / (2.8**2 - 0.9**2) * (24 / math.tan(math.radians(20))) ** 2
    assert out.opacity[0].sum().item() == pytest.approx(disc, rel=0.01)
    assert out.depth[0, 0, 24, 24].item() == pytest.approx(1.9, abs=0.02)


def test_normals_point_outwards_and_light_falls_by_lamberts_law():
    scene = ball()
    lighting = Lighting("lambertian", VIEWS.camera_to_world[:, :3, 3], 0.2, 0.7)
    out = scene.render(VIEWS, 32, GRAY, normals=True, lighting=lighting)
    outward = torch.nn.functional.normalize(VIEWS.camera_to_world[:, :3, 3], dim=1)
    torch.testing.assert_close(out.normal[:, :, 16, 16], outward, atol=0.05, rtol=0)
    assert out.rgb[0, 0, 16, 16].item() == pytest.approx(0.5 * 0.9, abs=0.01)
    assert not out.orientation.any()


def test_it_begins_with_the_files_colors_and_a_batch_is_its_views():
    scene = ball(striped)
    out = scene.render(VIEWS, 32, GRAY)
    for i in range(3):
        single = scene.render(VIEWS[i : i + 1], 32, GRAY[:1])
        torch.testing.assert_close(single.rgb[0], out.rgb[i], atol=1e-6, rtol=1e-5)
    places = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    wanted = torch.tensor(striped(places.numpy())).float()
    # The facets of the icosphere lie up to 1 % inside the ball.
    assert psnr(scene.color(places * 0.897), wanted) > 35


def test_the_baked_texture_is_the_paint_and_the_geometry_the_sources():
    scene = ball(striped, radius=7.0, turn=30.0)
    mesh = scene.textured(256)
    np.testing.assert_array_equal(mesh.vertices, scene.source.vertices)
    np.testing.assert_array_equal(mesh.faces, scene.source.faces)
    again = MeshScene(mesh, scene.options)
    face, weights = again.source.sample(4000)
    baked = torch.tensor(again.source.colors(face, weights)).float()
    painted = scene.color(scene.positions(face, weights))
    assert psnr(baked, painted) > 38
    assert (baked - painted).abs().max() < 0.1  # nowhere does a seam show
    assert psnr(again.render(VIEWS, 48, GRAY).rgb, scene.render(VIEWS, 48, GRAY).rgb) > 35


def test_turning_turns_the_object_and_not_the_file():
    def front_is_red(places):
        return np.where(places[..., :1] > 0, [0.9, 0.1, 0.1], [0.1, 0.1, 0.9])

    plain, turned = ball(front_is_red), ball(front_is_red, turn=180.0)
    images = [s.render(VIEWS[:1], 32, GRAY[:1]).rgb[0, :, 16, 16] for s in (plain, turned)]
    assert images[0][0] > 0.8 and images[1][2] > 0.8


def test_color_is_learned_from_images():
    target, scene = ball(striped), ball()
    wanted = target.render(VIEWS, 24, GRAY).rgb.detach()
    optimizer = adam(scene, 0.06)
    before = psnr(scene.render(VIEWS, 24, GRAY).rgb.detach(), wanted)
    for _ in range(30):
        optimizer.zero_grad()
        (scene.render(VIEWS, 24, GRAY).rgb - wanted).square().mean().backward()
        optimizer.step()
    assert before < 15 and psnr(scene.render(VIEWS, 24, GRAY).rgb.detach(), wanted) > 26


def test_shape_is_learned_from_silhouettes():
    """A ball becomes an egg; three views leave parts of it unseen."""
    egg, half_axes = ball(), torch.tensor([0.8, 0.8, 1.0])
    egg.rest = egg.rest * half_axes
    wanted = egg.render(VIEWS, 24, GRAY).opacity.detach()
    scene = ball(move=0.03)
    optimizer = adam(scene, 0.2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (scene.render(VIEWS, 24, GRAY).opacity - wanted).square().mean()
        (loss + 3 * scene.edge_length**4 * scene.penalties()["smooth_shape"]()).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
    away = [((v / half_axes).norm(dim=1) - 0.9).abs().mean() for v in (scene.rest, scene.vertices.detach())]
    assert away[1] < 0.6 * away[0]


def test_bending_is_zero_for_a_shift_and_positive_for_a_dent():
    scene = ball(move=0.1)
    edges = mesh_edges(scene.faces)
    shift = torch.ones_like(scene.rest)
    assert float(bending(shift, edges, scene.edge_length)) < 1e-10
    shift[5] += 1
    assert float(bending(shift, edges, scene.edge_length)) > 0


def test_bending_means_the_same_on_fine_and_coarse_meshes():
    """Of the same smooth movement, on rings whose edges are halved twice."""
    found = []
    for sections in (32, 64, 128):
        mesh = trimesh.creation.torus(1.0, 0.5, 2 * sections, sections)
        places, faces = torch.tensor(mesh.vertices).float(), torch.tensor(mesh.faces)
        movement = torch.sin(2 * places)
        found.append(float(bending(movement, mesh_edges(faces), float(mesh.edges_unique_length.mean()))))
    assert found[1:] == pytest.approx(found[:-1], rel=0.05)


def test_fitting_values_part_by_part_is_fitting_them_at_once(monkeypatch):
    points = torch.nn.functional.normalize(torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    fitted = []
    for part in (1 << 20, 700):
        monkeypatch.setattr("distill3d.scenes.surface_grid.PART", part)
        shell = SurfaceGrid(points, (4, 8, 16))
        shell.fit(points, points.abs())
        fitted.append(shell(points))
    torch.testing.assert_close(*fitted, rtol=1e-4, atol=1e-5)
    assert (fitted[0] - points.abs()).abs().mean() < 0.02


def test_a_scene_moves_to_another_device_whole():
    """A run on a GPU is moved to the CPU for its artifacts: no tensor may stay behind."""
    scene = ball(move=0.1).to("meta")

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from (t for v in value.values() for t in tensors(v))
        elif isinstance(value, (list, tuple)):
            yield from (t for v in value for t in tensors(v))
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            yield from tensors(vars(value))

    found = list(tensors(scene))
    assert len(found) > 8 and {tensor.device.type for tensor in found} == {"meta"}


def test_the_state_is_the_paint_alone_and_comes_back():
    scene = ball(striped, move=0.1)
    other = ball(move=0.1)
    other.load_state_dict(scene.state_dict())
    assert torch.equal(other.render(VIEWS, 16, GRAY).rgb, scene.render(VIEWS, 16, GRAY).rgb)
    assert all("tables" in name for name in scene.state_dict())


def test_a_shell_is_the_sum_of_its_lattices():
    """On a shell that holds the whole box, a linear function is met exactly; the gradient is the interpolation's."""
    axis = torch.linspace(-1, 1, 9)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    shell = SurfaceGrid(points, (3, 5), 1)
    assert [len(t) for t in shell.tables] == [27, 125]
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, 3)] * 3, indexing="ij")
    with torch.no_grad():
        shell.tables[0].copy_((x + 2 * y - z).reshape(-1, 1))
    at = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(shell(at)[:, 0], at @ torch.tensor([1.0, 2.0, -1.0]), atol=1e-5, rtol=0)
    shell(at).sum().backward()
    assert float(shell.tables[1].grad.sum()) == pytest.approx(50, rel=1e-4)
    # Differences of neighbors: 18 pairs an axis, slopes 1, 2 and -1 on a lattice of spacing 1.
    assert float(shell.roughness().detach()) == pytest.approx((1 + 4 + 1) * 18 / 27, rel=1e-5)


def test_a_lattice_too_large_for_a_table_of_its_points_gives_the_same_values(monkeypatch):
    points = torch.nn.functional.normalize(torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    points = torch.cat((points, torch.ones(1, 3)))  # the last lattice point of all
    at = torch.rand(500, 3, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2  # most have no lattice point
    found = []
    for dense in (1 << 24, 0):
        monkeypatch.setattr("distill3d.scenes.surface_grid.DENSE", dense)
        shell = SurfaceGrid(points, (4, 8, 16))
        assert all((places is None) == (dense == 0) for places in shell.places)
        with torch.no_grad():
            for table in shell.tables:
                table.copy_(torch.sin(torch.arange(table.numel())).view_as(table))
        assert shell._find(0, torch.tensor([4**3 - 1, 4**3]))[1].tolist() == [True, False]
        found.append((shell(torch.cat((points, at))).detach(), shell.roughness().detach()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("wrong", [{"levels": ()}, {"levels": (1,)}, {"supersample": 0}, {"move": -1.0}])
def test_mistakes_are_value_errors(wrong):
    with pytest.raises(ValueError, match=r"levels|supersample"):
        ball(**wrong)


def test_no_mesh_is_a_value_error():
    with pytest.raises(ValueError, match="no mesh is given"):
        MeshOptions().build()
