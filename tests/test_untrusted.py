"""What comes from outside is read within limits, and shown without being obeyed."""

import csv
import io
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from distill3d.untrusted import csv_text, printable, read_image_file, read_npz, read_text


def test_a_text_is_read_up_to_a_number_of_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffgrün".encode())
    assert read_text(tmp_path / "a.txt", 8) == "grün"
    with pytest.raises(ValueError, match=r"a\.txt has more than 7 bytes"):
        read_text(tmp_path / "a.txt", 7)
    with pytest.raises(ValueError, match="/dev/zero has more than 1,000 bytes"):
        read_text("/dev/zero", 1000)
    (tmp_path / "a.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(tmp_path / "a.txt")


def test_what_a_terminal_would_obey_is_shown_instead():
    assert (
        printable("a\x1b[31m\rb\x9b\u202e\udcff\x00\ttab\nline") == "a\\x1b[31m\\rb\\x9b\\u202e\\udcff\\x00\ttab\nline"
    )
    assert printable("a\x1b[31m\rb\x9b\u202e\udcff\x00") == "a\\x1b[31m\\rb\\x9b\\u202e\\udcff\\x00"
    assert printable("\ttab\nline") == "\ttab\nline"
    assert printable("grün 日本 👩‍🚀 ± é") == "grün 日本 👩‍🚀 ± é"


def png_of(width, height):
    """A whole PNG that declares a size; its pixels are at most a few."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(min(width, 9) + 1))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (30000, 30000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_counted_before_they_are_decoded(width, height):
    tracemalloc.start()
    match = "it has 8193 x 8192 pixels, more than 67,108,864" if width == 8193 else "more than|decompression bomb"
    with pytest.raises(ValueError, match=match):
        read_image_file(io.BytesIO(png_of(width, height)))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert read_image_file(io.BytesIO(png_of(4, 1))).size == (4, 1)


def test_only_formats_that_are_allowed_are_decoded():
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "BMP")
    with pytest.raises(ValueError, match=r"no kind that can be decoded \(PNG, JPEG, WEBP\)"):
        read_image_file(data)
    assert read_image_file(data, ("BMP",)).size == (4, 4)
    postscript = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="no kind"):  # it would be run by a program of its own
        read_image_file(postscript)


def test_arrays_that_are_not_what_they_declare_take_no_memory(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(5), b=np.ones((2, 3)))
    found = read_npz(tmp_path / "a.npz")
    assert found["a"].tolist() == [0, 1, 2, 3, 4] and found["b"].shape == (2, 3)
    with pytest.raises(ValueError, match="more than 100"):
        read_npz(tmp_path / "a.npz", 100)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    for name, data in (("long", head.getvalue()), ("short", b"\x93NUMPY\x01"), ("text", b"no array")):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            archive.writestr("a.npy", data)
        with pytest.raises(ValueError, match=f"{name}.npz cannot be read: "):
            read_npz(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match=r"cannot be read"):
        read_npz(tmp_path / "pickle.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(10**7))
    with pytest.raises(ValueError, match="10,000,000 bytes, more than 1,000,000"):
        read_npz(tmp_path / "bomb.npz", 10**6)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_no_cell_of_a_table_is_a_formula(start):
    """Whatever a spreadsheet would compute begins with one of these; numbers stay numbers."""
    (row,) = csv.reader(io.StringIO(csv_text([[f"{start}cmd|' /C calc'!A0", "-0.5", -0.5, None, "a\x1b\r=b"]])))
    assert row == [f"'{start}cmd|' /C calc'!A0", "-0.5", "-0.5", "", "a\\x1b\\r=b"]
