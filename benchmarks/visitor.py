"""A client of the viewer without a browser: it says where its camera is, and counts the pictures that it is sent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import viser
import zstandard
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from distill3d.cameras import orbit


class Visitor:
    """Connects and keeps reading, in a thread of its own."""

    def __init__(self, port: int, token: str | None = None, size: tuple[int, int] = (320, 240)) -> None:
        query = f"/?token={token}" if token else ""
        protocols: Any = [f"viser-v{viser.__version__}"]
        self.socket = connect(f"ws://127.0.0.1:{port}{query}", subprotocols=protocols, max_size=None, compression=None)
        self.size, self.pictures, self.messages = size, 0, []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        with contextlib.suppress(ConnectionClosed):
            self.look(30.0)

    def look(self, azimuth: float, elevation: float = 15.0, distance: float = 2.8, fov: float = 40.0) -> None:
        """Looks at the origin from there; angles in degrees."""
        cameras = orbit(azimuth, elevation, distance, fov)
        pose = cameras.camera_to_world[0]
        w, x, y, z = quaternion((pose[:3, :3] * pose.new_tensor([1.0, -1.0, -1.0])).tolist())
        message = {
            "type": "ViewerCameraMessage", "wxyz": [w, x, y, z], "position": pose[:3, 3].tolist(),
            "fov": float(cameras.fov_y[0]), "near": 0.01, "far": 100.0, "image_height": self.size[1],
            "image_width": self.size[0], "look_at": [0.0, 0.0, 0.0], "up_direction": [0.0, 0.0, 1.0],
        }  # fmt: skip
        self.socket.send(msgspec.msgpack.encode(message))

    def vanish(self) -> None:
        """Cuts the connection without a word."""
        self.socket.socket.shutdown(2)
        self._thread.join(10)

    def close(self) -> None:
        """Leaves."""
        self.socket.close()

    def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            while True:
                data = self.socket.recv()
                assert isinstance(data, bytes)
                length = int.from_bytes(data[8:16], "little")
                content = zstandard.ZstdDecompressor().decompress(
                    data[16 : 16 + length], max_output_size=int.from_bytes(data[:8], "little")
                )
                for message in msgspec.msgpack.decode(content)["messages"]:
                    self.pictures += message["type"] == "BackgroundImageMessage"
                    self.messages.append(message)


def quaternion(rotation: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """(w, x, y, z) of a rotation matrix, by the largest of the four (Shepperd 1978)."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    squares = (1 + a + e + i, 1 + a - e - i, 1 - a + e - i, 1 - a - e + i)
    n = max(range(4), key=squares.__getitem__)
    s = 2 * squares[n] ** 0.5
    rows = (
        (s / 4, (h - f) / s, (c - g) / s, (d - b) / s),
        ((h - f) / s, s / 4, (b + d) / s, (c + g) / s),
        ((c - g) / s, (b + d) / s, s / 4, (f + h) / s),
        ((d - b) / s, (c + g) / s, (f + h) / s, s / 4),
    )
    return rows[n]
