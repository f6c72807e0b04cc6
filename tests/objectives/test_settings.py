"""Settings of the methods as values."""

import dataclasses
import inspect

import pytest
import torch

from distill3d import objectives
from distill3d.diffusion.guidance import APG
from distill3d.diffusion.schedule import Flow
from distill3d.objectives import (
    CFD,
    CSD,
    ESD,
    ISM,
    METHODS,
    NFSD,
    RFDS,
    SDI,
    SDS,
    SJC,
    VSD,
    FlowDreamer,
    HiFA,
    MVDream,
    SDICached,
    SDSBridge,
    csd,
    effective_guidance,
    kappa_residual,
    methods,
    prediction_scale,
    sds,
    starting_at,
    timesteps,
)
from distill3d.objectives.prediction import inversion_factor
from distill3d.priors.loading import load_prior
from distill3d.priors.mixture import MixturePrior

TEXTS = ["left", "right", "odd"]


def seed(i=0):
    return torch.Generator().manual_seed(i)


# Settings that are not arguments of the functions: they change the objective, or the student.
FOR_FLOWS = ("rfds", "flowdreamer")
OF_ALL = ("time_scale", "pull", "apg", "student_rate")


class Zero:
    """A student that answers zero."""

    def predict(self, x_t, t, conditioning, with_camera):
        return torch.zeros_like(x_t)

    def learn(self, x, conditioning, generator):
        return len(x)


def built(method, prior, steps=10):
    return method.with_student(Zero()) if isinstance(method, (VSD, ESD)) else method.build(prior, steps, seed())


def suited(name, mixture):
    """The mixture for a method: a flow where it needs one, and with a text for NFSD's negative prompt."""
    texts = {**mixture.conditions, methods.NFSD_NEGATIVE_PROMPT: [0]}
    schedule = Flow() if name in FOR_FLOWS else mixture.schedule
    return MixturePrior(mixture.means, mixture.stds, mixture.weights, texts, schedule)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_functions(name):
    """One default, written in two places: as an argument of the function and as a field of the settings."""
    arguments = inspect.signature(getattr(objectives, name)).parameters
    fields = {f.name: f.default for f in dataclasses.fields(METHODS[name])}
    for name_of_all in OF_ALL:
        fields.pop(name_of_all, None)
    assert fields.pop("nominal", False) is False  # off, so that the published settings stay as published
    if name == "sdi":
        assert fields.pop("noise") == "inversion"
    assert fields == {key: arguments[key].default for key in fields}
    left_out = {"student", "views", "first", "solver", "overshoot", "released"}
    assert set(arguments) - set(fields) <= left_out


STUDENT = {"scale": 7.5, "student_steps": 1, "student_rate": 1e-4, "lookahead": False}
# What the sources say, in the order of the fields. A timestep k of 1000 is k / 1000.
SOURCES = {
    # Lukoianov et al. 2024 and the configuration of their code (threestudio, commit 28d9d80d).
    "sdi": {"scale": 7.5, "inversion_scale": -7.5, "inversion_steps": 10, "eta": 0.3, "start": 0.98, "stop": 0.25},
    "sdi_cached": {"scale": 7.5, "start": 0.98, "stop": 0.02, "eta": 0.0},
    # Ours: the times of sdi_cached, which is the same sampler.
    "cfd": {"scale": 7.5, "start": 0.98, "stop": 0.02, "refresh": 0.0},
    # Poole et al. 2022: guidance 100, t ~ U(0.02, 0.98).
    "sds": {"scale": 100.0, "low": 0.02, "high": 0.98, "anneal": False},
    # Wang et al. 2022, as configured in threestudio (sjc.yaml).
    "sjc": {"scale": 100.0, "low": 0.01, "high": 0.97, "variance_reduced": True},
    # Katzir et al. 2023.
    "nfsd": {
        "scale": 7.5,
        "negative_prompt": "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
        "low-resolution, gloomy",
        "low": 0.02,
        "high": 0.98,
    },
    # Yu et al. 2023: the classifier part alone.
    "csd": {"scale": 1.0, "negative_prompt": None, "negative_weight": 1.0, "stage": "form", "low": 0.02, "high": 0.98},
    # Zhu et al. 2023, as configured in threestudio (hifa.yaml): 0.01 for the sum over images of 3 x 512 x 512 values,
    # the loss on x being the sum over 4 x 64 x 64.
    "hifa": {"scale": 100.0, "start": 0.98, "stop": 0.3, "image_weight": 0.01 * (3 * 512 * 512) / (4 * 64 * 64)},
    # Liang et al. 2023, the configurations of LucidDreamer: delta_t 100 to 80, inversions of 200, 1500 of 5000 steps.
    "ism": {"scale": 7.5, "steps": 5, "wide": 0.1, "narrow": 0.08, "high": 0.98, "warmup": 1500 / 5000},
    # Shi et al. 2023, the configuration of MVDream-threestudio: 8000 of 10000 steps.
    "mvdream": {"scale": 50.0, "rescale": 0.5, "warmup": 8000 / 10000, "shared_noise": False},
    # McAllister et al. 2024, the 2D experiments of their code.
    "sds_bridge": {
        "scale": 40.0,
        "target_suffix": ", detailed high resolution, high quality, sharp",
        "source_suffix": ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, "
        "malformed",
        "first": 500 / 1000,
        "low": 0.02,
        "high": 0.98,
    },
    # Wang et al. 2023, as configured in threestudio (prolificdreamer.yaml): 5000 of 25000 steps.
    "vsd": STUDENT | {"camera": 1.0, "low": 0.02, "high": 0.98, "switch": 5000 / 25000},
    # Wang et al. 2024, as recommended in their code (guidance_scale_lora 0.5).
    "esd": STUDENT | {"entropy": 0.5},
    # Yang et al. 2024, their configuration for Stable Diffusion 3: entries 300 to 980 of a falling list of 1000 times.
    "rfds": {"scale": 100.0, "low": 1 - 980 / 1000, "high": 1 - 300 / 1000},
    # Xu et al. 2024, dsd.yaml of their code.
    "dsd": {"scale": 7.5, "steps": 10, "gap": 0.1, "start": 0.98, "stop": 0.32},
    # Ma et al. 2024, asd_sd_nerf.yaml of their code.
    "asd": {"scale": 7.5, "gap": 0.1},
    # Li et al. 2024, ucm.yaml of their code: 1800 of 10000 steps, and the same list of times as RFDS.
    "flowdreamer": {
        "scale": 60.0,
        "inversion_scale": 1.0,
        "inversion_steps": 3,
        "warmup": 1800 / 10000,
        "low": 1 - 980 / 1000,
        "high": 1 - 300 / 1000,
    },
    # Zhu et al. 2025, the configurations of SegmentDreamer.
    "sctd": {"scale": 7.5, "segments": 5, "gap": 80 / 1000},
    # Huang et al. 2024, the code of PlacidDreamer.
    "bsd": {"denoising": 1.25, "warmup": 0.3},
}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_sources(name):
    ours = ("noise", "nominal", "time_scale", "pull", "apg")
    fields = {f.name: f.default for f in dataclasses.fields(METHODS[name]) if f.name not in ours}
    assert fields == {
        key: value if isinstance(value, str | bool | None) else pytest.approx(value)
        for key, value in SOURCES[name].items()
    }


def test_mvdreams_times_are_those_of_its_source():
    """U[0.98, 0.98] at first, U[0.02, 0.5] after 8000 of 10000 steps."""
    times = MVDream().build(None, 10000, seed()).timesteps
    first, last = (times(step, 10000, 4000, seed()) for step in (0, 8000))
    assert (first == 0.98).all() and 0.02 <= last.min() < 0.0205 and 0.4995 < last.max() <= 0.5


@pytest.mark.parametrize("name", METHODS)
def test_settings_build_what_the_function_of_their_name_makes(name, mixture, conditions, randn):
    prior = suited(name, mixture)
    x, conditioning = randn(3, 2, 2, 2), conditions(prior, TEXTS)
    more = {"mvdream": {"views": 1}, "vsd": {"student": Zero()}, "esd": {"student": Zero()}}.get(name, {})
    both = built(METHODS[name], prior), getattr(objectives, name)(**more)
    out = [o.guidance(x, prior, conditioning, step=3, total=10, generator=seed()) for o in both]
    assert torch.equal(out[0].gradient, out[1].gradient) and out[0].nfe == out[1].nfe
    assert both[0].suffixes == both[1].suffixes


SOLVER_ROWS = {"fixed_point": 6, "sign_descent": 6, "descent": 6, "continuation": 6, "cfg_plus_plus": 6 + 1}


@pytest.mark.parametrize("noise", ["random", *SOLVER_ROWS])
def test_sdi_takes_its_noise_from_elsewhere(mixture, conditions, randn, noise):
    """Solvers run at the prediction's scale; at the first step their start is taken as it is."""
    objective = SDI(0.7, inversion_steps=2, noise=noise).build(mixture, 10, seed())
    x, conditioning, found = randn(1, 2, 2, 2), conditions(mixture, ["left"]), []
    for step in (0, 1, 2):
        out = objective.guidance(x, mixture, conditioning, step=step, total=10, generator=seed(step))
        torch.testing.assert_close(out.gradient, x - out.x0)  # the weight stays SDI's
        found.append(out)
    rows = SOLVER_ROWS.get(noise, 0)
    assert [out.nfe for out in found] == [2, 2 + rows, 2 + rows]
    if noise == "random":
        return
    assert torch.equal(found[0].noise, objective.state.kappa)
    t = torch.full((1,), 0.98 - (0.98 - 0.25) / 9, dtype=torch.float64)
    if noise != "cfg_plus_plus":  # which renoises with another scale
        start, solved = (kappa_residual(out.noise, x, t, mixture, conditioning, 0.7)[0] for out in (found[0], found[2]))
        assert solved < start  # at the level of step 1, from the noise of step 0


def test_in_3d_a_solver_begins_with_one_noise_for_all_views(mixture, conditions, randn):
    conditioning = conditions(mixture, TEXTS).with_camera(torch.eye(4).repeat(3, 1, 1))
    objective = SDI(noise="fixed_point").build(mixture, 6, seed())
    out = objective.guidance(randn(3, 2, 2, 2), mixture, conditioning, step=0, total=6, generator=seed())
    assert torch.equal(out.noise, out.noise[:1].expand(3, 2, 2, 2)) and out.noise.std() > 0


def test_an_objective_is_its_own_method(mixture):
    objective = sds()
    assert objective.build(mixture, 10, seed()) is objective


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SDI(start=980), r"times must lie in \[0, 1\]"),
        (lambda: SDI(noise="none"), "choose inversion, random, fixed_point"),
        (lambda: SDI(noise="cfg_plus_plus"), r"scale must lie in \[0, 1\], got 7.5"),
        (lambda: SDI(inversion_steps=0, noise="random"), "steps must be a whole number of at least 1"),
        (lambda: CFD(stop=-1.0), r"times must lie in \[0, 1\]"),
        (lambda: SDICached(scale=float("nan")), "scale must be a finite number"),
        (lambda: SDS(low=0.9, high=0.1), "swap them"),
        (lambda: SJC(high=2.0), r"times must lie in \[0, 1\]"),
        (lambda: NFSD(scale="7"), "scale must be a finite number"),
        (lambda: CSD(negative_weight=float("inf")), "negative_weight must be a finite number"),
        (lambda: HiFA(stop=-0.1), r"times must lie in \[0, 1\]"),
        (lambda: ISM(warmup=1500), r"warmup must lie in \[0, 1\]"),
        (lambda: MVDream(rescale=2.0), "rescale must lie in"),
        (lambda: SDSBridge(high=7.0), r"times must lie in \[0, 1\]"),
        (lambda: RFDS(scale=None), "scale must be a finite number"),
        (lambda: VSD(switch=5000), r"after must lie in \[0, 1\]"),
        (lambda: ESD(entropy=2.0), r"entropy must lie in \[0, 1\]"),
        (lambda: VSD(student_steps=0), "student_steps must be a whole number of at least 1"),
        (lambda: SDSBridge(first=2.0), r"first must lie in"),
        (lambda: CSD(negative_prompt="bad", stage="late"), "unknown stage 'late': choose form or refine"),
        (lambda: HiFA(image_weight=float("nan")), "image_weight must be a finite number"),
        (lambda: SDS(pull=float("nan")), "pull must be a finite number"),
        (lambda: SDS(apg=APG(parallel=2.0)), r"parallel must lie in \[0, 1\]"),
        (lambda: CSD(apg=APG(parallel=0.0)), "apg is for methods that predict with guidance alone, not for CSD"),
        (lambda: SJC(time_scale=1.5), r"time_scale must lie above 0 and up to 1"),
        (lambda: SJC(time_scale=0.0), r"time_scale must lie above 0 and up to 1"),
    ],
)
def test_settings_out_of_range_are_refused_when_they_are_made(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_priors_that_do_not_suit_a_method_are_refused_before_the_first_step(mixture):
    for settings in (RFDS(), FlowDreamer()):
        with pytest.raises(ValueError, match="flow-matching prior"):
            settings.build(mixture, 10, seed())
    for settings in (VSD(), ESD()):
        with pytest.raises(ValueError, match="needs a latent diffusion model with a UNet; mixture is not one"):
            settings.build(mixture, 10, seed())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_starts_at_t_has_no_times_above(name, mixture):
    prior = suited(name, mixture)
    limited = built(starting_at(METHODS[name], 0.6), prior)
    t = torch.cat([limited.timesteps(step, 50, 200, seed(step)) for step in range(50)])
    assert t.max() <= 0.6 and t.max() > 0.5
    if name not in ("sdi", "sds", *FOR_FLOWS):
        whole = built(METHODS[name], prior)
        again = torch.cat([whole.timesteps(step, 50, 200, seed(step)) for step in range(50)])
        torch.testing.assert_close(t, 0.6 * again)


def test_starting_at_takes_objectives_and_keeps_lower_limits():
    assert starting_at(SDI(start=0.9, stop=0.25), 0.2) == SDI(start=0.2, stop=0.2)
    assert starting_at(SDS(high=0.5), 0.6) == SDS(high=0.5)
    assert starting_at(CSD(time_scale=0.4), 0.6) == CSD(time_scale=0.4)
    assert starting_at(sds(), 0.5).timesteps(0, 1, 1000, seed()).max() <= 0.5
    with pytest.raises(ValueError, match="pass the Objective that it builds"):
        starting_at(object(), 0.5)


@pytest.mark.filterwarnings("ignore:.* teach the student little")
def test_a_student_is_the_state_of_its_objective(kl_folder, conditions, randn):
    """A run that is cut in two, with what was learned carried over, is the run in one."""
    pytest.importorskip("peft")
    prior = load_prior(kl_folder)
    x, conditioning = randn(2, *prior.sample_shape).float(), conditions(prior, ["a cat", "a dog"])

    def gradient(objective, step):
        return objective.guidance(x, prior, conditioning, step=step, total=6, generator=seed(step)).gradient

    whole, first = (VSD().build(prior, 6, seed()) for _ in range(2))
    second = VSD().build(prior, 6, seed(1))  # drawn otherwise, until it is loaded
    for step in range(2):
        assert torch.equal(gradient(whole, step), gradient(first, step))
    second.state.load_state_dict(first.state.state_dict())
    for step in range(2, 4):
        assert torch.equal(gradient(whole, step), gradient(second, step))


@pytest.mark.parametrize("method", [SDICached(), CFD()], ids=["sdi_cached", "cfd"])
def test_noise_of_images_refuses_3d(mixture, conditions, randn, method):
    conditioning = conditions(mixture, ["left"]).with_camera(torch.eye(4)[None])
    with pytest.raises(ValueError, match="is for 2D: in 3D every step shows another view; set noise='surface'"):
        method.build(mixture, 6, seed()).guidance(
            randn(1, 2, 2, 2), mixture, conditioning, step=0, total=6, generator=seed()
        )


@pytest.mark.parametrize(
    "method",
    [SDICached(), CFD(), SDI(inversion_steps=2, noise="fixed_point"), SDI(0.5, noise="cfg_plus_plus")],
    ids=["sdi_cached", "cfd", "fixed_point", "cfg_plus_plus"],
)
def test_the_kappa_of_a_run_is_the_state_of_its_objective(mixture, conditions, randn, method):
    x, conditioning, generator = torch.zeros(2, 2, 2, 2, dtype=torch.float64), conditions(mixture, TEXTS[:2]), seed()

    def steps(objective, x, some, generator):
        for step in some:
            x = x - objective.guidance(x, mixture, conditioning, step=step, total=6, generator=generator).gradient
        return x

    whole, first, second = (method.build(mixture, 6, seed()) for _ in range(3))
    assert first.state.state_dict() == {}
    half = steps(first, x, range(3), generator)
    second.state.load_state_dict(first.state.state_dict())
    # The generator of the second part is another one: all that is random was drawn at the first step.
    assert torch.equal(steps(second, half, range(3, 6), seed(1)), steps(whole, x, range(6), seed()))


def test_nominal_guidance_is_what_sdi_amounts_to(mixture, conditions, randn):
    """The setting predicts at (1 - c) W + c g, c that of its inversion; the law then gives back the scale."""
    x, conditioning, t = randn(2, 2, 2, 2), conditions(mixture, TEXTS[:2]), 0.98 + 5 / 9 * (0.25 - 0.98)

    def gradient(settings):
        objective = settings.build(mixture, 10, seed())
        return objective.guidance(x, mixture, conditioning, step=5, total=10, generator=seed()).gradient

    c = inversion_factor(mixture.schedule, torch.tensor([t], dtype=torch.float64), 10).item()
    for scale, inversion_scale in ((7.5, -7.5), (7.5, 1.0), (5.0, 5.0)):
        predicted_at = prediction_scale(scale, inversion_scale, c)
        assert effective_guidance(predicted_at, inversion_scale, c) == pytest.approx(scale, rel=1e-12)
        nominal = gradient(SDI(scale, inversion_scale, nominal=True))
        torch.testing.assert_close(nominal, gradient(SDI(predicted_at, inversion_scale)), rtol=1e-9, atol=1e-9)
    for noise in ("random", "fixed_point", "descent"):
        nominal, plain = (gradient(SDI(7.5, noise=noise, nominal=on)) for on in (True, False))
        assert torch.equal(nominal, plain)
    assert (effective_guidance(7.5, -7.5), effective_guidance(7.5, 1.0)) == (22.5, 14.0)
    assert effective_guidance(5.0, -5.0, 0.0) == 5.0 and effective_guidance(5.0, 5.0, 0.3) == 5.0
    with pytest.raises(ValueError, match="c must not be 1"):
        effective_guidance(7.5, 1.0, 1.0)


def test_only_methods_that_match_x0_pull_images(mixture):
    """The others' gradients are differences of predictions, which a pull to decode(x0_hat) would outweigh."""
    pulls = {name: built(method, suited(name, mixture)).pull for name, method in METHODS.items()}
    matching = {"sdi", "sds", "sjc", "mvdream", "rfds", "sdi_cached", "cfd", "flowdreamer"}
    assert pulls == {name: float(name in matching) for name in METHODS}
    assert CSD(pull=0.5).build(mixture, 10, seed()).pull == 0.5 and SDI(pull=0.0).build(mixture, 10, seed()).pull == 0
    own = {name for name, method in METHODS.items() if built(method, suited(name, mixture)).image_weight is not None}
    assert own == {"hifa"}


def test_a_run_too_short_for_its_student_says_so(kl_folder):
    """250,000 steps of 1e-4 teach as 25 of 1: what counts is how far the weights can move."""
    pytest.importorskip("peft")
    prior = load_prior(kl_folder)
    with pytest.warns(UserWarning, match="200 training steps of 0.0001 teach the student little, so that VSD is close"):
        VSD().build(prior, 200, seed())
    with pytest.warns(UserWarning, match="ESD is close to CSD at scale 6.5"):
        ESD(student_steps=2).build(prior, 100, seed())
    VSD().build(prior, 2500, seed())
    assert VSD(student_rate=1e-2).build(prior, 25, seed()).state.optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.filterwarnings("ignore:.* teach the student little")
def test_the_more_a_student_learns_the_further_is_vsd_from_csd(kl_folder, conditions, randn):
    """At first VSD is CSD, exactly: the student is the prior with the prompt, and e_s - e_c = (s - 1) (e_c - e_u)."""
    pytest.importorskip("peft")
    prior = load_prior(kl_folder)
    x, conditioning = randn(2, *prior.sample_shape).float(), conditions(prior, ["a cat", "a dog"])

    def gradient(objective):
        objective = dataclasses.replace(objective, timesteps=timesteps.linear(0.5, 0.5))
        return objective.guidance(x, prior, conditioning, step=0, total=6, generator=seed()).gradient

    classifier = gradient(csd(6.5))
    apart = []
    for lessons, rate in ((1, 1e-3), (10, 1e-3), (40, 1e-3), (40, 1e-2)):
        objective = VSD(student_rate=rate, student_steps=lessons).build(prior, 6, seed())
        torch.testing.assert_close(gradient(objective), classifier, rtol=1e-4, atol=1e-5)  # asked before it learned
        apart.append(float((gradient(objective) - classifier).norm() / classifier.norm()))
    assert apart == sorted(apart) and apart[-1] > 5 * apart[0]
    ahead = VSD(student_rate=1e-2, student_steps=40, lookahead=True).build(prior, 6, seed())
    assert (gradient(ahead) - classifier).norm() > 5 * apart[0] * classifier.norm()  # asked after
