"""Mesh files: what was written is what other programs read, and what is read is what the file says."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from distill3d.meshes.files import read_mesh, save_mesh
from distill3d.meshes.mesh import Mesh, linear_to_srgb, sample_texture, srgb_to_linear
from distill3d.meshes.texture import unwrap, uv_problem


@pytest.fixture(scope="module")
def painted():
    """An egg, long along x, whose vertex colors tell where they are."""
    ball = trimesh.creation.icosphere(subdivisions=3)
    vertices = np.array(ball.vertices)
    return Mesh(vertices * [0.8, 0.4, 0.2], np.array(ball.faces), (vertices * 100 + 128).round() / 255)


@pytest.fixture(scope="module")
def textured(painted):
    uv, uv_faces = unwrap(painted, size=64)
    ramp = np.linspace(0, 255, 64)
    texture = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.full((64, 64), 40.0)), -1).astype(np.uint8)
    return painted.with_texture(texture, uv, uv_faces)


class Glb:
    """A GLB file, read after the specification."""

    def __init__(self, path, mesh):
        save_mesh(path / "egg.glb", mesh)
        self.data = (path / "egg.glb").read_bytes()
        self.length = int.from_bytes(self.data[12:16], "little")
        self.document = json.loads(self.data[20 : 20 + self.length])
        (self.primitive,) = self.document["meshes"][0]["primitives"]

    def view(self, number):
        entry = self.document["bufferViews"][number]
        start = 28 + self.length + entry["byteOffset"]
        return self.data[start : start + entry["byteLength"]]

    def attribute(self, name):
        accessor = self.document["accessors"][self.primitive["attributes"][name]]
        columns = {"VEC2": 2, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        kind = {5126: "<f4", 5123: "<u2"}[accessor["componentType"]]
        assert accessor.get("normalized", False) == (kind == "<u2")
        assert self.document["bufferViews"][accessor["bufferView"]]["target"] == 34962
        return np.frombuffer(self.view(accessor["bufferView"]), kind)[: accessor["count"] * columns].reshape(
            -1, columns
        )


def test_glb_round_trip_is_y_up_with_the_front_towards_plus_z(painted, tmp_path):
    assert save_mesh(tmp_path / "egg.glb", painted) == [tmp_path / "egg.glb"]
    back = trimesh.load(tmp_path / "egg.glb", force="mesh", process=False)
    np.testing.assert_allclose(back.bounds, [[-0.4, -0.2, -0.8], [0.4, 0.2, 0.8]], atol=0.01)
    np.testing.assert_allclose(back.vertices, painted.vertices[:, [1, 2, 0]], atol=1e-6)
    volume = trimesh.Trimesh(painted.vertices, painted.faces).volume
    assert back.volume == pytest.approx(volume, rel=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["egg.glb"]


def test_the_glb_has_unit_normals_and_linear_colors(painted, tmp_path):
    glb = Glb(tmp_path, painted)
    np.testing.assert_allclose(np.linalg.norm(glb.attribute("NORMAL"), axis=1), 1, atol=1e-5)
    colors = glb.attribute("COLOR_0")
    np.testing.assert_allclose(colors[:, :3] / 65535, srgb_to_linear(painted.vertex_colors), atol=1e-5)
    assert (colors[:, 3] == 65535).all() and glb.document["asset"] == {"version": "2.0", "generator": "distill3d"}
    assert len(glb.data) == int.from_bytes(glb.data[8:12], "little") and len(glb.data) % 4 == 0
    look = glb.document["materials"][glb.primitive["material"]]["pbrMetallicRoughness"]
    assert look == {"metallicFactor": 0.0, "roughnessFactor": 0.9}


def test_a_textured_glb_reads_back_with_its_geometry_and_colors(textured, tmp_path):
    save_mesh(tmp_path / "egg.glb", textured)
    back = trimesh.load(tmp_path / "egg.glb", force="mesh", process=False)
    corners = textured.vertices[textured.faces][:, :, [1, 2, 0]]
    np.testing.assert_allclose(back.vertices[back.faces], corners, atol=1e-6)
    np.testing.assert_allclose(back.visual.uv[back.faces], textured.uv[textured.uv_faces], atol=1e-6)
    picture = np.asarray(back.visual.material.baseColorTexture)
    np.testing.assert_array_equal(picture, textured.textures[0])
    material = back.visual.material
    assert material.metallicFactor == 0 and material.roughnessFactor == pytest.approx(0.9)


def test_vertices_are_doubled_at_seams_only(textured, tmp_path):
    position, normal = (Glb(tmp_path, textured).attribute(name) for name in ("POSITION", "NORMAL"))
    pairs = set(zip(textured.faces.reshape(-1).tolist(), textured.uv_faces.reshape(-1).tolist(), strict=True))
    assert len(position) == len(normal) == len(pairs)
    assert len(textured.vertices) < len(pairs) < 1.5 * len(textured.vertices)
    # The normals of doubled vertices are those of the whole surface: no seam in the shading.
    _, same = np.unique(position, axis=0, return_inverse=True)
    for axis in range(3):
        low, high = np.full(same.max() + 1, np.inf), np.full(same.max() + 1, -np.inf)
        np.minimum.at(low, same.reshape(-1), normal[:, axis])
        np.maximum.at(high, same.reshape(-1), normal[:, axis])
        np.testing.assert_allclose(low, high, atol=1e-6)


def test_the_embedded_image_is_a_png_of_the_texture(textured, tmp_path):
    glb = Glb(tmp_path, textured)
    image = Image.open(io.BytesIO(glb.view(glb.document["images"][0]["bufferView"])))
    assert image.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), textured.textures[0])


@pytest.mark.parametrize(("scale", "wrap"), [(1, 33071), (2, 10497)])  # clamp to edge, repeat
def test_a_map_beyond_the_texture_repeats_it_and_filters_are_linear(textured, scale, wrap, tmp_path):
    document = Glb(tmp_path, replace(textured, uv=textured.uv * scale)).document
    assert document["samplers"] == [{"magFilter": 9729, "minFilter": 9987, "wrapS": wrap, "wrapT": wrap}]
    assert document["textures"] == [{"source": 0, "sampler": 0}]


def test_a_textured_obj_names_its_material_and_picture(textured, tmp_path):
    files = save_mesh(tmp_path / "an egg.obj", textured)
    assert [f.name for f in files] == ["an egg.obj", "an_egg.mtl", "an_egg.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)
    back = trimesh.load(files[0], force="mesh", process=False)
    np.testing.assert_allclose(back.vertices[back.faces], textured.vertices[textured.faces][..., [1, 2, 0]], atol=1e-6)
    np.testing.assert_allclose(back.visual.uv[back.faces], textured.uv[textured.uv_faces], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back.visual.material.image)[:, :, :3], textured.textures[0])


def test_a_ply_has_the_textures_colors_at_its_vertices(textured, tmp_path):
    save_mesh(tmp_path / "egg.ply", textured)
    back = trimesh.load(tmp_path / "egg.ply", process=False)
    np.testing.assert_allclose(back.vertices, textured.vertices, atol=1e-6)
    corner = sample_texture(textured.textures[0], textured.uv[textured.uv_faces.reshape(-1)])
    once = np.flatnonzero(
        np.bincount(np.unique(np.stack((textured.faces, textured.uv_faces)).reshape(2, -1), axis=1)[0]) == 1
    )
    first = np.array([np.flatnonzero(textured.faces.reshape(-1) == v)[0] for v in once])
    np.testing.assert_allclose(back.visual.vertex_colors[once, :3], corner[first], atol=0.51)
    np.testing.assert_array_equal(textured.with_vertex_colors().faces, textured.faces)


@pytest.mark.parametrize(
    ("name", "up", "axes"),
    [
        ("egg.ply", "auto", [0, 1, 2]),
        ("egg.ply", "y", [1, 2, 0]),
        ("egg.obj", "auto", [1, 2, 0]),
        ("egg.obj", "z", [0, 1, 2]),
        ("egg.glb", "y", [1, 2, 0]),
    ],
)
def test_obj_and_gltf_are_written_y_up_and_ply_z_up_unless_told(name, up, axes, painted, tmp_path):
    save_mesh(tmp_path / name, painted, up)
    back = trimesh.load(tmp_path / name, force="mesh", process=False)
    np.testing.assert_allclose(back.vertices[back.faces], painted.vertices[painted.faces][..., axes], atol=1e-6)
    np.testing.assert_allclose(read_mesh(tmp_path / name, up).vertices, painted.vertices, atol=1e-6)


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
@pytest.mark.parametrize(
    ("center", "size"),
    [([0, 0, 0], 1), ([512345.25, 5412345.75, 312.5], 1), ([0, 0, 0], 1e-6), ([0, 0, 0], 1e20), ([1e9, 0, 0], 1e-3)],
)
def test_positions_keep_their_digits_far_away_tiny_and_huge(suffix, center, size, textured, tmp_path):
    vertices = textured.vertices * size + np.array(center)
    save_mesh(tmp_path / f"a.{suffix}", replace(textured, vertices=vertices, normals=textured.vertex_normals()))
    found = read_mesh(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(soup(found), vertices[textured.faces], rtol=0, atol=1e-6 * size)


def test_a_gltf_file_far_away_has_a_node_in_its_place_and_small_numbers(textured, tmp_path):
    far = replace(textured, vertices=textured.vertices * 1e-6 + [512345.25, 5412345.75, 312.5])
    glb = Glb(tmp_path, far)
    (node,) = glb.document["nodes"]
    np.testing.assert_allclose(node["translation"], [5412345.75, 312.5, 512345.25], rtol=1e-7)
    assert np.abs(glb.attribute("POSITION")).max() < 2
    assert "scale" not in Glb(tmp_path, textured).document["nodes"][0]


def test_objects_and_materials_have_names(textured, tmp_path):
    document = Glb(tmp_path, textured).document
    assert {document[kind][0]["name"] for kind in ("nodes", "meshes", "materials", "images")} == {"egg"}
    run = tmp_path / "a-red egg-01ab9f"
    save_mesh(run / "mesh.obj", textured)
    lines = (run / "mesh.obj").read_text().splitlines()
    assert "o a-red_egg" in lines and "usemtl a-red_egg" in lines
    assert "newmtl a-red_egg" in (run / "mesh.mtl").read_text()


@pytest.mark.parametrize("mode", ["MASK", "BLEND"])
def test_opacity_and_backs_come_back_from_a_gltf_file(mode, textured, tmp_path):
    alpha = np.full((*textured.textures[0].shape[:2], 1), 90, np.uint8)
    texture = np.concatenate((textured.textures[0], alpha), axis=2)
    cutoff = 0.3 if mode == "MASK" else 0.5
    mesh = replace(textured, textures=(texture,), alpha_mode=mode, alpha_cutoff=cutoff, double_sided=True)
    save_mesh(tmp_path / "a.glb", mesh)
    found = read_mesh(tmp_path / "a.glb")
    assert (found.alpha_mode, found.alpha_cutoff, found.double_sided) == (mode, cutoff, True)
    np.testing.assert_array_equal(found.textures[0], texture)
    painted = mesh.with_vertex_colors()
    save_mesh(tmp_path / "b.glb", painted)
    found = read_mesh(tmp_path / "b.glb")
    assert (found.alpha_mode, found.double_sided) == (mode, True)
    np.testing.assert_allclose(found.alpha, 90 / 255, atol=1e-4)


def test_the_transfer_curve_at_known_values():
    np.testing.assert_allclose(srgb_to_linear(np.array([0, 0.04045, 0.5, 1])), [0, 0.0031308, 0.2140411, 1], atol=1e-6)
    values = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(linear_to_srgb(srgb_to_linear(values)), values, atol=1e-6)


# Reading.


def soup(mesh):
    """Corners [F, 3, 3], whatever the numbering of the vertices."""
    return np.asarray(mesh.vertices)[np.asarray(mesh.faces)]


def noisy(mesh):
    """The mesh with a texture of noise."""
    return mesh.with_texture(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), *unwrap(mesh))


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_what_is_written_is_what_is_read(suffix, painted, tmp_path):
    mesh = noisy(painted)
    save_mesh(tmp_path / f"a.{suffix}", mesh)
    found = read_mesh(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(soup(found), soup(mesh), atol=1e-6)
    assert uv_problem(found) is None and found.uv is not None and found.vertex_colors is None
    np.testing.assert_allclose(found.uv[found.uv_faces], mesh.uv[mesh.uv_faces], atol=1e-6)
    np.testing.assert_array_equal(found.textures[0], mesh.textures[0])
    face, weights = found.sample(200)
    expected = sample_texture(mesh.textures[0], np.einsum("nc,ncr->nr", weights, mesh.uv[mesh.uv_faces[face]]))
    np.testing.assert_allclose(found.colors(face, weights) * 255, expected, atol=1e-2)


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_vertex_colors_are_srgb_again(suffix, tmp_path):
    ball = trimesh.creation.icosphere(1)
    colors = np.random.default_rng(0).integers(0, 256, (len(ball.vertices), 3)) / 255
    save_mesh(tmp_path / f"a.{suffix}", Mesh(np.array(ball.vertices), np.array(ball.faces), colors))
    found = read_mesh(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(soup(found), soup(ball), atol=1e-6)
    np.testing.assert_allclose(found.corner_colors(), colors[ball.faces], atol=0.6 / 255)
    assert found.vertex_colors is not None and uv_problem(found) == "it has none"


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


def test_the_upward_axis_can_be_chosen(tmp_path):
    box = trimesh.creation.box((1, 2, 3))
    box.export(tmp_path / "a.obj")
    box.export(tmp_path / "a.glb")
    np.testing.assert_allclose(np.ptp(read_mesh(tmp_path / "a.obj", up="z").vertices, axis=0), [1, 2, 3])
    for mesh in (read_mesh(tmp_path / "a.obj"), read_mesh(tmp_path / "a.glb")):
        np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), [3, 1, 2])


def test_an_npz_file_holds_everything_exactly(textured, tmp_path):
    two = replace(
        textured,
        vertex_colors=np.random.default_rng(0).random(textured.vertices.shape),
        normals=textured.vertex_normals(),
        textures=(textured.textures[0], np.full((8, 4, 4), 3, np.uint8)),
        texture_of=np.arange(len(textured.faces)) % 3 - 1,
        wraps=(("clamp", "repeat"), ("mirror", "mirror")),
        alpha=np.linspace(0, 1, len(textured.vertices)),
        alpha_mode="MASK",
        alpha_cutoff=0.3,
        double_sided=True,
    )
    for mesh in (two, textured, Mesh(textured.vertices, textured.faces)):
        save_mesh(tmp_path / "a.npz", mesh)
        found = read_mesh(tmp_path / "a.npz", up="y")  # it is in world axes, whatever its source was in
        for name, value in vars(mesh).items():
            if not isinstance(value, np.ndarray) and name != "textures":
                assert getattr(found, name) == value
                continue
            for ours, theirs in zip(
                *(v if name == "textures" else (v,) for v in (value, getattr(found, name))), strict=True
            ):
                assert (ours is None and theirs is None) or (
                    ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
                )


def test_parts_with_textures_of_their_own_keep_them(tmp_path):
    scene, images = trimesh.Scene(), [np.full((4, 4, 3), value, np.uint8) for value in (200, 40)]
    for i, image in enumerate([*images, None]):
        box = trimesh.creation.box().apply_translation([3 * i, 0, 0])
        if image is not None:
            material = PBRMaterial(baseColorTexture=Image.fromarray(image))
            box.visual = TextureVisuals(uv=np.full((8, 2), 0.5), material=material)
        scene.add_geometry(box, geom_name=f"part {i}", node_name=f"part {i}")
    scene.export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    assert [texture[0, 0, 0] for texture in mesh.textures] == [200, 40] and len(mesh.faces) == 36
    assert set(mesh.texture_of) == {-1, 0, 1} and uv_problem(mesh) == "it reaches beyond the texture"
    with pytest.raises(ValueError, match="one texture for all faces"):
        save_mesh(tmp_path / "b.glb", mesh)
    save_mesh(tmp_path / "b.ply", mesh)


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
    elif name == "line.obj":
        path.write_text("v 0 0 0\nv 1 0 0\nv 2 1e-15 0\nf 1 2 3\n")
    elif name == "vast.obj":
        path.write_text("v 0 0 0\nv 1e200 0 0\nv 0 1e200 0\nf 1 2 3\n")
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
        ("nan.obj", "1 of 3 vertices are not finite"),
        ("point.obj", "no extent"),
        ("line.obj", "no area"),
        ("vast.obj", "1e-100 to 1e\\+100"),
        ("corner.obj", "cannot be read as a mesh"),
        ("splats.ply", "Gaussian splats"),
        ("other.ply", "not a PLY file"),
        ("empty.obj", "is empty"),
        ("blank.obj", "no faces"),
        ("cut.glb", "cannot be read as a mesh"),
        ("cut.ply", "cannot be read as a mesh"),
    ],
)
def test_what_is_not_a_mesh_is_refused_in_one_line(name, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read_mesh(damaged(tmp_path, name))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_what_cannot_be_written_is_refused(painted, textured, tmp_path):
    with pytest.raises(ValueError, match="stl"):
        save_mesh(tmp_path / "a.stl", painted)
    with pytest.raises(ValueError, match="UV map has coordinates that are not finite"):
        save_mesh(tmp_path / "a.glb", replace(textured, uv=textured.uv * np.nan))
    with pytest.raises(ValueError, match="y up by definition"):
        save_mesh(tmp_path / "a.glb", painted, up="z")
    assert not list(tmp_path.iterdir())
