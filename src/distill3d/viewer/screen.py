"""The page in the browser: a viser server, its clients and their cameras. viser is imported here only."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from distill3d.cameras import DISTANCE, ELEVATION, FOV, orbit
from distill3d.viewer.gate import MARK, Address, Gate
from distill3d.viewer.pictures import Eye

if TYPE_CHECKING:
    from viser import ClientHandle, ViserServer

INSTALL = "the viewer needs viser: type pip install 'distill3d[viewer]'"
BLANK = np.full((1, 1, 3), 230, dtype=np.uint8)  # gray behind the object, as in our renders
FRONT = 30.0  # azimuth from which a client first looks, degrees


class Screen:
    """A viser server behind a gate. Clients come and go at any time."""

    def __init__(self, address: Address, label: str) -> None:
        """Opens it.

        Raises:
            ImportError: where viser is not installed, with what to type.
            ValueError: for a port in use.
        """
        try:
            import viser
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "viser":
                raise
            raise ImportError(INSTALL, name="viser") from None
        with contextlib.redirect_stdout(io.StringIO()):  # its own address, which is behind the gate
            self.server: ViserServer = viser.ViserServer("127.0.0.1", 0, label=label, verbose=False)
        self.server.request_share_url = lambda verbose=True: None  # it would open the page to the whole Internet
        try:
            self.gate = Gate(address, self.server.get_port(), self.server.get_event_loop())
        except ValueError:
            self._stop()
            raise
        self._refuse_others()
        self.url = address.url(self.gate.port)
        self.clear()

    def _refuse_others(self) -> None:
        """Closes websockets that did not come through the gate. viser has no public place for such a check."""
        inner = self.server._websock_server

        async def check(client) -> None:
            connection = inner._live_connections[client.client_id]
            if connection.request is None or connection.request.headers.get(MARK) != self.gate.secret:
                await connection.close(1008)

        inner.on_client_connect(check)

    def clear(self) -> None:
        """An empty page with the camera in front of the object."""
        server = self.server
        server.gui.reset()
        server.scene.reset()
        server.gui.configure_theme(show_logo=False, show_share_button=False, control_width="large")
        server.gui.main_panel.dock_right()
        server.scene.world_axes.visible = False
        server.scene.set_background_image(BLANK)
        eye = orbit(FRONT, ELEVATION, DISTANCE, FOV).camera_to_world[0, :3, 3].numpy()
        server.initial_camera.position = eye
        server.initial_camera.look_at = np.zeros(3)
        server.initial_camera.fov = float(np.deg2rad(FOV))

    def eyes(self) -> list[Eye]:
        """From where the clients look, those that are ready."""
        seen = [eye_of(client) for client in self.server.get_clients().values()]
        return [eye for eye in seen if eye is not None]

    def send(self, client: int, image: UInt8[Tensor, "h w 3"]) -> None:
        """Shows a picture behind the scene of a client, if it is still there."""
        handle = self.server.get_clients().get(client)
        if handle is not None:
            handle.scene.set_background_image(image.numpy(), format="jpeg", jpeg_quality=85)

    def blank(self) -> None:
        """Takes the pictures of all clients away."""
        for handle in self.server.get_clients().values():
            handle.scene.set_background_image(BLANK)

    def notify(self, client: int | None, title: str, text: str) -> None:
        """Shows a message to a client, or to all."""
        clients = self.server.get_clients()
        for handle in clients.values() if client is None else filter(None, [clients.get(client)]):
            handle.add_notification(title, text, auto_close_seconds=8.0)

    def download(self, client: int, name: str, content: bytes) -> None:
        """Gives a client a file."""
        handle = self.server.get_clients().get(client)
        if handle is not None:
            handle.send_file_download(name, content, save_immediately=True)

    def close(self) -> None:
        """Ends the server; the pages of clients say so."""
        self.gate.close()
        self._stop()

    def _stop(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.server.stop()


def eye_of(client: ClientHandle) -> Eye | None:
    """From where a client looks; None before its canvas has a size."""
    camera = client.camera
    width, height = camera.image_width, camera.image_height
    w, x, y, z = (float(value) for value in camera.wxyz)
    if width < 1 or height < 1:
        return None
    rotation = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    pose = torch.eye(4)
    pose[:3, :3] = rotation * torch.tensor([1.0, -1.0, -1.0])  # viser's cameras look along +z, with y down
    pose[:3, 3] = torch.tensor(camera.position, dtype=torch.float32)
    return Eye(client.client_id, pose, float(camera.fov), width, height, camera.update_timestamp)
