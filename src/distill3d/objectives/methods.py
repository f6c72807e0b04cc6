"""The published methods, each a point of the design space in objective.py.

At x_t = alpha_t x + sigma_t kappa: e_c is the noise predicted with the prompt, e_u with the empty (or the user's
negative) one, e_n with a negative prompt of the method, and eps_s = e_u + s (e_c - e_u). A timestep k of 1000 in a
source is t = k / 1000 here, and steps of a run are fractions of it. Defaults are those of the paper or, where it is
silent, of public code, as the docstrings say. Settings out of range raise ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from distill3d.devices import on_host
from distill3d.diffusion.ddim import Solver
from distill3d.diffusion.schedule import coefficients, to_eps
from distill3d.objectives import noise, prediction, reference, timesteps, weighting
from distill3d.objectives.atlas import Atlas, memory_of
from distill3d.objectives.noise import Cached, Constant
from distill3d.objectives.objective import NoiseFrame, Objective, Query, check_fraction, check_number
from distill3d.objectives.prediction import (
    Coefficient,
    Text,
    fixed_text,
    linear_combination,
    negative,
    positive,
    without_negative,
)
from distill3d.objectives.sdi_release import sdi_as_released
from distill3d.types import Schedule

# The negative prompt of NFSD (Katzir et al. 2023).
NFSD_NEGATIVE_PROMPT = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
)
# What SDS-Bridge (McAllister et al. 2024) appends to the prompt to describe its target and its source distribution.
BRIDGE_TARGET = ", detailed high resolution, high quality, sharp"
BRIDGE_SOURCE = ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed"


def sds(scale: float = 100.0, low: float = 0.02, high: float = 0.98, anneal: bool = False) -> Objective:
    """g = sigma_t^2 (eps_s - kappa), kappa ~ N(0, I), t ~ U[low, high].

    Score distillation sampling (DreamFusion, Poole et al. 2022, eq. 3). anneal: t falls linearly from high to low
    instead, a step of the ablation on the way to SDI (Lukoianov et al. 2024). DreamFusion and threestudio write
    e_c + s (e_c - e_u), so that their 100 is 101 here.
    """
    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.linear(high, low) if anneal else timesteps.uniform(low, high),
        prediction=prediction.guided(scale),
        reference=reference.injected_noise,
        weight=weighting.noise_variance,
        pull=1.0,
    )


def sdi(
    scale: float = 7.5,
    inversion_scale: float = -7.5,
    inversion_steps: int = 10,
    eta: float = 0.3,
    start: float = 0.98,
    stop: float = 0.25,
    solver: Solver = "euler",
    overshoot: float | None = None,
    released: bool = False,
) -> Objective:
    """g = sigma_t / alpha_t (eps_s - kappa) = x - x0_hat, kappa by DDIM inversion of x to t + tau.

    Score distillation via reparametrized DDIM (SDI, Lukoianov et al. 2024): t falls linearly from start to stop.
    The other arguments are those of noise.ddim_inversion. Constants: the paper and its public code. released=True
    gives the official implementation number for number, defects included (sdi_release.py lists them); it has neither
    solver nor overshoot. Both amount to more guidance than 7.5, at the last time to 18.4
    (`prediction.effective_guidance`, c = 0.42); `nominal` of settings.SDI corrects it.
    """
    if released:
        if solver != "euler" or overshoot is not None:
            raise ValueError("sdi(released=True) has neither solver nor overshoot: leave them out")
        return sdi_as_released(scale, inversion_scale, inversion_steps, eta, start, stop)
    return Objective(
        noise=noise.ddim_inversion(inversion_steps, inversion_scale, eta, solver, overshoot),
        timesteps=timesteps.linear(start, stop),
        prediction=prediction.guided(scale),
        reference=reference.injected_noise,
        weight=weighting.x0_matching,
        pull=1.0,
    )


def sdi_cached(
    scale: float = 7.5,
    start: float = 0.98,
    stop: float = 0.02,
    first: Tensor | None = None,
    noise: NoiseFrame = "image",
    eta: float = 0.0,
) -> Objective:
    """SDI with the kappa of the step before: from x = 0, with x <- x0_hat at every step, it IS DDIM sampling.

    For one run: the objective keeps kappa as its state. In 2D, noise="image", first [B, ...] is the noise of step 0.
    In 3D kappa is read from an atlas, and the prediction is written back into it with the fresh noise eta
    (`Atlas.remember`): on the pixels of the views from each of some azimuths, noise="camera", or on the object,
    noise="surface".
    """
    memory = memory_of(noise, Cached(first), Atlas(eta=eta))
    return Objective(
        noise=memory.noise,
        timesteps=timesteps.linear(start, stop),
        prediction=memory.remember(prediction.guided(scale)),
        reference=reference.injected_noise,
        weight=weighting.x0_matching,
        pull=1.0,
        state=memory,
        frame=noise,
    )


def cfd(
    scale: float = 7.5,
    start: float = 0.98,
    stop: float = 0.02,
    first: Tensor | None = None,
    noise: NoiseFrame = "image",
    refresh: float = 0.0,
) -> Objective:
    """g = (1 - rho' / rho) (x - x0_hat), the same kappa at every step, rho = sigma_t / alpha_t, rho' at the next time.

    The constant-noise form of DDIM, on which consistent flow distillation is built (Yan et al. 2025): from x = 0, with
    x <- x - g at every step, x + rho' kappa IS DDIM's sample over alpha, and the last step, which takes the target
    whole, ends at its denoised image. For one run: the objective keeps kappa as its state. In 2D, noise="image", first
    [B, ...] is that kappa; by default it is drawn once.

    In 3D, with another noise, g = x - x0_hat, for an optimizer that takes the step itself (Adam in the paper), and
    kappa is read from an atlas (`Atlas`): fixed to the object, noise="surface", as in the paper; or, for comparison, to
    the pixels of all views, "constant", or of the views from each of some azimuths, "camera". refresh is the share of
    fresh noise at each step, 1e-4 in the public code.
    """
    memory = memory_of(noise, Constant(first), Atlas(refresh))
    return Objective(
        noise=memory.noise,
        timesteps=timesteps.linear(start, stop),
        prediction=prediction.guided(scale),
        reference=reference.injected_noise,
        weight=weighting.x0_matching,
        pull=1.0,
        state=memory,
        step_size=weighting.ddim_step_size if noise == "image" else None,
        frame=noise,
    )


def sjc(scale: float = 100.0, low: float = 0.01, high: float = 0.97, variance_reduced: bool = True) -> Objective:
    """g = eps_s - kappa = (x - D) / u_t with D = z - u_t eps_s, z = x + u_t kappa, u_t = sigma_t / alpha_t.

    Score Jacobian chaining (Wang et al. 2022) in the frame z = x_t / alpha_t: SDS of weight 1. Without variance
    reduction the reference is zero, g = (z - D) / u_t. Times and scale: its re-implementation in threestudio.
    """
    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.uniform(low, high),
        prediction=prediction.guided(scale),
        reference=reference.injected_noise if variance_reduced else reference.zero,
        weight=weighting.constant(1.0),
        pull=1.0,
    )


def hifa(scale: float = 100.0, start: float = 0.98, stop: float = 0.3, image_weight: float = 0.48) -> Objective:
    """g = sigma_t^2 (eps_s - kappa), kappa ~ N(0, I), t = start - (start - stop) sqrt(step / total).

    HiFA (Zhu et al. 2023) as threestudio has it. sigma_t^2 (eps_s - kappa) = alpha_t sigma_t (x - x0_hat), and the
    rendered image has the same pull, image_weight alpha_t sigma_t (image - decode(x0_hat)), in place of a recipe's.
    threestudio's 0.01 weighs sums; losses here are means, and a latent of Stable Diffusion stands for 48 values of the
    image: 0.48. The variance of the depth along a ray is a regularizer of the scene. The authors' own code is another
    variant: x0_hat by four DDIM steps with eta 1, weight 0.05 at all times, 0.1 on the image.
    """
    check_number("image_weight", image_weight)

    def on_images(schedule: Schedule, t: Tensor) -> Tensor:
        return image_weight * schedule.alpha(t) * schedule.sigma(t)

    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.square_root(start, stop),
        prediction=prediction.guided(scale),
        reference=reference.injected_noise,
        weight=weighting.noise_variance,
        image_weight=on_images if image_weight else None,
    )


def nfsd(
    scale: float = 7.5, negative_prompt: str = NFSD_NEGATIVE_PROMPT, low: float = 0.02, high: float = 0.98
) -> Objective:
    """g = sigma_t^2 (s (e_c - e_u) + d), d = e_u for t < 0.2 and e_u - e_n above, e_n with the negative prompt.

    Noise-free score distillation (Katzir et al. 2023), all constants from there. Written here as eps_s minus e_n, or
    minus nothing: the same difference, with a prediction that denoises. e_u is that of the empty text, whatever the
    user's negative words.
    """

    def late(query: Query) -> Tensor:
        t = on_host(query.t)
        return (t >= 0.2).to(t)

    return _unconditional(_guided_against(scale, {fixed_text(negative_prompt): late}, low, high), negative_prompt)


def csd(
    scale: float = 1.0,
    negative_prompt: str | None = None,
    negative_weight: float = 1.0,
    stage: Literal["form", "refine"] = "form",
    low: float = 0.02,
    high: float = 0.98,
) -> Objective:
    """g = sigma_t^2 s (e_c - e_u), or with a negative prompt sigma_t^2 (s (e_c - e_u) + w (e_u - e_n)).

    Classifier score distillation (Yu et al. 2023): SDS without its generative part e_u - kappa. e_u is that of the
    empty text, whatever the user's negative words. w is negative_weight times the schedule of the public code: while
    the object forms, it rises from 0 to 1 over half of the run; while it is refined, it falls from 1 to 0.5. That code
    also draws t <= 0.5 in the second half of the first stage and in the second stage: set high.
    """
    check_number("negative_weight", negative_weight)
    if stage not in ("form", "refine"):
        raise ValueError(f"unknown stage {stage!r}: choose form or refine")
    if negative_prompt is None:
        return _unconditional(_guided_against(scale, {negative: 1.0}, low, high))

    def share(query: Query) -> Tensor:
        done = min(query.step / max(query.total - 1, 1), 1.0)
        return on_host(query.t).new_tensor(negative_weight * (min(2 * done, 1.0) if stage == "form" else 1 - done / 2))

    compared = {negative: lambda query: 1 - share(query), fixed_text(negative_prompt): share}
    return _unconditional(_guided_against(scale, compared, low, high), negative_prompt)


def sds_bridge(
    scale: float = 40.0,
    target_suffix: str = BRIDGE_TARGET,
    source_suffix: str = BRIDGE_SOURCE,
    first: float = 0.5,
    low: float = 0.02,
    high: float = 0.98,
) -> Objective:
    """g = sigma_t^2 s (e_target - e_source), one text describing the goal, the other the images so far.

    SDS as a bridge between image distributions (McAllister et al. 2024). Over the fraction `first` of the run it is SDS
    at the same scale from the empty text to the target; then the bridge follows. Target and source are the
    conditioning's positive and negative text. The caller writes them, as Objective.suffixes says: prompt +
    target_suffix and prompt + source_suffix. Constants: the 2D experiments of its public code, whose first stage has
    the prompt without a suffix; its 3D code has scale 100, first = 0.8 and weight 1.
    """
    check_fraction("first", first)
    bridge = _guided_against(scale, {negative: 1.0}, low, high)
    begin = sds(scale)

    def prediction(query: Query, x_t: Tensor) -> tuple[Tensor, int, Tensor]:
        if query.step >= timesteps.steps_of(first, query.total):
            return bridge.prediction(query, x_t)  # type: ignore[return-value]
        predicted, nfe, *_ = begin.prediction(without_negative(query), x_t)
        return predicted, nfe, to_eps("x0", query.x, x_t, *coefficients(query.prior.schedule, query.t, x_t))

    return replace(bridge, prediction=prediction, suffixes=(target_suffix, source_suffix), texts=("",))


def _unconditional(objective: Objective, *texts: str) -> Objective:
    """The objective with the empty text as its negative one; it needs these texts too."""
    shown = objective.prediction
    return replace(objective, prediction=lambda query, x_t: shown(without_negative(query), x_t), texts=("", *texts))


def _guided_against(scale: float, reference: Mapping[Text, Coefficient], low: float, high: float) -> Objective:
    """g = sigma_t^2 (eps_s - sum of coefficient times e(x_t | text)), kappa ~ N(0, I), t ~ U[low, high]."""
    check_number("scale", scale)
    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.uniform(low, high),
        prediction=linear_combination({positive: scale, negative: 1 - scale}, reference),
        reference=None,
        weight=weighting.noise_variance,
    )


def ism(
    scale: float = 7.5, steps: int = 5, wide: float = 0.1, narrow: float = 0.08, high: float = 0.98, warmup: float = 0.3
) -> Objective:
    """g = 0.1 sigma_t / alpha_t (eps_s(x_t, t) - e_u(x_s, s)), x_s by unconditional DDIM inversion, s = t - gap.

    Interval score matching (LucidDreamer, Liang et al. 2023). gap as in noise.interval_inversion; t ~ U[0.02, top],
    top falling from high to 0.5 over the fraction `warmup` of the run. Constants and weight: its public code, where
    the warmup takes 1500 of 5000 steps. With gap 0 it is g = 0.1 sigma_t / alpha_t s (e_c - e_u), CSD at an
    inverted x_t. A user's negative words reach eps_s only, as there. The public code noises x to the lowest level
    before the first step (its sigma is 0.03); here the inversion starts at x itself.
    """
    inverted = noise.interval_inversion(steps, wide, narrow, warmup)
    return Objective(
        noise=lambda query: inverted(without_negative(query)),
        timesteps=timesteps.narrowing(0.02, high, 0.5, over=warmup),
        prediction=prediction.guided(scale),
        reference=None,
        weight=weighting.scaled(0.1, weighting.x0_matching),
        texts=("",),
    )


def vsd(
    student: reference.Student,
    scale: float = 7.5,
    camera: float = 1.0,
    low: float = 0.02,
    high: float = 0.98,
    switch: float = 0.2,
    student_steps: int = 1,
    lookahead: bool = False,
) -> Objective:
    """g = sigma_t^2 (eps_s - e_phi), e_phi the student's noise at x_t, conditioned on prompt and camera.

    Variational score distillation (ProlificDreamer, Wang et al. 2023); t ~ U[low, high], and U[low, 0.5] after the
    fraction `switch` of the run. The student (priors.student.Student) learns student_steps times at each step, on the
    same x; camera is the guidance scale of its camera. lookahead lets it learn before it is asked, not after, so that
    it is not a step behind (L2-VSD, Lin et al. 2025, without its linearization). Constants: its re-implementation in
    threestudio, which switches after 5000 of 25000 steps.

    The student starts as the prior conditioned on the prompt, so g is at first that of csd(scale - 1). It stays near
    that until the student has learned: after 200 training steps at a rate of 1e-4 the two differ by 2 to 5 %.
    """
    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.narrowing(low, high, 0.5, after=switch),
        prediction=prediction.guided(scale),
        reference=reference.student(student, camera, student_steps, lookahead),
        weight=weighting.noise_variance,
    )


def esd(
    student: reference.Student,
    scale: float = 7.5,
    entropy: float = 0.5,
    student_steps: int = 1,
    lookahead: bool = False,
) -> Objective:
    """g = sigma_t^2 (eps_s - (1 - l) e_phi(x_t | camera) - l e_phi(x_t)), l = entropy.

    Entropic score distillation (Wang et al. 2024): VSD with guidance on the camera, of scale 1 - l, in the student.
    l = 0 is VSD; 0.5 is the setting its public code recommends.
    """
    check_fraction("entropy", entropy)
    return vsd(student, scale, camera=1 - entropy, student_steps=student_steps, lookahead=lookahead)


def mvdream(
    scale: float = 50.0, rescale: float = 0.5, views: int = 4, warmup: float = 0.8, shared_noise: bool = False
) -> Objective:
    """g = x - x0_hat, x0_hat of a guided prediction, rescaled; kappa ~ N(0, I), groups of views at one time.

    MVDream (Shi et al. 2023, section 3.2 and eq. 3): x0_hat = rescale c x0_s + (1 - rescale) x0_s with
    c = std x0_c / std x0_s, x0_c the conditional and x0_s the guided estimate, deviations over all views of a group.
    t ~ U[low, high], low falling from 0.98 to 0.02 and high from 0.98 to 0.5 over the fraction `warmup` of
    the run. Constants: its public code, 8000 of 10000 steps, where all groups of a batch share one t. shared_noise
    gives the views of a group one noise. On a prior that sees single views it is SDS on x0_hat, rescaled view by view.
    """
    return Objective(
        noise=noise.gaussian(shared_noise),
        timesteps=timesteps.moving((0.98, 0.98), (0.02, 0.5), over=warmup),
        prediction=prediction.rescaled(scale, rescale),
        reference=reference.injected_noise,
        weight=weighting.x0_matching,
        pull=1.0,
        views=views,
    )


def rfds(scale: float = 100.0, low: float = 0.02, high: float = 0.7) -> Objective:
    """g = v_s - (kappa - x) at x_t = (1 - t) x + t kappa, v_s the guided velocity; kappa ~ N(0, I).

    Rectified flow distillation sampling (Yang et al. 2024), for flow models only: v = eps - x0 makes it
    (eps_s - kappa) / (1 - t), SDS of that weight. Constants: its public code for Stable Diffusion 3, but for the factor
    sigmoid(N(0, 1)) there and that its loss has no 1/2. For InstaFlow it has scale 50, high 0.98 and, in the last two
    thirds of the run, low 0.3.
    """
    return Objective(
        noise=noise.gaussian(),
        timesteps=timesteps.uniform(low, high),
        prediction=prediction.guided(scale),
        reference=reference.injected_noise,
        weight=weighting.velocity_matching,
        pull=1.0,
    )
