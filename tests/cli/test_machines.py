"""--workers, --ray and addresses: what is wrong is one line and status 2, and a prompt file is made once."""

import json
import socket

import pytest

from distill3d.cli import main as cli
from distill3d.priors.base import FrozenPrior
from distill3d.workers import ray_cluster, store
from distill3d.workers.store import Store, place_of

BENCH = ["bench", "--methods", "sdi", "--prompts", "a red mushroom"]
TINY = [
    "--prior",
    "toybox",
    "--recipe",
    "distill",
    "--dtype",
    "float32",
    "--method",
    "sds",
    "--steps",
    "1",
    "--views-per-step",
    "1",
]
TINY += ["--frames", "2", "--texture-size", "16", *("--set", "scene.resolution=12", "--set", "export.fit=0")]


def refused(words, capsys):
    """The one line that a command ends with."""
    assert cli.run(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--workers", "2", "--ray", "auto"], "--ray and --workers exclude each other"),
        (["--gpus-per-cell", "0.5"], "--gpus-per-cell is for --ray"),
        (["--ray", "auto", "--gpus-per-cell", "1.5"], "--gpus-per-cell must be a fraction such as 0.25, or whole GPUs"),
        (["--ray", "nowhere"], "--ray needs auto or the address of a head node, such as 10.0.0.5:6379, got 'nowhere'"),
        (["--ray", "127.0.0.1:1"], "the Ray cluster 127.0.0.1:1 cannot be reached (ConnectionRefusedError"),
    ],
)
def test_what_is_wrong_with_machines_is_one_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: name)  # as if it were installed: it is not needed
    assert line in refused([*BENCH, "--out", str(tmp_path), *words], capsys)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--at-once", "0"], "--at-once must be at least 1, got 0"),
        (["--at-once", "2", "--workers", "2"], "--at-once is for the objects of one process"),
        (
            ["--at-once", "2", "--method", "vsd"],
            "vsd and esd train a network for each object, so they cannot share its calls",
        ),
        (["--at-once", "2", "--log", "tensorboard"], "--log and --view are for one object at a time"),
    ],
)
def test_what_is_wrong_with_objects_at_once_is_one_line(words, line, tmp_path, capsys):
    assert line in refused(["generate", "a red mushroom", "--out", str(tmp_path), *words], capsys)
    assert not any(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer_has_a_time_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: name)
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 0.2)
    with socket.socket() as silent:  # its queue is full: nobody is let in, nobody is turned away
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        address = "{}:{}".format(*silent.getsockname())
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(silent.getsockname())
        line = refused([*BENCH, "--out", str(tmp_path), "--ray", address], capsys)
        for one in waiting:
            one.close()
    assert f"the Ray cluster {address} cannot be reached (TimeoutError" in line


def test_ray_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    line = refused([*BENCH, "--out", str(tmp_path), "--ray", "auto"], capsys)
    assert 'pip install "distill3d[ray]"' in line
    monkeypatch.setattr(store, "find_spec", lambda name: None)
    assert "pip install s3fs" in refused([*BENCH, "--out", "s3://bucket/folder"], capsys)


@pytest.mark.parametrize("address", ["local:///proc/nothing/here", "nonsense://bucket/folder"])
def test_a_place_that_cannot_be_written_is_one_line(address, capsys):
    line = refused([*BENCH, "--out", address], capsys)
    assert address in line and ("cannot write to" in line or "cannot be used" in line)


def test_addresses_and_folders_are_told_apart(tmp_path):
    assert place_of("s3://bucket/folder/") == "s3://bucket/folder"
    assert place_of(f"file://{tmp_path}") == tmp_path == place_of(str(tmp_path))


def test_a_prompt_file_is_made_once_by_workers_and_on_an_address(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red mushroom\na blue car\n")
    words, runs = ["generate", f"@{prompts}", *TINY], tmp_path / "runs"
    assert cli.run([*words, "--workers", "2", "--out", str(runs)]) == 0
    assert capsys.readouterr().out.count(" | ") == 4
    made = {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    assert len(made) == 2 and all(json.loads((runs / name / "result.json").read_text())["steps"] == 1 for name in made)
    assert cli.run([*words, "--workers", "2", "--out", str(runs)]) == 0
    assert made == {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}

    address = f"memory://{tmp_path}/runs"
    assert cli.run([*words, "--at-once", "1", "--out", address]) == 0  # as the workers: the same bits
    assert sorted(made) == Store(address).names(), "the names are those of the folder, and no work is left"
    for name in made:
        assert Store(address).read(f"{name}/preview.png") == (runs / name / "preview.png").read_bytes()


def test_a_prompt_file_is_made_together(tmp_path, capsys, monkeypatch):
    prompts, calls, predict = tmp_path / "prompts.txt", [], FrozenPrior.predict
    prompts.write_text("a red mushroom\na blue car\n")
    monkeypatch.setattr(
        FrozenPrior, "predict", lambda prior, x, t, condition: calls.append(len(x)) or predict(prior, x, t, condition)
    )
    assert cli.run(["generate", f"@{prompts}", *TINY, "--out", str(tmp_path / "runs")]) == 0
    assert calls == [4] and capsys.readouterr().out.count("done after") == 2
