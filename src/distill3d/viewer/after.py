"""A run in the browser when it has ended, or stopped: its mesh, its splats, and maps that our renderer makes."""

from __future__ import annotations

import base64
import math
import queue
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import load_scene, read_config
from distill3d.scenes.gaussians import Gaussians
from distill3d.scenes.mesh import MeshScene
from distill3d.types import Scene
from distill3d.viewer.gate import Address
from distill3d.viewer.live import NAP, save_snapshot
from distill3d.viewer.panel import WIDTH, Curves, Display, Snapshot
from distill3d.viewer.pictures import Painter
from distill3d.viewer.screen import Screen

Y_UP = (0.5, 0.5, 0.5, 0.5)  # glTF to our axes: x, y, z of the file are y, z, x of the world


class AfterViewer:
    """The page of one run. `tick` has to be called again and again; it renders what clients wait for."""

    def __init__(self, folder: Path, address: Address, device: str = "cpu") -> None:
        """Opens the page.

        Raises:
            ValueError: where the folder is not a run of an object or has no checkpoint, and as `Screen` does.
            ImportError: where viser is not installed.
        """
        self.folder, self.config = folder, read_config(folder)
        self.scene, self.history = load_scene(folder, device=device), RunFolder(folder).history()
        self.snapshots: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
        self.screen = Screen(address, folder.name)
        self.painter = Painter(self.screen.send)
        self.nodes = self._add_nodes()
        self._fill_panel()
        self._chosen = ""

    def close(self) -> None:
        """Closes the page."""
        self.screen.close()

    def tick(self) -> None:
        """Shows what is chosen, and renders one picture or waits a moment."""
        while not self.snapshots.empty():
            self._snapshot(self.snapshots.get().client)
        chosen, shown = self.display.chosen, self.display.shown
        if chosen != self._chosen:
            self._chosen = chosen
            for name, node in self.nodes.items():
                node.visible = name == chosen
            if shown is None:
                self.screen.blank()
                self.painter = Painter(self.screen.send)  # every picture is gone
        if shown is None or not self.painter.paint(self.scene, self.screen.eyes(), 0, shown, math.inf):
            time.sleep(NAP)

    def _add_nodes(self) -> dict:
        """What viser draws by itself, by its name in the menu."""
        nodes, scene, mesh = {}, self.screen.server.scene, self.folder / "mesh.glb"
        if mesh.is_file():
            scale, turn, position = _place(self.scene)
            nodes["mesh"] = scene.add_glb(
                "/mesh", mesh.read_bytes(), scale=scale, wxyz=turn, position=position, cast_shadow=False
            )
        if isinstance(self.scene, Gaussians):
            nodes["splats"] = scene.add_gaussian_splats("/splats", *_splats(self.scene))
        return nodes

    def _fill_panel(self) -> None:
        gui, steps, total = self.screen.server.gui, len(self.history), self.config.recipe.steps
        gui.set_panel_label(self.folder.name)
        gui.main_panel.set_width(WIDTH)
        seconds = f" in {self.history[-1]['seconds']:.0f} s" if self.history else ""
        gui.add_markdown(f"**{_plain(self.config.prompt)}**\n\n{steps} of {total} steps{seconds}")
        self.display = Display(self.screen.server, tuple(self.nodes))
        gui.add_button("Snapshot", hint="Save this view as a PNG in the run's folder").on_click(
            lambda event: self.snapshots.put(Snapshot(-1 if event.client_id is None else event.client_id))
        )
        tabs = gui.add_tab_group()
        with tabs.add_tab("Turntable"):
            self._add_turntable()
        with tabs.add_tab("Curves"):
            names = ("loss", "penalty", "opacity")
            Curves(self.screen.server).show(
                [line["step"] for line in self.history], {name: [line[name] for line in self.history] for name in names}
            )

    def _add_turntable(self) -> None:
        gui, video, preview = self.screen.server.gui, self.folder / "turntable.mp4", self.folder / "preview.png"
        if video.is_file():
            data = base64.b64encode(video.read_bytes()).decode()
            style = "width: 100%; border-radius: 4px"
            gui.add_html(f'<video src="data:video/mp4;base64,{data}" style="{style}" autoplay loop muted></video>')
        if preview.is_file():
            with Image.open(preview) as image:
                gui.add_image(np.asarray(image.convert("RGB")))
        if not video.is_file() and not preview.is_file():
            gui.add_markdown("The run has not written its files: it was ended early, or is still under way.")

    def _snapshot(self, client: int) -> None:
        eye = next((eye for eye in self.screen.eyes() if eye.client == client), None)
        if eye is not None:
            path = save_snapshot(self.folder, "snapshot", self.scene, eye, self.display.shown or "color")
            self.screen.notify(client, "Saved", str(path))


def _place(scene: Scene) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale, quaternion and position that put the run's mesh where the scene renders it."""
    if not isinstance(scene, MeshScene):
        return 1.0, np.array(Y_UP), np.zeros(3)
    half = math.radians(scene.options.turn) / 2
    w, x, y, z = Y_UP
    c, s = math.cos(half), math.sin(half)
    turn = np.array((c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w))  # (c, 0, 0, s) times Y_UP
    return scene.placement.scale, turn, scene._to_scene(np.zeros((1, 3)))[0]


@torch.no_grad()
def _splats(scene: Gaussians) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centers, covariances, colors and opacities as viser takes them."""
    splats = scene.cpu().splats()
    axes = splats.axes() * splats.log_scales.exp()[:, None]
    tensors = (splats.means, axes @ axes.mT, splats.colors.clamp(0, 1), splats.opacities.sigmoid()[:, None])
    centers, covariances, colors, opacities = (tensor.float().numpy() for tensor in tensors)
    return centers, covariances, colors, opacities


def _plain(text: str) -> str:
    """A text without what Markdown understands."""
    return "".join(f"&#{ord(letter)};" if letter in "\\`*_{}[]<>()#+!|&~" else letter for letter in text)
