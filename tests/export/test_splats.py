"""PLY files of splats: read by others, read again, and refused where they hold something else."""

import numpy as np
import pytest
import torch
import trimesh
from plyfile import PlyData, PlyElement

from distill3d.cameras import Cameras, orbit
from distill3d.export.splats import TO_VIEWER, load_splats, save_splats
from distill3d.render.splat import Splats, render_splats
from distill3d.scenes.gaussians import GaussianOptions, Gaussians, splats_in_ball

PARTS = ("means", "quaternions", "log_scales", "opacities", "colors")


@pytest.fixture
def splats():
    g = torch.Generator().manual_seed(0)
    ball = splats_in_ball(50, 0.6, 0.7, g)
    return Splats(
        ball.means,
        ball.quaternions,
        ball.log_scales + 0.5 * torch.randn(50, 3, generator=g),
        ball.opacities + torch.randn(50, generator=g),
        torch.rand(50, 3, generator=g),
    )


@pytest.mark.parametrize("axes", ["viewer", "world"])
def test_what_is_written_is_read(splats, axes, tmp_path):
    save_splats(tmp_path / "a.ply", splats, axes)
    again = load_splats(tmp_path / "a.ply", axes)
    for name in PARTS:
        torch.testing.assert_close(getattr(again, name), getattr(splats, name), atol=1e-6, rtol=1e-5)


def test_another_reader_finds_what_viewers_look_for(splats, tmp_path):
    save_splats(tmp_path / "a.ply", splats, "world")
    data = PlyData.read(tmp_path / "a.ply")
    assert not data.text and data.byte_order == "<" and [e.name for e in data.elements] == ["vertex"]
    vertex = data["vertex"]
    names = [p.name for p in vertex.properties]
    assert names[:6] == ["x", "y", "z", "nx", "ny", "nz"] and {p.val_dtype for p in vertex.properties} == {"f4"}
    np.testing.assert_array_equal(vertex["z"], splats.means[:, 2].numpy())
    np.testing.assert_array_equal(vertex["opacity"], splats.opacities.numpy())
    np.testing.assert_array_equal(vertex["scale_1"], splats.log_scales[:, 1].numpy())
    np.testing.assert_allclose(vertex["rot_0"], splats.quaternions[:, 0].numpy(), atol=1e-6)
    # The spherical harmonic of degree 0, as its sources print it.
    np.testing.assert_allclose(0.5 + 0.28209479177387814 * vertex["f_dc_2"], splats.colors[:, 2].numpy(), atol=1e-6)
    # A reader that shares no code with the writer.
    other = trimesh.load(tmp_path / "a.ply")
    np.testing.assert_array_equal(other.vertices.astype(np.float32), splats.means.numpy())
    np.testing.assert_array_equal(other.metadata["_ply_raw"]["vertex"]["data"]["rot_3"].ravel(), vertex["rot_3"])


def test_a_viewer_sees_the_front_upright(splats, tmp_path):
    """A camera at the place where viewers stand, y down and looking along z, sees our front view."""
    save_splats(tmp_path / "a.ply", splats)
    turned = load_splats(tmp_path / "a.ply", "world")
    front = orbit(0.0, 0.0, 2.8, 40.0)
    pose = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, -2.8], [0, 0, 0, 1]])[None]
    viewer = Cameras(pose, front.fov_y, front.azimuth, front.elevation, front.distance)
    ours, theirs = (render_splats(s, c, 32, torch.ones(1, 3)) for s, c in ((splats, front), (turned, viewer)))
    torch.testing.assert_close(ours.rgb, theirs.rgb, atol=1e-5, rtol=0)
    up = TO_VIEWER @ torch.tensor([0.0, 0.0, 1.0])
    assert up.tolist() == [0, -1, 0]


def test_a_scene_survives_the_file(splats, tmp_path):
    scene = Gaussians(GaussianOptions(), splats=splats)
    save_splats(tmp_path / "new" / "a.ply", scene.splats())
    again = Gaussians(GaussianOptions(), splats=load_splats(tmp_path / "new" / "a.ply"))
    views = orbit([0.0, 130.0], 20.0, 2.8, 40.0)
    a, b = (s.eval().render(views, 24, torch.ones(2, 3)) for s in (scene, again))
    torch.testing.assert_close(a.rgb, b.rgb, atol=1e-4, rtol=0)


def written(path, splats, order="<", extra=(), text=False, cut=None):
    """The splats as another program may store them: other order of properties, doubles, bands of degree 1."""
    columns = {"opacity": splats.opacities, "f_rest_0": torch.ones(50), "red": torch.ones(50)}
    for prefix, value in (("f_dc_", splats.colors * 0), ("scale_", splats.log_scales), ("rot_", splats.quaternions)):
        columns |= {f"{prefix}{i}": value[:, i] for i in range(value.shape[1])}
    columns |= {name: splats.means[:, i] for i, name in enumerate("xyz")}
    columns = {name: value for name, value in columns.items() if name not in extra}
    kind = [(name, "u1" if name == "red" else "f8" if name == "opacity" else "f4") for name in columns]
    table = np.zeros(50, kind)
    for name, value in columns.items():
        table[name] = value.numpy()
    PlyData([PlyElement.describe(table, "vertex")], text=text, byte_order=order).write(path)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    return path


@pytest.mark.parametrize(("order", "text"), [("<", False), (">", False), ("=", True)])
def test_files_of_others_are_read_with_a_warning_of_what_is_lost(splats, order, text, tmp_path):
    with pytest.warns(UserWarning, match="degree 0"):
        again = load_splats(written(tmp_path / "a.ply", splats, order, text=text), "world")
    for name in ("means", "quaternions", "log_scales", "opacities"):
        torch.testing.assert_close(getattr(again, name), getattr(splats, name))
    torch.testing.assert_close(again.colors, torch.full((50, 3), 0.5))


def mesh(path):
    trimesh.creation.box().export(path)
    return path


def headless(path, splats):
    """Cut in its header."""
    content = written(path, splats).read_bytes()
    path.write_bytes(content[: content.index(b"end_header")])
    return path


def nothing(path):
    path.write_bytes(b"solid box")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path, splats: path, "no file"),
        (lambda path, splats: nothing(path), "not a PLY"),
        (lambda path, splats: mesh(path), "is it a mesh"),
        (lambda path, splats: written(path, splats, extra=("rot_3",)), "rot_3"),
        (lambda path, splats: written(path, splats, cut=1), "cut short"),
        (lambda path, splats: written(path, splats, cut=2000), "cut short"),
        (lambda path, splats: headless(path, splats), "not a PLY"),
        (lambda path, splats: written(path, Splats(splats.means / 0, *list(vars(splats).values())[1:])), "finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*degree 0")
def test_other_files_are_refused_in_one_line(make, words, splats, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        load_splats(make(tmp_path / "a.ply", splats))
    assert "\n" not in str(error.value)


def test_what_cannot_be_written_is_refused(splats, tmp_path):
    with pytest.raises(ValueError, match=r"\.ply"):
        save_splats(tmp_path / "a.glb", splats)
    with pytest.raises(ValueError, match="no splats"):
        save_splats(tmp_path / "a.ply", Splats(*(value[:0] for value in vars(splats).values())))
    with pytest.raises(ValueError, match="finite"):
        save_splats(tmp_path / "a.ply", Splats(splats.means / 0, *list(vars(splats).values())[1:]))
    assert not list(tmp_path.iterdir())
