"""glTF files are read as the specification says: geometry, poses, colors, and what is refused or warned of."""

import base64
import io
import json
import struct
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from distill3d.meshes.files import read_mesh
from distill3d.meshes.mesh import linear_to_srgb, srgb_to_linear

TYPES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)
FACES = np.array([[0, 1, 2], [0, 2, 3]])
UV = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)  # v downwards: the picture stands upright
RED_BLUE = np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(8, axis=1), 16, axis=0)


class Gltf:
    """A document that is built up piece by piece."""

    def __init__(self, *extensions, required=()):
        self.data, self.tree = b"", {"asset": {"version": "2.0"}, "scenes": [{"nodes": []}]}
        if extensions or required:
            self.tree |= {"extensionsUsed": [*extensions, *required], "extensionsRequired": list(required)}

    def add(self, kind, **entry):
        self.tree.setdefault(kind, []).append(entry)
        return len(self.tree[kind]) - 1

    def view(self, data, **more):
        self.data += bytes(-len(self.data) % 4)
        self.data += data
        return self.add("bufferViews", buffer=0, byteOffset=len(self.data) - len(data), byteLength=len(data), **more)

    def values(self, values, dtype="f4", **more):
        values = np.asarray(values, "<" + dtype)
        kind = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}[values.shape[1] if values.ndim > 1 else 1]
        view = self.view(values.tobytes())
        return self.add("accessors", bufferView=view, componentType=TYPES[dtype], count=len(values), type=kind, **more)

    def primitive(self, positions=SQUARE, faces=FACES, **more):
        attributes = {"POSITION": self.values(positions), **more.pop("attributes", {})}
        if faces is not None:
            more["indices"] = self.values(np.reshape(faces, -1), "u2")
        return {"attributes": attributes, **more}

    def node(self, *primitives, root=True, mesh=None, **more):
        if primitives:
            more["mesh"] = self.add("meshes", primitives=list(primitives), **(mesh or {}))
        number = self.add("nodes", **more)
        if root:
            self.tree["scenes"][0]["nodes"].append(number)
        return number

    def texture(self, pixels=RED_BLUE, sampler=None, **more):
        file = io.BytesIO()
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, "PNG")
        source = self.add("images", bufferView=self.view(file.getvalue()), mimeType="image/png")
        if sampler:
            more["sampler"] = self.add("samplers", **sampler)
        return self.add("textures", source=source, **more)

    def painted(self, uv=UV, info=None, sampler=None, pixels=RED_BLUE, attributes=None, **material):
        """A square with a picture."""
        base = {"baseColorTexture": {"index": self.texture(pixels, sampler), **(info or {})}}
        base |= material.pop("base", {})
        number = self.add("materials", pbrMetallicRoughness=base, **material)
        given = {"TEXCOORD_0": self.values(uv), **(attributes or {})}
        self.node(self.primitive(attributes=given, material=number))
        return self

    def save(self, path):
        self.tree["buffers"] = [{"byteLength": len(self.data)}, *self.tree.get("buffers", [])[1:]]
        text = json.dumps(self.tree).encode()
        text, data = text + b" " * (-len(text) % 4), self.data + bytes(-len(self.data) % 4)
        size = 28 + len(text) + len(data)
        path.write_bytes(
            struct.pack("<4sIII4s", b"glTF", 2, size, len(text), b"JSON")
            + text
            + struct.pack("<I4s", len(data), b"BIN\0")
            + data
        )
        return path


def points(mesh):
    """Corners [F, 3, 3] in the axes of glTF."""
    return mesh.vertices[mesh.faces][:, :, [1, 2, 0]]


def area(mesh):
    a, b, c = points(mesh).transpose(1, 0, 2)
    return np.cross(b - a, c - a).sum(0) / 2


@pytest.fixture
def read(tmp_path):
    """Writes a document and reads it; a warning is an error unless it is expected."""
    return lambda gltf: read_mesh(gltf.save(tmp_path / "a.glb"))


def middle(mesh, x, y=0.0):
    """The color in [0, 255] at a place of the square."""
    u, v = (x + 1) / 2, (y + 1) / 2
    face, weights = (0, [1 - u, u - v, v]) if u >= v else (1, [1 - v, u, v - u])
    return mesh.colors(np.array([face]), np.array([weights]))[0] * 255


# Geometry.


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2"])
@pytest.mark.parametrize("normalized", [True, False])
def test_quantized_positions_are_fractions_if_they_are_normalized(dtype, normalized, read):
    gltf, most = Gltf(required=["KHR_mesh_quantization"]), np.iinfo(dtype).max
    whole = np.array([[0, 0, 0], [most, 0, 0], [most, most, 0], [0, most, 0]])
    rows = np.zeros((4, 8 // np.dtype(dtype).itemsize), dtype)
    rows[:, :3] = whole  # padded to a stride of 8 bytes
    primitive, view = gltf.primitive(), gltf.view(rows.tobytes(), byteStride=8)
    primitive["attributes"]["POSITION"] = gltf.add(
        "accessors", bufferView=view, componentType=TYPES[dtype], count=4, type="VEC3", normalized=normalized
    )
    gltf.node(primitive, scale=[2, 2, 2])
    expected = 2 * (whole / most if normalized else whole)
    np.testing.assert_allclose(points(read(gltf)), expected[FACES])


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_a_sparse_accessor_changes_its_base_or_zeros(base, dtype, read):
    gltf = Gltf()
    primitive = gltf.primitive()
    entry = gltf.tree["accessors"][primitive["attributes"]["POSITION"]]
    expected = SQUARE.copy() if base else np.zeros_like(SQUARE)
    expected[[1, 2]] = [[5, 0, 0], [3, 3, 0]]
    if not base:
        del entry["bufferView"]
    index, value = gltf.view(np.array([1, 2], dtype).tobytes()), gltf.view(expected[[1, 2]].tobytes())
    entry["sparse"] = {
        "count": 2,
        "indices": {"bufferView": index, "componentType": TYPES[dtype]},
        "values": {"bufferView": value},
    }
    gltf.node(primitive)
    np.testing.assert_allclose(points(read(gltf)), expected[FACES])


@pytest.mark.parametrize("indexed", [True, False])
def test_strips_and_fans_cover_what_triangles_cover(indexed, read):
    t = np.arange(8) * np.pi / 4
    disc = np.stack((np.cos(t), np.sin(t), 0 * t), axis=1).astype(np.float32)
    zigzag = np.array([[i // 2, i % 2, 0] for i in range(7)], np.float32)
    zigzag[:, 1] *= -1  # the first triangle is then counter-clockwise
    for mode, shape, expected in ((6, disc, 8 * np.sin(np.pi / 4) / 2), (5, zigzag, 2.5)):
        gltf = Gltf()
        gltf.node(gltf.primitive(shape, np.arange(len(shape)) if indexed else None, mode=mode))
        mesh = read(gltf)
        np.testing.assert_allclose(area(mesh), [0, 0, expected], atol=1e-6)
        assert len(mesh.faces) == len(shape) - 2


def test_a_strip_is_joined_by_faces_without_area(read):
    gltf = Gltf()
    gltf.node(gltf.primitive(SQUARE, [0, 1, 3, 2, 2, 0, 0, 1, 3, 2], mode=5))
    np.testing.assert_allclose(area(read(gltf)), [0, 0, 8], atol=1e-6)


def test_points_and_lines_are_left_out_with_a_word(read):
    gltf = Gltf()
    gltf.node(gltf.primitive(), gltf.primitive(mode=1), gltf.primitive(mode=0))
    with pytest.warns(UserWarning, match="2 primitives of points or lines"):
        assert len(read(gltf).faces) == 2


def test_nodes_are_placed_by_all_above_them_also_those_of_cameras(read):
    gltf, turn = Gltf(), np.sqrt(0.5)
    primitive = gltf.primitive()
    inner = gltf.node(primitive, root=False, rotation=[0, 0, turn, turn], scale=[2, 1, 1])
    matrix = np.array([[1, 0, 0, 5], [0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    gltf.node(root=True, camera=gltf.add("cameras", type="perspective"), matrix=matrix.T.ravel().tolist())
    gltf.tree["nodes"][-1]["children"] = [inner]
    gltf.node(primitive, camera=0, translation=[0, 0, 7])
    mesh = read(gltf)
    x, y, z = SQUARE.T
    expected = np.concatenate((np.stack((-y + 5, 6 * x, z), 1)[FACES], np.add(SQUARE, [0, 0, 7])[FACES]))
    np.testing.assert_allclose(points(mesh), expected, atol=1e-6)


def test_a_mirror_keeps_the_outside(read):
    gltf = Gltf()
    gltf.node(gltf.primitive(attributes={"NORMAL": gltf.values(np.tile([0, 0, 1.0], (4, 1)))}), scale=[-1, 1, 1])
    mesh = read(gltf)
    np.testing.assert_allclose(area(mesh), [0, 0, 4], atol=1e-6)
    np.testing.assert_allclose(mesh.normals[:, [1, 2, 0]], np.tile([0, 0, 1.0], (4, 1)))


def test_one_file_gives_one_order(read):
    gltf = Gltf()
    colors = [[i / 9, 0.5, 0.1, 1] for i in range(9)]
    numbers = [gltf.add("materials", pbrMetallicRoughness={"baseColorFactor": color}) for color in colors]
    parts = [gltf.primitive(np.add(SQUARE, [i, 0, 0]), material=number) for i, number in enumerate(numbers)]
    gltf.node(*parts[:5])
    gltf.node(*parts[5:])
    mesh = read(gltf)
    np.testing.assert_allclose(mesh.vertices[::4, 1], np.arange(9) - 1)
    np.testing.assert_allclose(mesh.vertex_colors[::4], linear_to_srgb(np.array(colors)[:, :3]))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_a_skin_has_the_pose_of_its_joints_and_not_of_its_node(dtype, read):
    gltf, half = Gltf(), np.iinfo(dtype).max // 2
    joints = gltf.values([[0, 1, 0, 0]] * 4, dtype)
    weights = gltf.values(
        [[2 * half, 0, 0, 0], [0, 2 * half, 0, 0], [half, half, 0, 0], [0] * 4], dtype, normalized=True
    )
    inverse = np.stack([np.eye(4), np.eye(4)])
    inverse[1, 3, 0] = -1.0  # by columns: a shift along x
    numbers = [gltf.node(translation=[0, 0, 1]), gltf.node(translation=[0, 4, 0])]
    skin = gltf.add("skins", joints=numbers, inverseBindMatrices=gltf.values(inverse.reshape(2, 16)))
    primitive = gltf.primitive(attributes={"JOINTS_0": joints, "WEIGHTS_0": weights})
    gltf.node(primitive, skin=skin, translation=[100, 0, 0])
    moves = np.array([[0, 0, 1], [-1, 4, 0], [-0.5, 2, 0.5], [0, 0, 1]])  # the last is bound to nothing
    np.testing.assert_allclose(points(read(gltf)), (SQUARE + moves)[FACES], atol=1e-6)


@pytest.mark.parametrize(("mesh", "node", "weight"), [([0.5], None, 0.5), ([0.5], [2], 2), (None, None, 0)])
def test_morph_targets_have_their_default_weights(mesh, node, weight, read):
    gltf, delta = Gltf(), np.arange(12.0).reshape(4, 3)
    primitive = gltf.primitive(targets=[{"POSITION": gltf.values(delta)}])
    gltf.node(primitive, mesh=mesh and {"weights": mesh}, **({"weights": node} if node else {}))
    np.testing.assert_allclose(points(read(gltf)), (SQUARE + weight * delta)[FACES], atol=1e-6)


def test_each_instance_is_there(read):
    gltf, turn = Gltf(required=["EXT_mesh_gpu_instancing"]), np.sqrt(0.5)
    attributes = {
        "TRANSLATION": gltf.values([[0, 0, 0], [5, 0, 0]]),
        "ROTATION": gltf.values([[0, 0, 0, 32767], [0, 0, 32767 * turn, 32767 * turn]], "i2", normalized=True),
        "SCALE": gltf.values([[1, 1, 1], [2, 1, 1]]),
    }
    gltf.node(gltf.primitive(), extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}}, scale=[3, 3, 3])
    x, y, z = SQUARE.T
    expected = np.concatenate((3 * SQUARE[FACES], 3 * np.stack((5 - y, 2 * x, z), 1)[FACES]))
    np.testing.assert_allclose(points(read(gltf)), expected, atol=1e-3)


def test_what_is_hidden_is_not_there(read):
    gltf = Gltf("KHR_node_visibility")
    inner = gltf.node(gltf.primitive(), root=False)
    gltf.node(gltf.primitive())
    gltf.node(children=[inner], extensions={"KHR_node_visibility": {"visible": False}})
    assert len(read(gltf).faces) == 2


def test_without_scenes_all_nodes_are_shown(read):
    gltf = Gltf()
    gltf.node(gltf.primitive())
    del gltf.tree["scenes"]
    assert len(read(gltf).faces) == 2


# Colors.


@pytest.mark.parametrize(("dtype", "width"), [("u1", 3), ("u1", 4), ("u2", 3), ("u2", 4), ("f4", 3), ("f4", 4)])
def test_vertex_colors_are_linear_whatever_their_type(dtype, width, read):
    gltf, most = Gltf(), 1.0 if dtype == "f4" else np.iinfo(dtype).max
    value = np.array([0.0, 0.25, 0.5, 1.0])[:, None] * np.ones(width)
    color = gltf.values((value * most) if dtype == "f4" else (value * most).round(), dtype, normalized=dtype != "f4")
    gltf.node(gltf.primitive(attributes={"COLOR_0": color}))
    np.testing.assert_allclose(read(gltf).vertex_colors, linear_to_srgb(value[:, :3]), atol=2e-3)


def test_a_factor_multiplies_the_light_of_the_picture(read):
    base = {"baseColorFactor": [0.25, 1, 0.5, 1]}
    found = middle(read(Gltf().painted(base=base, pixels=np.full((2, 2, 3), 188, np.uint8))), 0.3)
    np.testing.assert_allclose(
        srgb_to_linear(found / 255), srgb_to_linear(188 / 255) * np.array([0.25, 1, 0.5]), atol=5e-3
    )


@pytest.mark.parametrize("moved", [False, True])
def test_a_texture_transform_moves_turns_and_scales_coordinates(moved, read):
    # The example of the specification: the lower left quadrant, turned.
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[8:, :8] = [[[0, 255, 0]]]
    pixels[8:12, :4] = [[[255, 255, 0]]]
    change = {"offset": [0, 1], "rotation": np.pi / 2, "scale": [0.5, 0.5]}
    gltf, uv = Gltf("KHR_texture_transform"), np.zeros_like(UV) if moved else UV
    more = {"TEXCOORD_1": gltf.values(UV)} if moved else {}
    info = {"extensions": {"KHR_texture_transform": change | ({"texCoord": 1} if moved else {})}}
    mesh = read(gltf.painted(uv=uv, info=info, pixels=pixels, attributes=more))
    # (u, v) in the square is (v / 2, 1 - u / 2) in the picture: its upper left texels come from u = 1, v = 0.
    np.testing.assert_allclose(middle(mesh, 0.6, 0.6), [255, 255, 0], atol=1)
    for x, y in ((-0.6, 0.6), (-0.6, -0.6), (0.6, -0.6)):
        np.testing.assert_allclose(middle(mesh, x, y), [0, 255, 0], atol=1)


def test_a_second_set_of_coordinates_can_be_the_one(read):
    gltf = Gltf()
    mesh = read(gltf.painted(uv=UV * 0, info={"texCoord": 1}, attributes={"TEXCOORD_1": gltf.values(UV)}))
    np.testing.assert_allclose([middle(mesh, -0.5), middle(mesh, 0.5)], [[255, 0, 0], [0, 0, 255]])


@pytest.mark.parametrize(
    ("mode", "outside"), [(10497, [0, 0, 255]), (33071, [255, 0, 0]), (33648, [255, 0, 0]), (None, [0, 0, 255])]
)
def test_a_picture_repeats_ends_or_is_mirrored_outside(mode, outside, read):
    mesh = read(Gltf().painted(uv=UV * 2 - 0.5, sampler=mode and {"wrapS": mode, "wrapT": mode}))
    np.testing.assert_allclose(middle(mesh, -0.75, 0.1), outside)  # u = -0.25
    np.testing.assert_allclose(middle(mesh, -0.25, 0.1), [255, 0, 0])
    third = read(Gltf().painted(uv=UV * 4 - 1.5, sampler=mode and {"wrapS": mode, "wrapT": mode}))
    far = {33071: [255, 0, 0], 33648: [0, 0, 255]}.get(mode, [0, 0, 255])
    np.testing.assert_allclose(middle(third, -0.875, 0.1), far)  # u = -1.25


def test_specular_and_glossiness_have_their_own_color(read):
    name = "KHR_materials_pbrSpecularGlossiness"
    gltf = Gltf(name)
    gltf.painted(base={"baseColorFactor": [0, 1, 0, 1]})
    other = {"diffuseTexture": {"index": 0}, "diffuseFactor": [1, 1, 0, 1]}
    gltf.tree["materials"][0]["extensions"] = {name: other}
    mesh = read(gltf)
    np.testing.assert_allclose([middle(mesh, -0.5), middle(mesh, 0.5)], [[255, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.full((4, 4), 32896, np.uint16)), [128] * 3),
        (Image.fromarray(np.full((4, 4), 77, np.uint8)), [77] * 3),
        (Image.fromarray(np.full((4, 4, 2), 77, np.uint8), "LA"), [77] * 3),
        (Image.fromarray(np.full((4, 4), 255, np.uint8)).convert("1"), [255] * 3),
        (Image.fromarray(np.full((4, 4, 3), [9, 99, 199], np.uint8)).convert("P", palette=1, colors=8), [9, 99, 199]),
    ],
)
def test_pictures_of_any_mode_become_rgb(image, expected, read):
    np.testing.assert_allclose(middle(read(Gltf().painted(pixels=image)), 0.2), expected, atol=1)


def test_opacity_and_backs_are_kept(read):
    pixels = np.dstack((RED_BLUE, np.full(RED_BLUE.shape[:2], 255, np.uint8)))
    pixels[:, :8, 3] = 51
    for mode, cutoff in (("MASK", 0.3), ("BLEND", 0.5), ("OPAQUE", 0.5)):
        extra = {"alphaCutoff": cutoff} if mode == "MASK" else {}
        base = {"baseColorFactor": [1, 1, 1, 0.5]}
        gltf = Gltf().painted(pixels=pixels, alphaMode=mode, doubleSided=True, base=base, **extra)
        mesh = read(gltf)
        assert (mesh.alpha_mode, mesh.alpha_cutoff, mesh.double_sided) == (mode, cutoff, True)
        face, weights = np.array([1, 0]), np.array([[0.45, 0.1, 0.45], [0.1, 0.8, 0.1]])
        expected = [1, 1] if mode == "OPAQUE" else [0.1, 0.5]
        np.testing.assert_allclose(mesh.opacity(face, weights), expected, atol=3e-3)


def test_parts_of_other_alpha_modes_keep_their_look(read):
    gltf = Gltf()
    looks = [("OPAQUE", 0.5, 0.2), ("MASK", 0.8, 0.7), ("MASK", 0.2, 0.3)]
    for mode, cutoff, alpha in looks:
        base = {"baseColorFactor": [1, 1, 1, alpha]}
        number = gltf.add("materials", pbrMetallicRoughness=base, alphaMode=mode, alphaCutoff=cutoff)
        gltf.node(gltf.primitive(material=number))
    mesh = read(gltf)
    assert mesh.alpha_mode == "MASK" and not mesh.double_sided
    shown = mesh.opacity(np.arange(6), np.full((6, 3), 1 / 3)) >= mesh.alpha_cutoff
    np.testing.assert_array_equal(shown, [True, True, False, False, True, True])


def test_coordinates_that_are_not_numbers_lose_their_picture_alone(read):
    uv = UV.copy()
    uv[3] = np.nan  # a corner of the second face
    with pytest.warns(UserWarning, match="1 faces have UV coordinates that are not finite"):
        mesh = read(Gltf().painted(uv=uv))
    np.testing.assert_allclose(middle(mesh, 0.6, -0.5), [0, 0, 255])
    np.testing.assert_allclose(middle(mesh, -0.5, 0.5), [255, 255, 255])


def test_colors_and_normals_that_are_not_numbers_are_left_out(read):
    gltf, bad = Gltf(), np.ones((4, 3))
    bad[1, 0] = np.nan
    gltf.node(gltf.primitive(attributes={"COLOR_0": gltf.values(0.5 * bad), "NORMAL": gltf.values(bad)}))
    with pytest.warns(UserWarning, match="1 vertices have colors that are not finite"):
        mesh = read(gltf)
    assert mesh.normals is None and mesh.vertex_colors[1].tolist() == [1, 1, 1]
    np.testing.assert_allclose(mesh.vertex_normals(), [[1, 0, 0]] * 4, atol=1e-12)  # x is glTF's z


# Files.


@pytest.mark.parametrize("uri", ["my%20buffer.bin", "my buffer.bin", "../up/b.bin", "data:", "data:unpadded"])
def test_a_uri_is_decoded(uri, tmp_path):
    gltf = Gltf()
    gltf.node(gltf.primitive())
    (tmp_path / "up").mkdir()
    (tmp_path / "model").mkdir()
    if uri.startswith("data:"):
        text = base64.b64encode(gltf.data).decode()
        uri = "data:application/octet-stream;base64," + (text if uri == "data:" else text.rstrip("="))
    else:
        (tmp_path / "model" / uri.replace("%20", " ")).write_bytes(gltf.data)
    gltf.tree["buffers"] = [{"byteLength": len(gltf.data), "uri": uri}]
    (tmp_path / "model" / "a.gltf").write_text(json.dumps(gltf.tree))
    assert len(read_mesh(tmp_path / "model" / "a.gltf").faces) == 2


def test_a_picture_that_is_missing_is_named(tmp_path):
    gltf = Gltf().painted()
    gltf.tree["images"] = [{"uri": "not%20here.png"}]
    with pytest.warns(UserWarning, match="not here.png"):
        mesh = read_mesh(gltf.save(tmp_path / "a.glb"))
    assert not mesh.textures and mesh.vertex_colors is None


def test_a_picture_that_cannot_be_decoded_is_named(read):
    gltf = Gltf("KHR_texture_basisu").painted()
    gltf.tree["images"] = [{"bufferView": gltf.view(b"\xabKTX 20"), "mimeType": "image/ktx2"}]
    gltf.tree["textures"] = [{"extensions": {"KHR_texture_basisu": {"source": 0}}}]
    with pytest.warns(UserWarning, match="image/ktx2 is left out"):
        assert not read(gltf).textures


def test_extensions_that_are_not_read_are_named(read):
    gltf = Gltf("EXT_something")
    gltf.node(gltf.primitive())
    with pytest.warns(UserWarning, match="EXT_something is ignored"):
        read(gltf)
    look = Gltf(required=["KHR_materials_transmission"])
    look.node(look.primitive())
    with pytest.warns(UserWarning, match="KHR_materials_transmission is ignored"):
        assert len(read(look).faces) == 2
    gltf.tree["extensionsRequired"] = ["EXT_something"]
    with pytest.raises(ValueError, match="requires EXT_something, which cannot be read"):
        read(gltf)


def break_index(gltf):
    gltf.tree["accessors"][gltf.tree["meshes"][0]["primitives"][0]["indices"]]["bufferView"] = gltf.view(b"\x09\0" * 6)


def break_cycle(gltf):
    gltf.tree["nodes"][0]["children"] = [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_index, "indices from 0 to 3"),
        (break_cycle, "do not form a tree"),
        (lambda gltf: gltf.tree["accessors"][0].update(count=99), "cut short"),
        (lambda gltf: gltf.tree["accessors"][0].update(componentType=1), "damaged"),
        (lambda gltf: gltf.tree["nodes"][0].update(mesh=7), "damaged"),
        (lambda gltf: gltf.tree["asset"].update(version="1.0"), "glTF 1.0"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(change, message, read):
    gltf = Gltf()
    gltf.node(gltf.primitive())
    change(gltf)
    with pytest.raises(ValueError, match=message) as caught:
        read(gltf)
    assert "\n" not in str(caught.value)


def draco(gltf, required):
    """The square through the encoder of Draco, with vertex colors of two bytes."""
    module = pytest.importorskip("DracoPy")
    data = module.encode(SQUARE, FACES, quantization_bits=14, tex_coord=UV.astype(float))
    found = {a["attribute_type"]: a["unique_id"] for a in module.decode(data).attributes}
    primitive = gltf.primitive(attributes={"TEXCOORD_0": gltf.values(UV)})
    if required:
        for number in (*primitive["attributes"].values(), primitive["indices"]):
            del gltf.tree["accessors"][number]["bufferView"]
    attributes = {"POSITION": found[0], "TEXCOORD_0": found[3]}
    packed = {"bufferView": gltf.view(data), "attributes": attributes}
    primitive["extensions"] = {"KHR_draco_mesh_compression": packed}
    gltf.node(primitive)
    return gltf


def meshopt(gltf, required):
    """The square through the encoder of meshopt."""
    module = pytest.importorskip("meshoptimizer")
    gltf.node(gltf.primitive(faces=FACES.astype(np.uint32)))
    entries = gltf.tree["bufferViews"]
    packed = [
        (module.encode_vertex_buffer(SQUARE, 4, 12), "ATTRIBUTES", 4, 12),
        (module.encode_index_buffer(FACES.reshape(-1).astype(np.uint32), 6, 4), "TRIANGLES", 6, 2),
    ]
    for entry, (data, mode, count, stride) in zip(entries[:2], packed, strict=True):
        view = entries[gltf.view(bytes(data))]
        view |= {"mode": mode, "count": count, "byteStride": stride}
        entry |= {"extensions": {"EXT_meshopt_compression": view}} | ({"buffer": 1} if required else {})
    gltf.tree["bufferViews"] = entries[:2]
    gltf.tree["buffers"] = [{}, {"byteLength": 60, "extensions": {"EXT_meshopt_compression": {"fallback": True}}}]
    return gltf


KINDS = {
    "draco": SimpleNamespace(make=draco, module="DracoPy", name="KHR_draco_mesh_compression"),
    "meshopt": SimpleNamespace(make=meshopt, module="meshoptimizer", name="EXT_meshopt_compression"),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_compressed_meshes_are_decoded_or_refused_by_name(kind, read, monkeypatch):
    gltf, plain = kind.make(Gltf(required=[kind.name]), True), Gltf()
    plain.node(plain.primitive())
    # Draco may begin a face at another corner, and number vertices anew.
    ours, theirs = (np.sort(points(read(g)).sum(1), axis=0) for g in (gltf, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    optional = kind.make(Gltf(kind.name), False)
    monkeypatch.setitem(sys.modules, kind.module, None)
    with pytest.raises(ValueError, match=f"{kind.name}.*pip install {kind.module}") as caught:
        read(gltf)
    assert "\n" not in str(caught.value)
    np.testing.assert_allclose(points(read(optional)), SQUARE[FACES])  # with a plain copy nothing is needed


def test_a_damaged_blob_names_its_compression(read):
    pytest.importorskip("DracoPy")
    gltf = draco(Gltf(), True)
    gltf.tree["meshes"][0]["primitives"][0]["extensions"]["KHR_draco_mesh_compression"]["bufferView"] = gltf.view(
        b"DRA"
    )
    with pytest.raises(ValueError, match="Draco"), warnings.catch_warnings():
        read(gltf)
