"""A plan is true: memory, rows and arithmetic are those of real calls and real runs, and it makes and loads nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill3d.cli import main as cli
from distill3d.cli.images import Image
from distill3d.cli.meshes import Refine
from distill3d.cli.shared import flag_values
from distill3d.distill.image_recipes import image_recipe
from distill3d.distill.loop import optimize
from distill3d.distill.objects import object_run
from distill3d.distill.recipes import DISTILL, LAPTOP
from distill3d.objectives import SDI, SDS, VSD
from distill3d.planning.cards import CARDS, find_card
from distill3d.planning.fit import candidates, fitting
from distill3d.planning.measure import Known, Stage, profile
from distill3d.planning.meter import ATTENTION, Meter
from distill3d.planning.models import MODELS
from distill3d.planning.plan import plan, planned_dtype, planned_memory
from distill3d.planning.shells import Shells, load_shell, size_of
from distill3d.priors import load_prior
from distill3d.priors.components import hub
from distill3d.priors.components.packing import PackedConv2d
from distill3d.priors.options import PriorOptions
from distill3d.runs.images import ImageConfig, finish, prepare
from distill3d.runs.objects import Config
from distill3d.scenes.voxels import VoxelOptions
from distill3d.types import Condition

SMALL = replace(DISTILL, steps=3, views=2, scene=VoxelOptions(resolution=12), objective=SDI(inversion_steps=2))
# Parameters of the denoising networks in millions, as their authors or diffusers give them.
PUBLISHED = {"sd15": 859.5, "sd21": 865.9, "sdxl": 2567.5, "if": 4304.7, "sd35": 2243.2, "sd35-large": 8056.6}
PUBLISHED |= {"flux": 11901.4}


@pytest.fixture
def config(kl_folder):
    return Config("a red dot", SMALL, prior=str(kl_folder), dtype="float32")


@pytest.fixture
def no_network(monkeypatch):
    def download(*_):
        raise AssertionError("a plan must not ask the hub")

    monkeypatch.setattr(hub, "_download", download)


def test_a_meter_counts_what_lives_and_its_peak():
    outside = torch.zeros(1000)
    with Meter() as meter:
        a = torch.zeros(100)  # 400 bytes
        view, same = a.view(10, 10), outside[:10]
        with meter.within("b"):
            b = a + 1
        assert meter.live == {"other": 400, "b": 400} and meter.total == 800
        del a
        assert meter.total == 800, "the view keeps the storage alive"
        del view, b
        assert meter.total == 0 and meter.highest == 800 and dict(meter.peak) == {"other": 400, "b": 400}
        meter.pulse("c", 5000)
        assert meter.total == 0 and meter.highest == 5000
        del same
    assert sum(one.bytes for one in meter.work) == 400 + 800  # zeros written, a read and b written; views are free


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_network_without_values_needs_what_the_real_one_needs(kl_folder, checkpointing):
    """Encoder with gradient and denoiser: bytes and arithmetic of every phase are equal to the last one."""
    options, stage = PriorOptions(checkpointing=checkpointing), Stage()
    real, shell = load_prior(kl_folder, options=options), load_shell(str(kl_folder), "float32", options, stage)
    size, rows = real.image_size, 3
    condition = real.embed(["a dot"] * rows)
    x, t = torch.zeros(rows, *real.sample_shape), torch.full((rows,), 0.5)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()

    inside = {"encoder": lambda: real.codec.encode(images), "network": lambda: real.predict(x, t, condition)}
    shell.encode(images).sum().backward()
    with torch.no_grad():
        shell.predict(x, t, Condition(torch.zeros_like(condition.hidden)))
    found, (played, _) = {key[0]: one for key, one in stage.known.profiles.items()}, stage.take()
    for part, call in inside.items():
        gradient = part == "encoder"
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with torch.set_grad_enabled(gradient), counter:
            out = call()
            if gradient:
                out.sum().backward()
        work = played[part]  # the backward pass included
        assert work == found[part].work + found[part].work_backward
        assert sum(one.flops * times for one, times in work.items()) == counter.get_total_flops() > 0
        with torch.set_grad_enabled(gradient):
            true = profile(call, gradient)
        planned = [found[part].forward, found[part].kept, found[part].backward]
        # `predict` also converts x and the result: a few latents.
        slack = 0 if gradient else 8 * x.numel() * 4
        assert planned == pytest.approx([true.forward, true.kept, true.backward], abs=slack), part
    assert found["encoder"].kept > 0 and found["network"].kept == 0


@pytest.mark.parametrize("recipe", [SMALL, replace(SMALL, objective=SDS(), views=1)], ids=["sdi", "sds"])
def test_rows_are_those_of_a_real_run(config, recipe):
    config = replace(config, recipe=recipe)
    counts = []
    run = object_run(recipe, config.prompts, load_prior(config.prior), config.seed)
    optimize(run, range(recipe.steps), lambda progress: counts.append(progress.nfe))
    found = plan(config)
    assert found.whole and found.rows == counts[-1]
    assert found.flops("network") > 0 and found.flops("encoder") > 0


def test_rows_of_a_run_that_samples_views():
    assert LAPTOP.sampling is not None
    sampling = replace(LAPTOP.sampling, joint_levels=2, levels=2, rings=((4, 12.0, 0.0),), group=4)
    recipe = replace(LAPTOP, steps=5, sampling=sampling, scene=VoxelOptions(resolution=12))
    config = Config("a red mushroom", recipe, prior="toybox-mv", dtype="float32")
    counts = []
    run = object_run(recipe, config.prompts, load_prior("toybox-mv"), config.seed)
    optimize(run, range(recipe.steps), lambda progress: counts.append(progress.nfe))
    assert plan(config).rows == counts[-1]


@pytest.mark.parametrize(
    ("method", "space", "start"),
    [("ddim", "latents", "zero"), ("sdi", "latents", "denoised"), ("sds", "pixels", "gray")],
)
def test_an_image_is_planned_as_it_is_made(kl_folder, method, space, start):
    """Rows are those of a real run; memory beside the weights is that which a meter finds there."""
    recipe = replace(image_recipe(method), steps=3, space=space, start=start)
    config = ImageConfig("a red dot", recipe, prior=str(kl_folder), dtype="float32")
    prior, generator = load_prior(config.prior), torch.Generator().manual_seed(0)
    run = prepare(prior, ["a red dot"], recipe, generator)
    with Meter() as meter:
        made = finish(run)
    found = plan(config)
    assert found.whole and found.rows == made.nfe
    beside = {part: count for part, count in found.memory.step.items() if not part.startswith("weights")}
    assert sum(beside.values()) == pytest.approx(meter.highest, rel=0.1)
    assert found.flops("network") > 0 and found.seconds(CARDS["H100"])["network"] > 0
    assert ("encoder" in found.work) == (method != "ddim") and "renderer" not in found.work


def test_advice_names_only_flags_that_the_command_has(config):
    known, gpu = Known(), replace(config, device="cuda:H100")
    image = ImageConfig("a red dot", prior=config.prior, dtype="float32", device="cuda:H100")
    for command, planned in ((Refine(Path("run")), gpu), (Image("a dot"), image)):
        allowed = dict(flag_values(command))
        found = [flags for flags, _ in candidates(planned, 32, known, allowed)]
        typed = {flag.split()[0][2:].replace("-", "_") for flags in found for flag in flags}
        assert "dtype" in typed <= allowed.keys()
        assert len(found) == len(set(found))


def test_a_longer_run_has_more_of_everything_but_memory(config):
    known = Known()
    short, long = (plan(replace(config, recipe=replace(SMALL, steps=steps)), known) for steps in (60, 240))
    assert not short.whole and long.rows == pytest.approx(4 * short.rows, rel=0.05)
    assert long.memory.peak == short.memory.peak
    card = CARDS["H100"]
    assert sum(long.seconds(card).values()) == pytest.approx(4 * sum(short.seconds(card).values()), rel=0.05)
    assert sum(short.seconds(CARDS["T4"]).values()) > sum(short.seconds(card).values())


def test_flags_do_what_they_say(config):
    known, gpu = Known(), replace(config, device="cuda:H100")

    def memory(**options):
        return planned_memory(replace(gpu, prior_options=PriorOptions(**options)), known).step

    def kept(checkpointing, vae, views=2):
        """Bytes that the encoder keeps for its gradient."""
        encoders = {key: found for key, found in known.profiles.items() if key[0] == "encoder" and key[3]}
        wanted = (checkpointing, vae, views)
        return next(found.kept for key, found in encoders.items() if (*key[1][3:5], key[2][0][0][0]) == wanted)

    plain, offloaded = memory(), memory(offload=True)
    memory(checkpointing=True)
    memory(vae="taesd")
    network = "weights of the network"
    half = planned_memory(replace(gpu, dtype="bfloat16"), known).step
    assert half[network] == pytest.approx(plain[network] / 2, rel=0.01)
    assert 0 < offloaded[network] < plain[network] / 4
    assert 0 < kept(True, None) < kept(False, None) and kept(False, "taesd") != kept(False, None)
    planned_memory(replace(gpu, recipe=replace(SMALL, views=1)), known)
    assert kept(False, None, views=1) == pytest.approx(kept(False, None) / 2, rel=0.02)
    fewer = planned_memory(replace(gpu, recipe=replace(SMALL, render_size=8)), known).step
    assert fewer["renderer"] < plain["renderer"]
    assert planned_dtype(replace(gpu, dtype="auto")) == "bfloat16"
    assert planned_dtype(replace(gpu, dtype="auto", device="cuda:T4")) == "float32"


def test_packed_weights_are_in_memory_twice(config):
    known, packed = Known(), PriorOptions(packed=True)
    network = load_prior(config.prior, dtype="float32", options=packed).network
    again = sum(one.weight.nbytes for one in network.modules() if isinstance(one, PackedConv2d))
    plain, twice = (
        planned_memory(replace(config, prior_options=options), known).step["weights of the network"]
        for options in (PriorOptions(), packed)
    )
    assert twice - plain == again > 0


def test_the_first_flags_that_fit_are_those_that_lose_least(config):
    gpu, known = replace(config, device="cuda:H100"), Known()
    whole = planned_memory(gpu, known).peak
    size = planned_memory(gpu, known).image_size
    fits = fitting(gpu, size, [whole, whole - 1], known)
    first, second = fits[whole], fits[whole - 1]
    assert first is not None and first[0] == ()
    assert second is not None and second[0] == ("--dtype bfloat16",) and second[1].peak < whole


def test_configurations_are_those_of_the_published_models(no_network):
    for name, millions in PUBLISHED.items():
        stage, files = Stage(), MODELS[name]
        shells = Shells(hub.resolve("toybox"), torch.bfloat16, files=files, fake=stage.fake)
        network = shells.model("unet" if "unet" in files else "transformer")
        count = sum(p.numel() for p in network.parameters())
        assert count == pytest.approx(millions * 1e6, abs=1e5) and size_of(network) >= 2 * count, name
    t5 = shells.model("text_encoder_2")  # of FLUX; its table of words is shared, and counts once
    assert sum(p.numel() for p in t5.parameters()) == pytest.approx(4762.3e6, abs=1e5)


def test_attention_is_fused():
    """At 4096 tokens the plain product would keep a matrix of 4096 x 4096 for each head."""
    stage = Stage()
    with stage.fake:
        q = torch.empty(1, 8, 4096, 64)
    with stage.fake:
        found = profile(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), False)
    assert found.forward < 4096 * 4096 * 4 / 8


def test_a_plan_leaves_nothing_and_asks_nobody(kl_folder, tmp_path, capsys, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--prior", str(kl_folder), "--steps", "2", "--set", "scene.resolution=12", "--device", "cuda:H100"]
    assert cli.run(["doctor", "--plan", *flags]) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert all(text in said for text in ("peak memory:", "network rows:", "time on H100", " 8 GB: these settings"))


def test_an_image_is_planned_without_a_renderer(kl_folder, tmp_path, capsys, no_network, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.run(["image", "a dot", "--plan", "--prior", str(kl_folder), "--steps", "2", "--device", "cuda:H100"]) == 0
    )
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for text in ("peak memory:", "network rows: 4 in 2 steps", "time on H100: about", " 8 GB: these settings"):
        assert text in said
    assert "renderer" not in said and "mesh" not in said


def test_errors_are_one_line(kl_folder, capsys, no_network):
    prior = ["--plan", "--prior", str(kl_folder)]
    for words, part in (
        (["doctor", *prior, "--device", "cuda:H900"], "unknown card 'H900': use H200, H100"),
        (["doctor", *prior, "--recipe", "napkin"], "unknown recipe 'napkin'"),
        (["doctor", "--plan", "--prior", "someone/model"], "downloads nothing and has no configuration"),
        (["doctor", *prior, "--offload"], "choose one with --device"),
        (["image", "a dot", *prior, "--offload"], "choose one with --device"),
        (["doctor", *prior, "--controlnet", "x"], "leave out --controlnet"),
        (["doctor", "--recipe", "paper"], "settings of a run go with --plan"),
    ):
        assert cli.run(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert part in line
    with pytest.raises(ValueError, match="student"):
        plan(Config("a dot", replace(SMALL, objective=VSD()), prior=str(kl_folder), dtype="float32"))


def test_cards_are_found_by_any_spelling():
    assert find_card("rtx 4090") is find_card("RTX-4090") is CARDS["RTX4090"]
    assert all(card.half >= card.convolution >= card.float32 * 0.99 for card in CARDS.values())
