"""From flags to a configuration: recipe, then --config, then flags, then --set."""

import dataclasses
import json
import tomllib

import pytest

from distill3d.cli import main as cli
from distill3d.cli.settings import layered, nested, paths, read_file, to_toml
from distill3d.distill.image_recipes import image_recipe
from distill3d.distill.recipes import DISTILL, PAPER, RECIPES, TEXTURE_RECIPES, TUNED, from_mesh
from distill3d.objectives import ISM, METHODS, SDS
from distill3d.priors.options import PriorOptions
from distill3d.render.shading import ShadingOptions
from distill3d.runs.config import from_plain, to_plain
from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import Config
from distill3d.scenes.gaussians import GaussianOptions
from distill3d.scenes.hashgrid.field import HashOptions
from distill3d.scenes.voxels import VoxelOptions


def config(*arguments, command="generate", prompt="a red apple"):
    """The configuration of a command line, without running it."""
    return cli.parse([command, prompt, *arguments]).config()


@pytest.fixture
def file(tmp_path):
    """Writes my.toml and returns the flag for it."""

    def write(text):
        (tmp_path / "my.toml").write_text(text)
        return ["--config", str(tmp_path / "my.toml")]

    return write


def written(capsys, *arguments):
    assert cli.run(["recipes", *arguments]) == 0
    return capsys.readouterr().out


def test_without_flags_it_is_the_library():
    assert config() == Config("a red apple")


def test_every_flag_reaches_its_setting():
    texts = ["--negative", "fog", "--front", "a face", "--overhead", "a lid", "--seed", "5"]
    model = ["--prior", "some/model", "--device", "cuda:0", "--dtype", "float16", "--image-size", "32"]
    model += [
        "--vae",
        "taesd",
        "--lora",
        "a.safetensors",
        "--lora",
        "b.safetensors:0.5",
        "--token",
        "t.safetensors:cat",
    ]
    model += ["--controlnet", "net", "--control", "normal", "--offload", "--compile"]
    quality = ["--method", "SDS", "--scale", "12", "--steps", "9", "--views-per-step", "3", "--learning-rate", "0.5"]
    quality += ["--render-size", "48", "--perp-neg"]
    found = config(*texts, *model, *quality, "--frames", "7", "--texture-size", "256", "--faces", "99")
    options = PriorOptions(
        image_size=32, vae="taesd", lora=("a.safetensors", "b.safetensors:0.5"), token=("t.safetensors:cat",),
        controlnet="net", control="normal", offload=True, compile=True,
    )  # fmt: skip
    export = dataclasses.replace(DISTILL.export, texture=256, faces=99)
    recipe = dataclasses.replace(
        DISTILL, objective=SDS(scale=12.0), steps=9, views=3, learning_rate=0.5, render_size=48, perp_neg=True,
        frames=7, export=export,
    )  # fmt: skip
    assert found == Config(
        "a red apple", recipe, {"front": "a face", "overhead": "a lid"}, prior="some/model", negative="fog", seed=5,
        device="cuda:0", dtype="float16", prior_options=options,
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_names_in_any_case(name):
    assert config("--recipe", name.upper()).recipe == RECIPES[name]
    assert config("--recipe", name, "--method", "ISM").recipe.objective == ISM()
    assert config("--method", "SDS-Bridge").recipe.objective == METHODS["sds_bridge"]


def test_a_method_has_the_settings_that_are_tuned_for_the_recipe():
    for name, methods in TUNED.items():
        for method, settings in methods.items():
            assert config("--recipe", name, "--method", method).recipe.objective == settings


@pytest.mark.parametrize("name", RECIPES)
def test_a_written_recipe_reads_back_as_it_is(name, file, capsys):
    flag = file(written(capsys, name))
    assert config(*flag) == config("--recipe", name)


@pytest.mark.parametrize("name", TEXTURE_RECIPES)
def test_so_does_that_of_a_texture(name, file, capsys):
    flag = file(written(capsys, name, "--of", "texture"))
    arguments = ["texture", "a.glb", "a red apple"]
    assert cli.parse([*arguments, *flag]).config() == cli.parse([*arguments, "--recipe", name]).config()


@pytest.mark.parametrize("name", ["ddim", "sdi", "sdi_cached", "cfd", "ism"])
def test_so_does_that_of_an_image(name, file, capsys):
    flag = file(written(capsys, name, "--of", "image"))
    found = config(*flag, command="image")
    assert found == config("--method", name, command="image") and found.recipe == image_recipe(name)


def test_toml_keeps_every_value():
    plain = to_plain(Config("x", PAPER))
    again = layered(to_plain(Config("x", DISTILL)), tomllib.loads(to_toml(plain)))
    assert from_plain(Config, again) == Config("x", PAPER)


def test_the_config_of_a_run_is_read_too(tmp_path):
    once = Config("a blue car", PAPER, {"back": "a wall"}, seed=4, negative="fog")
    folder = RunFolder.create(tmp_path, "x")
    folder.write_config("object", once)
    found = config("--config", str(folder.path / "config.json"))
    assert found == dataclasses.replace(once, prompt="a red apple")


def test_a_file_may_hold_a_few_settings_only(file):
    found = config(*file('prior = "sd15"\nsteps = 9\n[recipe.penalties]\nopaque = { end = 0 }\n'))
    assert (found.prior, found.recipe.steps) == ("sd15", 9)
    opaque = dataclasses.replace(DISTILL.penalties.opaque, end=0.0)
    penalties = dataclasses.replace(DISTILL.penalties, opaque=opaque)
    assert found.recipe == dataclasses.replace(DISTILL, steps=9, penalties=penalties)


def test_each_layer_has_priority_over_those_before(file):
    flag = file('base = "paper"\nseed = 1\n[recipe]\nsteps = 1\nviews = 1\nframes = 1\n')
    found = config(*flag, "--steps", "2", "--views-per-step", "2", "--set", "steps=3")
    assert (found.prior, found.recipe.scene) == ("sd21", PAPER.scene)
    assert (found.seed, found.recipe.frames, found.recipe.views, found.recipe.steps) == (1, 1, 2, 3)
    assert config(*flag, "--recipe", "distill").recipe.scene == DISTILL.scene


def test_a_method_flag_keeps_the_settings_that_the_file_gives_it(file):
    flag = file('[recipe.objective]\nkind = "SDS"\nscale = 7\n')
    assert config(*flag, "--method", "sds").recipe.objective == SDS(scale=7.0)
    assert config(*flag, "--method", "ism").recipe.objective == ISM()


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=7", lambda c: c.recipe.steps == 7),
        ("recipe.steps=7", lambda c: c.recipe.steps == 7),
        ("learning-rate=1", lambda c: c.recipe.learning_rate == 1.0 and type(c.recipe.learning_rate) is float),
        ("views=3", lambda c: c.recipe.views == 3),
        ("penalties.opaque.end=0", lambda c: c.recipe.penalties.opaque.end == 0),
        ("perp_neg=true", lambda c: c.recipe.perp_neg is True),
        ("cameras.distance=[2, 3]", lambda c: c.recipe.cameras.distance == (2.0, 3.0)),
        ("export.texture=none", lambda c: c.recipe.export.texture is None),
        ("negative=a foggy day", lambda c: c.negative == "a foggy day"),
        ('negative="7"', lambda c: c.negative == "7"),
        ("prior_options.tiling=true", lambda c: c.prior_options.tiling),
        ('prior_options.lora=["a", "b"]', lambda c: c.prior_options.lora == ("a", "b")),
        ("scene=HashOptions", lambda c: c.recipe.scene == HashOptions()),
        ("scene={kind = 'GaussianOptions', count = 9}", lambda c: c.recipe.scene == GaussianOptions(count=9)),
        ("scene.kind=VoxelOptions", lambda c: c.recipe.scene == DISTILL.scene),
        ("shading={}", lambda c: c.recipe.shading is not None),
        ("objective.eta=0.5", lambda c: c.recipe.objective.eta == 0.5),
        ("supervision.weight.start=2", lambda c: c.recipe.supervision.weight.start == 2.0),
    ],
)
def test_set_changes_any_setting(assignment, value):
    assert value(config("--recipe", "distill", "--set", assignment))


@pytest.mark.parametrize(
    ("flags", "sampled"),
    [
        ((), True),
        (("--prior", "toybox-mv", "--steps", "90", "--scale", "3"), True),
        (("--prior", "toybox"), False),
        (("--method", "sdi"), False),
        (("--method", "cfd"), False),
        (("--perp-neg",), False),
        (("--recipe", "laptop", "--method", "sdi"), True),
        (("--recipe", "distill"), False),
    ],
)
def test_views_are_sampled_unless_the_flags_ask_for_what_only_distillation_has(flags, sampled):
    found = config(*flags)
    assert (found.recipe.sampling is not None) == sampled
    assert found.prior == ("toybox-mv" if sampled else "toybox")


def test_a_later_set_builds_on_an_earlier_one():
    flags = ("scene=VoxelOptions", "scene.resolution=20", "steps=2", "steps=3")
    found = config("--recipe", "distill", *(word for flag in flags for word in ("--set", flag)))
    assert found.recipe.scene == dataclasses.replace(DISTILL.scene, resolution=20) and found.recipe.steps == 3
    assert isinstance(found.recipe.scene, VoxelOptions)
    shaded = config("--set", "shading={}", "--set", "shading.ambient=0.2").recipe.shading
    assert shaded == ShadingOptions(ambient=0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "steps"], "--set needs PATH=VALUE, such as steps=100, got 'steps'"),
        (["--set", "penalties.opaqe.end=1"], "setting 'penalties.opaqe.end'; did you mean penalties.opaque.end"),
        (["--recipe", "distill", "--set", "inversion-steps=1"], "did you mean objective.inversion_steps"),
        (["--set", "stepz=1"], "unknown setting 'stepz'; did you mean steps"),
        (["--set", "qwertz=1"], "unknown setting 'qwertz'; distill3d recipes NAME lists the settings"),
        (["--set", "steps=many"], "recipe.steps: a whole number is needed, got 'many'"),
        (["--set", "perp_neg=1"], "recipe.perp_neg: true or false is needed, got 1"),
        (["--set", "steps=0"], "at least one step"),
        (["--set", "scene.kind=Teapot"], "unknown kind 'Teapot'"),
        (["--config", "nowhere.toml"], "the configuration file nowhere.toml cannot be read: No such file"),
        (["--recipe", "soup"], f"unknown recipe 'soup'; allowed: {', '.join(RECIPES)}"),
        (["--method", "magic"], "unknown method 'magic'; allowed: sdi, sds"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_allowed(flags, message):
    with pytest.raises(ValueError) as error:
        config(*flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_mistakes_in_a_file_have_its_paths(file):
    for text, message in (
        ("[recipe]\nstepz = 1\n", "unknown setting 'stepz'; did you mean steps"),
        ("stepz = 1\n", "unknown setting 'stepz'; did you mean steps"),
        ("seed = 'x'\n", "seed: a whole number is needed, got 'x'"),
        ("seed = \n", "my.toml cannot be read: Invalid value"),
    ):
        with pytest.raises(ValueError, match=message):
            config(*file(text))


@pytest.mark.parametrize(("flags", "start"), [([], 0.6), (["--set", "objective.start=0.8"], 0.8)])
def test_a_time_set_beside_init_wins(flags, start):
    found = config("--init", "a.glb", *flags)
    assert found.init == "a.glb" and found.recipe.objective.start == start
    usual = from_mesh(DISTILL).objective
    assert found.recipe.objective == dataclasses.replace(usual, start=start)


def test_settings_of_single_methods_in_a_comparison():
    found = config("--methods", "DDIM, sdi", "--steps", "9", "--set", "sdi.steps=4", command="compare").recipes
    assert {name: recipe.steps for name, recipe in found.items()} == {"ddim": 9, "sdi": 4}
    assert found["sdi"] == dataclasses.replace(image_recipe("sdi"), steps=4)


def test_settings_of_single_methods_in_a_bench():
    flags = ["--methods", "SDI,sds", "--prompts", "a red apple", "--steps", "9", "--set", "sds.scale=8"]
    found = cli.parse(["bench", *flags, "--set", "scene.resolution=20"]).protocol()
    assert found.names == ("sdi", "sds") and found.prompts == ("a red apple",)
    scene = dataclasses.replace(DISTILL.scene, resolution=20)
    assert [v.recipe for v in found.variants] == [
        dataclasses.replace(DISTILL, steps=9, scene=scene),
        dataclasses.replace(DISTILL, steps=9, scene=scene, objective=dataclasses.replace(METHODS["sds"], scale=8.0)),
    ]


def test_a_bench_reads_the_file_of_a_recipe(file, capsys):
    text = written(capsys, "distill").replace("scale = 7.5", "scale = 3.0", 1)
    found = cli.parse(["bench", "--methods", "sdi,sds", *file(text)]).protocol()
    assert found.variants[0].recipe.objective == dataclasses.replace(DISTILL.objective, scale=3.0)
    assert found.variants[1].recipe.objective == TUNED["distill"]["sds"]


def test_paths_of_a_tree():
    assert nested({"a.b": 1, "a.c": None, "d": 2}) == {"a": {"b": 1}, "d": 2}
    assert dict(paths({"a": {"b": 1, "c": {}}, "d": 2})) == {"a.b": 1, "a.c": {}, "d": 2}
    assert read_file(None) == {}


def test_a_damaged_config_of_a_run_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="json cannot be read"):
        config("--config", str(tmp_path / "config.json"))


@pytest.mark.parametrize("words", [("--learning-rate", "nan"), ("--set", "recipe.objective.scale=inf")])
def test_settings_are_finite_numbers(words):
    with pytest.raises(ValueError, match="finite number"):
        config(*words)
