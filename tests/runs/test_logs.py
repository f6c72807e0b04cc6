"""The logs for other programs, read back as those programs read them: the numbers of metrics.jsonl, and images."""

import dataclasses
import json
import shutil
import signal
import struct
import sys
from collections import defaultdict

import pytest
from PIL import Image

from distill3d.cli import main as cli
from distill3d.distill.loop import Progress
from distill3d.distill.recipes import DISTILL, LAPTOP, ViewSampling
from distill3d.distill.regularizers import WeightSchedule
from distill3d.export.options import ExportOptions
from distill3d.objectives import CFD, SDI, SDS
from distill3d.priors.loading import load_prior
from distill3d.runs.folder import RunFolder
from distill3d.runs.logs import LOGS, open_logs
from distill3d.runs.logs.wandb import mode
from distill3d.runs.objects import Config, generate, resume
from distill3d.scenes.voxels import VoxelOptions

EXPORT = ExportOptions(texture=16, resolution=16, fit=0, faces=200)
SMALL = dataclasses.replace(
    DISTILL, steps=4, views=2, frames=2, scene=VoxelOptions(resolution=12), objective=SDI(inversion_steps=2),
    penalties=dataclasses.replace(DISTILL.penalties, opaque=WeightSchedule(1.0, 1.0)), export=EXPORT,
)  # fmt: skip
SAMPLED = dataclasses.replace(
    LAPTOP, steps=4, views=2, frames=2, scene=VoxelOptions(resolution=12), objective=CFD(scale=3.0), export=EXPORT,
    sampling=ViewSampling(((4, 10.0, 0.0), (4, 30.0, 45.0)), group=8, joint_levels=2, levels=2, first=0.5, hull=False),
)  # fmt: skip
NUMBERS = {field.name for field in dataclasses.fields(Progress)} - {"step"}


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(kl_folder)


@pytest.fixture(autouse=True)
def not_logged_in(tmp_path, monkeypatch):
    """No account of whoever runs the tests is used."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))


def events(folder):
    """Scalars {name: {step: value}} and images {name: {step: (width, height)}} as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    tags = found.Tags()
    scalars = {name: by_step((e.step, e.value) for e in found.Scalars(name)) for name in tags["scalars"]}
    images = {name: by_step((e.step, (e.width, e.height)) for e in found.Images(name)) for name in tags["images"]}
    return scalars, images


def by_step(pairs):
    """A dict of the pairs; each step stands there once."""
    pairs = list(pairs)
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def history(folder):
    """What W&B recorded offline: {name: {step: value}} over all parts of a run, in the order of writing."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = defaultdict(dict)
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for content in records(path.read_bytes()):
            record = messages.Record.FromString(content)
            if record.WhichOneof("record_type") != "history":
                continue
            items: dict[str, object] = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                if inner:
                    items.setdefault(name, {})["/".join(inner)] = json.loads(item.value_json)
                else:
                    items[name] = json.loads(item.value_json)
            step = items.pop("_step")
            for name, value in items.items():
                found[name][step] = value
    return dict(found)


def records(data):
    """The records of a file in LevelDB's log format: blocks of 32 KiB, each piece with checksum, length and kind."""
    at, whole = 7, b""  # behind W&B's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_both_logs_have_the_numbers_of_every_step_and_images_of_some(prior, tmp_path):
    logs = open_logs(["tensorboard", "wandb", "wandb"], SMALL.steps, every=3)
    assert [log.name for log in logs] == ["tensorboard", "wandb"]
    # The target of SDI is its estimate; that of SDS, with its own weight, is not.
    recipe = dataclasses.replace(SMALL, objective=SDS())
    run = generate(Config("a cat", recipe), tmp_path, prior=prior, observers=logs).folder
    steps = RunFolder(run).history()
    scalars, images = events(run)
    recorded = history(run)
    assert scalars.keys() >= NUMBERS and recorded.keys() >= NUMBERS
    for name in NUMBERS:
        wanted = {step["step"]: pytest.approx(step[name], rel=1e-6) for step in steps}
        assert scalars[name] == wanted and recorded[name] == wanted
    assert scalars["penalties/opaque"].keys() == {0, 3} == recorded["penalties/opaque"].keys()
    size = prior.image_size
    shown = {0: (2 * size + 2, size), 3: (2 * size + 2, size)}  # two views side by side
    assert {name: images[name] for name in ("views", "targets", "x0")} == dict.fromkeys(
        ("views", "targets", "x0"), shown
    )
    assert images["preview"].keys() == {3}
    pictures = []
    for name in ("views", "targets", "x0"):
        assert recorded[name].keys() == {0, 3}
        (file,) = (run / "wandb").glob(f"offline-run-*/files/{recorded[name][3]['path']}")
        with Image.open(file) as picture:
            assert picture.size == shown[3]
            pictures.append(picture.tobytes())
    assert len(set(pictures)) == 3  # three things to see
    assert not (tmp_path / "wandb").exists()  # everything lies in the run's folder


def test_a_log_changes_nothing(prior, tmp_path):
    with_log = generate(Config("a cat", SMALL), tmp_path, prior=prior, observers=open_logs(["tensorboard"], 4, every=1))
    without = generate(Config("a cat", SMALL), tmp_path, prior=prior)
    lines = [
        [{k: v for k, v in step.items() if k != "seconds"} for step in RunFolder(run.folder).history()]
        for run in (with_log, without)
    ]
    assert lines[0] == lines[1] and with_log.mesh.read_bytes() == without.mesh.read_bytes()


def test_sampled_views_are_logged_from_the_first_step(views_folder, tmp_path):
    prior = load_prior(views_folder)
    logs = open_logs(["tensorboard"], SAMPLED.steps)
    run = generate(Config("a cat", SAMPLED), tmp_path, prior=prior, observers=logs).folder
    _, images = events(run)
    assert images["views"].keys() == images["targets"].keys() == {0, 1, 2, 3}


def numbers(run):
    """The losses of metrics.jsonl by step."""
    return {step["step"]: pytest.approx(step["loss"], rel=1e-6) for step in RunFolder(run).history()}


def test_a_run_that_is_interrupted_goes_on_in_the_same_logs(prior, tmp_path):
    def interrupt(progress):
        if progress.step == 1:
            signal.raise_signal(signal.SIGINT)

    logs = open_logs(LOGS, SMALL.steps)
    run = generate(Config("a cat", SMALL), tmp_path, prior=prior, on_step=interrupt, observers=logs).folder
    assert events(run)[0]["loss"] == numbers(run) == history(run)["loss"] and numbers(run).keys() == {0, 1}
    resume(run, prior=prior, observers=open_logs(LOGS, SMALL.steps))
    scalars, images = events(run)
    assert scalars["loss"] == numbers(run) == history(run)["loss"] and numbers(run).keys() == {0, 1, 2, 3}
    assert images["views"].keys() == {0, 1, 2, 3}
    parts = {path.stem for path in (run / "wandb").glob("offline-run-*/*.wandb")}
    assert parts == {f"run-{run.name}"}  # one id, so that W&B takes both parts as one run


def test_steps_that_a_killed_run_lost_are_shown_once(prior, tmp_path):
    """They were logged after its last checkpoint."""

    def keep(progress):
        if progress.step == 0:
            (folder,) = tmp_path.glob("*/checkpoint")
            shutil.copytree(folder, tmp_path / "kept")

    logs = open_logs(["tensorboard"], SMALL.steps)
    run = generate(Config("a cat", SMALL), tmp_path, prior=prior, on_step=keep, observers=logs).folder
    shutil.rmtree(run / "checkpoint")
    (tmp_path / "kept").rename(run / "checkpoint")
    resume(run, prior=prior, observers=open_logs(["tensorboard"], SMALL.steps))
    assert events(run)[0]["loss"] == numbers(run)


def test_images_on_the_way_of_an_image(kl_folder, tmp_path):
    words = [
        "--prior",
        str(kl_folder),
        "--steps",
        "3",
        "--log",
        "tensorboard",
        "--log",
        "wandb",
        "--out",
        str(tmp_path),
    ]
    assert cli.run(["image", "a red dot", *words]) == 0
    (run,) = (path.parent for path in tmp_path.glob("*/config.json"))
    scalars, images = events(run)
    size = load_prior(kl_folder).image_size
    assert scalars["t"].keys() == {0, 1, 2} and images["image"] == dict.fromkeys(range(3), (size, size))
    assert history(run)["image"].keys() == {0, 1, 2}


@pytest.mark.parametrize("command", ["generate", "image"])
@pytest.mark.parametrize("name", LOGS)
def test_a_missing_package_is_one_line_before_anything_runs(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert cli.run([command, "a red mushroom", "--log", name, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f'distill3d: --log {name} needs {name}: type  pip install "distill3d[log]"\n'
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown log 'mlflow'; allowed: tensorboard, wandb"):
        open_logs(["mlflow"], 10)
    with pytest.raises(ValueError, match="images are logged every 1 or more steps, got 0"):
        open_logs([], 10, every=0)


def test_nothing_leaves_the_machine_unless_the_user_is_logged_in(monkeypatch):
    pytest.importorskip("wandb")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    assert mode() == "online"
