"""The scene as each client sees it: which picture is due, at which resolution, and the picture itself.

A client whose camera moves gets small pictures fast, one whose camera rests gets a larger one. How long a picture takes
is learned from those before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distill3d.cameras import BACKGROUND, project
from distill3d.render.maps import geometry_image
from distill3d.types import Cameras, Rendering, Scene

Map = Literal["color", "normals", "opacity", "depth"]
MAPS: tuple[Map, ...] = ("color", "normals", "opacity", "depth")
EMPTY: dict[Map, tuple[float, ...]] = {  # what is shown beside the object
    "color": (BACKGROUND,) * 3,
    "normals": (0.5, 0.5, 1.0),
    "opacity": (0.0,) * 3,
    "depth": (0.0,) * 3,
}
ROWS = (48, 64, 96, 128, 192, 256, 384, 512, 768)  # heights of pictures
MOVING, RESTING = 0.06, 0.4  # seconds that a picture may take while the camera moves, and at rest
STILL = 0.3  # seconds without movement after which a camera rests
REACH = 0.95  # radius that objects stay within, world units


@dataclass(frozen=True)
class Eye:
    """From where one client looks at the scene."""

    client: int
    camera_to_world: Float[Tensor, "4 4"]  # OpenGL, as everywhere
    fov_y: float  # radians
    width: int  # of the client's canvas, pixels
    height: int
    moved: float  # when it last moved, in seconds of time.time()

    @property
    def pose(self) -> tuple[float, ...]:
        """Everything that decides the picture."""
        return (*self.camera_to_world.flatten().tolist(), self.fov_y, float(self.width), float(self.height))

    def cameras(self, widened: float = 1.0, device: torch.device | str = "cpu") -> Cameras:
        """One camera, its field of view widened by a factor of the image plane."""
        fov = 2 * math.atan(math.tan(self.fov_y / 2) * widened)
        return Cameras.from_poses(self.camera_to_world, math.degrees(fov)).to(device)


@torch.no_grad()
def picture(scene: Scene, eye: Eye, rows: int, shown: Map) -> UInt8[Tensor, "h w 3"]:
    """The scene on the client's canvas, `rows` pixels high.

    Scenes render squares: the one in the middle of the canvas where the object fits into it, else one as wide as the
    canvas, of which the middle is cut out.
    """
    device = next((p.device for group in scene.parameter_groups() for p in group["params"]), torch.device("cpu"))
    columns = max(1, round(rows * eye.width / eye.height))
    square = rows if columns <= rows or _fits(eye) else columns
    cameras = eye.cameras(square / rows, device)
    behind = torch.tensor([EMPTY["color"]], device=device)
    image = _mapped(scene.render(cameras, square, behind, normals=shown == "normals"), cameras, shown)[0]
    top, left = (square - rows) // 2, max(0, (square - columns) // 2)
    image = image[:, top : top + rows, left : left + columns]
    canvas = torch.tensor(EMPTY[shown], device=device)[:, None, None].repeat(1, rows, columns)
    left = (columns - image.shape[2]) // 2
    canvas[:, :, left : left + image.shape[2]] = image
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()


def _fits(eye: Eye) -> bool:
    """Whether the middle square of the canvas shows everything up to `REACH` from the origin."""
    cameras = eye.cameras()
    right, up = eye.camera_to_world[:3, 0], eye.camera_to_world[:3, 1]
    distance = float(eye.camera_to_world[:3, 3].norm())
    if distance <= REACH:
        return False
    reach = REACH / math.sqrt(1 - (REACH / distance) ** 2)  # of the ball's outline
    pixels, depth = project(cameras, reach * torch.stack((right, -right, up, -up)), 2, 2)
    return bool((depth > 0).all() and (pixels[..., 0] >= 0).all() and (pixels[..., 0] <= 2).all())


def _mapped(rendering: Rendering, cameras: Cameras, shown: Map) -> Tensor:
    if shown == "color":
        return rendering.rgb
    if shown == "opacity":
        return rendering.opacity.expand(-1, 3, -1, -1)
    return geometry_image(rendering, cameras.camera_to_world, "normal" if shown == "normals" else "depth")


@dataclass(frozen=True)
class _Sent:
    pose: tuple[float, ...]
    shown: Map
    version: int
    rows: int
    at: float


class Painter:
    """Makes the pictures of all clients, one at a time, the most urgent one first."""

    def __init__(self, send: Callable[[int, UInt8[Tensor, "h w 3"]], None], clock: Callable[[], float] = time.time):
        """`send` is given a client's number and its picture; `clock` is that of `Eye.moved`."""
        self.send, self.clock = send, clock
        self.frames = 0  # sent so far
        self._second_per_pixel: dict[Map, float] = {}
        self._sent: dict[int, _Sent] = {}

    def paint(
        self, scene: Scene, eyes: Sequence[Eye], version: int, shown: Map, allowance: float, most: float = math.inf
    ) -> bool:
        """Makes and sends the next picture that is due, if it is expected to take no longer than `allowance` seconds.

        Args:
            version: of the scene; a picture of an older one is due again.
            most: seconds that can ever be allowed.

        Returns:
            whether there was one.
        """
        self._sent = {eye.client: self._sent[eye.client] for eye in eyes if eye.client in self._sent}
        for eye in sorted(eyes, key=self._waits):
            rows = self._due(eye, version, shown, allowance, most)
            if rows:
                began = time.perf_counter()
                self.send(eye.client, picture(scene, eye, rows, shown))
                self._learn(shown, rows, time.perf_counter() - began)
                self._sent[eye.client] = _Sent(eye.pose, shown, version, rows, self.clock())
                self.frames += 1
                return True
        return False

    def _waits(self, eye: Eye) -> tuple[bool, float]:
        """Sorts clients: those that wait for another view first, then those whose picture is oldest."""
        sent = self._sent.get(eye.client)
        return (sent is not None and sent.pose == eye.pose, sent.at if sent else 0.0)

    def _due(self, eye: Eye, version: int, shown: Map, allowance: float, most: float) -> int:
        """The height of the picture that a client is to get now; 0 for none."""
        sent = self._sent.get(eye.client)
        another = sent is None or (sent.pose, sent.shown) != (eye.pose, shown)
        if another or self.clock() - eye.moved < STILL:
            if not another and sent is not None and sent.version == version:
                return 0
            rows = self._affordable(eye, shown, min(allowance, MOVING))
            return rows or (ROWS[0] if allowance >= min(most, self._cost(shown, ROWS[0])) else 0)
        assert sent is not None
        goal = self._affordable(eye, shown, min(most, RESTING)) or ROWS[0]
        if (sent.version, sent.rows) == (version, goal):
            return 0
        return goal if allowance >= min(most, self._cost(shown, goal)) else 0

    def _affordable(self, eye: Eye, shown: Map, seconds: float) -> int:
        rows = [rows for rows in ROWS if rows <= max(eye.height, ROWS[0]) and self._cost(shown, rows) <= seconds]
        return max(rows, default=0)

    def _cost(self, shown: Map, rows: int) -> float:
        """Expected seconds; a first picture is small."""
        known = self._second_per_pixel.get(shown)
        return (0.0 if rows == ROWS[0] else math.inf) if known is None else known * rows**2

    def _learn(self, shown: Map, rows: int, seconds: float) -> None:
        found = seconds / rows**2
        known = self._second_per_pixel.get(shown, found)
        self._second_per_pixel[shown] = 0.5 * (known + found)
