"""One cell: it is whole or not there, goes on after an interrupt, and a failure is an outcome."""

import dataclasses
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from distill3d.bench.cells import make_cell, read_maps, read_outcome, read_views
from distill3d.bench.judging import Judges, choose_metrics, find_judges, score
from distill3d.bench.protocol import Protocol, Variant
from distill3d.distill.recipes import DISTILL
from distill3d.objectives import SDI, SDS
from distill3d.priors.loading import load_prior
from distill3d.runs.folder import RunFolder

SMALL = dataclasses.replace(
    DISTILL, steps=4, views=1, scene=dataclasses.replace(DISTILL.scene, resolution=12), objective=SDI(inversion_steps=2)
)


def protocol(folder, recipe=SMALL):
    return Protocol((Variant("sdi", recipe),), ("a cat",), prior=str(folder), views=4, size=16)


def silent(progress):
    pass


@pytest.fixture(scope="module")
def finished(kl_folder, tmp_path_factory):
    """(protocol, folder of the bench, outcome) of one cell."""
    out = tmp_path_factory.mktemp("bench")
    whole = protocol(kl_folder)
    return whole, out, make_cell(out, whole, whole.tasks()[0], load_prior(str(kl_folder)), silent)


def test_a_cell_holds_its_pictures_and_what_it_took(finished):
    whole, out, outcome = finished
    folder = out / "cells" / whole.tasks()[0].folder
    assert not list((out / "work").iterdir()) and read_outcome(folder) == outcome
    assert outcome.steps == 4 and not outcome.failure and outcome.peak_memory > 2**20
    lines = RunFolder(folder).history()
    assert lines[-1]["nfe"] == outcome.nfe > 0
    assert lines[-1]["seconds"] == outcome.seconds >= lines[0]["seconds"] > 0
    views, (opacity, depth) = read_views(folder, whole), read_maps(folder)
    assert views.shape == (4, 3, 16, 16) and opacity.shape == depth.shape == (4, 1, 16, 16)
    assert float(views.std()) > 0.01
    # Where nothing is hit the picture is its background, to the rounding of both to 8 bits.
    empty = (opacity == 0).expand_as(views)
    if empty.any():
        assert float((views[empty] - whole.background).abs().max()) < 2 / 255


def test_the_same_task_gives_the_same_pictures(finished, kl_folder, tmp_path):
    whole, out, _ = finished
    task = whole.tasks()[0]
    make_cell(tmp_path, whole, task, load_prior(str(kl_folder)), silent)
    for name in ("views.png", "maps.npz", "turn.webp"):
        assert (tmp_path / "cells" / task.folder / name).read_bytes() == (
            out / "cells" / task.folder / name
        ).read_bytes()


def test_an_interrupted_cell_goes_on_where_it_was(finished, kl_folder, tmp_path):
    whole, out, _ = finished
    task, prior = whole.tasks()[0], load_prior(str(kl_folder))
    seen = []

    def stop(progress):
        seen.append(progress.step)
        if progress.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cell(tmp_path, whole, task, prior, stop)
    assert read_outcome(tmp_path / "cells" / task.folder) is None
    make_cell(tmp_path, whole, task, prior, lambda progress: seen.append(progress.step))
    assert seen == [0, 1, 2, 3]  # none twice
    for name in ("views.png", "maps.npz"):
        assert (tmp_path / "cells" / task.folder / name).read_bytes() == (
            out / "cells" / task.folder / name
        ).read_bytes()
    assert [line["step"] for line in RunFolder(tmp_path / "cells" / task.folder).history()] == [0, 1, 2, 3]


def test_a_cell_that_was_killed_before_it_was_moved_is_not_made_again(finished, kl_folder, tmp_path):
    whole, out, outcome = finished
    task = whole.tasks()[0]
    shutil.copytree(out / "cells" / task.folder, tmp_path / "work" / task.folder)
    assert make_cell(tmp_path, whole, task, load_prior(str(kl_folder)), lambda progress: 1 / 0) == outcome
    assert read_outcome(tmp_path / "cells" / task.folder) == outcome and not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("name", ["checkpoint/scene.safetensors", "checkpoint/state.json", "metrics.jsonl"])
def test_a_cell_whose_checkpoint_or_log_is_damaged_is_made_again(name, finished, kl_folder, tmp_path):
    whole, out, _ = finished
    task, prior, seen = whole.tasks()[0], load_prior(str(kl_folder)), []

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cell(tmp_path, whole, task, prior, stop)
    path = tmp_path / "work" / task.folder / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"damaged.*made again from its first step"):
        make_cell(tmp_path, whole, task, prior, lambda progress: seen.append(progress.step))
    assert seen == [0, 1, 2, 3]
    for picture in ("views.png", "maps.npz"):
        assert (tmp_path / "cells" / task.folder / picture).read_bytes() == (
            out / "cells" / task.folder / picture
        ).read_bytes()


def test_ctrl_c_within_a_step_of_a_cell_is_heard_at_its_end(finished, kl_folder, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent process may have ignored it
    whole, out, _ = finished
    task, prior, seen = whole.tasks()[0], load_prior(str(kl_folder)), []
    encode = prior.encode

    def pressed(picture):
        if len(seen) == 1:  # in the second step
            os.kill(os.getpid(), signal.SIGINT)
        return encode(picture)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prior, "encode", pressed)
        make_cell(tmp_path, whole, task, prior, lambda progress: seen.append(progress.step))
    assert seen == [0, 1]
    make_cell(tmp_path, whole, task, prior, lambda progress: seen.append(progress.step))
    assert seen == [0, 1, 2, 3]
    for name in ("views.png", "maps.npz"):
        assert (tmp_path / "cells" / task.folder / name).read_bytes() == (
            out / "cells" / task.folder / name
        ).read_bytes()


def test_numbers_that_are_not_finite_end_a_cell_as_diverged(kl_folder, tmp_path):
    broken, whole = load_prior(str(kl_folder)), protocol(kl_folder)
    with torch.no_grad():  # a file of such weights is refused
        next(broken.network.parameters()).fill_(torch.nan)
    outcome = make_cell(tmp_path, whole, whole.tasks()[0], broken, silent)
    assert outcome.failure == "nan" and outcome.steps == 0
    (cell,) = score(tmp_path, whole, Judges(), ("saturation", "diverged", "seconds"))
    assert cell.diverged and cell.scores["diverged"] == 1 and "saturation" not in cell.scores


def test_a_lattice_beyond_all_memory_is_recorded_as_such(kl_folder, tmp_path):
    scene = dataclasses.replace(SMALL.scene, refine=((0.5, 2e3),))
    whole = protocol(
        kl_folder, dataclasses.replace(SMALL, scene=scene, objective=SDS())
    )  # 24000^3 points: more than addresses reach
    outcome = make_cell(tmp_path, whole, whole.tasks()[0], load_prior(str(kl_folder)), silent)
    assert outcome.failure == "out of memory" and outcome.steps == 2
    assert read_outcome(tmp_path / "cells" / whole.tasks()[0].folder) == outcome


def test_scores_are_kept_until_what_they_depend_on_changes(finished):
    whole, out, _ = finished
    path = out / "cells" / whole.tasks()[0].folder / "scores.json"
    (first,) = score(out, whole, Judges(), ("saturation",))
    stamp = path.stat().st_mtime_ns
    (again,) = score(out, whole, Judges(), ("saturation",))
    assert again.scores == first.scores and path.stat().st_mtime_ns == stamp
    (more,) = score(out, whole, Judges(), ("saturation", "nfe"))
    assert more.scores["saturation"] == first.scores["saturation"] and "nfe" in more.scores
    score(out, whole, Judges(fingerprint="another"), ("saturation",))
    assert path.stat().st_mtime_ns > stamp


def test_metrics_are_those_that_can_be_measured(finished):
    whole, _, _ = finished
    assert "saturation" in choose_metrics(None, whole, Judges())
    assert "clip_score" not in choose_metrics("all", whole, Judges())
    toybox = dataclasses.replace(whole, prior="toybox", prompts=("a red mushroom", "a blue car"), seeds=(0, 1))
    judges = find_judges(toybox, None, None)
    assert {"clip_score", "sharpness", "diversity"} <= set(choose_metrics(None, toybox, judges))
    # What one prompt lacks others may have; five views see no back.
    mixed = dataclasses.replace(toybox, prompts=("a corgi", "a red mushroom"), views=5)
    assert {"sharpness", "chamfer"} <= set(choose_metrics("all", mixed, judges))
    assert "lost_back" in choose_metrics(None, toybox, judges) and "lost_back" not in choose_metrics(
        "all", mixed, judges
    )
    with pytest.raises(ValueError, match=r"unknown metric 'beauty'; allowed: .*diversity"):
        choose_metrics("saturation,beauty", whole, Judges())


def test_a_damaged_cell_is_told_in_one_line(finished, tmp_path):
    whole, out, _ = finished
    folder = tmp_path / "cell"
    shutil.copytree(out / "cells" / whole.tasks()[0].folder, folder)
    (folder / "views.png").write_bytes((folder / "views.png").read_bytes()[:50])
    (folder / "maps.npz").write_bytes(b"")
    (folder / "cell.json").write_text("{")
    for read in (lambda: read_views(folder, whole), lambda: read_maps(folder), lambda: read_outcome(folder)):
        with pytest.raises(ValueError, match="delete its folder"):
            read()


def test_a_score_without_a_value_is_null_on_disk_and_nan_again_when_read(finished, tmp_path):
    whole, out, _ = finished
    shutil.copytree(out / "cells", tmp_path / "cells")
    folder = tmp_path / "cells" / whole.tasks()[0].folder
    np.savez(
        folder / "maps.npz", opacity=np.zeros((4, 1, 16, 16), np.uint8), depth=np.zeros((4, 1, 16, 16), np.float16)
    )
    (folder / "cell.json").write_text(json.dumps(dataclasses.asdict(read_outcome(out / "cells" / folder.name))))
    (cell,) = score(tmp_path, whole, Judges(), ("warp_error",))
    assert math.isnan(cell.scores["warp_error"])
    assert json.loads((folder / "scores.json").read_text())["scores"]["warp_error"] is None
    stamp = (folder / "scores.json").stat().st_mtime_ns
    (again,) = score(tmp_path, whole, Judges(), ("warp_error",))
    assert math.isnan(again.scores["warp_error"]) and (folder / "scores.json").stat().st_mtime_ns == stamp
