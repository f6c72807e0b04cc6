import pytest
import torch

from distill3d.diffusion import schedule as sch

SCHEDULES = [
    sch.Cosine(),
    sch.Linear(),
    sch.Flow(),
    sch.Flow(shift=3.0),
    sch.stable_diffusion(),
    sch.Table.from_config({"beta_schedule": "squaredcos_cap_v2"}),
    sch.Table.from_config({"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_positive_and_falling_over_the_whole_range(schedule, dtype):
    t = torch.linspace(0, 1, 501, dtype=dtype)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.dtype == sigma.dtype == dtype
    for value in (alpha, sigma, schedule.log_snr(t)):
        assert value.isfinite().all()
    assert (alpha > 0).all() and (sigma > 0).all()
    assert (schedule.log_snr(t).diff() <= 0).all()


@pytest.mark.parametrize("schedule", [sch.Cosine(), sch.Flow()])
def test_continuous_schedules_stop_a_ten_thousandth_before_their_ends(schedule, randn):
    """Nearer, float32 keeps fewer than three digits of a conversion; further away, noise at t = 0 could be seen."""
    ends = torch.tensor([0.0, 1.0])
    smallest = torch.stack([schedule.sigma(ends)[0], schedule.alpha(ends)[1]])
    assert (smallest >= 0.99e-4).all() and (smallest <= 1.6e-4).all()  # Cosine's slope there is pi / 2
    x0, eps = randn(2, 1000).float(), randn(2, 1000).float()
    alpha, sigma = sch.coefficients(schedule, ends, x0)
    x_t = alpha * x0 + sigma * eps
    torch.testing.assert_close(sch.to_eps("x0", x0, x_t, alpha, sigma), eps, rtol=0, atol=5e-3)
    torch.testing.assert_close(sch.from_eps("x0", eps, x_t, alpha, sigma), x0, rtol=0, atol=5e-3)


@every_schedule
def test_log_snr_and_its_inverse(schedule):
    t = torch.linspace(0.001, 0.99, 400, dtype=torch.float64)
    level = schedule.log_snr(t)
    torch.testing.assert_close(sch.log_snr(schedule, t), level, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(schedule.time(level), t, rtol=0, atol=1e-9)


@every_schedule
def test_variance_is_preserved_except_by_flow(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    total = a + s if isinstance(schedule, sch.Flow) else a**2 + s**2
    torch.testing.assert_close(total, torch.ones_like(t))


def test_table_is_that_of_diffusers():
    from diffusers import DDIMScheduler

    for config in (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
    ):
        theirs = DDIMScheduler(**config).alphas_cumprod
        t = torch.arange(1000) / 1000  # float32: grid times must hit their entries all the same
        table = sch.Table.from_config(config)
        assert (table.position(t) == torch.arange(1000)).all()
        torch.testing.assert_close(table.alpha(t) ** 2, theirs, rtol=2e-5, atol=1e-7)


def test_table_position_is_whole_on_the_grid_and_clamped_at_the_end():
    table = sch.stable_diffusion()
    t = torch.tensor([0.0, 0.25, 0.98, 0.999, 1.0, 0.5005])
    assert table.position(t)[:5].tolist() == [0, 250, 980, 999, 999]
    assert table.position(t)[5].item() == pytest.approx(500.5, abs=1e-3)


@every_schedule
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "velocity"])
def test_round_trips_between_predictions(schedule, kind, randn):
    x0, eps = randn(5, 2, 3, 3), randn(5, 2, 3, 3)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    alpha, sigma = sch.coefficients(schedule, t, x0)
    x_t = alpha * x0 + sigma * eps
    meaning = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}
    value = sch.from_eps(kind, eps, x_t, alpha, sigma)
    torch.testing.assert_close(value, meaning[kind], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(sch.to_eps(kind, value, x_t, alpha, sigma), eps, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"shift": 3.0}, 64),
        ({"use_dynamic_shifting": True}, 256),
        ({"use_dynamic_shifting": True}, 4096),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0}, 1024),
    ],
)
def test_even_times_of_a_flow_are_the_steps_of_diffusers_sampler(config, tokens):
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    c = scheduler.config
    limits = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    mu = calculate_shift(tokens, *limits) if c.use_dynamic_shifting else None
    t = np.linspace(1.0, 0.1, 10)
    scheduler.set_timesteps(sigmas=t, mu=mu)
    sigma = sch.Flow.from_config(dict(c), tokens).sigma(torch.from_numpy(t))
    torch.testing.assert_close(sigma[1:].float(), scheduler.sigmas[1:10], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(1000 * sigma[1:].float(), scheduler.timesteps[1:], rtol=1e-5, atol=1e-3)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="shift of a flow must be a positive number, got 0"):
        sch.Flow(0.0)
    with pytest.raises(ValueError, match="time_shift_type 'cubic'"):
        sch.Flow.from_config({"use_dynamic_shifting": True, "time_shift_type": "cubic"}, 64)
    with pytest.raises(ValueError, match="choose eps"):
        sch.to_eps("noise", *[torch.zeros(1)] * 4)
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid' is not supported"):
        sch.Table.from_config({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="between 0 and 1"):
        sch.Table.from_betas([0.1, 1.0])
