"""Cells on workers and on shared storage: the folder and the tables are those of one process, whatever ends early."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from distill3d.bench.judging import Judges
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.run import Listeners, run_bench
from distill3d.cli import main as cli
from distill3d.distill.recipes import DISTILL
from distill3d.objectives import SDI
from distill3d.priors.loading import load_prior
from distill3d.runs import folder as folders
from distill3d.runs.shared_work import kept_copy
from distill3d.workers.processes import Processes
from distill3d.workers.store import LEASE_SECONDS, Store

SCENE = dataclasses.replace(DISTILL.scene, resolution=12)
SMALL = dataclasses.replace(DISTILL, steps=3, views=1, scene=SCENE, objective=SDI(inversion_steps=2))
METRICS = ("saturation", "nfe", "diverged")
TABLES = ("table.md", "table.tex", "table.csv", "cells.csv")


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(str(kl_folder))


@pytest.fixture(scope="module")
def protocol(kl_folder):
    return Protocol(
        (Variant("SDI", SMALL),), ("a cat", "a dog"), (0, 1), prior=str(kl_folder), dtype="float32", views=2, size=16
    )


@pytest.fixture(scope="module")
def whole(protocol, prior, tmp_path_factory):
    """The folder of a bench that one process made."""
    return run_bench(tmp_path_factory.mktemp("whole"), protocol, prior, Judges(), METRICS).folder


def content(folder):
    """What has to be the same: tables, and the files of cells that hold no times."""
    cells = [p for name in ("views.png", "maps.npz", "turn.webp", "mesh.glb") for p in folder.glob(f"cells/*/{name}")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in (*cells, *(folder / name for name in TABLES))}


def test_processes_make_the_same_folder_and_one_that_is_killed_is_replaced(protocol, prior, whole, tmp_path):
    killed, made = [], []

    def kill_one(task, progress):
        if not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    listeners = Listeners(kill_one, lambda task, outcome, new: made.append((task.folder, new)))
    found = run_bench(tmp_path, protocol, prior, Judges(), METRICS, listeners=listeners, executor=Processes(2))
    assert killed and sorted(made) == sorted((task.folder, True) for task in protocol.tasks())
    assert content(tmp_path) == content(whole) and len(found.cells) == 4
    assert not (tmp_path / "work").exists()


def test_a_killed_driver_leaves_no_worker_and_the_same_command_goes_on(kl_folder, tmp_path, capsys):
    words = ["bench", "--prior", str(kl_folder), "--methods", "sdi", "--prompts", "a cat", "a dog", "--seeds", "0,1"]
    words += ["--dtype", "float32", "--steps", "3", "--views", "2", "--view-size", "16", "--metrics", ",".join(METRICS)]
    words += [w for s in ("views=1", "scene.resolution=12", "sdi.inversion_steps=2") for w in ("--set", s)]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    many = [*words, "--workers", "2", "--out", str(out)]
    driver = subprocess.Popen([sys.executable, "-m", "distill3d", *many], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("cells/*/cell.json")) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}
    assert 1 <= len(kept) < 4, "it was to be killed in the middle"
    assert cli.run(many) == 0
    assert len(list(out.glob("cells/*/cell.json"))) == 4 and {p: p.stat().st_mtime_ns for p in kept} == kept
    assert cli.run([*words, "--out", str(whole)]) == 0
    assert content(out) == content(whole) and "--workers" not in (out / "report.html").read_text()


@pytest.fixture(params=["memory", "local", "s3"])
def address(request, tmp_path, monkeypatch):
    """A folder on shared storage; for S3, on a server of this machine."""
    if request.param != "s3":
        yield f"{request.param}://{tmp_path}/bench"
        return
    reason = "needs s3fs and a server: pip install s3fs 'moto[s3]' flask flask-cors"
    pytest.importorskip("s3fs", reason=reason)
    moto = pytest.importorskip("moto.server", reason=reason)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    settings = dict(ACCESS_KEY_ID="a", SECRET_ACCESS_KEY="b", DEFAULT_REGION="us-east-1")
    settings["ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
    yield "s3://bucket/some/bench"
    server.stop()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:moto", "ignore::ResourceWarning")
def test_a_shared_address_holds_the_same_folder(address, protocol, prior, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL3D_CACHE", str(tmp_path / "cache"))
    seen = []

    def stop(task, progress):
        seen.append((task.folder, progress.step))
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(folders, "CHECKPOINT_SECONDS", 0.0)  # after every step
    with pytest.raises(KeyboardInterrupt):
        run_bench(address, protocol, prior, Judges(), METRICS, listeners=Listeners(stop))
    first, second = [task.folder for task in protocol.tasks()][:2]
    assert Store(address).names("cells") == [first] and f"{second}.zip" in Store(address).names("work")

    monkeypatch.setenv("DISTILL3D_CACHE", str(tmp_path / "other machine"))
    seen.clear()
    listeners = Listeners(lambda task, progress: seen.append((task.folder, progress.step)))
    found = run_bench(address, protocol, prior, Judges(), METRICS, listeners=listeners)
    assert seen[0] == (second, 2), "it was to go on with the checkpoint that was published"
    assert first not in {name for name, _ in seen} and found.folder == kept_copy(address)

    files, root = fsspec.url_to_fs(address)
    files.invalidate_cache()
    there = {p.split("/bench/", 1)[1]: files.cat_file(p) for p in files.find(root)}
    assert content(whole).items() <= there.items()
    expected = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    assert set(there) == expected, "the layout is that of one machine"


def test_a_cell_that_two_workers_wrote_is_noticed_and_made_again(protocol, prior, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL3D_CACHE", str(tmp_path / "cache"))
    address = f"local://{tmp_path}/bench"
    run_bench(address, protocol, prior, Judges(), METRICS)
    (log,) = (tmp_path / "bench/cells" / protocol.tasks()[0].folder).glob("metrics.jsonl")
    log.write_text(log.read_text() + "\n")
    monkeypatch.setenv("DISTILL3D_CACHE", str(tmp_path / "other machine"))
    made = []
    listeners = Listeners(on_cell=lambda task, outcome, new: made.append(new))
    with pytest.warns(UserWarning, match="metrics.jsonl does not have the checksum in it.*made again"):
        found = run_bench(address, protocol, prior, Judges(), METRICS, listeners=listeners)
    assert sorted(made) == [False] * 3 + [True] and content(found.folder) == content(whole)


def test_a_worker_that_was_replaced_does_not_publish(tmp_path):
    store = Store(f"local://{tmp_path}")
    first = store.claim("cell")
    assert first.holds
    second = store.claim("cell")
    assert second.holds and not first.holds


@pytest.mark.parametrize(
    ("machine", "process", "age", "free"),
    [
        (platform.node(), os.getppid(), 0.0, False),
        (platform.node(), 2**22 + 1, 0.0, True),  # no process has this number
        ("elsewhere", 1, 0.0, False),
        ("elsewhere", 1, LEASE_SECONDS + 1, True),
    ],
)
def test_one_process_at_a_time_is_in_charge_of_a_shared_folder(machine, process, age, free, tmp_path):
    store = Store(f"local://{tmp_path}")
    lease = {"machine": machine, "process": process, "time": time.time() - age}
    store.write("driver.json", json.dumps(lease, allow_nan=False).encode())
    refused = pytest.raises(ValueError, match=f"another process .{process} on {machine}. is at work in local://")
    with contextlib.nullcontext() if free else refused, store.leased():
        assert json.loads(store.read("driver.json") or b"")["process"] == os.getpid()
    assert (store.read("driver.json") is None) == free
