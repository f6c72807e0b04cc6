"""Observers see a run without changing it; what they do change is recorded, and a resumed run repeats it."""

import dataclasses
import shutil
import time
from dataclasses import replace

import pytest
import torch

from distill3d.distill.changes import Change, changeable, changed
from distill3d.distill.objects import object_run
from distill3d.distill.observer import Observer, Steering
from distill3d.distill.recipes import DISTILL, LAPTOP, ViewSampling
from distill3d.distill.regularizers import WeightSchedule
from distill3d.export.options import ExportOptions
from distill3d.objectives import BSD, CFD, DSD, SDI, VSD, sds
from distill3d.priors.loading import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import Config, generate
from distill3d.runs.watching import Watching, read_changes
from distill3d.scenes import VoxelOptions

EXPORT = ExportOptions(texture=16, resolution=16, fit=0, faces=200)
SMALL = replace(
    DISTILL,
    steps=5,
    views=2,
    frames=2,
    scene=replace(DISTILL.scene, resolution=12),
    objective=SDI(inversion_steps=2),
    export=EXPORT,
)
SAMPLED = replace(
    LAPTOP,
    steps=6,
    views=2,
    frames=2,
    scene=VoxelOptions(resolution=12),
    objective=CFD(scale=3.0),
    sampling=ViewSampling(((4, 10.0, 0.0), (4, 30.0, 45.0)), group=8, joint_levels=2, levels=3, first=0.34, hull=False),
    export=EXPORT,
)


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(kl_folder)


@pytest.fixture(scope="module")
def views_prior(views_folder):
    return load_prior(views_folder)


def train(prior, folder, *observers, recipe=SMALL):
    """Trains in the folder, from its checkpoint if there is one; returns the parameters and how the training ended."""
    run = object_run(recipe, ViewPrompts("a cat"), prior, seed=1)
    folder.mkdir(exist_ok=True)
    watching = Watching(run, folder, observers)
    training = RunFolder(folder).train(run, recipe.steps, watching=watching)
    watching.end()
    return run.scene.raw.detach(), training


def numbers(folder):
    """The log without the seconds, and without evaluations: DSD samples a trajectory again where it goes on."""
    return [{k: v for k, v in step.items() if k not in ("seconds", "nfe")} for step in RunFolder(folder).history()]


class Spy(Observer):
    """Looks at everything that there is to see."""

    def __init__(self):
        self.seen, self.heard, self.calls = {}, [], []

    def start(self, run, folder, step):
        self.calls.append(("start", step))

    def wants(self, step):
        return True

    def see(self, step, views):
        x0 = None if views.x0_images is None else views.x0_images()
        self.seen[step] = (views, views.target_images(), x0)

    def after(self, progress):
        self.heard.append(progress)

    def end(self):
        self.calls.append(("end",))


class Script(Observer):
    """Asks for something after single steps."""

    def __init__(self, **steerings):
        self.steerings = {int(name[1:]): list(value) for name, value in steerings.items()}

    def after(self, progress):
        left = self.steerings.get(progress.step, [])
        return left.pop(0) if left else None


@pytest.mark.parametrize("kind", ["distilled", "sampled"])
def test_a_run_is_the_same_under_observation(kind, prior, views_prior, tmp_path):
    used, recipe = (prior, SMALL) if kind == "distilled" else (views_prior, SAMPLED)
    spy = Spy()
    alone, _ = train(used, tmp_path / "alone", recipe=recipe)
    observed, _ = train(used, tmp_path / "observed", spy, recipe=recipe)
    assert numbers(tmp_path / "alone") == numbers(tmp_path / "observed")
    assert torch.equal(alone, observed)
    steps = list(range(recipe.steps))
    assert spy.calls == [("start", 0), ("end",)] and [p.step for p in spy.heard] == list(spy.seen) == steps
    for step, (views, target, x0) in spy.seen.items():
        assert views.images.shape == target.shape == x0.shape == (2, 3, 16, 16) and len(views.cameras) == 2
        assert not views.images.requires_grad and float(target.min()) >= 0 and float(x0.max()) <= 1
        penalty = sum(float(term) for term in views.penalties.values())
        assert penalty == pytest.approx(spy.heard[step].penalty, rel=1e-5)
    if kind == "distilled":  # SDI pulls each view to its estimate
        assert torch.allclose(target, x0, atol=1e-4)


def test_nobody_is_shown_what_nobody_wants(prior, tmp_path):
    class Sometimes(Spy):
        def wants(self, step):
            return step % 2 == 1

    spy = Sometimes()
    train(prior, tmp_path, spy, Script())
    assert list(spy.seen) == [1, 3] and len(spy.heard) == 5


CHANGES = dict(
    s0=[Steering({"objective.scale": 30.0})],
    s2=[Steering({"penalties.opaque": 4.0, "objective.scale": 2.0})],
)
RECORD = [(1, "objective.scale", 30.0), (3, "penalties.opaque", 4.0), (3, "objective.scale", 2.0)]


@pytest.mark.filterwarnings("ignore:.* teach the student little")
@pytest.mark.parametrize(
    "objective",
    [SDI(inversion_steps=2), SDI(noise="fixed_point", inversion_steps=2), CFD(noise="surface"), DSD(), VSD(), "views"],
    ids=lambda objective: objective if isinstance(objective, str) else type(objective).__name__,
)
def test_changes_are_recorded_and_a_resumed_run_repeats_them(objective, prior, views_prior, tmp_path):
    if isinstance(objective, VSD):
        pytest.importorskip("peft")
    used, recipe = (views_prior, SAMPLED) if objective == "views" else (prior, replace(SMALL, objective=objective))
    live, _ = train(used, tmp_path / "live", Script(**CHANGES), recipe=recipe)
    plain, _ = train(used, tmp_path / "plain", recipe=recipe)
    assert not torch.equal(live, plain)
    assert [dataclasses.astuple(change) for change in read_changes(tmp_path / "live")] == RECORD
    # Stopped with a checkpoint after the changes, and with one before most of them.
    _, ended = train(used, tmp_path / "after", Script(**CHANGES, s3=[Steering(stop=True)]), recipe=recipe)
    assert ended.steps == 4 and not ended.interrupted
    train(used, tmp_path / "before", Script(s0=[Steering(stop=True)]), recipe=recipe)
    shutil.copy(tmp_path / "live" / "changes.jsonl", tmp_path / "before")
    for name in ("after", "before"):
        resumed, _ = train(used, tmp_path / name, recipe=recipe)
        assert numbers(tmp_path / name) == numbers(tmp_path / "live")
        assert torch.equal(resumed, live)


def test_a_stopped_run_is_kept_as_a_finished_one(kl_folder, tmp_path):
    config, spy = Config("a cat", SMALL, prior=str(kl_folder), dtype="float32"), Spy()
    result = generate(config, tmp_path, observers=(Script(s1=[Steering(stop=True)]), spy))
    assert [progress.step for progress in spy.heard] == [0, 1]  # the last step is shown to all
    assert result.steps == 2 and result.interrupted == 0 and spy.calls == [("start", 0), ("end",)]
    assert {"preview.png", "turntable.mp4", "checkpoint"} <= {path.name for path in result.folder.iterdir()}


def test_a_pause_changes_nothing_and_its_time_does_not_count(prior, tmp_path):
    class Pause(Spy):
        def after(self, progress):
            super().after(progress)
            if progress.step == 1 and len(self.heard) < 6:
                time.sleep(0.5)
                return Steering(again=True)
            return None

    spy = Pause()
    began = time.monotonic()
    paused, training = train(prior, tmp_path / "paused", spy)
    assert training.seconds < time.monotonic() - began - 1.5  # four pauses of half a second
    assert [p.step for p in spy.heard] == [0, 1, 1, 1, 1, 1, 2, 3, 4]
    assert torch.equal(paused, train(prior, tmp_path / "straight")[0])


@pytest.mark.parametrize("method", ["start", "wants", "see", "after", "end"])
def test_an_observer_that_fails_is_dropped(method, prior, tmp_path):
    def fail(self, *args):
        raise RuntimeError("the browser is gone")

    broken, spy = type("Broken", (Spy,), {method: fail})(), Spy()
    with pytest.warns(UserWarning, match="Broken failed and is switched off, the run goes on: the browser is gone"):
        _, training = train(prior, tmp_path, broken, spy)
    assert training.steps == len(spy.heard) == len(spy.seen) == 5


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("steps", 3.0, "no setting 'steps' that can change; it has objective.scale, penalties.sparsity"),
        ("penalties.smooth_shape", 1.0, "no setting 'penalties.smooth_shape'"),  # of surfaces
        ("penalties.opaque", -1.0, "at least 0"),
        ("objective.scale", float("nan"), "finite number"),
    ],
)
def test_what_a_run_does_not_have_is_not_changed(setting, value, reason, prior, tmp_path):
    with pytest.warns(UserWarning, match=f"{setting} was not changed: .*{reason}"):
        _, training = train(prior, tmp_path, Script(s0=[Steering({setting: value})]))
    assert training.steps == 5 and not read_changes(tmp_path)


@pytest.mark.parametrize("line", ['{"step": 1', '{"step": 1, "setting": "steps", "value": 2.0}', "[]"])
def test_a_damaged_record_is_an_error(line, prior, tmp_path):
    (tmp_path / "changes.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"changes\.jsonl (cannot be read|does not fit)"):
        train(prior, tmp_path)


def test_settings_are_a_function_of_the_step():
    changes = [Change(3, "objective.scale", 9.0), Change(1, "objective.scale", 2.0), Change(1, "penalties.opaque", 0.5)]
    assert [changed(SMALL, changes, step).objective.scale for step in range(5)] == [7.5, 2.0, 2.0, 9.0, 9.0]
    recipe = changed(SMALL, changes, 1)
    assert recipe.penalties == replace(SMALL.penalties, opaque=WeightSchedule(0.5, 0.5))
    assert changed(SMALL, changes, 0) == SMALL


def test_only_methods_with_a_guidance_scale_can_change_it():
    for objective in (BSD(), sds()):
        assert changeable(replace(SMALL, objective=objective), {"opaque"}) == ("penalties.opaque",)
    assert changeable(SMALL, {"opaque", "sparsity"}) == ("objective.scale", "penalties.sparsity", "penalties.opaque")
