"""The viewer as a person meets it: in headless Chromium, during a run and after it."""

import io
import os
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("viser")

from distill3d.distill.recipes import DISTILL, Penalties
from distill3d.export.options import ExportOptions
from distill3d.objectives import SDI
from distill3d.runs.objects import Config, generate
from distill3d.runs.watching import read_changes
from distill3d.scenes.gaussians import GaussianOptions
from distill3d.viewer.after import AfterViewer
from distill3d.viewer.gate import Address
from distill3d.viewer.live import LiveViewer
from distill3d.viewer.panel import Pause, Stop

FLAGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
SMALL = replace(
    DISTILL,
    steps=4,
    views=1,
    frames=4,
    scene=replace(DISTILL.scene, resolution=16),
    objective=SDI(inversion_steps=2),
    export=ExportOptions(texture=None, resolution=16, fit=0, faces=200),
)
PATIENCE = 120_000  # milliseconds: without a GPU, on a busy machine
TOKEN = "a-token-1234"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="this test drives a browser")
    path = os.environ.get("DISTILL3D_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page in a session of its own."""
    contexts = []

    def open_page(url):
        contexts.append(browser.new_context(viewport={"width": 900, "height": 620}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(url, wait_until="domcontentloaded")
        return page

    yield open_page
    for context in contexts:
        context.close()


class Running:
    """A run in a thread of its own, which waits after its first step."""

    def __init__(self, folder, out):
        self.viewer = LiveViewer(Address(port=0, token=TOKEN))
        self.viewer.commands.put(Pause(True))
        self.results = []
        config = Config("a cat", SMALL, prior=str(folder), dtype="float32")
        self.thread = threading.Thread(
            target=lambda: self.results.append(generate(config, out, observers=(self.viewer,)))
        )
        self.thread.start()

    def result(self):
        self.thread.join(PATIENCE / 1000)
        return self.results[0]


@pytest.fixture
def running(kl_folder, tmp_path):
    running = Running(kl_folder, tmp_path)
    yield running
    running.viewer.commands.put(Stop())
    running.thread.join(60)
    running.viewer.close()


def canvas(page):
    """The pixels of the object's part of the page, without the notes in its corner."""
    box = page.locator("canvas").first.bounding_box()
    clip = {"x": box["x"], "y": box["y"] + 170, "width": 500, "height": box["height"] - 170}
    return np.asarray(Image.open(io.BytesIO(page.screenshot(clip=clip, timeout=PATIENCE))).convert("RGB")).astype(int)


def until(condition, seconds=PATIENCE / 1000):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.1)


def shows_something(page):
    return canvas(page).std() > 3


def drag(page):
    page.mouse.move(250, 400)
    page.mouse.down()
    page.mouse.move(400, 420, steps=4)
    page.mouse.up()


def test_open_rotate_pause_change_export_and_stop(running, visit, tmp_path):
    page = visit(running.viewer.screen.url)
    page.get_by_text("Step 1 of 4").wait_for()
    assert "token" not in page.url
    until(lambda: shows_something(page))
    before, frames = canvas(page), running.viewer.painter.frames
    drag(page)
    until(lambda: running.viewer.painter.frames > frames and np.abs(canvas(page) - before).mean() > 1)

    # One step of the slider.
    slider = next(h for h in running.viewer.screen.server.gui._gui_input_handle_from_uuid.values()
                  if getattr(h, "label", "") == "Guidance scale")  # fmt: skip
    assert slider.value == 7.5
    page.get_by_role("slider").first.focus()
    page.keyboard.press("ArrowRight")
    until(lambda: slider.value > 7.5)
    (folder,) = tmp_path.iterdir()
    until(lambda: read_changes(folder))
    change = read_changes(folder)[-1]
    assert (change.step, change.setting, change.value) == (1, "objective.scale", pytest.approx(slider.value))

    with page.expect_download() as download:
        page.get_by_role("button", name="Export mesh").click()
    assert download.value.suggested_filename == "step-00001.glb" and (folder / "step-00001.glb").is_file()
    page.get_by_role("button", name="Snapshot").click()
    until(lambda: (folder / "snapshot-00001.png").is_file())

    page.get_by_role("button", name="Stop and keep").click()
    result = running.result()
    assert result.steps == 1 and not result.interrupted and (folder / "turntable.mp4").is_file()
    page.get_by_text("1 of 4 steps").wait_for()


def is_still(page):
    """Whether a page shows the same for half a second."""
    before = canvas(page)
    time.sleep(0.5)
    return np.array_equal(canvas(page), before)


def test_two_clients_pause_and_one_vanishes(running, visit):
    first, second = visit(running.viewer.screen.url), visit(running.viewer.screen.url)
    until(lambda: shows_something(first) and shows_something(second))
    until(lambda: is_still(second))  # the first picture is a small one
    second_before = canvas(second)
    drag(first)  # each has its own camera
    frames = running.viewer.painter.frames
    until(lambda: running.viewer.painter.frames > frames)
    assert np.abs(canvas(second) - second_before).mean() < 1
    second.context.close()
    until(lambda: len(running.viewer.screen.eyes()) == 1)
    assert first.get_by_role("button", name="Resume").count() == 1  # it waits since its first step
    first.get_by_role("button", name="Resume").click()
    assert running.result().steps == 4


def test_without_the_token_there_is_no_page(running, visit):
    page = visit(running.viewer.screen.url.split("?")[0])
    assert "This viewer needs its token" in page.inner_text("body") and page.locator("canvas").count() == 0


@pytest.fixture
def ended():
    """Opens the viewer of a run that has ended, at work in a thread of its own."""
    closed, threads, viewers = threading.Event(), [], []

    def work(viewer):
        while not closed.is_set():
            viewer.tick()

    def open_viewer(folder):
        viewers.append(AfterViewer(folder, Address(port=0)))
        threads.append(threading.Thread(target=work, args=viewers[-1:]))
        threads[-1].start()
        return viewers[-1]

    yield open_viewer
    closed.set()
    for thread, viewer in zip(threads, viewers, strict=True):
        thread.join()
        viewer.close()


@pytest.mark.parametrize("kind", ["mesh", "splats"])
def test_a_run_that_has_ended(kind, kl_folder, visit, ended, tmp_path):
    recipe = replace(SMALL, steps=2)
    if kind == "splats":
        recipe = replace(recipe, scene=GaussianOptions(count=50), penalties=Penalties())
    viewer = ended(generate(Config("a *cat*", recipe, prior=str(kl_folder), dtype="float32"), tmp_path).folder)
    page = visit(viewer.screen.url)
    page.get_by_text("2 of 2 steps").wait_for()
    assert page.get_by_text("a *cat*").count() == 1  # as typed
    assert set(viewer.nodes) == {kind} and page.locator("video").count() == 1
    until(lambda: shows_something(page))
    assert np.abs(canvas(page)[-9:, :9] - 230).max() < 9  # gray, as behind our renders
    for shown in ("Color", "Depth", kind.capitalize()):
        before = canvas(page)
        page.get_by_role("combobox").last.click()
        page.get_by_role("option", name=shown, exact=True).click()
        until(lambda before=before: np.abs(canvas(page) - before).mean() > 1)
