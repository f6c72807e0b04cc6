"""The report as a person meets it: opened from a file in headless Chromium, without a network."""

import dataclasses
import io
import itertools
import json
import re
import shutil
from xml.etree import ElementTree

import pytest
from PIL import Image

from distill3d import bench
from distill3d.bench.cells import Outcome, make_artifacts
from distill3d.bench.judging import Scored
from distill3d.bench.plots import Curve, interval_plot, line_plot
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.report import write_report
from distill3d.bench.tables import cells_csv, make_table

NAMES = ("sdi", "sds", "ism")
PROMPTS = ("a red <b>ball</b> & a box", "a blue car %%js%%")
SCORES = {"sdi": (28.0, 31.0), "sds": (22.5, 24.0), "ism": (25.0, 30.0)}


@pytest.fixture(scope="module")
def report(tmp_path_factory, ball):
    """The page about three methods and two prompts; the last method failed on the second."""
    out = tmp_path_factory.mktemp("bench")
    protocol = Protocol(tuple(map(Variant, NAMES)), PROMPTS, views=6, size=32, prior="some/where")
    cells, first = [], None
    for task in protocol.tasks():
        folder = out / "cells" / task.folder
        failed = task.variant.name == "ism" and task.prompt == PROMPTS[1]
        if first is None:
            folder.mkdir(parents=True)
            make_artifacts(folder, ball, protocol)
            first = folder
        elif not failed:
            shutil.copytree(first, folder)
        folder.mkdir(exist_ok=True)
        steps = [dict(step=i, loss=0.1 / (i + 1), opacity=0.1, nfe=4 * i + 4, seconds=float(i)) for i in range(20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        outcome = Outcome(task.variant.name, task.prompt, 0, 20, 1.0, 80, 0, "out of memory" if failed else "")
        scores = {} if failed else {"clip_score": SCORES[task.variant.name][PROMPTS.index(task.prompt)]}
        cells.append(Scored(task, outcome, scores))
    table = make_table(NAMES, ("clip_score",), cells)
    write_report(out / "report.html", out, protocol, table, cells, 'distill3d bench --prompts "my <file>"')
    return out / "report.html"


@pytest.fixture
def page(opened, report):
    """The opened page."""
    return opened(report)


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
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", body) and "http" not in re.sub("http-equiv", "", body)
    assert len(text) < 1_000_000


def test_no_name_becomes_a_part_of_the_page(tmp_path):
    """Neither HTML nor what a terminal obeys, whether it comes from a flag or from a file."""
    evil = "x</pre></script><img src=x onerror=alert(1)>\x1b[31m"
    protocol = Protocol((Variant(evil),), ("a ball",), views=6, size=32, prior=f"some/{evil}", negative="<i>'\"")
    cells = [Scored(task, Outcome(evil, task.prompt, 0, 0, 1.0, 0, 0, evil), {}) for task in protocol.tasks()]
    table = make_table((evil,), ("clip_score",), cells)
    write_report(tmp_path / "report.html", tmp_path, protocol, table, cells, f"distill3d bench {evil}")
    text = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in text and "<i>" not in text and "\x1b" not in text and text.count("&lt;img src=x") >= 4
    assert "\x1b" not in cells_csv(table.metrics, cells)


def drawn(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of every path in the groups of a kind."""
    groups = [g for g in ElementTree.fromstring(svg).iter("g") if g.get("class") == kind]
    paths = [path.get("d") for group in groups for path in group.iter("path")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def test_plots_are_whole_svg_and_follow_their_values():
    curve = Curve(0, "a <b>", [0, 1, 2, 3], [1.0, 10.0, 100.0, 1000.0])
    svg = line_plot([curve], "loss", "steps", log=True)
    (points,) = drawn(svg, "curve")
    rises = [a[1] - b[1] for a, b in itertools.pairwise(points)]
    assert len(points) == 4 and rises == pytest.approx([rises[0]] * 3, abs=0.11) and rises[0] > 0  # even in the log
    assert [title.text for title in ElementTree.fromstring(svg).iter("title")] == ["a <b>"]
    assert ElementTree.fromstring(svg).get("aria-label") == "loss, over steps: a <b>"
    assert line_plot([], "loss", "steps") == ""
    assert line_plot([dataclasses.replace(curve, y=[-1.0] * 4)], "", "", True) == ""


def test_values_that_cannot_be_drawn_are_left_out():
    curve = Curve(0, "a", [0, 1, 2, 3], [1.0, float("nan"), 0.0, 1000.0])
    assert [len(points) for points in drawn(line_plot([curve], "", "", log=True), "curve")] == [2]
    assert [len(points) for points in drawn(line_plot([curve], "", ""), "curve")] == [3]


def test_a_plot_of_many_steps_is_small_and_shows_means():
    many = Curve(0, "a", range(100_000), [float(i % 7) for i in range(100_000)])
    svg = line_plot([many], "loss", "steps")
    (points,) = drawn(svg, "curve")
    assert len(svg) < 4000 and len(points) <= 60
    heights = [y for _, y in points]
    assert max(heights) - min(heights) < 1  # each bin has all values of 0 to 6


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-4, 2e-4), (17.2, 17.9), (0, 123456)])
def test_ticks_are_round_and_few(low, high):
    svg = ElementTree.fromstring(line_plot([Curve(0, "a", [0, 1], [low, high])], "loss", "steps"))
    ticks = [float(text.text) for text in svg.iter("text") if "anchor: end" in text.get("style")]
    room = 0.06 * (high - min(low, 0))
    assert 3 <= len(ticks) <= 6 and all(min(low, 0) - room <= tick <= high + room for tick in ticks)
    assert all(len(f"{t:.6g}".replace("-", "").replace(".", "").strip("0").split("e")[0]) <= 3 for t in ticks)


def test_an_interval_lies_about_its_mean():
    outcomes = [Outcome("sdi", p, 0, 1, 1.0, 1, 0) for p in PROMPTS]
    task = Protocol((Variant("sdi"),), PROMPTS).tasks()
    cells = [Scored(t, o, {"clip_score": v}) for t, o, v in zip(task, outcomes, (20.0, 30.0), strict=True)]
    table = make_table(("sdi",), ("clip_score",), cells)
    svg = interval_plot(table, table.metrics[0], "clip score")
    ((low, high),) = drawn(svg, "interval")
    (dot,) = [use for g in ElementTree.fromstring(svg).iter("g") if g.get("class") == "mean" for use in g.iter("use")]
    assert float(dot.get("x")) == pytest.approx((low[0] + high[0]) / 2, abs=0.11) and low[0] < high[0]
    assert float(dot.get("y")) == pytest.approx(low[1], abs=0.01) and low[1] == high[1]


def test_plots_take_their_colors_from_the_page(report):
    text = report.read_text()
    svgs = re.findall("<svg.*?</svg>", text, flags=re.S)
    assert len(svgs) == 2 + 1 + 2 * len(PROMPTS)
    assert not any(re.search("#[0-9a-f]{6}", svg) for svg in svgs)
    variables = {name for svg in svgs for name in re.findall(r"var\((--\w+)\)", svg)}
    assert {"--c0", "--c1", "--c2", "--quiet", "--rule"} <= variables and all(f"{name}:" in text for name in variables)


def test_points_follow_the_dark_scheme(browser, report):
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    ink = "getComputedStyle(document.documentElement).getPropertyValue('--c0')"
    assert page.evaluate(ink) == "#f2f0ea"
    point = page.locator(".plots svg .mean use").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
    assert shot.getpixel((round(box["x"] + box["width"] / 2), round(box["y"] + box["height"] / 2))) > 200
    page.close()


def test_a_missing_library_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setattr(bench, "LIBRARIES", ("matplotlib", "no_such_library"))
    with pytest.raises(ImportError, match=r'need no_such_library: type  pip install "distill3d\[bench\]"'):
        bench.check_libraries()
