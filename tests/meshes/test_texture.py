"""UV maps: islands that do not overlap and come back the same, and padding that only adds."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from distill3d.meshes.mesh import Mesh
from distill3d.meshes.texture import pad_islands, paint_texels, rasterize_uv, unwrap, usable_uv, uv_problem


@pytest.fixture(scope="module")
def ball():
    mesh = trimesh.creation.icosphere(subdivisions=3)
    return Mesh(np.array(mesh.vertices), np.array(mesh.faces))


@pytest.fixture(scope="module")
def mapped(ball):
    uv, uv_faces = unwrap(ball, size=256)
    return ball.with_texture(np.zeros((256, 256, 3), np.uint8), uv, uv_faces)


def area_of(points, faces):
    a, b, c = (points[faces[:, i]] for i in range(3))
    return 0.5 * ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])


def test_a_map_names_each_corner_and_nearly_keeps_angles_and_areas(mapped):
    assert mapped.uv_faces.shape == mapped.faces.shape
    assert mapped.uv.min() >= 0 and mapped.uv.max() <= 1
    flat = np.abs(area_of(mapped.uv, mapped.uv_faces))
    solid = trimesh.Trimesh(mapped.vertices, mapped.faces, process=False).area_faces
    ratio = flat / solid
    assert ratio.min() > 0.3 * np.median(ratio) and ratio.max() < 3 * np.median(ratio)


def test_the_same_mesh_gives_the_same_map(ball, mapped):
    uv, uv_faces = unwrap(ball, size=256)
    np.testing.assert_array_equal(uv, mapped.uv)
    np.testing.assert_array_equal(uv_faces, mapped.uv_faces)


@pytest.mark.parametrize(("scale", "center"), [(2.0**-20, 0.0), (2.0**70, 0.0), (1.0, 2.0**22)])
def test_the_map_does_not_depend_on_the_unit_or_the_place(scale, center, ball, mapped):
    uv, uv_faces = unwrap(replace(ball, vertices=ball.vertices * scale + center), size=256)
    flat, other = (np.abs(area_of(*of)) for of in ((uv, uv_faces), (mapped.uv, mapped.uv_faces)))
    assert uv_problem(replace(ball, uv=uv, uv_faces=uv_faces)) is None
    np.testing.assert_allclose(flat / flat.sum(), other / other.sum(), atol=1e-4)


def test_no_time_is_one_line_and_not_a_wait(ball, monkeypatch):
    monkeypatch.setattr("distill3d.meshes.texture.LIMIT", (0.01, 0.0))
    with pytest.raises(ValueError, match="no UV map was found in 0 s"):
        unwrap(ball, 64)


def test_opacity_is_painted_as_a_fourth_channel(mapped):
    texture = paint_texels(mapped.uv, mapped.uv_faces, 64, lambda face, weights: np.full((len(face), 4), 9, np.uint8))
    np.testing.assert_array_equal(texture, np.full((64, 64, 4), 9, np.uint8))


def test_texels_cover_the_islands_once(mapped):
    size = 256
    face, weights = rasterize_uv(mapped.uv, mapped.uv_faces, size)
    covered = face >= 0
    # As many texel centers as the islands are large: fewer were holes, and overlapping islands would hide each other.
    island = np.abs(area_of(mapped.uv, mapped.uv_faces)).sum() * size * size
    assert covered.sum() == pytest.approx(island, rel=0.01)
    np.testing.assert_allclose(weights[covered].sum(1), 1, atol=1e-9)
    assert weights[covered].min() > -1e-9 and not weights[~covered].any()
    # The weights lead back to the texel's own center.
    place = (weights[covered][:, :, None] * mapped.uv[mapped.uv_faces[face[covered]]]).sum(1)
    row, column = covered.nonzero()
    np.testing.assert_allclose(place, np.stack(((column + 0.5) / size, 1 - (row + 0.5) / size), 1), atol=1e-9)


def test_rasterizing_agrees_with_a_test_of_every_texel():
    rng = np.random.default_rng(0)
    uv, faces = rng.random((12, 2)), np.arange(12).reshape(4, 3)  # overlapping, of either winding
    face, _ = rasterize_uv(uv, faces, 40)
    center = (np.arange(40) + 0.5) / 40
    point = np.stack(np.meshgrid(center, 1 - center), axis=-1)  # [row, column, uv]
    expected = np.full((40, 40), -1)
    for number, corners in enumerate(uv[faces]):
        to = corners[:, None, None] - point
        cross = [np.cross(np.pad(to[i], [(0, 0)] * 2 + [(0, 1)]), np.pad(to[i - 2], [(0, 0)] * 2 + [(0, 1)]))[..., 2]
                 for i in range(3)]  # fmt: skip
        inside = np.stack(cross)
        expected[(inside >= 0).all(0) | (inside <= 0).all(0)] = number
    np.testing.assert_array_equal(face, expected)


def test_neighboring_faces_leave_no_gap():
    rng = np.random.default_rng(1)
    uv = rng.random((60, 2))
    from scipy.spatial import Delaunay

    hull = Delaunay(np.concatenate((uv, [[0, 0], [0, 1], [1, 0], [1, 1]])))
    face, _ = rasterize_uv(hull.points, hull.simplices, 64)
    assert (face >= 0).all()


@pytest.mark.parametrize("band", [1, 96 * 7, 96 * 96])
def test_painting_band_by_band_is_painting_at_once(mapped, band, monkeypatch):
    monkeypatch.setattr("distill3d.meshes.texture.BAND", band)
    size, asked = 96, []

    def colors(face, weights):
        asked.append(len(face))
        return np.stack((face % 256, weights[:, 0] * 255, weights[:, 1] * 255), 1).round().astype(np.uint8)

    face, weights = rasterize_uv(mapped.uv, mapped.uv_faces, size)
    covered = face >= 0
    whole = np.zeros((size, size, 3), np.uint8)
    whole[covered] = colors(face[covered], weights[covered])
    asked.clear()
    painted = paint_texels(mapped.uv, mapped.uv_faces, size, colors)
    np.testing.assert_array_equal(painted, pad_islands(whole, covered))
    assert max(asked) <= max(band, size) and sum(asked) == covered.sum()


def test_padding_keeps_what_is_there_and_takes_the_nearest():
    texture = np.zeros((5, 8, 3), np.uint8)
    covered = np.zeros((5, 8), bool)
    texture[2, 1], texture[2, 6] = 10, 200
    covered[2, [1, 6]] = True
    padded = pad_islands(texture, covered)
    assert (padded[:, :4] == 10).all() and (padded[:, 4:] == 200).all()
    full = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    np.testing.assert_array_equal(pad_islands(full, np.ones((4, 4), bool)), full)
    np.testing.assert_array_equal(pad_islands(full, np.zeros((4, 4), bool)), full)


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
        (lambda uv: uv * 2 - 0.5, "it reaches beyond the texture"),
        (lambda uv: np.abs(uv - 0.5), "its islands overlap"),  # mirrored halves share their texels
        (lambda uv: uv * [1, 0], "it leaves faces without any place in the texture"),
        (lambda uv: uv * np.nan, "it reaches beyond the texture"),
    ],
)
def test_maps_that_cannot_be_painted_are_found_and_made_anew(change, problem):
    vertices, faces = grid()
    mesh = Mesh(vertices, faces, uv=change(vertices[:, :2]), uv_faces=faces)
    assert uv_problem(mesh) == problem
    uv, uv_faces, why = usable_uv(mesh, 64)
    assert why == problem and uv.min() >= 0 and uv.max() <= 1 and uv_faces.shape == mesh.faces.shape
    if problem is None:
        np.testing.assert_allclose(uv[uv_faces], vertices[faces][..., :2], atol=1e-6)


def test_mistakes_are_value_errors(ball, mapped):
    with pytest.raises(ValueError, match=r"got 9000; 1024 is usual"):
        unwrap(ball, 9000)
    with pytest.raises(ValueError, match=r"got 0; 1024 is usual"):
        paint_texels(mapped.uv, mapped.uv_faces, 0, lambda face, weights: face)
