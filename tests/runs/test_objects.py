"""Every method of the family makes an object, through the same path, with a random model of toy size."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from distill3d.export.options import ExportOptions
from distill3d.runs.objects import Config, generate, load_scene, resume
from distill3d.distill.recipes import LAPTOP, METHODS, SDI

SMALL = dataclasses.replace(
    LAPTOP,
    steps=4,
    views=2,
    frames=2,
    scene=dataclasses.replace(LAPTOP.scene, resolution=12),
    sdi=SDI(inversion_steps=2),
    export=ExportOptions(texture=64, resolution=32, fit=1),
)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_field_and_stays_finite(method, kl_folder, tmp_path):
    if method in ("vsd", "esd"):
        pytest.importorskip("peft")
    result = generate(Config("a cat", SMALL, method, str(kl_folder)), tmp_path)
    scene = load_scene(result.folder)
    assert result.steps == 4 and not result.interrupted
    assert bool(torch.isfinite(scene.raw).all())
    assert scene.raw.shape[0] == SMALL.scene.resolution_at(1) == 18  # refined on the way
    assert float(scene.raw[..., 1:].detach().abs().max()) > 0.1  # colors start from 0
    assert lines(result.folder)[-1]["nfe"] >= 4 * 2 * 2


def test_an_interrupted_run_with_a_student_continues_to_the_same_end(kl_folder, tmp_path):
    pytest.importorskip("peft")

    def stop(progress):
        if progress.step == 1:
            raise KeyboardInterrupt

    config = Config("a cat", SMALL, "vsd", str(kl_folder))
    whole = generate(config, tmp_path)
    part = generate(config, tmp_path, on_step=stop)
    assert part.interrupted and part.steps == 2
    # A killed run may have written lines after its last checkpoint: they are made again, not twice.
    with (part.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 2, "loss": 0.0}) + "\n")
    resume(part.folder)
    assert [line["loss"] for line in lines(part.folder)] == [line["loss"] for line in lines(whole.folder)]
    assert [line["nfe"] for line in lines(part.folder)] == [line["nfe"] for line in lines(whole.folder)]
    assert torch.equal(load_scene(part.folder).raw, load_scene(whole.folder).raw)


def test_ctrl_c_within_a_step_is_heard_at_its_end(kl_folder, tmp_path, monkeypatch):
    """Halfway through a step noise is drawn and the field may be hardened: neither may happen twice."""
    recipe = dataclasses.replace(SMALL, scene=dataclasses.replace(SMALL.scene, harden=((0.5, 1.5),)))
    config = Config("a cat", recipe, "sdi", str(kl_folder))
    whole = generate(config, tmp_path)
    prior, steps = config.load_prior(), []
    encode = prior.encode

    def pressed(picture):
        if len(steps) == 2:  # in the third step, which hardens
            os.kill(os.getpid(), signal.SIGINT)
        return encode(picture)

    monkeypatch.setattr(prior, "encode", pressed)
    part = generate(config, tmp_path, on_step=steps.append, prior=prior)
    assert part.interrupted and part.steps == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resume(part.folder)
    assert lines(part.folder) == lines(whole.folder)
    assert torch.equal(load_scene(part.folder).raw, load_scene(whole.folder).raw)


def test_a_second_ctrl_c_does_not_wait(kl_folder, tmp_path, monkeypatch):
    config = Config("a cat", SMALL, "sds", str(kl_folder))
    prior = config.load_prior()

    def pressed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(prior, "encode", pressed)
    part = generate(config, tmp_path, prior=prior)
    assert part.interrupted and part.steps == 0 and (part.folder / "preview.png").is_file()
