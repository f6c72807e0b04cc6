"""PLY files of other programs: strips, polygons, and colors under any name and type."""

import numpy as np
import pytest
from PIL import Image
from plyfile import PlyData, PlyElement

from distill3d.meshes.files import read_mesh

SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0.0]])
QUAD = [[0, 1, 2, 3]]


@pytest.fixture
def read(tmp_path):
    """Writes elements to a file and reads it; columns are given by name."""

    def read(vertex=None, polygons=QUAD, face=None, name="vertex_indices", element="face", text=False, comments=()):
        columns = dict(zip("xyz", SQUARE.T, strict=True)) | (vertex or {})
        rows = np.array(
            list(zip(*columns.values(), strict=True)), [(n, np.asarray(c).dtype) for n, c in columns.items()]
        )
        lists = {name: polygons, **(face or {})}
        kinds = [(n, "O" if isinstance(c, list) else c.dtype) for n, c in lists.items()]
        faces = np.empty(len(polygons), kinds)
        for n, values in lists.items():
            for i, value in enumerate(values):
                faces[n][i] = np.asarray(value, "i4" if n == name else "f4") if isinstance(values, list) else value
        kind = {n: ("i4" if n == name else "f4") for n, c in lists.items() if isinstance(c, list)}
        described = [PlyElement.describe(rows, "vertex"), PlyElement.describe(faces, element, val_types=kind)]
        PlyData(described, text=text, comments=list(comments)).write(str(tmp_path / "a.ply"))
        return read_mesh(tmp_path / "a.ply", up="z")

    return read


def area(mesh):
    a, b, c = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    return np.cross(b - a, c - a).sum(0) / 2


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("name", ["vertex_indices", "vertex_index"])
def test_polygons_of_mixed_size_are_read(text, name, read):
    np.testing.assert_allclose(area(read(text=text, name=name, polygons=[[0, 1, 2], [0, 2, 3]])), [0, 0, 4])
    np.testing.assert_allclose(area(read(text=text, name=name)), [0, 0, 4])
    with pytest.warns(UserWarning, match="1 faces of less than three corners"):
        np.testing.assert_allclose(area(read(text=text, name=name, polygons=[[0, 1], *QUAD])), [0, 0, 4])


@pytest.mark.parametrize(("strip", "faces"), [([0, 1, 3, 2], 2), ([0, 1, 3, -1, 1, 2, 3], 2), ([0, 1, 3, 3, 2, 2], 1)])
def test_strips_are_read(strip, faces, read):
    mesh = read(polygons=[strip], element="tristrips")
    assert len(mesh.faces) == faces
    np.testing.assert_allclose(area(mesh), [0, 0, 2 * faces])


@pytest.mark.parametrize(
    "names", ["red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue", "Red Green Blue"]
)
@pytest.mark.parametrize(("kind", "most"), [("u1", 255), ("u2", 65535), ("i4", 255), ("f4", 1), ("f8", 255)])
def test_colors_have_many_names_and_types(names, kind, most, read):
    value = np.array([[0, 0.2, 1], [1, 0.4, 0], [0, 0, 0], [1, 1, 1]])
    columns = dict(zip(names.split(), (value * most).T.astype(kind), strict=True))
    np.testing.assert_allclose(read(columns).vertex_colors, value, atol=1e-4)


@pytest.mark.parametrize("polygons", [[[0, 1, 2], [0, 2, 3]], [[0, 1, 2, 3], [0, 2, 3]]])
def test_colors_of_faces_stay_on_their_faces(polygons, read):
    face = {name: np.array(value, "u1") for name, value in (("red", [255, 0]), ("green", [0, 0]), ("blue", [0, 255]))}
    mesh = read(polygons=polygons, face=face)
    expected = np.zeros((len(mesh.faces), 3, 3))
    expected[:-1, :, 0] = expected[-1, :, 2] = 1
    np.testing.assert_allclose(mesh.corner_colors(), expected)


def test_opacity_is_read_unless_it_says_nothing(read):
    colors = {name: np.full(4, 255, "u1") for name in ("red", "green", "blue")}
    assert read(colors | {"alpha": np.full(4, 0, "u1")}).alpha_mode == "OPAQUE"
    mesh = read(colors | {"alpha": np.array([0, 51, 255, 255], "u1")})
    np.testing.assert_allclose(mesh.alpha, [0, 0.2, 1, 1])


@pytest.mark.parametrize("corners", [True, False])
def test_a_picture_lies_on_vertices_or_on_corners(corners, read, tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4, 0] = pixels[:, 4:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "t.png")
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], "f4")
    vertex = {} if corners else {"s": uv[:, 0], "t": uv[:, 1]}
    face = {"texcoord": [uv.reshape(-1).tolist()]} if corners else None
    mesh = read(vertex, face=face, comments=["TextureFile t.png"])
    found = mesh.colors(np.array([1, 0]), np.array([[0.1, 0.1, 0.8], [0.1, 0.8, 0.1]]))
    np.testing.assert_allclose(found, [[1, 0, 0], [0, 0, 1]], atol=1e-6)
    with pytest.warns(UserWarning, match=r"no image 'gone\.png'"):
        assert not read(vertex, face=face, comments=["TextureFile gone.png"]).textures
