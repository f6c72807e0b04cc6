"""sdi(released=True) against numbers recorded from the official implementation; see tests/data/parity/README.md.

DISTILL3D_PARITY names another folder of recorded cases. `pytest -s` prints the largest deviation of each family.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from distill3d.diffusion.guidance import guided_prediction
from distill3d.diffusion.schedule import coefficients, to_eps
from distill3d.objectives import Query, attach, noise, sdi, sdi_release, sds, timesteps
from distill3d.priors import load_prior
from distill3d.prompts import ViewPrompts
from distill3d.types import Condition, Conditioning

BUNDLED = Path(__file__).parents[1] / "data" / "parity"
FOLDER = Path(os.environ.get("DISTILL3D_PARITY") or BUNDLED)
FILES = sorted(FOLDER.rglob("*.npz"))
TOLERANCE = 5e-4  # float32 against float64 of the same formulas: up to 5.5e-5; the least mistake: 4e-3
F32, F64 = torch.float32, torch.float64
STEPS_OF_A_RUN = 10000


@functools.cache
def prior_of(dtype):
    """The recorded model; in float64 it shows how much of a deviation is rounding."""
    folders = (root / "tiny_sd" for root in (FOLDER, FOLDER.parent, BUNDLED))
    return load_prior(next(folder for folder in folders if folder.is_dir()), dtype=dtype)


class Watched:
    """Passes everything on to a prior and keeps what goes in and out of predict."""

    def __init__(self, prior):
        self._prior = prior
        self.calls = []

    def __getattr__(self, name):
        return getattr(self._prior, name)

    def predict(self, x_t, t, text):
        out = self._prior.predict(x_t, t, text)
        self.calls.append((x_t, self._prior.schedule.timestep(t), out))
        return out


class Case:
    """One recorded file; `agree` is the comparison, and remembers the largest deviation."""

    def __init__(self, path, worst=None):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.worst = {} if worst is None else worst
        self.family = family_of(path.stem)[0]
        self.perp = "_perp_" in path.stem

    def __contains__(self, name):
        return name in self.arrays

    def __getitem__(self, name):
        """An array as a tensor, a scalar as a number."""
        array = self.arrays[name]
        return array.item() if array.ndim == 0 else torch.from_numpy(array)

    def agree(self, ours, theirs, label, family=None):
        """max|a - b| <= 5e-4 max|b|, b the recorded value."""
        ours, theirs = torch.as_tensor(ours, dtype=F64), torch.as_tensor(theirs, dtype=F64)
        assert ours.shape == theirs.shape, f"{label}: {list(ours.shape)} against {list(theirs.shape)}"
        gap, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        deviation = 0.0 if gap == 0 else gap / size if size else float("inf")
        family = family or self.family
        self.worst[family] = max(self.worst.get(family, (0.0, "")), (deviation, label))
        assert deviation <= TOLERANCE, f"{label} deviates by {deviation:.1e} of its largest value"


@functools.cache
def prompt():
    """The text behind the cases, from the folder's own record of it."""
    texts = next((path for path in FILES if path.stem == "prompts"), BUNDLED / "cases" / "prompts.npz")
    with np.load(texts, allow_pickle=False) as arrays:
        return str(arrays["prompts"][0])


def conditioning(azimuth, elevation, perp, dtype=F32):
    """What the library tells the model about these cameras."""
    views = ViewPrompts(prompt(), perp_neg=perp)
    return views.conditioning(azimuth, elevation, prior_of(dtype).embed)


def recorded_conditioning(text, weights, dtype=F32):
    """Rows as the official network received them: B positive, B empty, then K negatives a view, view by view."""
    b = len(weights)
    positive, negative, *away = (Condition(part) for part in text.to(dtype).split([b, b, len(text) - 2 * b]))
    if weights.numel() == 0:
        return Conditioning(positive, negative)
    return Conditioning(positive, negative, away[0], weights.to(dtype))


def check_texts(case, text, weights, azimuth, elevation, perp):
    """Embeddings [B, rows, L, C] of B cameras, each [positive, empty, negatives ...], and Perp-Neg's weights."""
    ours = conditioning(azimuth, elevation, perp)
    case.agree(ours.positive.hidden, text[:, 0], "positive embeddings")
    case.agree(ours.negative.hidden, text[:, 1], "empty embeddings")
    if not perp:
        assert ours.perp is None and text.shape[1] == 2
        return
    case.agree(ours.perp_weights, weights, "Perp-Neg weights")
    used = weights != 0  # the release fills up views that have no negatives with arbitrary texts
    away = ours.perp.hidden.unflatten(0, weights.shape)
    if used.any():
        case.agree(away[used], text[:, 2:][used], "negative embeddings")


def check_sdi(case):
    perp, t, steps = case["use_perp_neg"], case["t"], case["inversion_n_steps"]
    path, times = case["timesteps"], timesteps.listed(t / 1000)
    check_texts(case, case["text_embeddings"][None], case["neg_guidance_weights"], case["azimuth"],
                case["elevation"], perp)  # fmt: skip
    ours = sdi_release.grid(t.item(), steps, case["random_value"])
    assert ours == path.tolist() and ours[-1] == min(t.item() + case["delta_t"], 999)
    settings = dict(scale=case["guidance_scale"], inversion_scale=case["inversion_guidance_scale"],
                    inversion_steps=steps, eta=case["inversion_eta"], released=True)  # fmt: skip
    draws = sdi_release.inversion(
        steps, settings["inversion_scale"], settings["eta"], case["random_value"], case["step_noise"]
    )
    objective = dataclasses.replace(sdi(**settings), timesteps=times, noise=draws)

    def guidance(dtype):
        prior = Watched(prior_of(dtype))
        texts = recorded_conditioning(case["text_embeddings"], case["neg_guidance_weights"], dtype)
        x = case["latents"].to(dtype)
        out = objective.guidance(x, prior, texts, step=0, total=STEPS_OF_A_RUN, generator=torch.Generator())
        level = coefficients(prior.schedule, path[-1:] / 1000, x)
        return out, to_eps("x0", x, out.x_t, *level), prior, texts

    out, found, prior, texts = guidance(F32)
    case.agree(out.x_t, case["latents_noisy"], "latents_noisy")
    case.agree(found, case["found_noise"], "found_noise")
    case.agree(out.prediction, case["noise_pred"], "noise_pred")
    case.agree(out.x0, case["target"], "target")
    case.agree(out.gradient, case["latents"] - case["target"], "gradient")

    assert [len(x) for x, _, _ in prior.calls] == case["unet_batch"].tolist()
    assert out.nfe == case["unet_batch"].sum()
    assert torch.stack([told_t for _, told_t, _ in prior.calls]).equal(case["unet_t"])
    case.agree(torch.stack([y for _, _, y in prior.calls]), case["unet_out"], "unet_out")
    case.agree(torch.stack([x[:1] for x, _, _ in prior.calls]), case["traj_latents"], "traj_latents")
    inverse = sdi(**settings | {"scale": settings["inversion_scale"]}).prediction
    for k, theirs in enumerate(case["inv_noise_pred"]):
        x, at = case["traj_latents"][k], path[k : k + 1] / 1000
        eps, _ = inverse(Query(x, at, prior_of(F32), texts, torch.Generator(), 0, STEPS_OF_A_RUN), x)
        case.agree(eps, theirs, f"inv_noise_pred {k}")

    if "target_f64" in case:
        fine, fine_found, _, _ = guidance(F64)
        for name, low, high in (("target", out.x0, fine.x0), ("latents_noisy", out.x_t, fine.x_t),
                                ("found_noise", found, fine_found)):  # fmt: skip
            case.agree(low, case[f"{name}_f64"], name, case.family + ", ours in float32 against float64")
            case.agree(high, case[f"{name}_f64"], name, case.family + ", both in float64")


def check_defined_noise(case):
    objective = dataclasses.replace(
        sdi(scale=case["guidance_scale"], released=True),
        timesteps=timesteps.listed(case["t"] / 1000),
        noise=noise.given(case["noise"]),
    )
    texts = conditioning(case["azimuth"], case["elevation"], case.perp)
    out = objective.guidance(
        case["latents"], prior_of(F32), texts, step=0, total=STEPS_OF_A_RUN, generator=torch.Generator()
    )
    case.agree(out.x_t, case["latents_noisy"], "latents_noisy")
    case.agree(out.prediction, case["noise_pred"], "noise_pred")
    case.agree(out.x0, case["target"], "target")


def check_call(case):
    objective = dataclasses.replace(
        sdi(eta=0.0, released=True),
        timesteps=timesteps.listed(case["t"] / 1000),
        noise=sdi_release.inversion(eta=0.0, random=0.0),
    )
    texts = conditioning(case["azimuth"], case["elevation"], case.perp)
    x = case["latents"].requires_grad_()
    out = objective.guidance(x, prior_of(F32), texts, step=0, total=STEPS_OF_A_RUN, generator=torch.Generator())
    loss = attach(x, out.gradient)
    (gradient,) = torch.autograd.grad(loss, x)
    case.agree(out.x0, case["target"], "target")
    case.agree(loss.detach(), case["loss_sdi"], "loss_sdi")
    case.agree(out.gradient.norm(), case["grad_norm"], "grad_norm")
    case.agree(gradient, case["latents_grad"], "latents_grad")


def check_sds(case):
    assert case["weighting"] == "sds"
    perp, scale, t = case["use_perp_neg"], case["guidance_scale"], case["t"]
    check_texts(case, case["text_embeddings"][None], case["neg_guidance_weights"], case["azimuth"],
                case["elevation"], perp)  # fmt: skip
    texts = recorded_conditioning(case["text_embeddings"], case["neg_guidance_weights"])
    # The library's own sds() with the scale in its convention, and the release's prediction with the scale as is.
    own = dataclasses.replace(
        sds(scale if perp else scale + 1), timesteps=timesteps.listed(t / 1000), noise=noise.given(case["noise"])
    )
    for objective in (own, dataclasses.replace(own, prediction=sdi_release.guided(scale))):
        out = objective.guidance(
            case["latents"], prior_of(F32), texts, step=0, total=STEPS_OF_A_RUN, generator=torch.Generator()
        )
        case.agree(out.x_t, case["latents_noisy"], "latents_noisy")
        case.agree(out.prediction, case["noise_pred"], "noise_pred")
        case.agree(out.gradient, case["grad"], "grad")
        case.agree(objective.weight(prior_of(F32).schedule, out.t), case["w"], "w")


def check_scheduler(case):
    schedule, theirs = prior_of(F32).schedule, case["alphas_cumprod"]
    ours = schedule.alpha(torch.arange(len(theirs)) / len(theirs)) ** 2
    case.agree(ours, theirs, "alphas_cumprod")
    case.agree(ours / theirs, torch.ones_like(ours), "alphas_cumprod, each by itself")
    below = schedule.alpha(torch.tensor([-0.099])).square().item()
    case.agree(below, case["initial_alpha_cumprod"], "level of the first step")
    case.agree(ours[0], case["final_alpha_cumprod"], "lowest level")


def check_t_schedule(case):
    objective = sdi(start=case["max_step_percent"], stop=case["min_step_percent"], released=True)
    for step, theirs in zip(case["global_step"].tolist(), case["t"].tolist(), strict=True):
        t = objective.timesteps(step, case["trainer_max_steps"], 1, torch.Generator())
        case.agree(t * 1000, [theirs], f"t at step {step}")
        assert round(t.item() * 1000, 6) == theirs


def check_prompts(case):
    texts = case.arrays["prompts"].tolist()
    views = ViewPrompts(texts[0])
    assert [views.prompt, views.negative, *map(views.text, ("side", "front", "back", "overhead"))] == texts
    embed = prior_of(F32).embed
    case.agree(embed(texts[:1]).hidden, case["text_embeddings"], "prompt")
    case.agree(embed(texts[1:2]).hidden, case["uncond_text_embeddings"], "empty prompt")
    case.agree(embed(texts[2:]).hidden, case["text_embeddings_vd"], "views")
    case.agree(embed([views.negative] * 4).hidden, case["uncond_text_embeddings_vd"], "empty prompt of the views")


def check_views(case):
    cameras = case["azimuth"], case["elevation"]
    check_texts(case, case["plain_text_embeddings"], None, *cameras, perp=False)
    check_texts(case, case["perp_text_embeddings"], case["perp_neg_weights"], *cameras, perp=True)


def check_vae(case):
    prior, image, scale = prior_of(F32), case["image"], case["scaling_factor"]
    mean, drawn = prior.encode(image), prior.encode(image, torch.Generator().manual_seed(9))
    spread = case["std"] * torch.randn(mean.shape, generator=torch.Generator().manual_seed(9))
    case.agree(mean, case["mean"] * scale, "mean")
    case.agree(drawn - mean, spread * scale, "spread")
    case.agree(drawn, case["latents"], "latents")
    case.agree(prior.decode(case["latents"]), case["decoded"], "decoded")


def check_batch_of_two(case):
    x, cameras = case["latents"], (case["azimuth"], case["elevation"])
    weights, text = case["neg_guidance_weights"], case["perp_text_embeddings"]
    b, k = weights.shape
    of_views = [text[[i, b + i, *range(2 * b + k * i, 2 * b + k * (i + 1))]] for i in range(b)]
    check_texts(case, torch.stack(of_views), weights, *cameras, perp=True)
    perp = recorded_conditioning(text, weights)
    plain = recorded_conditioning(case["plain_text_embeddings"], weights[:, :0])
    t, prediction = torch.full((b,), 0.5), sdi(scale=7.5, released=True).prediction

    def predict(texts):
        query = Query(x, t, prior_of(F32), texts, torch.Generator(), 0, STEPS_OF_A_RUN)
        with torch.no_grad():
            return prediction(query, x)[0]

    together = case["perp_noise_pred_batch2"]
    alone = case["perp_noise_pred_single"].reshape(together.shape)
    case.agree(predict(plain), case["plain_noise_pred_batch2"], "plain_noise_pred_batch2")
    case.agree(predict(perp), together, "perp_noise_pred_batch2")
    # The default tells every view its own negatives, and is therefore what two calls of one view are.
    with torch.no_grad():
        case.agree(guided_prediction(prior_of(F32), x, t, perp, 7.5)[0], alone, "perp_noise_pred_single")
    assert (together - alone).abs().max() > TOLERANCE * alone.abs().max()


FAMILIES = {
    r"sdi_(plain|perp)_t\d+_d\d+(_.+)?": check_sdi,
    r"sdi_(plain|perp)_t\d+_defnoise": check_defined_noise,
    r"sdi_call_(plain|perp)_t\d+": check_call,
    r"sds_(plain|perp)_t\d+_s[\d.]+": check_sds,
    r"scheduler": check_scheduler,
    r"t_schedule": check_t_schedule,
    r"prompts": check_prompts,
    r"views": check_views,
    r"vae": check_vae,
    r"quirk_batch2": check_batch_of_two,
}


def family_of(stem):
    """(name of the family, its check) of a file name without its ending; ValueError if no family has it."""
    for pattern, check in FAMILIES.items():
        if match := re.fullmatch(pattern, stem):
            branch = match.group(1) + " " if match.groups() else ""
            return branch + check.__name__.removeprefix("check_"), check
    raise ValueError(f"{stem}.npz belongs to no known family of recorded cases")


@pytest.fixture(scope="module")
def worst():
    """Largest deviation of each family and what showed it; printed at the end."""
    table = {}
    yield table
    for family, (deviation, label) in sorted(table.items()):
        print(f"\n{family}: {deviation:.1e} ({label})", end="")


def test_there_are_cases():
    assert FILES, f"no recorded case (*.npz) in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_recorded_numbers(path, worst):
    family_of(path.stem)[1](Case(path, worst))


def test_what_cannot_be_interpreted_fails(tmp_path):
    np.savez(tmp_path / "sdx_plain_t500.npz", latents=np.zeros(1))
    with pytest.raises(ValueError, match="no known family"):
        Case(tmp_path / "sdx_plain_t500.npz")
    for family in ("sdi_perp_t500_d0", "sdi_plain_t1_defnoise", "sdi_call_perp_t2", "sds_plain_t3_s7.5", *(
        "scheduler", "t_schedule", "prompts", "views", "vae", "quirk_batch2"
    )):  # fmt: skip
        np.savez(tmp_path / f"{family}.npz", something=np.zeros(1))
        with pytest.raises(KeyError):
            family_of(family)[1](Case(tmp_path / f"{family}.npz"))
