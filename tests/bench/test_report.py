"""The report as a person meets it: opened from a file in headless Chromium, without a network."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from xml.etree import ElementTree

import pytest
import torch

from distill3d.bench.cells import Outcome, make_artifacts
from distill3d.bench.judging import Scored
from distill3d.bench.plots import Line, interval_plot, line_plot, ticks
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.report import write_report
from distill3d.bench.tables import make_table
from distill3d.scenes.voxels import VoxelField, VoxelOptions

FLAGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
NAMES = ("sdi", "sds", "ism")
PROMPTS = ("a red <b>ball</b> & a box", "a blue car %%js%%")
SCORES = {"sdi": (28.0, 31.0), "sds": (22.5, 24.0), "ism": (25.0, 30.0)}


def ball() -> VoxelField:
    """A field that is a solid colored ball of the radius 0.6."""
    field = VoxelOptions(resolution=24, blob_height=0.0).build()
    axis = torch.linspace(-1, 1, 24)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    with torch.no_grad():
        field.raw[..., 0] = 0.54 + 40 * (0.6 - (x**2 + y**2 + z**2).sqrt())  # softplus(0.54) is 1
        field.raw[..., 1:] = torch.stack((x, y, z), -1) * 4
    return field.eval()


# Without a GPU pixels are read back slowly, a busy machine is late with a frame: both are said, neither is a mistake.
SLOW = ("GPU stall due to ReadPixels", "rAF timed out")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page about three methods and two prompts; the last method failed on the second."""
    out = tmp_path_factory.mktemp("bench")
    protocol = Protocol(tuple(map(Variant, NAMES)), PROMPTS, views=6, size=32, prior="some/where")
    cells, first = [], None
    for task in protocol.tasks():
        folder = out / "cells" / task.folder
        failed = task.variant.name == "ism" and task.prompt == PROMPTS[1]
        if first is None:
            folder.mkdir(parents=True)
            make_artifacts(folder, ball(), protocol)
            first = folder
        elif not failed:
            shutil.copytree(first, folder)
        folder.mkdir(exist_ok=True)
        steps = [dict(step=i, loss=0.1 / (i + 1), opacity=0.1, nfe=4 * i + 4) for i in range(20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        outcome = Outcome(task.variant.name, task.prompt, 0, 20, 1.0, 80, 0, "out of memory" if failed else "")
        scores = {} if failed else {"clip_score": SCORES[task.variant.name][PROMPTS.index(task.prompt)]}
        cells.append(Scored(task, outcome, scores))
    table = make_table(NAMES, ("clip_score",), cells)
    write_report(out / "report.html", out, protocol, table, cells, 'distill3d bench --prompts "my <file>"')
    return out / "report.html"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; the tests are skipped where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("DISTILL3D_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set DISTILL3D_CHROMIUM")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, report):
    """The opened page; whatever the console says or the network is asked for, fails the test."""
    complaints = []
    page = browser.new_page(
        viewport={"width": 1100, "height": 800}, color_scheme="light", reduced_motion="no-preference"
    )
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or complaints.append(asked.url))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert not [c for c in complaints if not any(said in c for said in SLOW)]


def test_a_table_sorts(page):
    names = "#means tbody th"
    assert page.locator(names).all_inner_texts() == ["sdi", "sds", "ism"]
    page.get_by_role("button", name="clip score").first.click()
    assert page.locator(names).all_inner_texts() == ["sdi", "ism", "sds"]  # 29.5, 25, 23.25
    assert page.locator("#means [aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="clip score").first.click()
    assert page.locator(names).all_inner_texts() == ["sds", "ism", "sdi"]
    page.locator("#means").get_by_role("button", name="method").click()
    assert page.locator(names).all_inner_texts() == ["ism", "sdi", "sds"]
    page.locator("#means").get_by_role("button", name="diverged").click()
    assert page.locator(names).all_inner_texts()[0] == "ism"


def test_a_row_opens_its_turntables_and_a_model_turns(page):
    assert page.evaluate("customElements.get('model-viewer') === undefined")  # nothing heavy before a row is opened
    assert page.locator("details.prompt img[src*='turn']").count() == 0
    page.locator("details.prompt summary").first.click()
    picture = page.locator("details.prompt .card img").first
    page.wait_for_selector("details.prompt .card img:not([data-turn])")  # the event comes after the click
    picture.evaluate("i => i.complete || new Promise((done) => { i.onload = done; })")
    assert picture.evaluate("i => [i.naturalWidth, i.dataset.turn === undefined]") == [32, True]
    page.get_by_role("button", name="turn it yourself").first.click()
    model = page.locator("model-viewer")
    model.evaluate("m => m.loaded || new Promise((done) => m.addEventListener('load', done))")
    assert model.evaluate("m => m.loaded")
    size = model.evaluate("m => { const d = m.getDimensions(); return [d.x, d.y, d.z]; }")
    assert size == pytest.approx([1.2, 1.2, 1.2], abs=0.15)  # the ball has the radius 0.6
    before = model.evaluate("m => m.getCameraOrbit().theta")
    model.evaluate("m => { m.cameraOrbit = '90deg 75deg 105%'; m.jumpCameraToGoal(); }")
    turned = model.evaluate(
        "async m => { await m.updateComplete; m.jumpCameraToGoal(); return m.getCameraOrbit().theta; }"
    )
    assert before == pytest.approx(0, abs=0.01) and turned == pytest.approx(1.5708, abs=0.01)


def test_prompts_are_text_and_can_be_found(page):
    assert page.locator(".words").all_inner_texts() == list(PROMPTS)
    assert page.locator("header pre").inner_text() == 'distill3d bench --prompts "my <file>"'
    page.get_by_role("searchbox").fill("CAR blue")
    assert page.locator("details.prompt:visible .words").all_inner_texts() == [PROMPTS[1]]
    page.locator("details.prompt:visible summary").click()
    assert page.locator(".card .none").inner_text() == "no object: out of memory"


@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_fits_its_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("details.prompt summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_asks_for_nothing_outside(report):
    text = report.read_text()
    body = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.S)
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]*", body) and "http" not in re.sub("http-equiv", "", body)
    assert len(text) < 1_000_000


def test_plots_are_whole_svg_and_follow_their_values():
    line = Line(0, "a <b>", [0, 1, 2, 3], [1.0, 10.0, 100.0, 1000.0])
    svg = ElementTree.fromstring(line_plot([line], "loss", "steps", log=True))
    (path,) = [e for e in svg if e.get("class", "").startswith("line")]
    points = [tuple(map(float, p.split())) for p in path.get("d")[1:].split("L")]
    rises = [a[1] - b[1] for a, b in itertools.pairwise(points)]
    assert (
        len(points) == 4 and rises == pytest.approx([rises[0]] * 3, abs=0.11) and rises[0] > 0
    )  # even in the logarithm
    assert (
        line_plot([], "loss", "steps") == ""
        and line_plot([dataclasses.replace(line, y=[-1.0] * 4)], "", "", True) == ""
    )


def test_a_plot_of_many_steps_is_small():
    many = Line(0, "a", range(100_000), [float(i % 7) for i in range(100_000)])
    assert len(line_plot([many], "loss", "steps")) < 4000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-4, 2e-4), (17.2, 17.9), (0, 123456)])
def test_ticks_are_round_and_few(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 6 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert all(len(f"{t:.6g}".replace("-", "").replace(".", "").strip("0").split("e")[0]) <= 3 for t in found)


def test_an_interval_lies_about_its_mean(report):
    outcomes = [Outcome("sdi", p, 0, 1, 1.0, 1, 0) for p in PROMPTS]
    task = Protocol((Variant("sdi"),), PROMPTS).tasks()
    cells = [Scored(t, o, {"clip_score": v}) for t, o, v in zip(task, outcomes, (20.0, 30.0), strict=True)]
    table = make_table(("sdi",), ("clip_score",), cells)
    svg = ElementTree.fromstring(interval_plot(table, table.metrics[0], "clip score"))
    (bar,) = [e for e in svg if e.get("class", "").startswith("bar")]
    low, high = map(float, re.findall(r"[MH]([\d.]+)", bar.get("d")))
    (dot,) = [e for e in svg if e.get("class", "").startswith("dot")]
    assert float(dot.get("cx")) == pytest.approx((low + high) / 2, abs=0.11) and low < high
