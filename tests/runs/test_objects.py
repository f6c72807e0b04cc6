"""Every method makes an object through the same path, with a random model of toy size; so do a user's own parts."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from distill3d.distill.divergence import Diverged
from distill3d.distill.recipes import DISTILL, method_settings
from distill3d.export.options import ExportOptions
from distill3d.objectives import (
    CFD,
    METHODS,
    SDI,
    Objective,
    SDICached,
    noise,
    prediction,
    reference,
    timesteps,
    weighting,
)
from distill3d.priors.loading import load_prior
from distill3d.priors.mixture import MixturePrior
from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import Config, generate, load_scene, read_config, resume
from distill3d.types import Rendering, Scene, SceneOptions

SMALL = dataclasses.replace(
    DISTILL,
    steps=4,
    views=2,
    frames=2,
    scene=dataclasses.replace(DISTILL.scene, resolution=12),
    objective=SDI(inversion_steps=2),
    export=ExportOptions(texture=64, resolution=32, fit=1),
)


def config(folder, objective=SMALL.objective, **changes):
    recipe = dataclasses.replace(SMALL, objective=objective, **changes)
    return Config("a cat", recipe, prior=str(folder), dtype="float32")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """The log without the seconds, which differ from run to run."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines(folder)]


UNSUITED = ("rfds", "flowdreamer")  # for flow models


def stop_after(steps):
    def stop(progress):
        if progress.step == steps - 1:
            raise KeyboardInterrupt

    return stop


@pytest.mark.filterwarnings("ignore:.* teach the student little")
@pytest.mark.filterwarnings("ignore:toy reads the first")  # the negative words of NFSD, letter by letter
@pytest.mark.parametrize("method", [name for name in METHODS if name not in UNSUITED])
def test_every_method_moves_the_field_and_stays_finite(method, kl_folder, tmp_path):
    if method in ("vsd", "esd"):
        pytest.importorskip("peft")
    result = generate(config(kl_folder, method_settings(method)), tmp_path)
    scene = load_scene(result.folder)
    assert result.steps == 4 and not result.interrupted
    assert bool(torch.isfinite(scene.raw).all())
    assert scene.raw.shape[0] == SMALL.scene.resolution_at(1) == 18  # refined on the way
    assert float(scene.raw[..., 1:].detach().abs().max()) > 0.1  # colors start from 0
    assert lines(result.folder)[-1]["nfe"] >= 4 * 2 * 2


@pytest.mark.filterwarnings("ignore:.* teach the student little")
def test_an_interrupted_run_with_a_student_continues_to_the_same_end(kl_folder, tmp_path):
    pytest.importorskip("peft")
    whole = generate(config(kl_folder, METHODS["vsd"]), tmp_path)
    part = generate(config(kl_folder, METHODS["vsd"]), tmp_path, on_step=stop_after(2))
    assert part.interrupted and part.steps == 2
    # A killed run may have logged steps after its last checkpoint: they are taken again, not twice.
    with (part.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 2, "loss": 0.0}) + "\n")
    resume(part.folder)
    assert numbers(part.folder) == numbers(whole.folder)
    assert torch.equal(load_scene(part.folder).raw, load_scene(whole.folder).raw)


@pytest.mark.parametrize(
    "method",
    [SDICached(noise="surface", eta=0.3), CFD(noise="surface", refresh=0.1), SDICached(noise="camera")],
    ids=repr,
)
def test_an_interrupted_run_with_its_own_noise_continues_to_the_same_end(method, kl_folder, tmp_path):
    whole = generate(config(kl_folder, method), tmp_path)
    part = generate(config(kl_folder, method), tmp_path, on_step=stop_after(2))
    assert part.interrupted and part.steps == 2
    resume(part.folder)
    assert numbers(part.folder) == numbers(whole.folder)
    assert torch.equal(load_scene(part.folder).raw, load_scene(whole.folder).raw)


def test_ctrl_c_within_a_step_is_heard_at_its_end(kl_folder, tmp_path, monkeypatch):
    """Halfway through a step noise is drawn and the density may be scaled: neither may happen twice."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent process may have ignored it
    settings = config(kl_folder, scene=dataclasses.replace(SMALL.scene, density_gain=((0.5, 1.5),)))
    whole = generate(settings, tmp_path)
    prior, steps = load_prior(str(kl_folder)), []
    encode = prior.encode

    def pressed(image):
        if len(steps) == 2:  # in the third step, which scales the density
            os.kill(os.getpid(), signal.SIGINT)
        return encode(image)

    monkeypatch.setattr(prior, "encode", pressed)
    part = generate(settings, tmp_path, on_step=steps.append, prior=prior)
    assert part.interrupted and part.steps == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resume(part.folder)
    assert numbers(part.folder) == numbers(whole.folder)
    assert torch.equal(load_scene(part.folder).raw, load_scene(whole.folder).raw)


def test_a_second_ctrl_c_does_not_wait(kl_folder, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prior = load_prior(str(kl_folder))

    def pressed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(prior, "encode", pressed)
    part = generate(config(kl_folder, METHODS["sds"]), tmp_path, prior=prior)
    assert part.interrupted and part.steps == 0 and (part.folder / "preview.png").is_file()


def test_numbers_that_are_not_finite_end_a_run_and_leave_its_last_checkpoint(kl_folder, tmp_path, monkeypatch):
    prior, steps = load_prior(str(kl_folder)), []
    predict = prior.predict
    monkeypatch.setattr(prior, "predict", lambda *args: predict(*args) * (torch.nan if len(steps) == 2 else 1))
    with pytest.raises(Diverged, match="step 2"):
        generate(config(kl_folder, METHODS["sds"]), tmp_path, on_step=steps.append, prior=prior)
    (folder,) = tmp_path.iterdir()
    assert len(lines(folder)) == 2 and bool(load_scene(folder).raw.isfinite().all())


def test_a_folder_says_what_kind_of_run_it_is(kl_folder, tmp_path):
    settings = config(kl_folder)
    RunFolder(tmp_path).write_config("object", settings)
    assert read_config(tmp_path) == settings
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"kind": "image"}, "a run of kind 'image'; this needs one of kind 'object'"),
        ({"format": 99}, "has format 99"),
        ({"colour": 1}, "colour"),
        ({"seed": "x"}, "seed: .*a whole number is needed"),
        ({"recipe": content["recipe"] | {"scene": {"kind": "Sphere"}}}, "unknown kind 'Sphere'"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message) as error:
            read_config(tmp_path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match="not a run folder"):
        read_config(tmp_path)


class Ball(nn.Module, Scene):
    """A user's own scene: a disc of one color in the middle of every view, which is all that it can learn."""

    def __init__(self):
        super().__init__()
        self.color = nn.Parameter(torch.zeros(3))

    def render(self, cameras, size, background, *, generator=None, normals=False, lighting=None):
        axis = torch.linspace(-1, 1, size)
        opacity = (axis[:, None] ** 2 + axis**2 < 0.5).float().expand(len(cameras), 1, -1, -1)
        rgb = opacity * self.color.sigmoid().view(3, 1, 1) + (1 - opacity) * background.view(-1, 3, 1, 1)
        return Rendering(rgb, opacity, 2.8 * opacity, 0 * opacity)


@dataclasses.dataclass(frozen=True)
class BallOptions(SceneOptions):
    """Its options, for a recipe."""

    def build(self, device=None):
        return Ball()


def denoising(scale=3.0):
    """A user's own objective: SDS of weight 1 at annealed times."""
    return Objective(
        noise.gaussian(), timesteps.linear(0.9, 0.1), prediction.guided(scale), reference.injected_noise,
        weighting.constant(1.0),
    )  # fmt: skip


def own(mixture_prior, **changes):
    plain = dataclasses.replace(
        SMALL, scene=BallOptions(), objective=denoising(), penalties=type(SMALL.penalties)(), image_weight=0.0
    )
    return Config("red", dataclasses.replace(plain, **changes), prior=mixture_prior.name)


@pytest.fixture
def colors():
    """A prior whose images are all red, or all blue without a prompt: a mixture on 3 x 8 x 8 pixels."""
    means = torch.zeros(2, 3, 8, 8)
    means[0, 0], means[1, 2] = 1.0, 1.0
    return MixturePrior(means, stds=torch.tensor([0.2, 0.2]), conditions={"red": [0]})


def test_what_cannot_be_saved_in_its_folder_is_kept_elsewhere(colors, tmp_path):
    """A file where the checkpoint is to be written stands for a full disk."""

    def block(progress):
        if progress.step == 3:
            (folder,) = tmp_path.iterdir()
            (folder / "checkpoint.new").write_text("in the way")

    with pytest.raises(OSError, match=r"its 5 steps are kept in .*: type  distill3d resume") as caught:
        generate(own(colors, steps=5), tmp_path, prior=colors, on_step=block)
    assert "\n" not in str(caught.value)
    kept = Path(str(caught.value).rpartition(" ")[2])
    with pytest.warns(UserWarning, match="no mesh written"):
        assert resume(kept, prior=colors, scene=BallOptions(), objective=denoising()).steps == 5
        whole = generate(own(colors, steps=5), tmp_path / "whole", prior=colors)
    assert torch.equal(load_scene(kept, BallOptions()).color, load_scene(whole.folder, BallOptions()).color)
    shutil.rmtree(kept)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(colors, tmp_path):
    settings = own(colors, steps=5)
    with pytest.warns(UserWarning, match="no mesh written"):
        whole = generate(settings, tmp_path, prior=colors)
        parts = {"prior": colors, "scene": BallOptions(), "objective": denoising()}
        first = load_scene(whole.folder, BallOptions()).color
        shutil.rmtree(whole.folder / "checkpoint")
        with pytest.raises(ValueError, match="has no checkpoint to continue from"):  # it had one: steps are logged
            resume(whole.folder, **parts)
        (whole.folder / "metrics.jsonl").unlink()
        assert resume(whole.folder, **parts).steps == 5
    assert torch.equal(load_scene(whole.folder, BallOptions()).color, first)


@pytest.mark.parametrize("steps", [2, 4])
def test_files_are_named_before_they_are_made(steps, kl_folder, tmp_path):
    """Also where the run is interrupted before its last step."""
    there = {}

    def note(names):
        (folder,) = tmp_path.iterdir()
        there[names] = {path.name for path in folder.iterdir()} & {"preview.png", "turntable.mp4", "mesh.glb"}

    result = generate(config(kl_folder), tmp_path, on_step=stop_after(steps), on_file=note)
    assert result.steps == steps and result.mesh is not None
    assert list(there.items()) == [("preview and turntable", set()), ("3D file", {"preview.png", "turntable.mp4"})]


def test_a_run_whose_folder_was_removed_says_so_and_does_not_make_it_again(colors, tmp_path):
    def remove(progress):
        if progress.step == 3:
            shutil.rmtree(next(tmp_path.iterdir()))

    with pytest.raises(FileNotFoundError, match="the run folder was removed") as caught:
        generate(own(colors, steps=5), tmp_path, prior=colors, on_step=remove)
    assert not list(tmp_path.iterdir()) and "is kept" not in "".join(getattr(caught.value, "__notes__", ()))


def test_a_users_own_scene_objective_and_prior_go_through_generate_and_resume(colors, tmp_path):
    settings = own(colors, steps=30)
    with pytest.warns(UserWarning, match="no mesh written"):
        whole = generate(settings, tmp_path, prior=colors)
        part = generate(settings, tmp_path, prior=colors, on_step=stop_after(11))
    assert part.interrupted and part.steps == 11 and whole.mesh is None
    with pytest.raises(ValueError, match=r"pass the value to resume\(\)"):
        resume(part.folder, prior=colors)
    with pytest.warns(UserWarning, match="no mesh written"):
        resume(part.folder, prior=colors, scene=BallOptions(), objective=denoising())
    assert numbers(part.folder) == numbers(whole.folder)
    ball = load_scene(whole.folder, BallOptions())
    assert torch.equal(ball.color, load_scene(part.folder, BallOptions()).color)
    red, green, blue = ball.color.sigmoid().tolist()
    assert red > 0.6 > 0.5 > green and red > blue  # what the mixture draws for "red"
