"""Users' meshes: what is read is what the file says, and what is wrong is told in one line."""

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals

from distill3d.meshes.mesh import place, placed, read_mesh, usable_uv, uv_problem, weld
from distill3d.meshes.texture import TexturedMesh, unwrap

mesh_files = pytest.importorskip("distill3d.meshes.files")


def soup(mesh):
    """Corners [F, 3, 3], whatever the numbering of the vertices."""
    return np.asarray(mesh.vertices)[np.asarray(mesh.faces)]


def textured(size=32, seed=0):
    ball = trimesh.creation.icosphere(2, radius=0.7)
    vertices, faces = np.array(ball.vertices) * [1, 0.6, 0.8] + [0.1, 0.2, 0.3], np.array(ball.faces)
    uv, uv_faces = unwrap(vertices, faces)
    picture = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return TexturedMesh(vertices, faces, uv, uv_faces, picture)


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_what_is_written_is_what_is_read(suffix, tmp_path):
    mesh = textured()
    mesh_files.save_mesh(tmp_path / f"a.{suffix}", mesh)
    found = read_mesh(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(soup(found), soup(mesh), atol=1e-6)
    assert uv_problem(found) is None and found.uv is not None and found.colored
    np.testing.assert_allclose(found.uv[found.uv_faces], mesh.uv[mesh.uv_faces], atol=1e-6)
    np.testing.assert_array_equal(found.textures[0], mesh.texture)
    face, weights = found.sample(200)
    expected = mesh_files.texture_colors(mesh.texture, np.einsum("nc,ncr->nr", weights, mesh.uv[mesh.uv_faces[face]]))
    np.testing.assert_allclose(found.colors(face, weights) * 255, expected, atol=1e-2)


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_vertex_colors_are_srgb_again(suffix, tmp_path):
    ball = trimesh.creation.icosphere(1)
    colors = np.random.default_rng(0).integers(0, 256, (len(ball.vertices), 3), dtype=np.uint8)
    ball.visual = ColorVisuals(ball, vertex_colors=colors)
    mesh_files.save_mesh(tmp_path / f"a.{suffix}", ball)
    found = read_mesh(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(soup(found), soup(ball), atol=1e-6)
    np.testing.assert_allclose(found.corner_colors * 255, colors[ball.faces], atol=0.6)
    assert found.colored and uv_problem(found) == "it has none"


def test_parts_lie_where_the_scene_has_them_and_a_mirror_keeps_the_outside(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([5, 0, 0]))
    mirror = np.diag([1.0, -1, 1, 1])
    scene.add_geometry(trimesh.creation.icosphere(2), transform=mirror)
    scene.export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    assert len(mesh.faces) == 12 + 320 and mesh.vertices[:, 1].max() == 5.5  # glTF's x is the world's y
    a, b, c = soup(mesh).transpose(1, 0, 2)
    assert np.einsum("fi,fi->", a, np.cross(b, c)) / 6 == pytest.approx(1 + 4 / 3 * np.pi, rel=0.05)


def test_the_upward_axis_can_be_told(tmp_path):
    box = trimesh.creation.box((1, 2, 3))
    box.export(tmp_path / "a.obj")
    box.export(tmp_path / "a.glb")
    np.testing.assert_allclose(np.ptp(read_mesh(tmp_path / "a.obj").vertices, axis=0), [1, 2, 3])
    for mesh in (read_mesh(tmp_path / "a.obj", up="y"), read_mesh(tmp_path / "a.glb")):
        np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), [3, 1, 2])


def test_placing_touches_the_sphere_and_can_be_undone(tmp_path):
    box = trimesh.creation.box((10, 2, 3)).apply_translation([100, 0, 7])
    box.export(tmp_path / "a.ply")
    mesh = read_mesh(tmp_path / "a.ply")
    placement = place(mesh)
    scene = placed(mesh).vertices
    assert np.linalg.norm(scene, axis=1).max() == pytest.approx(0.9)
    np.testing.assert_allclose(scene.min(0), -scene.max(0), atol=1e-12)
    np.testing.assert_allclose(placement.to_file(scene), mesh.vertices, atol=1e-12)


def test_samples_lie_evenly_by_area(tmp_path):
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "a.ply")
    mesh = read_mesh(tmp_path / "a.ply")
    face, weights = mesh.sample(22000)
    assert np.allclose(weights.sum(1), 1) and weights.min() >= 0
    a, b, c = soup(mesh).transpose(1, 0, 2)
    area = 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)
    np.testing.assert_allclose(np.bincount(face, minlength=12), area * 1000, atol=2)


def grid(cells=16):
    """A flat sheet whose diagonals run through texel centers, mapped one to one."""
    axis = np.linspace(0, 1, cells + 1)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    vertices = np.stack((x, y, 0 * x), -1).reshape(-1, 3)
    first = (np.arange(cells)[:, None] * (cells + 1) + np.arange(cells)).reshape(-1, 1)
    corners = [[0, 1, cells + 2], [0, cells + 2, cells + 1]]
    return vertices, np.concatenate([first + c for c in corners])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda uv: uv, None),
        (lambda uv: uv * 2 - 0.5, "it reaches beyond the picture"),
        (lambda uv: np.abs(uv - 0.5), "its islands overlap"),  # mirrored halves share their texels
        (lambda uv: uv * [1, 0], "it leaves faces without any place in the picture"),
        (lambda uv: uv * np.nan, "it reaches beyond the picture"),
    ],
)
def test_maps_that_cannot_be_painted_are_found_and_made_anew(change, problem, tmp_path):
    vertices, faces = grid()
    visual = TextureVisuals(uv=change(vertices[:, :2]), image=Image.new("RGB", (4, 4)))
    trimesh.Trimesh(vertices, faces, visual=visual, process=False).export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    assert uv_problem(mesh) == problem
    uv, uv_faces, why = usable_uv(mesh, 64)
    assert why == problem and uv.min() >= 0 and uv.max() <= 1 and uv_faces.shape == mesh.faces.shape
    if problem is None:
        np.testing.assert_allclose(uv[uv_faces], vertices[faces][..., :2], atol=1e-6)


def test_welding_joins_what_lies_at_one_place():
    box = trimesh.creation.box()
    split = soup(box).reshape(-1, 3)
    vertices, faces = weld(split, np.arange(36).reshape(-1, 3))
    assert len(vertices) == 8
    np.testing.assert_array_equal(vertices[faces], soup(box))


def damaged(folder, name):
    """One file for each thing that can be wrong."""
    path = folder / name
    box = trimesh.creation.box()
    if name == "cloud.ply":
        trimesh.PointCloud(box.vertices).export(path)
    elif name == "nan.obj":
        path.write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    elif name == "point.obj":
        path.write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    elif name == "corner.obj":
        path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 5\n")
    elif name == "splats.ply":
        path.write_text("ply\nformat ascii 1.0\nelement vertex 0\nproperty float f_dc_0\nend_header\n")
    elif name == "other.ply":
        path.write_text("solid nothing")
    elif name == "empty.obj":
        path.write_bytes(b"")
    elif name == "blank.obj":
        path.write_text("# nothing\n")
    elif name.startswith("cut"):
        box.export(path)
        path.write_bytes(path.read_bytes()[:-40])
    elif name == "mesh.stl":
        box.export(path)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.glb", "there is no file"),
        ("mesh.stl", "is read from .glb, .gltf, .obj, .ply"),
        ("cloud.ply", "no faces"),
        ("nan.obj", "1 of 3 vertices are no numbers"),
        ("point.obj", "no extent"),
        ("corner.obj", "cannot be read as a mesh"),
        ("splats.ply", "Gaussian splats"),
        ("other.ply", "no PLY file"),
        ("empty.obj", "is empty"),
        ("blank.obj", "no faces"),
        ("cut.glb", "cannot be read as a mesh"),
        ("cut.ply", "cannot be read as a mesh"),
    ],
)
def test_what_is_no_mesh_is_told_in_one_line(name, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read_mesh(damaged(tmp_path, name))
    assert "\n" not in str(caught.value) and name in str(caught.value)
