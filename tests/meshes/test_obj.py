"""OBJ files as modelers and scanners write them, and their materials."""

import warnings

import numpy as np
import pytest
from PIL import Image

from distill3d.meshes.files import read_mesh
from distill3d.meshes.polygons import triangulate

SQUARE = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
FACE = "f 1/1 2/2 3/3 4/4\n"


@pytest.fixture
def read(tmp_path):
    """Reads a text as an OBJ file of this folder."""

    def read(text):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "a.obj").write_bytes(data)
        return read_mesh(tmp_path / "a.obj", up="z")

    return read


@pytest.fixture
def picture(tmp_path):
    """A picture, red on the left and blue on the right, under any name."""

    def save(name):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:, :4, 0] = pixels[:, 4:, 2] = 255
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)

    return save


def ends(mesh):
    """Colors near the left and the right edge of the square."""
    return mesh.colors(np.array([1, 0]), np.array([[0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])).round(2).tolist()


RED_BLUE = [[1, 0, 0], [0, 0, 1]]


def area(vertices, faces):
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return np.cross(b - a, c - a) / 2


@pytest.mark.parametrize(
    "text",
    [
        SQUARE.replace("v 1 -1 0\n", "v 1 -1 0 # a corner\n") + "f 1 2 3 4 # a side\n",
        SQUARE.replace(" ", "\t") + "f\t1\t2\t3\t4",
        b"\xef\xbb\xbf" + (SQUARE + FACE).encode(),
        (SQUARE + FACE).encode("utf-16"),
        (SQUARE + FACE).replace("\n", "\r\n"),
        "# caf\xe9\n".encode("latin-1") + (SQUARE + FACE).encode(),
        SQUARE + "f 1 2 \\\n 3 4\n",
        SQUARE + "f -4 -3 -2 -1\n",
        SQUARE + "f 1//1 2//1 3//1 4//1\nvn 0 0 1\n",
        SQUARE + "fo 1 2 3 4\n",
        SQUARE.replace("0\nv", "0 1.0\nv") + FACE,
    ],
)
def test_a_square_is_a_square_however_it_is_written(text, read):
    mesh = read(text)
    np.testing.assert_allclose(area(mesh.vertices, mesh.faces).sum(0), [0, 0, 4])
    np.testing.assert_allclose(mesh.vertices[mesh.faces[0, :2]], [[-1, -1, 0], [1, -1, 0]])
    assert mesh.vertex_colors is None


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e12])
@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ([[1, 0], [2, 2], [0, 0.5], [-2, 2], [-1, 0], [0, -2]], 5.0),
        ([[0, 0], [2, 1], [0, 2], [1, 1]], 1.0),  # a dart, whose notch is its last corner
        ([[1, 1], [0, 0], [2, 1], [0, 2]], 1.0),
        ([[0, 0], [4, 0], [4, 4], [0, 4], [0, 3], [3, 3], [3, 1], [0, 1]], 10.0),  # C
        ([[0, 0], [4, 0], [4, 4], [0, 4], [0, 0], [1, 1], [1, 3], [3, 3], [3, 1], [1, 1]], 12.0),  # a hole by a bridge
        ([[0, 0], [1, 0], [2, 0], [2, 2], [0, 2]], 4.0),  # a corner on an edge
    ],
)
def test_triangles_lie_inside_their_polygon(corners, expected, scale):
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    points = np.insert(np.array(corners, float), 2, 0.0, axis=1) @ turn.T * scale
    for first in range(len(points)):
        faces, source, own = triangulate(points, [np.roll(np.arange(len(points)), -first).tolist()])
        parts = area(points, faces) / scale**2
        total = np.linalg.norm(parts.sum(0))
        assert total == pytest.approx(expected) and np.linalg.norm(parts, axis=1).sum() == pytest.approx(expected)
        assert len(faces) == len(points) - 2 and not source.any()
        np.testing.assert_array_equal(np.roll(np.arange(len(points)), -first)[own], faces)


def test_polygons_keep_their_order_and_their_texture_coordinates(read):
    mesh = read(SQUARE + "v 3 -1 0\nv 3 1 0\nvt .5 .5\nf 2/2 5/5 6/5\n" + FACE + "f 2 6 3\n")
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[0]], [[1, 0], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[1:3]], [[[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [0, 1]]])
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[3]], -1)  # no place


def test_colors_of_vertices_are_read(read):
    text = SQUARE.replace(" 0\nv", " 0 0.25 0.5 1\nv").replace("1 0\nvt 0 0", "1 0 0.25 0.5 1\nvt 0 0")
    np.testing.assert_allclose(read(text + FACE).vertex_colors, np.tile([0.25, 0.5, 1], (4, 1)))


def test_hard_edges_keep_a_normal_for_each_side(read):
    mesh = read(SQUARE + "vn 0 0 1\nvn 1 0 0\nf 1//1 2//1 3//1\nf 1//2 3//2 4//2\n")
    assert len(mesh.vertices) == 6
    np.testing.assert_allclose(mesh.normals[mesh.faces[:, 0]], [[0, 0, 1], [1, 0, 0]])


def test_faces_of_several_materials_keep_their_order_and_colors(read, tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl one\nKd 1 0 0\nnewmtl my two\nKd 0 0.5 0\n")
    text = "mtllib a.mtl\n" + SQUARE + "usemtl one\nf 1 2 3\nusemtl my two\nf 1 3 4\nusemtl one\nf 2 3 4\n"
    mesh = read(text)
    expected = [[1, 0, 0], [0, 0.5, 0], [1, 0, 0]]
    np.testing.assert_allclose(mesh.corner_colors(), np.repeat(expected, 3, axis=0).reshape(3, 3, 3))
    np.testing.assert_allclose(mesh.vertices[mesh.faces[2]], [[1, -1, 0], [1, 1, 0], [-1, 1, 0]])


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("t.png", "t.png"),
        ("../up/t.png", "../up/t.png"),
        ("..\\up\\t.png", "../up/t.png"),
        ("-s 1 1 1 t.png", "t.png"),
        ("-bm 0.5 -mm 0 1 -o 0 0 0 t.png", "t.png"),
        ("-blendu on -clamp off my t.png", "my t.png"),
        ('"my t.png"', "my t.png"),
        ("my%20t.png", "my t.png"),
        ("50%.png", "50%.png"),
        ("C:\\models\\chair\\T.PNG", "t.png"),
        ("t.png\t# the paint", "t.png"),
    ],
)
def test_the_picture_of_a_material_is_found(line, file, read, picture, tmp_path):
    picture(file)
    (tmp_path / "a.mtl").write_text(f"newmtl m\n\tKd 0.8 0.8 0.8\n\tmap_Kd {line}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ends(read("mtllib a.mtl\n" + SQUARE + "usemtl m\n" + FACE)) == RED_BLUE


def test_options_of_a_picture_move_scale_and_clamp_it(read, picture, tmp_path):
    picture("t.png")
    for option, expected in (
        ("-s -1 1 1", RED_BLUE[::-1]),
        ("-o 0.5", RED_BLUE[::-1]),
        ("-o 0.5 -clamp on", [[0, 0, 1]] * 2),
    ):
        (tmp_path / "a.mtl").write_text(f"newmtl m\nmap_Kd {option} t.png\n")
        assert ends(read("mtllib a.mtl\n" + SQUARE + "usemtl m\n" + FACE)) == expected


@pytest.mark.parametrize(
    "lines", ["mtllib none.mtl\nmtllib b.mtl\n", "mtllib none.mtl b.mtl\n", "mtllib none.mtl\nmtllib sub\\b.mtl\n"]
)
def test_a_second_library_is_read_and_a_missing_one_named(lines, read, picture, tmp_path):
    picture("t.png")
    (tmp_path / "b.mtl").write_text("newmtl m\nmap_Kd t.png\n")
    with pytest.warns(UserWarning, match="there is no material file 'none.mtl'"):
        assert ends(read(lines + SQUARE + "usemtl m\n" + FACE)) == RED_BLUE


def test_what_is_missing_or_left_out_is_named(read, tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd gone.png\n")
    with pytest.warns(UserWarning, match=r"there is no image 'gone\.png'"):
        read("mtllib a.mtl\n" + SQUARE + "usemtl m\n" + FACE)
    with pytest.warns(UserWarning, match="no material file has 'other'"):
        read(SQUARE + "usemtl other\n" + FACE)
    with pytest.warns(UserWarning, match="lines, points are left out"):
        read(SQUARE + FACE + "l 1 2\np 3\n")


def test_normals_and_places_that_are_not_there_are_named_and_left_out(read):
    with pytest.warns(UserWarning, match="1 faces name texture coordinates that are not there"):
        mesh = read(SQUARE + "f 1/1 2/2 3/9\nf 1/1 3/3 4/4\n")
    np.testing.assert_allclose(mesh.uv[mesh.uv_faces[0, 2]], -1)
    with pytest.warns(UserWarning, match="1 faces name normals that are not there"):
        assert read(SQUARE + "f 1//1 2//2 3//3\n").normals is None


def test_opacity_is_read(read, picture, tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl m\nd 0.25\n")
    mesh = read("mtllib a.mtl\n" + SQUARE + "usemtl m\n" + FACE)
    assert mesh.alpha_mode == "BLEND"
    np.testing.assert_allclose(mesh.alpha, 0.25)


@pytest.mark.parametrize(
    "text", [SQUARE + "f 1 2 9\n", SQUARE + "f 1 2 0\n", SQUARE + "f 1 2 -9\n", SQUARE + "f 1 2 x\n", "v 1 2\n" + FACE]
)
def test_what_is_damaged_is_refused_in_one_line(text, read):
    with pytest.raises(ValueError, match="cannot be read as a mesh") as caught:
        read(text)
    assert "\n" not in str(caught.value)
