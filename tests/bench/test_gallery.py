"""A gallery holds what the runs hold, says what they were made from, and opens from a file without a network."""

import base64
import dataclasses
import gzip
import io
import json
import re
import shutil

import pytest
from PIL import Image, ImageSequence

import distill3d as d3d
from distill3d.bench.cells import SMALL, make_artifacts
from distill3d.bench.gallery import check_size, find_entries, method_name, self_contained, write_gallery
from distill3d.bench.protocol import Protocol, Variant
from distill3d.cli import main as cli
from distill3d.distill.recipes import DISTILL, LAPTOP
from distill3d.meshes.files import read_mesh, save_mesh
from distill3d.runs.folder import RunFolder
from distill3d.runs.images import ImageConfig
from distill3d.runs.objects import Config, write_artifacts

PROMPT = "a red <b>ball</b> & a box %%js%%"
CELL = "a blue car"


@pytest.fixture(scope="module")
def place(tmp_path_factory, ball):
    """`runs` with a finished object, one without files and an image; `bench` with a cell; a mesh."""
    out = tmp_path_factory.mktemp("place")
    recipe = dataclasses.replace(LAPTOP, frames=6, export=SMALL)
    folder = RunFolder.create(out / "runs", "a ball")
    folder.write_config("object", Config(PROMPT, recipe, seed=3, dtype="float32"))
    write_artifacts(folder.path, ball, recipe)
    RunFolder.create(out / "runs", "b begun").write_config("object", Config("a hat", recipe, dtype="float32"))
    RunFolder.create(out / "runs", "c image").write_config("image", ImageConfig("a hat"))
    protocol = Protocol((Variant("sds"),), (CELL,), views=6, size=32)
    (task,) = protocol.tasks()
    cell = RunFolder(out / "bench" / "cells" / task.folder)
    cell.path.mkdir(parents=True)
    cell.write_config("object", protocol.config(task))
    make_artifacts(cell.path, ball, protocol)
    save_mesh(out / "ball.obj", read_mesh(cell.path / "mesh.glb"))
    return out


def written(path, folder, paths, models=True):
    """The text of a gallery of these paths."""
    entries, _ = find_entries([folder / name for name in paths])
    write_gallery(path / "gallery.html", entries, [f"type <this> {e.title}" for e in entries], models=models)
    return (path / "gallery.html").read_text()


def stored(text, name):
    """The content that the page has under a name."""
    found = re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', text)
    return None if found is None else base64.b64decode(found[1])


def test_every_kind_of_run_is_found_and_what_is_not_finished_is_counted(place):
    entries, unfinished = find_entries([place / "runs", place / "bench", place / "ball.obj"])
    assert [entry.title for entry in entries] == [PROMPT, CELL, "ball.obj"] and unfinished == 1
    assert dict(entries[0].facts) == {"method": "cfd", "prior": "toybox-mv", "seed": "3", "steps": "150"}
    assert dict(entries[1].facts) == {"method": "sdi", "prior": "toybox", "seed": "0", "steps": str(DISTILL.steps)}
    alone, _ = find_entries([entries[0].path])
    assert alone == entries[:1]


def test_the_page_holds_the_models_and_the_frames_of_the_runs(place, tmp_path):
    text = written(tmp_path, place, ["runs", "bench"])
    runs = [entry.path for entry in find_entries([place / "runs", place / "bench"])[0]]
    for i, run in enumerate(runs):
        assert gzip.decompress(stored(text, f"mesh-{i}")) == (run / "mesh.glb").read_bytes()
    assert stored(text, "turn-1") == (runs[1] / "turn.webp").read_bytes()
    turning = Image.open(io.BytesIO(stored(text, "turn-0")))
    assert turning.size == (128, 128) and turning.n_frames == 6 and turning.info["loop"] == 0
    first, _, _, behind, *_ = (frame.convert("RGB").resize((1, 1)) for frame in ImageSequence.Iterator(turning))
    assert first.getpixel((0, 0)) != behind.getpixel((0, 0))  # the ball's colors differ from side to side


def test_texts_are_escaped_and_nothing_is_asked_for(place, tmp_path):
    text = written(tmp_path, place, ["runs", "bench", "ball.obj"])
    page = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.DOTALL)
    assert "<b>ball</b>" not in page and "a red &lt;b&gt;ball&lt;/b&gt; &amp; a box %%js%%" in page
    assert "<this>" not in page and page.count("type &lt;this&gt;") == 3
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", page)
    assert "http" not in page.replace("http-equiv", "") and "default-src 'none'" in page


def test_a_mesh_of_another_format_becomes_one_that_the_page_can_show(place, tmp_path):
    content = gzip.decompress(stored(written(tmp_path, place, ["ball.obj"]), "mesh-0"))
    (tmp_path / "found.glb").write_bytes(content)
    found, source = read_mesh(tmp_path / "found.glb"), read_mesh(place / "ball.obj")
    assert content[:4] == b"glTF" and len(found.faces) == len(source.faces)
    assert found.vertices[found.faces] == pytest.approx(source.vertices[source.faces], abs=1e-5)


@pytest.mark.parametrize(
    ("document", "whole"),
    [
        ({}, True),
        ({"buffers": [{"byteLength": 4}], "images": [{"bufferView": 0}]}, True),
        ({"extensionsRequired": ["KHR_texture_transform"]}, True),
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, False),
        ({"extensionsRequired": ["EXT_meshopt_compression"]}, False),
        ({"images": [{"uri": "skin.png"}]}, False),
        ({"buffers": [{"uri": "mesh.bin"}]}, False),
    ],
)
def test_files_that_need_more_than_themselves_are_known(document, whole):
    assert self_contained(document) is whole


def test_without_models_a_page_is_small(place, tmp_path):
    text = written(tmp_path, place, ["runs"], models=False)
    assert stored(text, "mesh-0") is None and stored(text, "turn-0") and "turn it yourself" not in text


def test_splats_have_a_picture_and_no_model(place, tmp_path):
    shutil.copytree(place / "runs", tmp_path / "runs")
    (mesh,) = (tmp_path / "runs").glob("*/mesh.glb")
    mesh.rename(mesh.with_name("splats.ply"))
    text = written(tmp_path, tmp_path, ["runs"])
    assert stored(text, "mesh-0") is None and stored(text, "turn-0")


@pytest.mark.parametrize(
    ("logged", "model", "lacks"),
    [
        (None, "mesh.glb", ""),  # a folder that was copied without its log
        (150, "mesh.glb", ""),
        (150, "splats.ply", ""),
        (150, None, "no mesh"),
        (149, "mesh.glb", "unfinished: 149 of 150 steps"),
        (2, None, "unfinished: 2 of 150 steps, no mesh"),
    ],
)
def test_a_card_says_what_its_run_lacks(logged, model, lacks, place, tmp_path):
    shutil.copytree(place / "runs", tmp_path / "runs")
    (mesh,) = (tmp_path / "runs").glob("*/mesh.glb")
    _ = mesh.rename(mesh.with_name(model)) if model else mesh.unlink()
    if logged is not None:
        line = {"step": 0, "loss": 0.5, "nfe": 2, "seconds": 0.1}
        text = "".join(json.dumps({**line, "step": step}) + "\n" for step in range(logged))
        (mesh.parent / "metrics.jsonl").write_text(text)
    (entry,), _ = find_entries([mesh.parent])
    assert entry.lacks == lacks
    said = re.findall(r'<p class="lacks">(.*?)</p>', written(tmp_path, tmp_path, ["runs"]))
    assert said == ([lacks] if lacks else [])


def test_a_page_that_would_be_too_large_is_not_begun(place):
    entries, _ = find_entries([place / "runs"] * 40)
    check_size(entries, 200, models=True)
    with pytest.raises(ValueError, match=r"these 40 models would have about \d+ MB, --most-mb allows 1: pass fewer, "):
        check_size(entries, 1, models=True)
    check_size(entries, 1, models=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "is neither a run folder, a folder of these, a bench folder, nor a mesh"),
        (["notes.txt"], "notes.txt is neither a run folder"),
        (["damaged.glb"], "damaged.glb"),
        (["runs-of-nothing"], "there is no finished object in runs-of-nothing"),
        (["begun"], "begun has no object yet: type  distill3d resume begun"),
        (["begun", "--out", "page.pdf"], "--out must end in .html, got page.pdf"),
        (["whole", "--out", "notes.txt/page.html"], "notes.txt/page.html"),
    ],
)
def test_bad_input_is_one_line(words, says, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run in (place / "runs").iterdir():
        name = next((n for n in ("whole", "begun") if n[0] == run.name[0].replace("a", "w")), None)
        if name:
            shutil.copytree(run, name)
    shutil.copytree("begun", "runs-of-nothing/begun")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "damaged.glb").write_bytes(b"glTF\x02\0\0\0 ")
    if words == ["."]:
        shutil.rmtree("whole"), shutil.rmtree("begun")
    assert cli.run(["gallery", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("distill3d: ") and says in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_the_command_writes_a_page(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["gallery", str(place / "runs"), str(place / "bench"), "--title", "<i>Toys</i>"]) == 0
    said = capsys.readouterr()
    assert "gallery.html: 2 models, 0." in said.out and "1 run without an object is left out" in said.err
    text = (tmp_path / "gallery.html").read_text()
    assert "<h1>&lt;i&gt;Toys&lt;/i&gt;</h1>" in text
    assert "distill3d generate &#39;a red &lt;b&gt;" in text and "--seed 3" in text


def test_a_gallery_turns_its_pictures_and_shows_models(place, tmp_path, opened):
    written(tmp_path, place, ["runs", "bench", "ball.obj"])
    page = opened(tmp_path / "gallery.html")
    assert page.locator("h3").all_inner_texts() == [PROMPT, CELL, "ball.obj"]
    page.wait_for_selector("#models img:not([data-turn])")
    assert page.evaluate("customElements.get('model-viewer') === undefined")  # nothing heavy before it is asked for
    first = page.locator("#models img").first
    first.evaluate("i => i.complete || new Promise((done) => { i.onload = done; })")
    assert first.evaluate("i => i.naturalWidth") == 128
    page.get_by_role("button", name="turn it yourself").nth(2).click()
    model = page.locator("model-viewer")
    model.evaluate("m => m.loaded || new Promise((done) => m.addEventListener('load', done))")
    size = model.evaluate("m => { const d = m.getDimensions(); return [d.x, d.y, d.z]; }")
    assert size == pytest.approx([1.2, 1.2, 1.2], abs=0.15)  # the ball has the radius 0.6
    page.get_by_role("searchbox").fill("CAR blue")
    assert page.locator(".entry:visible h3").all_inner_texts() == [CELL]


@pytest.mark.parametrize(("width", "columns"), [(360, 2), (390, 2), (1100, 4)])
def test_a_gallery_fits_its_window(width, columns, place, tmp_path, opened):
    shutil.copytree(place / "runs", tmp_path / "runs")
    (mesh,) = (tmp_path / "runs").glob("*/mesh.glb")
    config = RunFolder(mesh.parent).read_config("object", Config)
    config = dataclasses.replace(config, prior="a_model_with_a_name_that_is_longer_than_any_card_is_wide")
    RunFolder(mesh.parent).write_config("object", config)
    shutil.copytree(place / "bench", tmp_path / "bench")
    shutil.copy(place / "ball.obj", tmp_path)
    written(tmp_path, tmp_path, ["runs", "bench", "ball.obj"] * 2)
    page = opened(tmp_path / "gallery.html")
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#models')).gridTemplateColumns.split(' ').length")
        == columns
    )


def test_the_method_of_your_own_objective_is_the_name_of_its_class(tmp_path):
    recipe = dataclasses.replace(DISTILL, objective=d3d.sdi())
    folder = RunFolder.create(tmp_path, "own")
    folder.write_config("object", Config("a hat", recipe))
    assert method_name(Config("a hat", recipe)) == "Objective"
    assert method_name(folder.read_config("object", Config)) == "Objective"


def test_pictures_far_below_wait_until_they_are_scrolled_to(place, tmp_path, opened):
    written(tmp_path, place, ["runs"] * 40)
    page = opened(tmp_path / "gallery.html")
    page.wait_for_selector("#models img:not([data-turn])")
    assert page.locator("#models img[data-turn]").count() > 10
    page.locator("#models .card").last.scroll_into_view_if_needed()
    page.wait_for_selector("#models .card:last-child img:not([data-turn])")
