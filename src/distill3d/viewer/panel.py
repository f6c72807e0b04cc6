"""The controls beside the object: numbers, curves, training views and buttons. They only fill a queue of commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill3d.distill.changes import PENALTY, SCALE
from distill3d.viewer.pictures import MAPS, Map

if TYPE_CHECKING:
    from viser import GuiEvent, GuiUplotHandle, ViserServer

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
MOST_POINTS = 400  # of a curve
WIDTH = 360  # pixels


@dataclass(frozen=True)
class Pause:
    """Hold the run before its next step, or let it go on."""

    on: bool


@dataclass(frozen=True)
class Stop:
    """End the run here and keep what it has made."""


@dataclass(frozen=True)
class Set:
    """Change a setting from the next step on."""

    setting: str
    value: float


@dataclass(frozen=True)
class Snapshot:
    """Save what a client sees."""

    client: int


@dataclass(frozen=True)
class Export:
    """Write the object as it is now, and give it to a client."""

    client: int


Command = Pause | Stop | Set | Snapshot | Export
Put = Callable[[Command], None]


class Display:
    """Which map of the scene is shown; the same for all clients."""

    def __init__(self, server: ViserServer, others: Sequence[str] = ()) -> None:
        self._choice = server.gui.add_dropdown("Show", [name.capitalize() for name in (*others, *MAPS)])

    @property
    def shown(self) -> Map | None:
        """The map that is chosen; None for something else than a map."""
        name = self._choice.value.lower()
        return next((one for one in MAPS if one == name), None)

    @property
    def chosen(self) -> str:
        """The choice, in lower case."""
        return self._choice.value.lower()


class LivePanel:
    """The controls of a run that is under way."""

    def __init__(self, server: ViserServer, title: str, settings: Mapping[str, float], put: Put) -> None:
        """settings: the ones that may change, by path, at their present values."""
        self.server, gui = server, server.gui
        gui.set_panel_label(title)
        gui.main_panel.set_width(WIDTH)
        self._status, self._bar = gui.add_markdown("The first step is under way."), gui.add_progress_bar(0.0)
        self._pause = gui.add_button("Pause", hint="Hold the run before its next step")
        self._paused = False
        stop = gui.add_button("Stop and keep", color="red", hint="End the run here and write its files")
        self.display = Display(server)
        tabs = gui.add_tab_group()
        with tabs.add_tab("Settings"):
            self._add_settings(settings, put)
        with tabs.add_tab("Views"):
            gui.add_markdown("Training views of a recent step: rendered · target · estimate of x0")
            self._views = gui.add_image(np.full((8, 24, 3), 230, dtype=np.uint8))
        with tabs.add_tab("Curves"):
            self._curves = Curves(server)
        snapshot = gui.add_button("Snapshot", hint="Save this view as a PNG in the run's folder")
        export = gui.add_button("Export mesh", hint="Write the object as it is now, and download it")
        self._pause.on_click(lambda _: put(Pause(not self._paused)))
        stop.on_click(lambda _: put(Stop()))
        snapshot.on_click(lambda event: put(Snapshot(_client(event))))
        export.on_click(lambda event: put(Export(_client(event))))

    def _add_settings(self, settings: Mapping[str, float], put: Put) -> None:
        gui = self.server.gui
        for setting, value in settings.items():
            if setting == SCALE:
                control: Any = gui.add_slider("Guidance scale", 0.0, max(20.0, 3.0 * value), 0.1, value)
            else:
                control = gui.add_number(_readable(setting), value, min=0.0, step=0.001)
            control.on_update(lambda event, setting=setting: put(Set(setting, float(event.target.value))))

    def show_status(self, text: str, done: float) -> None:
        """The line of numbers, and how much of the run is done, 0 to 1."""
        self._status.content, self._bar.value = text, 100.0 * min(1.0, done)

    def show_paused(self, paused: bool) -> None:
        """What the button does next."""
        if paused != self._paused:
            self._paused, self._pause.label = paused, "Resume" if paused else "Pause"

    def show_views(self, sheet: np.ndarray) -> None:
        """Training views as one image [H, W, 3] of bytes."""
        self._views.image = sheet

    def show_curves(self, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """See `Curves.show`."""
        self._curves.show(steps, curves)


class Curves:
    """Losses and regularizers over the steps: one plot each, since their sizes differ."""

    def __init__(self, server: ViserServer) -> None:
        self._gui = server.gui
        self._folder = self._gui.add_folder("Loss and weighted regularizers", expand_by_default=True)
        self._plots: dict[str, GuiUplotHandle] = {}

    def show(self, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> None:
        """Draws curves of equal length by name; a missing value is NaN."""
        stride = max(1, -(-len(steps) // MOST_POINTS))
        x = np.asarray(steps, dtype=np.float64)[::stride]
        for name, values in curves.items():
            data = (x, np.asarray(values, dtype=np.float64)[::stride])
            if name in self._plots:
                self._plots[name].data = data
            elif len(x) > 1:
                series: Any = ({"label": "step"}, {"label": name, "stroke": COLORS[len(self._plots) % len(COLORS)]})
                with self._folder:
                    self._plots[name] = self._gui.add_uplot(
                        data, series, title=name, height=130, scales={"x": {"time": False}}, legend={"show": False}
                    )


def _client(event: GuiEvent[Any]) -> int:
    return -1 if event.client_id is None else event.client_id


def _readable(setting: str) -> str:
    """penalties.smooth_color as "Smooth color"."""
    return setting.removeprefix(PENALTY).replace("_", " ").capitalize()
