"""2D against DDIM: cached noise is DDIM, files belong to their settings, an interrupt loses nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from distill3d.bench.paper.images import DISTANCE, Sample, Study, make_table, read_sample, run_study, score_rows
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.priors.loading import load_prior


def study(folder, **changes):
    return dataclasses.replace(Study(("a cat",), steps=4, prior=str(folder)), **changes)


def test_the_papers_settings():
    rows = {row.name: row for row in Study(("a cat",), scale=7.5).rows}
    assert rows["DDIM"].recipe.steps == rows["SDI, cached noise"].recipe.steps == 50
    cached, inverted = rows["SDI, cached noise"].recipe, rows["SDI, DDIM inversion"].recipe
    assert (cached.rate, inverted.rate) == (None, None)  # targets taken whole
    sdi = inverted.objective
    assert sdi.inversion_scale == -7.5 and sdi.inversion_steps == 10 and not sdi.nominal and inverted.project
    assert rows["SDI, nominal guidance"].recipe.objective.nominal
    assert {row.recipe.objective.scale for row in rows.values()} == {7.5, 100}
    half = {row.name: row.recipe.steps for row in Study(("a cat",), steps=25).rows}
    assert half["SDI, DDIM inversion"] == 20 and half["SDS, scale 5"] == 200


def test_cached_noise_is_ddim_and_nothing_is_made_twice(kl_folder, tmp_path):
    prior, made = load_prior(str(kl_folder)), []

    def stop(row, prompt, new):
        made.append((row.name, new))
        if len(made) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, study(kl_folder), prior, None, stop)
    made.clear()
    found = run_study(tmp_path, study(kl_folder), prior, None, lambda row, prompt, new: made.append((row.name, new)))
    assert [new for _, new in made] == [False] * 3 + [True] * 7
    distance = {row: found.table.values[row, DISTANCE.name].mean for row in found.made}
    assert distance["DDIM"] == 0 and max(distance["SDI, cached noise"], distance["CFD, constant noise"]) < 1e-8
    assert min(distance["DDIM, another seed"], distance["SDS, scale 100"]) > 1e-4
    assert {"table.md", "table.tex", "table.csv", "images.csv"} <= {p.name for p in tmp_path.iterdir()}

    path = next((tmp_path / "images").iterdir())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="delete it to make it again"):
        read_sample(path)


def test_other_settings_are_other_files(kl_folder):
    one = study(kl_folder)
    keys = [
        other.key(row, "a cat")
        for other in (one, study(kl_folder, seed=1), study(kl_folder, scale=2.0), study(kl_folder, steps=5))
        for row in (*other.rows[:4], *other.references)
    ]
    assert len(set(keys)) == len(keys)
    assert one.key(one.rows[0], "a dog") != one.key(one.rows[0], "a cat")
    assert study(kl_folder, prompts=("a cat", "a dog")).key(one.rows[0], "a cat") == one.key(one.rows[0], "a cat")


def test_images_that_are_not_finite_are_counted_and_left_out(randn):
    two = Study(("a red mushroom", "a blue car"))
    sample = Sample(randn(3, 64, 64).float().sigmoid(), 1.0, 10)
    broken = dataclasses.replace(sample, image=sample.image * math.nan)
    made = {row.name: [sample, sample] for row in two.rows} | {"SDS, scale 100": [broken, sample]}
    reference, judge = [torch.stack([sample.image] * 2)] * 2, ToyboxJudge()
    table = make_table(two, made, score_rows(two, made, reference, judge), reference, judge)
    assert table.counts["SDS, scale 100"] == (1, 2) and table.counts["DDIM"] == (0, 2)
    assert table.values["SDS, scale 100", "clip_score"].n == 1
    assert table.values["DDIM", "sharpness"].mean == pytest.approx(1)
    assert ("DDIM", "kernel") in table.values and ("SDS, scale 100", "kernel") not in table.values


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompts": ()}, "at least one prompt"), ({"steps": 0}, "at least one step"), ({"scale": math.nan}, "finite")],
)
def test_mistakes_are_value_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        study("toybox", **changes)


def test_a_scale_of_100_is_one_row():
    names = [row.name for row in Study(("a cat",), scale=100.0).rows]
    assert len(set(names)) == len(names) == 7


def test_a_reference_that_is_no_number_is_left_out(kl_folder, tmp_path):
    one, prior = study(kl_folder, steps=1), load_prior(str(kl_folder))
    run_study(tmp_path, one, prior, None)
    path = tmp_path / "images" / one.key(one.references[0], "a cat")
    with np.load(path) as saved:
        broken = {"image": np.full_like(saved["image"], np.nan), "cost": saved["cost"]}
    np.savez(path, **broken)
    table = run_study(tmp_path, one, prior, ToyboxJudge()).table
    assert all(math.isfinite(estimate.mean) for estimate in table.values.values())
