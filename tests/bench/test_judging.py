"""Which metrics a bench can measure, and what is measured over several cells."""

import dataclasses

import numpy as np
import pytest
import torch

from distill3d.bench.cells import Outcome
from distill3d.bench.judging import DIVERSITY, Judges, Scored, diversities, find_judges, measurable
from distill3d.bench.protocol import Protocol, Variant
from distill3d.cameras import turntable
from distill3d.evaluation.evaluator import ToyboxJudge
from distill3d.evaluation.metrics import METRICS, RunResult
from distill3d.export.video import contact_sheet, save_image
from distill3d.meshes.mesh import Mesh

TOYS = Protocol((Variant("sdi"),), ("a red mushroom", "a blue car"), views=6, size=16)
JUDGED = find_judges(TOYS, None, None)


@pytest.mark.parametrize(
    ("protocol", "judges"),
    [
        (TOYS, JUDGED),
        (TOYS, Judges()),
        (TOYS, dataclasses.replace(JUDGED, evaluator=None)),
        (TOYS, Judges(ToyboxJudge(), lambda prompt: torch.rand(1, 3, 8, 8))),
        (dataclasses.replace(TOYS, prompts=("a red mushroom",)), JUDGED),
        (dataclasses.replace(TOYS, prompts=("a corgi", "a dog")), JUDGED),
        (dataclasses.replace(TOYS, views=5), JUDGED),  # none from behind
    ],
)
def test_what_is_announced_as_measurable_can_be_measured_and_nothing_else(protocol, judges):
    possible = set()
    for prompt in protocol.prompts:
        whole = RunResult(
            prompt,
            torch.rand(protocol.views, 3, 16, 16),
            turntable(protocol.views, 15.0, 2.8, 40.0),
            opacity=torch.ones(protocol.views, 1, 16, 16),
            depth=torch.ones(protocol.views, 1, 16, 16),
            mesh=Mesh(np.zeros((3, 3)), np.array([[0, 1, 2]])),
            evaluator=judges.evaluator,
            reference=judges.reference(prompt),
            prompts=protocol.prompts,
            seconds=1.0,
            nfe=1.0,
            peak_memory=1.0,
        )
        possible |= {name for name, metric in METRICS.items() if not whole.missing(metric)}
    assert set(measurable(protocol, judges)) == possible


def test_diversity_is_between_the_seeds_of_one_prompt_and_method(tmp_path):
    protocol = dataclasses.replace(TOYS, seeds=(0, 1))
    assert DIVERSITY.name in measurable(protocol, JUDGED) and DIVERSITY.name not in measurable(TOYS, JUDGED)
    cells, images = [], {}
    for i, task in enumerate(protocol.tasks()):
        images[task] = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(i // 3))
        images[task] = (images[task] * 255).round() / 255
        failure = "nan" if task.prompt == "a blue car" and task.seed == 1 else ""
        save_image(tmp_path / "cells" / task.folder / "views.png", contact_sheet(images[task], 10, gap=0))
        cells.append(Scored(task, Outcome("sdi", task.prompt, task.seed, 1, 1.0, 1, 0, failure), {}))
    found = diversities(tmp_path, protocol, JUDGED, cells)
    a, b = (JUDGED.evaluator.embed_images(images[task]) for task in protocol.tasks()[:2])
    assert found.keys() == {("a red mushroom", "sdi")}  # one seed of the car is no object
    assert found["a red mushroom", "sdi"] == pytest.approx(float((1 - (a * b).sum(1)).mean()), abs=1e-6)
