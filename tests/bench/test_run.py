"""The loop: Ctrl-C leaves a report of what is there, and a bench can grow."""

import dataclasses
import re
import resource
import sys
from pathlib import Path

import pytest

from distill3d.bench.cells import read_outcome, write_outcome
from distill3d.bench.judging import Judges
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.run import Listeners, run_bench
from distill3d.distill.recipes import DISTILL
from distill3d.objectives import SDI, SDS, Objective, noise, prediction, reference, timesteps, weighting
from distill3d.priors.loading import load_prior

SMALL = dataclasses.replace(
    DISTILL, steps=3, views=1, scene=dataclasses.replace(DISTILL.scene, resolution=12), objective=SDI(inversion_steps=2)
)
METRICS = ("saturation", "nfe")


@pytest.fixture(scope="module")
def prior(kl_folder):
    return load_prior(str(kl_folder))


@pytest.fixture
def protocol(kl_folder):
    variants = (Variant("SDI", SMALL), Variant("SDI, unguided", dataclasses.replace(SMALL, objective=SDI(1.0))))
    return Protocol(variants, ("a cat",), prior=str(kl_folder), views=2, size=16)


def test_an_interrupt_leaves_a_report_and_the_rest_is_made_later(protocol, prior, tmp_path):
    def stop(task, progress):
        if task.variant.name != "SDI" and progress.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(tmp_path, protocol, prior, Judges(), METRICS, listeners=Listeners(on_step=stop))
    page = (tmp_path / "report.html").read_text()
    assert "So far 1 of 2 objects are finished" in page and "| SDI, unguided | - | - | 0 of 0 |" in table(tmp_path)

    made = []
    listeners = Listeners(on_cell=lambda task, outcome, new: made.append((task.variant.name, task.seed, new)))
    found = run_bench(tmp_path, protocol, prior, Judges(), METRICS, listeners=listeners)
    assert made == [("SDI", 0, False), ("SDI, unguided", 0, True)]
    assert len(found.cells) == 2 and "So far" not in found.report.read_text()

    made.clear()
    run_bench(tmp_path, dataclasses.replace(protocol, seeds=(0, 1)), prior, Judges(), METRICS, listeners=listeners)
    assert [seed for _, seed, new in made if new] == [1, 1]


@pytest.fixture
def limit():
    """limit(megabytes): how much more address space this process gets, or as much as it likes (None)."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def set_limit(megabytes):
        status = Path("/proc/self/status").read_text()
        size = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024
        soft = before[0] if megabytes is None else size + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_cell_without_memory_is_made_again_at_the_end_of_the_sweep(protocol, prior, tmp_path, limit):
    scene = dataclasses.replace(SMALL.scene, refine=((0.5, 12.0),))  # 144^3 points from the third step on
    big = Variant("big", dataclasses.replace(SMALL, scene=scene, objective=SDS()))
    protocol = dataclasses.replace(protocol, variants=(big, protocol.variants[0]))
    steps, made = [], []

    def on_step(task, progress):
        steps.append((task.variant.name, progress.step))
        limit(20 if len(steps) < 3 else None)

    def on_cell(task, outcome, new):
        made.append((task.variant.name, outcome.failure, new))

    run_bench(tmp_path, protocol, prior, Judges(), METRICS, listeners=Listeners(on_step, on_cell))
    assert made == [("SDI", "", True), ("big", "", True)]
    assert [name for name, _ in steps] == ["big"] * 2 + ["SDI"] * 3 + ["big"] * 3

    (folder,) = tmp_path.glob("cells/*big*")
    write_outcome(folder, dataclasses.replace(read_outcome(folder), failure="out of memory"))  # in an earlier call
    made.clear()
    run_bench(tmp_path, protocol, prior, Judges(), METRICS, listeners=Listeners(on_cell=on_cell))
    assert made == [("SDI", "", False), ("big", "", True)]


def test_a_folder_without_its_outcome_does_not_block_a_bench(protocol, prior, tmp_path):
    run_bench(tmp_path, protocol, prior, Judges(), METRICS)
    first = tmp_path / "cells" / protocol.tasks()[0].folder
    (first / "cell.json").unlink()
    found = run_bench(tmp_path, protocol, prior, Judges(), METRICS)
    assert len(found.cells) == 2 and (first / "cell.json").is_file()


def test_an_empty_volume_counts_as_diverged_whatever_is_measured(protocol, prior, tmp_path):
    scene = dataclasses.replace(SMALL.scene, blob_radius=0.01, blob_floor=40.0)
    empty = dataclasses.replace(SMALL, scene=scene, objective=SDS())
    nothing = dataclasses.replace(protocol, variants=(Variant("nothing", empty),))
    found = run_bench(tmp_path, nothing, prior, Judges(), METRICS)
    assert found.table.counts == {"nothing": (1, 1)} and "1 of 1" in table(tmp_path)
    assert not list(tmp_path.glob("cells/*/mesh.glb"))


def test_an_objective_of_ones_own_goes_through_a_bench(protocol, prior, tmp_path):
    """It is a row beside the others, and the folder is continued with the same value."""
    own = Objective(
        noise.gaussian(), timesteps.linear(0.9, 0.1), prediction.guided(3.0), reference.injected_noise,
        weighting.constant(1.0),
    )  # fmt: skip
    variants = (protocol.variants[0], Variant("mine", dataclasses.replace(SMALL, objective=own)))
    protocol = dataclasses.replace(protocol, variants=variants)

    def stop(task, progress):
        if task.variant.name == "mine" and progress.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(tmp_path, protocol, prior, Judges(), METRICS, listeners=Listeners(on_step=stop))
    steps = []
    listeners = Listeners(on_step=lambda task, progress: steps.append((task.variant.name, progress.step)))
    found = run_bench(tmp_path, protocol, prior, Judges(), METRICS, listeners=listeners)
    assert steps == [("mine", 2)] and len(found.cells) == 2 and "mine" in table(tmp_path)


def table(out):
    return re.sub(" +", " ", (out / "table.md").read_text())  # without the spaces that align columns
