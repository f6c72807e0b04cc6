"""The viewer: pictures of it in a real browser, what it costs a run, and how many frames a second it gives.

python benchmarks/viewer.py pictures --out docs/images   # needs playwright and Chromium
python benchmarks/viewer.py cost                         # training with and without the viewer, in turns
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from visitor import Visitor

from distill3d.distill.observer import Observer
from distill3d.distill.recipes import DISTILL, LAPTOP, PRIORS, Recipe
from distill3d.priors.loading import load_prior
from distill3d.runs.objects import Config, generate
from distill3d.types import Prior
from distill3d.viewer.after import AfterViewer
from distill3d.viewer.gate import Address
from distill3d.viewer.live import LiveViewer

FLAGS = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
PROMPT = "a red mushroom"


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("pictures", "cost"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, help="of a run; default: the recipe's for pictures, 20 for costs")
    parser.add_argument("--pairs", type=int, default=5, help="runs with and without the viewer")
    options = parser.parse_args()
    if options.task == "pictures":
        pictures(options.out, options.steps or LAPTOP.steps)
    else:
        cost(options.steps or 20, options.pairs)


def recipe(steps: int) -> Recipe:
    """The recipe of the distillation on the bundled prior, which renders and distills in each step."""
    export = dataclasses.replace(DISTILL.export, fit=0)  # the fit of the mesh takes longer than these runs
    return dataclasses.replace(DISTILL, steps=steps, export=export, frames=24)


def pictures(out: Path, steps: int) -> None:
    """viewer-live.png, of a run of recipe laptop at 70 % of its steps, and viewer-after.png, of its mesh."""
    viewer, work = LiveViewer(Address(port=0)), Path(tempfile.mkdtemp())
    config = Config("a green chair", dataclasses.replace(LAPTOP, steps=steps), prior=PRIORS["laptop"])
    runner = threading.Thread(target=lambda: generate(config, work, observers=(viewer,)))
    runner.start()

    def shot(page, name: str) -> None:
        page.screenshot(path=str(out / name), timeout=300_000)
        small = shrink(out / name)
        print(f"{out / name}: {small / 1000:.0f} kB", flush=True)

    with browser_page(viewer.screen.url) as page:
        page.get_by_role("tab", name="Views").click()
        until(lambda: getattr(viewer, "steps", None) and viewer.steps[-1] >= 0.7 * steps)
        dismiss(page)
        shot(page, "viewer-live.png")
    runner.join()
    viewer.close()
    (folder,) = work.iterdir()
    after, seen = AfterViewer(folder, Address(port=0)), threading.Event()
    ticking = threading.Thread(target=lambda: tick(after, seen))
    ticking.start()
    with browser_page(after.screen.url) as page:
        page.get_by_text("Turntable").wait_for()
        time.sleep(5)
        dismiss(page)
        shot(page, "viewer-after.png")
    seen.set()
    ticking.join()
    after.close()
    shutil.rmtree(work)


def tick(viewer: AfterViewer, seen: threading.Event) -> None:
    """Lets the viewer work until the event."""
    while not seen.is_set():
        viewer.tick()


class browser_page:  # used like a function
    """A page of headless Chromium, 1200 x 720."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self):
        from playwright.sync_api import sync_playwright

        path = os.environ.get("DISTILL3D_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
        self.api = sync_playwright().start()
        self.browser = self.api.chromium.launch(executable_path=path, args=list(FLAGS))
        page = self.browser.new_page(viewport={"width": 1200, "height": 720})
        page.set_default_timeout(300_000)
        page.goto(self.url, wait_until="domcontentloaded")
        return page

    def __exit__(self, *_: object) -> None:
        self.browser.close()
        self.api.stop()


def dismiss(page) -> None:
    """Closes the note about a browser without a GPU."""
    for button in page.locator(".mantine-Notification-closeButton").all():
        button.click()
    time.sleep(1)


def shrink(path: Path) -> int:
    """Stores a picture with 256 colors where that is smaller; returns its bytes."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path.stat().st_size


def until(condition: Callable[[], object]) -> None:
    """Waits for it."""
    while not condition():
        time.sleep(0.1)


class Client(Observer):
    """A client that turns around the object at a steady pace, as an observer after the viewer."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor, self.ended = visitor, threading.Event()
        self.thread = threading.Thread(target=self._turn, daemon=True)
        self.thread.start()

    def _turn(self) -> None:
        began = time.monotonic()
        while not self.ended.wait(0.05):
            self.visitor.look(40 * (time.monotonic() - began) % 360)


class Timer(Observer):
    """Wall clock and CPU time of this process between the first and the last step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def after(self, progress) -> None:
        """See `Observer`."""
        self.times.append((time.perf_counter(), time.process_time()))

    @property
    def spans(self) -> tuple[float, float]:
        """Seconds, wall clock and CPU."""
        (a, b), (c, d) = self.times[0], self.times[-1]
        return c - a, d - b


def cost(steps: int, pairs: int) -> None:
    """Training with the viewer and one client over training without, in pairs, in turns."""
    prior = load_prior("toybox")
    train(prior, 3, None)  # warm
    ratios: list[tuple[float, float]] = []
    rates: list[float] = []
    for pair in range(pairs):
        spans = {}
        for watched in ((False, True), (True, False))[pair % 2]:
            viewer = LiveViewer(Address(port=0)) if watched else None
            spans[watched], frames = train(prior, steps, viewer)
            if viewer is not None:
                rates.append(frames / spans[True][0])
                viewer.close()
        ratios.append((spans[True][0] / spans[False][0], spans[True][1] / spans[False][1]))
        print(
            f"pair {pair}: {spans[False][0]:.1f} s and {spans[True][0]:.1f} s, ratio {ratios[-1][0]:.3f}, "
            f"CPU time {ratios[-1][1]:.3f}, {rates[-1]:.1f} frames a second",
            flush=True,
        )
    wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    threads = torch.get_num_threads()
    print(f"{threads} threads, {steps} steps: time x {wall:.3f}, CPU time x {cpu:.3f} (medians of {pairs} pairs),")
    print(f"{statistics.median(rates):.1f} frames a second during a run; {paused_rate():.1f} while it is at rest")


def train(prior: Prior, steps: int, viewer: LiveViewer | None) -> tuple[tuple[float, float], int]:
    """Seconds of wall clock and CPU of a run's steps, and how many pictures its client was sent."""
    from distill3d.distill.objects import object_run
    from distill3d.prompts import ViewPrompts
    from distill3d.runs.folder import RunFolder
    from distill3d.runs.watching import Watching

    timer, observers, frames = Timer(), [], 0
    client = None
    if viewer is not None:
        client = Client(Visitor(viewer.screen.gate.port, size=(840, 720)))
        until(lambda: viewer.screen.eyes())
        observers = [viewer]
    with tempfile.TemporaryDirectory() as place:
        run = object_run(dataclasses.replace(DISTILL, steps=steps), ViewPrompts(PROMPT), prior, seed=0)
        watching = Watching(run, Path(place), (*observers, timer))
        RunFolder(Path(place)).train(run, steps, watching=watching)
        watching.end()
    if client is not None:
        client.ended.set()
        client.thread.join()
        frames = client.visitor.pictures
        client.visitor.close()
    return timer.spans, frames


def paused_rate() -> float:
    """Frames a second of a scene that is not being trained, for one client that turns."""
    import math

    from distill3d.viewer.pictures import Painter

    scene = DISTILL.scene.build()
    viewer = LiveViewer(Address(port=0))
    client = Client(Visitor(viewer.screen.gate.port, size=(840, 720)))
    until(lambda: viewer.screen.eyes())
    painter, began = Painter(viewer.screen.send), time.perf_counter()
    while time.perf_counter() - began < 10:
        if not painter.paint(scene, viewer.screen.eyes(), 0, "color", math.inf):
            time.sleep(0.005)
    client.ended.set()
    client.thread.join()
    client.visitor.close()
    viewer.close()
    return painter.frames / 10


if __name__ == "__main__":
    main()
