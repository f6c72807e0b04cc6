"""A run in the browser while it is under way: an observer that renders between the steps, within a budget of time."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from distill3d.distill.changes import PENALTY, SCALE, changeable, changed
from distill3d.distill.loop import ObjectRun, Progress
from distill3d.distill.observer import Observer, Steering, StepViews
from distill3d.export.video import contact_sheet, save_image
from distill3d.runs.folder import RunFolder
from distill3d.types import Scene
from distill3d.viewer.budget import Budget
from distill3d.viewer.gate import Address
from distill3d.viewer.panel import Command, LivePanel, Pause, Set, Snapshot, Stop
from distill3d.viewer.pictures import Eye, Map, Painter, picture
from distill3d.viewer.screen import Screen

NUMBERS, CURVES, VIEWS = 0.25, 1.0, 3.0  # seconds between two updates
VIEWS_SHARE = 4  # training views take no more than one part in so many of the budget
MOST_VIEWS, SHEET = 4, 340  # training views that the panel shows, and their width in pixels
SNAPSHOT = 512  # rows of a snapshot, at most
NAP = 0.02  # seconds


class LiveViewer(Observer):
    """Shows one run after another on one page."""

    def __init__(self, address: Address, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens the page; for errors see `Screen`."""
        self.screen = Screen(address, "distill3d")
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.clock, self.budget = clock, Budget(clock=clock)
        self.painter = Painter(self.screen.send)
        self.paused = False
        self._due: dict[str, float] = {}
        self._views_cost = 0.0

    def close(self) -> None:
        """Closes the page."""
        self.screen.close()

    def start(self, run: ObjectRun, folder: Path, step: int) -> None:
        """See `Observer`."""
        self.run, self.folder, self.paused = run, folder, False
        before = [line for line in RunFolder(folder).history() if line["step"] < step]  # of a run that is resumed
        self.steps = [line["step"] for line in before]
        self.curves = {name: [line[name] for line in before] for name in ("loss", "penalty")}
        self.recent: list[tuple[int, float]] = []
        self.screen.clear()
        self._latest: dict[str, float] = {}
        self.panel = LivePanel(self.screen.server, folder.name, present_settings(run, step), self.commands.put)

    def wants(self, step: int) -> bool:
        """See `Observer`: now and then, where somebody looks."""
        return bool(self.screen.server.get_clients()) and self._is_due("views") and self.budget.allows(self._views_cost)

    def see(self, step: int, views: StepViews) -> None:
        """See `Observer`."""
        began = self.clock()
        with self.budget.spend():
            for name, value in views.penalties.items():
                self._latest[name] = float(value)
            rows = [views.images, views.target_images()]
            rows += [] if views.x0_images is None else [views.x0_images()]
            shown = torch.stack([row[:MOST_VIEWS] for row in rows], dim=1).flatten(0, 1)
            sheet = contact_sheet(shown.float().cpu().clamp(0, 1), columns=len(rows))
            height = round(sheet.height * SHEET / sheet.width)
            self.panel.show_views(np.asarray(sheet.resize((SHEET, height), resample=3)))  # BICUBIC
        self._views_cost = self.clock() - began
        self._put_off("views", max(VIEWS, VIEWS_SHARE * self._views_cost / self.budget.share))

    def after(self, progress: Progress) -> Steering:
        """See `Observer`: does what clients ask for, shows the numbers and renders for whoever is waiting."""
        steering = self._obey(progress)
        self._remember(progress)
        eyes = self.screen.eyes()
        if not self.paused:  # pictures first: they need all that is saved where they are slow
            self._paint(eyes, progress.step)
        elif not self.painter.paint(self.run.scene, eyes, progress.step, self._shown, math.inf):
            time.sleep(NAP)
        if eyes:
            with self.budget.spend():
                self._show_numbers(progress)
        return replace(steering, again=self.paused and not steering.stop)

    def end(self) -> None:
        """See `Observer`."""
        while not self.commands.empty():  # those are about a run that is over
            self.commands.get()
        if self.steps:
            done, total = self.steps[-1] + 1, self.run.written.steps
            text = f"**The run has ended**, {done} of {total} steps. Its files are in {self.folder}."
            self.panel.show_status(text, 1.0)
            self.panel.show_curves(self.steps, self.curves)
            self.screen.notify(None, "The run has ended", f"distill3d view {self.folder}")

    def _paint(self, eyes: list[Eye], step: int) -> None:
        """Pictures until the time is spent."""
        painted = bool(eyes)
        while painted:
            allowance = self.budget.allowance()
            with self.budget.spend():
                painted = self.painter.paint(self.run.scene, eyes, step, self._shown, allowance, self.budget.most)

    @property
    def _shown(self) -> Map:
        return self.panel.display.shown or "color"

    def _obey(self, progress: Progress) -> Steering:
        settings: dict[str, float] = {}
        stop = False
        while not self.commands.empty():
            command = self.commands.get()
            if isinstance(command, Pause):
                self.paused = command.on
                self.panel.show_paused(self.paused)
                self._due.clear()
            elif isinstance(command, Stop):
                stop = True
            elif isinstance(command, Set):
                settings[command.setting] = command.value
            elif isinstance(command, Snapshot):
                self._snapshot(command.client, progress.step)
            else:
                self._export(command.client, progress.step)
        return Steering(settings or None, stop)

    def _snapshot(self, client: int, step: int) -> None:
        eye = next((eye for eye in self.screen.eyes() if eye.client == client), None)
        if eye is not None:
            path = save_snapshot(self.folder, f"snapshot-{step + 1:05d}", self.run.scene, eye, self._shown)
            self.screen.notify(client, "Saved", str(path))

    def _export(self, client: int, step: int) -> None:
        try:
            options = replace(self.run.written.export, name=f"step-{step + 1:05d}", format=None)
            path, *_ = self.run.scene.build("cpu").eval().export(self.folder, options)
        except ValueError as error:
            self.screen.notify(client, "Nothing to export", str(error))
            return
        self.screen.notify(client, "Exported", str(path))
        self.screen.download(client, path.name, path.read_bytes())

    def _remember(self, progress: Progress) -> None:
        if self.steps and self.steps[-1] == progress.step:  # a pause
            return
        self.steps.append(progress.step)
        self.recent = [*self.recent[-20:], (progress.step, progress.seconds)]
        values = {"loss": progress.loss, "penalty": progress.penalty, **self._latest}
        for name, value in values.items():
            self.curves.setdefault(name, [math.nan] * (len(self.steps) - 1)).append(value)

    def _show_numbers(self, progress: Progress) -> None:
        if self._is_due("numbers"):
            self._put_off("numbers", NUMBERS)
            total = self.run.written.steps
            left = "paused" if self.paused else self._time_left(total - progress.step - 1)
            numbers = f"t {progress.t:.2f} · loss {progress.loss:.4f} · opacity {progress.opacity:.2f}"
            self.panel.show_status(
                f"**Step {progress.step + 1} of {total}** · {left}\n\n{numbers}", (progress.step + 1) / total
            )
        if self._is_due("curves"):
            self._put_off("curves", CURVES)
            self.panel.show_curves(self.steps, self.curves)

    def _time_left(self, steps: int) -> str:
        (first, then), (last, now) = self.recent[0], self.recent[-1]
        if last == first:
            return "…"
        seconds = round(steps * (now - then) / (last - first))
        return f"{seconds // 60} min {seconds % 60:02} s left" if seconds >= 60 else f"{seconds} s left"

    def _is_due(self, what: str) -> bool:
        return self.clock() >= self._due.get(what, -math.inf)

    def _put_off(self, what: str, seconds: float) -> None:
        self._due[what] = self.clock() + seconds


def present_settings(run: ObjectRun, step: int) -> dict[str, float]:
    """The settings that may change, by path, at their values of a step."""
    recipe, settings = changed(run.written, run.changes, step), {}
    for name in changeable(run.written, run.known_penalties):
        if name == SCALE:
            settings[name] = float(vars(recipe.objective)["scale"])
        else:
            settings[name] = vars(recipe.penalties)[name.removeprefix(PENALTY)](step, recipe.steps)
    return settings


def save_snapshot(folder: Path, name: str, scene: Scene, eye: Eye, shown: Map) -> Path:
    """Writes what a client sees as folder/name.png, or with a number behind the name where that is taken."""
    image = picture(scene, eye, min(SNAPSHOT, eye.height), shown)
    paths = (folder / f"{name}{suffix}.png" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    path = next(path for path in paths if not path.exists())
    save_image(path, image.permute(2, 0, 1) / 255)
    return path
