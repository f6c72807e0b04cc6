"""Mesh files: what was written is what other programs read."""

import io
import json

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals

from distill3d.meshes.files import glb_bytes, save_mesh, srgb_to_linear, vertex_normals, with_vertex_colors
from distill3d.meshes.texture import TexturedMesh, texture_colors, unwrap


@pytest.fixture(scope="module")
def painted():
    """An egg, long along x, whose vertex colors tell where they are."""
    mesh = trimesh.creation.icosphere(subdivisions=3)
    mesh.apply_scale([0.8, 0.4, 0.2])
    colors = (mesh.vertices / [0.8, 0.4, 0.2] * 100 + 128).round().astype(np.uint8)
    mesh.visual = ColorVisuals(mesh, vertex_colors=colors)
    return mesh


@pytest.fixture(scope="module")
def textured(painted):
    vertices, faces = np.array(painted.vertices), np.array(painted.faces)
    uv, uv_faces = unwrap(vertices, faces, size=64)
    ramp = np.linspace(0, 255, 64)
    texture = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.full((64, 64), 40.0)), -1).astype(np.uint8)
    return TexturedMesh(vertices, faces, uv, uv_faces, texture)


def parts(data):
    """The JSON of a GLB file, and a function that gives the bytes of a view."""
    length = int.from_bytes(data[12:16], "little")
    document = json.loads(data[20 : 20 + length])

    def view(i):
        entry = document["bufferViews"][i]
        start = 28 + length + entry["byteOffset"]
        return data[start : start + entry["byteLength"]]

    return document, view


def test_glb_round_trip_is_y_up_with_the_front_towards_plus_z(painted, tmp_path):
    assert save_mesh(tmp_path / "egg.glb", painted) == [tmp_path / "egg.glb"]
    back = trimesh.load(tmp_path / "egg.glb", force="mesh", process=False)
    np.testing.assert_allclose(back.bounds, [[-0.4, -0.2, -0.8], [0.4, 0.2, 0.8]], atol=0.01)
    np.testing.assert_allclose(back.vertices, painted.vertices[:, [1, 2, 0]], atol=1e-6)
    assert back.volume == pytest.approx(painted.volume, rel=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["egg.glb"]


def test_the_glb_has_unit_normals_and_linear_colors(painted):
    data = glb_bytes(painted)
    _, view = parts(data)
    normals = np.frombuffer(view(1), "<f4").reshape(-1, 3)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    linear = srgb_to_linear(painted.visual.vertex_colors[:, :3] / 255)
    colors = np.frombuffer(view(2), "<u2").reshape(-1, 4)
    np.testing.assert_allclose(colors[:, :3] / 65535, linear, atol=1e-5)
    assert len(data) == int.from_bytes(data[8:12], "little") and len(data) % 4 == 0


def test_a_textured_glb_reads_back_with_its_geometry_and_colors(textured, tmp_path):
    save_mesh(tmp_path / "egg.glb", textured)
    back = trimesh.load(tmp_path / "egg.glb", force="mesh", process=False)
    corners = textured.vertices[textured.faces][:, :, [1, 2, 0]]
    np.testing.assert_allclose(back.vertices[back.faces], corners, atol=1e-6)
    np.testing.assert_allclose(back.visual.uv[back.faces], textured.uv[textured.uv_faces], atol=1e-6)
    picture = np.asarray(back.visual.material.baseColorTexture)
    np.testing.assert_array_equal(picture, textured.texture)
    material = back.visual.material
    assert material.metallicFactor == 0 and material.roughnessFactor == pytest.approx(0.9)


def test_vertices_are_doubled_at_seams_only(textured):
    document, view = parts(glb_bytes(textured))
    pairs = set(zip(textured.faces.reshape(-1).tolist(), textured.uv_faces.reshape(-1).tolist(), strict=True))
    assert document["accessors"][0]["count"] == len(pairs)
    assert len(textured.vertices) < len(pairs) < 1.5 * len(textured.vertices)
    # The normals of doubled vertices are those of the whole surface: no seam in the shading.
    position = np.frombuffer(view(0), "<f4").reshape(-1, 3)
    normal = np.frombuffer(view(1), "<f4").reshape(-1, 3)
    _, same = np.unique(position, axis=0, return_inverse=True)
    for axis in range(3):
        low, high = np.full(same.max() + 1, np.inf), np.full(same.max() + 1, -np.inf)
        np.minimum.at(low, same.reshape(-1), normal[:, axis])
        np.maximum.at(high, same.reshape(-1), normal[:, axis])
        np.testing.assert_allclose(low, high, atol=1e-6)


def test_the_embedded_picture_is_a_png_of_the_texture(textured):
    document, view = parts(glb_bytes(textured))
    picture = Image.open(io.BytesIO(view(document["images"][0]["bufferView"])))
    assert picture.format == "PNG"
    np.testing.assert_array_equal(np.asarray(picture), textured.texture)


def test_a_textured_obj_names_its_material_and_picture(textured, tmp_path):
    files = save_mesh(tmp_path / "an egg.obj", textured)
    assert [f.name for f in files] == ["an egg.obj", "an_egg.mtl", "an_egg.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)
    back = trimesh.load(files[0], force="mesh", process=False)
    np.testing.assert_allclose(back.vertices[back.faces], textured.vertices[textured.faces], atol=1e-6)
    np.testing.assert_allclose(back.visual.uv[back.faces], textured.uv[textured.uv_faces], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back.visual.material.image)[:, :, :3], textured.texture)


def test_a_ply_has_the_textures_colors_at_its_vertices(textured, tmp_path):
    save_mesh(tmp_path / "egg.ply", textured)
    back = trimesh.load(tmp_path / "egg.ply", process=False)
    np.testing.assert_allclose(back.vertices, textured.vertices, atol=1e-6)
    corner = texture_colors(textured.texture, textured.uv[textured.uv_faces.reshape(-1)])
    once = np.flatnonzero(
        np.bincount(np.unique(np.stack((textured.faces, textured.uv_faces)).reshape(2, -1), axis=1)[0]) == 1
    )
    first = np.array([np.flatnonzero(textured.faces.reshape(-1) == v)[0] for v in once])
    np.testing.assert_allclose(back.visual.vertex_colors[once, :3], corner[first], atol=0.51)
    np.testing.assert_array_equal(with_vertex_colors(textured).faces, textured.faces)


@pytest.mark.parametrize("suffix", [".ply", ".obj"])
def test_other_formats_keep_the_world_axes(painted, tmp_path, suffix):
    save_mesh(tmp_path / f"egg{suffix}", painted)
    back = trimesh.load(tmp_path / f"egg{suffix}", force="mesh")
    np.testing.assert_allclose(back.bounds, painted.bounds, atol=1e-4)


def test_own_normals_are_kept(textured):
    up = np.tile([0.0, 0.0, 2.0], (len(textured.vertices), 1))
    mesh = TexturedMesh(textured.vertices, textured.faces, textured.uv, textured.uv_faces, textured.texture, normals=up)
    np.testing.assert_allclose(vertex_normals(mesh), up / 2)


def test_mistakes_are_value_errors(painted, tmp_path):
    with pytest.raises(ValueError, match="stl"):
        save_mesh(tmp_path / "a.stl", painted)
    with pytest.raises(ValueError, match="no faces"):
        save_mesh(tmp_path / "a.glb", trimesh.Trimesh())
    broken = painted.copy()
    broken.vertices[3] = np.nan
    with pytest.raises(ValueError, match="1 of 642 vertices are no numbers"):
        save_mesh(tmp_path / "a.glb", broken)
    assert not list(tmp_path.iterdir())


def test_the_transfer_curve_at_known_values():
    np.testing.assert_allclose(srgb_to_linear(np.array([0, 0.04045, 0.5, 1])), [0, 0.0031308, 0.2140411, 1], atol=1e-6)
