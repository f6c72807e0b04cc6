"""Files that declare more than they should: refused in one line before memory is taken."""

import base64
import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from distill3d.meshes.files import read_mesh, save_mesh
from distill3d.meshes.mesh import MOST, Mesh

TRIANGLE = Mesh(np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]]))


def refused(path, match):
    tracemalloc.start()
    with pytest.raises(ValueError, match=match) as caught:
        read_mesh(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and peak < 20e6
    return str(caught.value)


def gltf(tmp_path, image=None, **accessor):
    """A triangle in glTF, with changes to its accessor of positions, or an image."""
    positions = TRIANGLE.vertices.astype("<f4").tobytes()
    tree = {
        "asset": {"version": "2.0"},
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 3} | accessor,
            {"bufferView": 0, "componentType": 5126, "type": "VEC2", "count": 3},
        ],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": 36, "uri": f"data:;base64,{base64.b64encode(positions).decode()}"}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}} if image else {}],
    }
    if image:
        tree |= {"textures": [{"source": 0}], "images": [{"uri": f"data:;base64,{base64.b64encode(image).decode()}"}]}
    path = tmp_path / "a.gltf"
    path.write_text(json.dumps(tree))
    return path


def test_counts_are_compared_before_memory_is_taken(tmp_path):
    path = gltf(tmp_path, count=10**12)
    path.write_text(path.read_text().replace('"bufferView": 0, ', "", 1))  # zeros, as for a sparse one
    refused(path, f"has 1,000,000,000,000 values; meshes of up to {MOST:,}")
    for kind in ("ascii", "binary_little_endian"):
        ply = tmp_path / "a.ply"
        lines = [f"format {kind} 1.0", "element vertex 4000000000", "property double x", "property double y"]
        ply.write_text("\n".join(["ply", *lines, "property double z", "end_header", "0 0 0", ""]))
        refused(ply, "has 4,000,000,000 vertex")
    with pytest.raises(ValueError, match=f"up to {MOST:,}"):
        Mesh(TRIANGLE.vertices, np.broadcast_to(TRIANGLE.faces, (MOST + 1, 3)))


def test_instances_of_instances_do_not_multiply_without_end(tmp_path, monkeypatch):
    path = gltf(tmp_path)
    path.write_text(path.read_text().replace('[{"mesh": 0}]', str([{"mesh": 0}] * 4).replace("'", '"')))
    assert len(read_mesh(path).faces) == 4
    monkeypatch.setattr("distill3d.meshes.mesh.MOST", 3)
    refused(path, "has 4 faces")


def test_a_file_of_arrays_is_as_long_as_it_says(tmp_path):
    save_mesh(tmp_path / "a.npz", TRIANGLE)
    assert len(read_mesh(tmp_path / "a.npz").faces) == 1
    for name, values in {"faces": [[0.0, 1.0, 2.0]], "vertices": [["a", "b", "c"]] * 3, "more": [1.0]}.items():
        arrays = {"vertices": TRIANGLE.vertices, "faces": TRIANGLE.faces} | {name: np.array(values)}
        np.savez(tmp_path / "b.npz", **arrays)
        refused(tmp_path / "b.npz", "b.npz: ")


def test_a_concave_face_of_many_corners_is_not_cut(tmp_path):
    angle = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    radius = 1 + 0.5 * (np.arange(3000) % 2)
    lines = [f"v {r * np.cos(a)} {r * np.sin(a)} 0" for r, a in zip(radius, angle, strict=True)]
    lines.append("f " + " ".join(map(str, range(1, 3001))))
    (tmp_path / "a.obj").write_text("\n".join(lines))
    refused(tmp_path / "a.obj", "concave face has 3000 corners, more than 1000")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_images_in_gltf_are_png_jpeg_or_webp(kind, tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 0, 0)).save(data, kind)
    path = gltf(tmp_path, data.getvalue())
    if kind in ("PNG", "JPEG", "WEBP"):
        assert len(read_mesh(path).textures) == 1
    else:
        with pytest.warns(UserWarning, match=r"no kind that can be decoded \(PNG, JPEG, WEBP\)"):
            assert not read_mesh(path).textures
