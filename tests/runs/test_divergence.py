"""Numbers that are not finite end a run at the step where they appear; its last finite state is kept and exported."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from distill3d.distill.divergence import Diverged
from distill3d.distill.image_recipes import ImageRecipe, image_recipe
from distill3d.distill.recipes import DISTILL, Penalties
from distill3d.distill.regularizers import WeightSchedule
from distill3d.objectives import SDS
from distill3d.priors.mixture import MixturePrior
from distill3d.runs import folder as run_folder
from distill3d.runs.images import ImageConfig, generate_image
from distill3d.runs.objects import Config, generate, load_scene, resume
from distill3d.types import Rendering, Scene, SceneOptions

NAN, STEPS, AT = torch.nan, 5, 2  # in the step with this number something is not finite


class Break(torch.autograd.Function):
    """The identity with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * NAN


class Sheet(nn.Module, Scene):
    """A square of one color in the middle of each view; `broken` says what is not finite, and in which step."""

    def __init__(self, broken, at):
        super().__init__()
        self.color = nn.Parameter(torch.zeros(3))
        self.broken, self.at, self.step = broken, at, 0

    def adapt(self, step, total, optimizer):
        self.step = step
        if self.broken == "parameter" and step == self.at:
            self.color.data[1] = NAN

    def render(self, cameras, size, background, *, generator=None, normals=False, lighting=None):
        now = self.broken if self.step == self.at and self.training else None
        color = Break.apply(self.color) if now == "update" else self.color
        shown = torch.zeros(size, size)
        shown[size // 4 : -size // 4, size // 4 : -size // 4] = 1
        opacity = shown.expand(len(cameras), 1, -1, -1)
        rgb = opacity * color.sigmoid().view(3, 1, 1) + (1 - opacity) * background.view(-1, 3, 1, 1)
        variance = opacity * (NAN if now == "penalty" else 0)
        return Rendering(rgb * NAN if now == "rendering" else rgb, opacity, 2.8 * opacity, variance)


@dataclasses.dataclass(frozen=True)
class SheetOptions(SceneOptions):
    broken: str = ""
    at: int = AT

    def build(self, device=None):
        return Sheet(self.broken, self.at)


@pytest.fixture
def prior():
    means = torch.zeros(2, 3, 8, 8)
    means[0, 0], means[1, 2] = 1.0, 1.0
    return MixturePrior(means, stds=torch.tensor([0.2, 0.2]), conditions={"red": [0]})


class Failing:
    """A prior that predicts NaN from the call with a number on, `calls` times."""

    def __init__(self, prior, first, calls=10**6):
        self._prior, self.first, self.last = prior, first, first + calls
        self.count = 0

    def __getattr__(self, name):
        return getattr(self._prior, name)

    def predict(self, *args):
        self.count += 1
        return self._prior.predict(*args) * (NAN if self.first < self.count <= self.last else 1)


def config(broken="", at=AT, seed=0, **changes):
    recipe = dataclasses.replace(
        DISTILL, steps=STEPS, views=1, frames=8, scene=SheetOptions(broken, at), objective=SDS(7.5), image_weight=0.0
    )
    changes = {"penalties": Penalties(z_variance=WeightSchedule(1.0, 1.0)), **changes}
    return Config("red", dataclasses.replace(recipe, **changes), prior="own", seed=seed)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    return [{name: line[name] for name in ("step", "t", "loss", "penalty", "nfe")} for line in lines(folder)]


@pytest.mark.filterwarnings("ignore:no mesh written")
@pytest.mark.parametrize(
    ("broken", "culprit", "advice"),
    [
        ("prediction", "the prediction of the network", "--dtype float32"),
        ("penalty", "the penalty z_variance", "--set penalties.z_variance.end"),
        ("rendering", "the rendering", "--learning-rate"),
        ("parameter", "the parameter scene.color", "--learning-rate"),
        ("update", "the parameter scene.color", "--learning-rate"),
    ],
)
def test_the_culprit_is_named_and_the_last_finite_state_is_kept_and_exported(broken, culprit, advice, prior, tmp_path):
    used = Failing(prior, AT) if broken == "prediction" else prior
    at = AT + (broken == "update")  # its gradient spoils the parameters, which the next step notices
    with pytest.raises(Diverged) as caught:
        generate(config(broken), tmp_path, prior=used)
    (folder,) = tmp_path.iterdir()
    error = caught.value
    assert (error.step, error.culprit) == (at, culprit) and advice in str(error)
    assert str(folder) in "".join(error.__notes__) and "\n" not in str(error)
    assert len(lines(folder)) == at and (folder / "preview.png").is_file()
    assert bool(load_scene(folder, SheetOptions()).color.isfinite().all())


@pytest.mark.filterwarnings("ignore:no mesh written")
@pytest.mark.parametrize("seconds", [0, 60])
def test_what_no_loss_shows_is_not_saved_over_a_good_checkpoint(prior, tmp_path, monkeypatch, seconds):
    """The last step spoils a parameter, and no step follows."""
    monkeypatch.setattr(run_folder, "CHECKPOINT_SECONDS", seconds)
    with pytest.raises(Diverged, match=r"in step 4 the parameter scene.color is not finite"):
        generate(config("update", at=STEPS - 1), tmp_path, prior=prior)
    (folder,) = tmp_path.iterdir()
    color = load_scene(folder, SheetOptions()).color
    assert bool(color.isfinite().all()) and bool((color != 0).all()) == (seconds == 0)


@pytest.mark.filterwarnings("ignore:no mesh written")
def test_a_retry_goes_on_from_the_last_checkpoint_with_the_next_seed(prior, tmp_path, monkeypatch):
    """Here that checkpoint is the first: what follows is the run of the next seed."""
    failing = Failing(prior, AT, calls=2)
    with pytest.warns(UserWarning, match=r"in step . the prediction .*: retry . of 3 follows"):
        done = generate(config(), tmp_path / "a", prior=failing, retries=3)
    other = generate(config(seed=2), tmp_path / "b", prior=prior)
    assert done.steps == STEPS and numbers(done.folder) == numbers(other.folder)
    assert [line["retry"] for line in lines(done.folder)] == [2] * STEPS
    assert [line["retry"] for line in lines(other.folder)] == [0] * STEPS

    monkeypatch.setattr(run_folder, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Diverged) as caught:
        generate(config(), tmp_path / "c", prior=Failing(prior, AT))
    (folder,) = (tmp_path / "c").iterdir()
    parts = {"prior": prior, "scene": SheetOptions(), "objective": SDS(7.5)}
    with pytest.warns(UserWarning, match="retry 1 of 1 follows"):
        done = resume(folder, retries=1, **(parts | {"prior": Failing(prior, 0, calls=1)}))
    assert caught.value.step == AT and done.steps == STEPS
    assert [line["retry"] for line in lines(folder)] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("method", ["ddim", "sds"])
def test_an_image_is_that_of_the_last_finite_step(method, prior, tmp_path):
    recipe = dataclasses.replace(image_recipe(method), steps=STEPS)

    def stop(progress):
        if progress.step == AT - 1:
            raise KeyboardInterrupt

    settings = {"prior": "own", "dtype": "float32"}
    good = generate_image(ImageConfig("red", recipe, **settings), tmp_path / "good", prior=prior, on_step=stop)
    with pytest.raises(Diverged, match="in step 2 the prediction of the network") as caught:
        generate_image(ImageConfig("red", recipe, **settings), tmp_path / "bad", prior=Failing(prior, AT))
    (folder,) = (tmp_path / "bad").iterdir()
    assert str(folder) in "".join(caught.value.__notes__)
    assert (folder / "image.png").read_bytes() == good.image.read_bytes() and len(lines(folder)) == AT


def test_an_update_that_spoils_an_image_in_its_last_step_is_noticed(prior, tmp_path, monkeypatch):
    encode, steps = prior.encode, []
    monkeypatch.setattr(prior, "encode", lambda image: encode(Break.apply(image) if len(steps) == 2 else image))
    settings = ImageConfig(
        "red", ImageRecipe(steps=3, objective=SDS(7.5), space="pixels"), prior="own", dtype="float32"
    )
    with pytest.raises(Diverged, match="in step 2 the parameter image"):
        generate_image(settings, tmp_path, prior=prior, on_step=steps.append)
    (folder,) = tmp_path.iterdir()
    good = generate_image(
        dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, steps=2)), tmp_path, prior=prior
    )
    assert (folder / "image.png").read_bytes() == good.image.read_bytes() and len(lines(folder)) == 3
