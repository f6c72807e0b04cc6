"""A run under the live viewer, with real clients without a browser: they see it, steer it, and vanish."""

import dataclasses
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from distill3d.cameras import orbit
from distill3d.distill.changes import Change
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import DISTILL
from distill3d.export.options import ExportOptions
from distill3d.objectives import SDI
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.runs.folder import RunFolder
from distill3d.runs.watching import CHANGES, Watching, read_changes
from distill3d.viewer.gate import Address
from distill3d.viewer.live import LiveViewer
from distill3d.viewer.panel import Export, Pause, Set, Snapshot, Stop

Visitor = pytest.importorskip("visitor", reason="the viewer needs viser").Visitor
SMALL = replace(
    DISTILL,
    steps=4,
    views=1,
    scene=replace(DISTILL.scene, resolution=12),
    objective=SDI(inversion_steps=2),
    export=ExportOptions(texture=None, resolution=16, fit=0, faces=200),
)


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(kl_folder)


@pytest.fixture(scope="module")
def viewer():
    """One page for all runs of this file, as the command line has one for all prompts of a file."""
    viewer = LiveViewer(Address(port=0))
    yield viewer
    viewer.close()


@pytest.fixture
def visitor(viewer):
    """A client whose camera is known to the server."""
    visitor = Visitor(viewer.screen.gate.port)
    until(lambda: viewer.screen.eyes())
    yield visitor
    visitor.close()
    until(lambda: not viewer.screen.eyes())


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.01)


def train(prior, folder, *observers):
    folder.mkdir(exist_ok=True)
    run = object_run(SMALL, ViewPrompts("a cat"), prior, seed=1)
    watching = Watching(run, folder, observers)
    training = RunFolder(folder).train(run, SMALL.steps, watching=watching)
    watching.end()
    assert list(observers) == watching.observers  # none has failed
    return run.scene.raw.detach(), training


@pytest.fixture
def background(prior, viewer, tmp_path):
    """Starts a run that waits after its first step, in a thread of its own; gives its result when it has ended."""
    results = []

    def work():
        results.append(train(prior, tmp_path / "live", viewer))

    thread = threading.Thread(target=work)
    viewer.commands.put(Pause(True))
    thread.start()
    until(lambda: viewer.paused or not thread.is_alive())

    def result():
        viewer.commands.put(Pause(False))
        thread.join(60)
        return results[0]

    yield result
    viewer.commands.put(Stop())
    thread.join(60)
    while not viewer.commands.empty():
        viewer.commands.get()


def test_a_watched_run_takes_the_same_steps_and_its_client_gets_pictures(prior, viewer, visitor, background, tmp_path):
    until(lambda: visitor.pictures >= 2)  # a small one, then a better one
    before = visitor.pictures
    visitor.look(120.0)
    until(lambda: visitor.pictures > before)
    watched, _ = background()
    assert torch.equal(watched, train(prior, tmp_path / "alone")[0])
    steps = [p["step"] for p in RunFolder(tmp_path / "live").history()]
    assert steps == viewer.steps == list(range(SMALL.steps))
    assert all(len(curve) == SMALL.steps for curve in viewer.curves.values())
    until(lambda: any(message["type"] == "GuiUplotMessage" for message in list(visitor.messages)))


def test_settings_change_between_steps_and_are_recorded(prior, viewer, background, tmp_path):
    for value in (3.0, 4.0, 30.0):  # a slider on its way: the last value counts
        viewer.commands.put(Set("objective.scale", value))
    viewer.commands.put(Set("penalties.opaque", 5.0))
    live, _ = background()
    expected = (Change(1, "objective.scale", 30.0), Change(1, "penalties.opaque", 5.0))
    assert read_changes(tmp_path / "live") == expected
    # The same from the record alone, and not the same without it.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / CHANGES).write_bytes((tmp_path / "live" / CHANGES).read_bytes())
    assert torch.equal(train(prior, tmp_path / "again")[0], live)
    assert not torch.equal(train(prior, tmp_path / "plain")[0], live)


def test_stop_and_keep_ends_the_run_after_the_present_step(prior, viewer, background, tmp_path):
    viewer.commands.put(Stop())
    _, training = background()
    assert (training.steps, training.interrupted) == (1, 0)
    assert (tmp_path / "live" / "checkpoint" / "state.json").is_file()
    _, rest = train(prior, tmp_path / "live", viewer)  # and can go on, with the curves from the start
    assert rest.steps == SMALL.steps and viewer.steps == list(range(SMALL.steps))
    assert all(len(curve) == SMALL.steps for curve in viewer.curves.values())


def test_snapshot_and_export_of_the_present_state(viewer, visitor, background, tmp_path):
    (client,) = (eye.client for eye in viewer.screen.eyes())
    for command in (Snapshot(client), Snapshot(client), Export(client)):
        viewer.commands.put(command)
    folder = tmp_path / "live"
    until(lambda: viewer.commands.empty() and any(folder.glob("step-00001.*")))
    background()
    with Image.open(folder / "snapshot-00001.png") as image:
        assert image.size == (320, 240)  # the client's canvas
    assert (folder / "snapshot-00001-2.png").is_file()
    assert (folder / "step-00001.glb").read_bytes()[:4] == b"glTF"
    assert any(message["type"] == "FileTransferStartDownload" for message in visitor.messages)


def test_two_clients_and_one_that_vanishes(viewer, visitor, background):
    other = Visitor(viewer.screen.gate.port, size=(200, 200))
    until(lambda: len(viewer.screen.eyes()) == 2 and other.pictures and visitor.pictures)
    other.vanish()
    until(lambda: len(viewer.screen.eyes()) == 1)
    before = visitor.pictures
    visitor.look(200.0)
    until(lambda: visitor.pictures > before)
    _, training = background()
    assert training.steps == SMALL.steps


def test_commands_of_clients_that_are_gone_do_nothing(viewer, background, tmp_path):
    for command in (Snapshot(1234), Export(-1)):
        viewer.commands.put(command)
    _, training = background()
    assert training.steps == SMALL.steps and not list((tmp_path / "live").glob("snapshot*"))


def test_settings_of_the_panel_are_those_of_the_run(viewer, background):
    """A number that a client sets on the page becomes a command of its setting."""
    assert {field.name for field in dataclasses.fields(DISTILL.penalties)} >= {"opaque"}
    handles = viewer.screen.server.gui._gui_input_handle_from_uuid.values()
    by_label = {handle.label: handle for handle in handles if hasattr(handle, "label")}
    assert by_label["Guidance scale"].value == 7.5 and by_label["Smooth color"].value == 3.0
    assert {"Pause", "Resume"} & by_label.keys() and {"Stop and keep", "Snapshot", "Export mesh"} <= by_label.keys()
    assert "Smooth shape" not in by_label  # of surfaces only


def test_a_clients_camera_is_the_one_it_says(viewer, visitor):
    """viser's cameras look along +z with y down, ours along -z with y up."""
    visitor.look(120.0, 30.0, 3.5, 50.0)
    expected = orbit(120.0, 30.0, 3.5, 50.0)
    until(lambda: torch.allclose(viewer.screen.eyes()[0].camera_to_world, expected.camera_to_world[0], atol=1e-5))
    (eye,) = viewer.screen.eyes()
    assert (eye.width, eye.height) == (320, 240) and eye.fov_y == pytest.approx(float(expected.fov_y[0]))


def test_nobody_gets_around_the_gate(viewer):
    """viser's own port takes connections of this machine, and serves none."""
    intruder = Visitor(viewer.screen.server.get_port())
    intruder._thread.join(30)
    assert not intruder._thread.is_alive() and not intruder.messages and not viewer.screen.eyes()


def test_nobody_can_open_the_page_to_the_internet(viewer):
    assert viewer.screen.server.request_share_url() is None
