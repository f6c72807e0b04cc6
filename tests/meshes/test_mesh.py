"""The one mesh type: what it refuses, its normals and colors, points on it, and its place in a scene."""

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import trimesh

from distill3d.meshes.mesh import Mesh, faces_per_edge, place, placed, sample_texture, weld


def of(solid, **more):
    return Mesh(np.array(solid.vertices), np.array(solid.faces), **more)


def soup(mesh):
    """Corners [F, 3, 3], whatever the numbering of the vertices."""
    return mesh.vertices[mesh.faces]


def textured(**changes):
    """A triangle in the lower left half of a texture of 2 x 2 texels, and one that repeats it from outside."""
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    texture = np.array([[[0, 0, 0], [60, 0, 0]], [[0, 120, 0], [0, 0, 240]]], np.uint8)
    uv = np.array([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [1.25, -0.75]])
    faces = np.array([[0, 1, 2], [1, 3, 2]])
    return Mesh(vertices, faces, **{"uv": uv, "uv_faces": faces, "textures": (texture,)} | changes)


def test_colors_are_those_of_texels_times_those_of_vertices():
    corner, faces = np.eye(3), np.array([0, 0, 0])
    expected = np.array([[0, 120, 0], [0, 0, 240], [0, 0, 0]]) / 255
    np.testing.assert_allclose(textured().colors(faces, corner), expected)
    np.testing.assert_allclose(textured().colors(np.array([1]), corner[1:2]), [[0, 120 / 255, 0]])  # [0.25, 0.25]
    half = np.full((4, 3), 0.5)
    np.testing.assert_allclose(textured(vertex_colors=half).colors(faces, corner), expected / 2)
    bare = textured(vertex_colors=half, texture_of=np.array([-1, 0]))
    np.testing.assert_allclose(bare.colors(faces, corner), half[:3])
    np.testing.assert_allclose(textured(textures=()).corner_colors(), 1)


def test_vertex_colors_are_the_mean_of_their_corners():
    painted = textured().with_vertex_colors()
    assert not painted.textures and painted.uv is None
    np.testing.assert_allclose(painted.vertex_colors[0], [0, 120 / 255, 0])
    corners = textured().corner_colors()
    np.testing.assert_allclose(painted.vertex_colors[1], (corners[0, 1] + corners[1, 0]) / 2)


def test_textures_are_sampled_at_texel_centers_and_between():
    texture = np.arange(12.0).reshape(2, 2, 3)
    centers = np.array([[0.25, 0.75], [0.75, 0.75], [0.25, 0.25], [0.75, 0.25]])  # row 0 is the top
    np.testing.assert_allclose(sample_texture(texture, centers), texture.reshape(4, 3))
    np.testing.assert_allclose(sample_texture(texture, np.array([[0.5, 0.5]])), texture.mean((0, 1))[None])
    np.testing.assert_allclose(sample_texture(texture, np.array([[0.0, 1.0]])), texture[:1, 0])


def test_own_normals_are_kept():
    box = of(trimesh.creation.box())
    up = np.tile([0.0, 0.0, 2.0], (8, 1))
    np.testing.assert_allclose(replace(box, normals=up).vertex_normals(), up / 2)


def test_normals_point_outwards_and_are_unit_where_there_is_no_area():
    ball = of(trimesh.creation.icosphere(3))
    np.testing.assert_allclose(ball.vertex_normals(), ball.vertices, atol=0.01)
    lonely = Mesh(np.concatenate((ball.vertices, [[3.0, 0, 0]])), ball.faces)
    np.testing.assert_array_equal(lonely.vertex_normals()[-1], [0, 0, 1])


def test_placing_touches_the_sphere_and_can_be_undone():
    mesh = of(trimesh.creation.box((10, 2, 3)).apply_translation([100, 0, 7]))
    placement = place(mesh)
    scene = placed(mesh).vertices
    assert np.linalg.norm(scene, axis=1).max() == pytest.approx(0.9)
    np.testing.assert_allclose(scene.min(0), -scene.max(0), atol=1e-12)
    np.testing.assert_allclose(placement.to_file(scene), mesh.vertices, atol=1e-12)


def test_samples_lie_evenly_by_area():
    mesh = of(trimesh.creation.box((1, 2, 3)))
    face, weights = mesh.sample(22000)
    assert np.allclose(weights.sum(1), 1) and weights.min() >= 0
    a, b, c = soup(mesh).transpose(1, 0, 2)
    area = 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)
    np.testing.assert_allclose(np.bincount(face, minlength=12), area * 1000, atol=2)


def test_welding_joins_what_lies_at_one_place():
    box = trimesh.creation.box()
    split = soup(box).reshape(-1, 3)
    vertices, faces = weld(split, np.arange(36).reshape(-1, 3))
    assert len(vertices) == 8
    np.testing.assert_array_equal(vertices[faces], soup(box))


def test_edges_of_closed_and_open_surfaces():
    box = of(trimesh.creation.box())
    assert faces_per_edge(box).tolist() == [2] * 18
    split = Mesh(soup(box).reshape(-1, 3), np.arange(36).reshape(-1, 3))  # as files split it at seams
    assert faces_per_edge(split).tolist() == [2] * 18
    assert sorted(faces_per_edge(replace(box, faces=box.faces[1:]))) == [1] * 3 + [2] * 15


@pytest.fixture
def without_shape_checks():
    """The package as users run it: shapes of annotations are checked in tests only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faces": np.zeros((0, 3), int)}, "no faces"),
        ({"faces": np.array([[0, 1, 4], [0, 1, 2]])}, "indices from 0 to 3 into vertices"),
        ({"faces": np.zeros((2, 4), int)}, r"faces must be triangles \[F, 3\], got \[2, 4\]"),
        ({"faces": np.array([[0, 1, -1], [0, 1, 2]])}, "indices from 0 to 3 into vertices"),
        ({"vertices": np.zeros((4, 2))}, r"vertices must be \[V, 3\], got \[4, 2\]"),
        ({"vertices": np.full((4, 3), np.nan)}, "4 of 4 vertices are not finite"),
        ({"vertex_colors": np.zeros((2, 3))}, r"vertex_colors must be \[V, 3\] with V = 4"),
        ({"normals": np.zeros((4, 2))}, r"normals must be \[V, 3\]"),
        ({"uv": None}, "both uv"),
        ({"uv": None, "uv_faces": None}, "a texture needs a UV map"),
        ({"uv_faces": np.array([[0, 1, 2]])}, "a UV map must be"),
        ({"uv_faces": np.array([[0, 1, 4], [0, 1, 2]])}, "indices from 0 to 3 into uv"),
        ({"texture_of": np.array([0, 1])}, "texture_of must be below 1"),
        (
            {"textures": (np.zeros((4, 4, 1), np.uint8),)},
            r"a texture must be \[H, W, 3\] or \[H, W, 4\], got \[4, 4, 1\]",
        ),
    ],
)
def test_what_is_not_a_mesh_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(textured(), **changes)
