"""Noise schedules, and the conversions between what networks predict; both are written here once.

Everywhere x_t = alpha(t) x0 + sigma(t) eps with t in [0, 1], t = 1 pure noise, one t per sample.

    log-SNR     lambda(t) = log(alpha^2 / sigma^2), falling in t
    v           alpha eps - sigma x0        (Salimans & Ho 2022, appendix D)
    velocity    eps - x0                    (flow matching: d x_t / dt where alpha = 1 - t, sigma = t)

No schedule reaches alpha = 0 or sigma = 0, where eps, x0 and v could not be converted into each other. Every t in
[0, 1], both ends included, therefore gives finite values. The methods of a schedule work on tensors of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.types import Schedule

Kind = Literal["eps", "x0", "v", "velocity"]

# Continuous schedules stay this far away from t = 0 and t = 1: in float32 the conversions lose at most four of their
# seven digits at the very end.
MARGIN = 1e-4
# The last entry of a table whose terminal SNR is zero (Lin et al. 2023) becomes this instead of 0.
SMALLEST_ALPHA_BAR = 2.0**-24


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Per-sample values [B] as [B, 1, ...], with the dtype and device of `like` [B, ...]."""
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))


def coefficients(
    schedule: Schedule, t: Float[Tensor, " b"], like: Float[Tensor, "b *shape"]
) -> tuple[Float[Tensor, "b *ones"], Float[Tensor, "b *ones"]]:
    """alpha(t) and sigma(t), shaped to multiply `like`."""
    t = t.to(like)
    if isinstance(schedule, _VariancePreserving):  # both from one look-up
        level = schedule.log_snr(t)
        return expand(torch.sigmoid(level).sqrt(), like), expand(torch.sigmoid(-level).sqrt(), like)
    return expand(schedule.alpha(t), like), expand(schedule.sigma(t), like)


def log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2) of any schedule at t, of any shape."""
    return 2 * (schedule.alpha(t).log() - schedule.sigma(t).log())


def to_eps(kind: Kind, value: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise eps that a prediction `value` of the given kind implies at x_t.

    value and x_t [B, ...], alpha and sigma as `coefficients` shapes them. ValueError for an unknown kind.
    """
    match kind:
        case "eps":
            return value
        case "x0":
            return (x_t - alpha * value) / sigma
        case "v":
            return (alpha * value + sigma * x_t) / (alpha**2 + sigma**2)
        case "velocity":
            return (alpha * value + x_t) / (alpha + sigma)
    raise _unknown(kind)


def from_eps(kind: Kind, eps: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The inverse of `to_eps`; with kind "x0" it is the denoised sample (x_t - sigma eps) / alpha."""
    x0 = (x_t - sigma * eps) / alpha
    match kind:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "velocity":
            return eps - x0
    raise _unknown(kind)


def _unknown(kind: object) -> ValueError:
    return ValueError(f"unknown kind of prediction {kind!r}: choose eps, x0, v or velocity")


class _VariancePreserving:
    """alpha^2 + sigma^2 = 1: both follow from the log-SNR, without cancellation at either end."""

    def log_snr(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the clean sample."""
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise."""
        return torch.sigmoid(-self.log_snr(t)).sqrt()


@dataclass(frozen=True)
class Cosine(_VariancePreserving):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol & Dhariwal 2021, without their offset)."""

    margin: float = MARGIN

    def log_snr(self, t: Tensor) -> Tensor:
        """-2 log tan(pi t / 2)."""
        return -2 * torch.tan(math.pi / 2 * t.clamp(self.margin, 1 - self.margin)).log()

    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which the schedule has this log-SNR."""
        return torch.atan(torch.exp(-log_snr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class Linear(_VariancePreserving):
    """beta(t) linear: -log alpha^2 = t beta_min + t^2 (beta_max - beta_min) / 2 (Song et al. 2021)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    margin: float = MARGIN

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / (1 - alpha^2))."""
        t = t.clamp(min=self.margin)
        return -torch.expm1(t * self.beta_min + t**2 * (self.beta_max - self.beta_min) / 2).log()

    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which the schedule has this log-SNR."""
        total = nn.functional.softplus(-log_snr)
        slope = self.beta_max - self.beta_min
        # The root of slope/2 t^2 + beta_min t = total in the form that does not cancel for small t.
        return 2 * total / (self.beta_min + (self.beta_min**2 + 2 * slope * total).sqrt())


@dataclass(frozen=True)
class Flow:
    """alpha = 1 - sigma: the straight path of flow matching and rectified flow.

    sigma = shift t / (1 + (shift - 1) t)  (Esser et al. 2024, eq. 23): with shift = 1 sigma is t itself. A
    larger shift spends more of the times on noisy samples, as large images need; even steps in t are then
    the steps that the model's own sampler takes. Raises ValueError unless shift is positive.
    """

    shift: float = 1.0
    margin: float = MARGIN

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"the shift of a flow must be a positive number, got {self.shift}")

    @staticmethod
    def from_config(config: Mapping[str, Any], tokens: int) -> Flow:
        """The flow that a diffusers scheduler configuration describes, for images of so many tokens.

        With `use_dynamic_shifting` the shift is exp(mu) ("exponential") or mu ("linear"), mu linear in tokens.
        Raises ValueError for a time_shift_type that is neither.
        """
        if not config.get("use_dynamic_shifting", False):
            return Flow(float(config.get("shift", 1.0)))
        few, many = float(config.get("base_image_seq_len", 256)), float(config.get("max_image_seq_len", 4096))
        low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
        mu = low + (high - low) * (tokens - few) / (many - few)
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type {kind!r} is not supported: use exponential or linear")
        return Flow(math.exp(mu) if kind == "exponential" else mu)

    def alpha(self, t: Tensor) -> Tensor:
        """1 - sigma(t)."""
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Fraction of noise, clamped to [margin, 1 - margin]."""
        return (self.shift * t / (1 + (self.shift - 1) * t)).clamp(self.margin, 1 - self.margin)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma)."""
        return 2 * (self.alpha(t) / self.sigma(t)).log()

    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which the schedule has this log-SNR."""
        sigma = torch.sigmoid(-log_snr / 2)
        return sigma / (self.shift - (self.shift - 1) * sigma)


@dataclass(frozen=True, eq=False)
class Table(_VariancePreserving):
    """The table of a discrete model with N noise levels, lowest first.

    t is position p = N t of the table, so t = 0.98 is timestep 980 of 1000. t = 0 is the lowest level that the network
    was trained on (small noise, not none), and every t above (N - 1) / N is the highest. Between two entries the
    log-SNR is interpolated and the network gets the fractional position: noise level and timestep agree at every t,
    and a time k / N gives exactly entry k.
    """

    log_snrs: Tensor = field(repr=False)  # [N] float64, falling
    _copies: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def from_betas(betas: Tensor | Sequence[float], zero_terminal_snr: bool = False) -> Table:
        """The table with abar_k = prod_{i <= k} (1 - beta_i); ValueError unless all betas [N] lie in (0, 1).

        zero_terminal_snr rescales sqrt(abar) linearly to end at zero (Lin et al. 2023, algorithm 1).
        """
        beta = torch.as_tensor(betas, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) < 2 or not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError("betas must be two or more numbers between 0 and 1, both excluded")
        bar = torch.cumprod(1 - beta, 0)
        if zero_terminal_snr:
            root = bar.sqrt()
            bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        bar = bar.clamp(min=SMALLEST_ALPHA_BAR)
        return Table(bar.log() - torch.log1p(-bar))

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Table:
        """The table that a diffusers scheduler configuration describes; ValueError for another beta_schedule."""
        count = int(config.get("num_train_timesteps", 1000))
        first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        zero = bool(config.get("rescale_betas_zero_snr", False))
        if config.get("trained_betas") is not None:
            return Table.from_betas(config["trained_betas"], zero)
        kind = config.get("beta_schedule", "linear")
        if kind == "linear":
            return Table.from_betas(torch.linspace(first, last, count, dtype=torch.float64), zero)
        if kind == "scaled_linear":
            root = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64)
            return Table.from_betas(root**2, zero)
        if kind == "squaredcos_cap_v2":
            angle = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * math.pi / 2
            bar = torch.cos(angle) ** 2
            return Table.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=0.999), zero)
        raise ValueError(f"beta_schedule {kind!r} is not supported: use linear, scaled_linear or squaredcos_cap_v2")

    def __len__(self) -> int:
        return len(self.log_snrs)

    def _values(self, like: Tensor) -> Tensor:
        """The table on the device of `like` and in its precision, copied once in a run."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = self.log_snrs.to(like)
        return self._copies[key]

    def position(self, t: Tensor) -> Tensor:
        """The position of t in the table, in [0, N - 1]."""
        return self.timestep(t).clamp(min=0)

    def timestep(self, t: Tensor) -> Tensor:
        """The timestep that the network gets at t: the position, or N t below 0, which only the SDI release uses."""
        p = (t * len(self)).clamp(max=len(self) - 1)
        whole = p.round()
        # Grid times such as 0.98 are not exact in floating point; they mean the entry itself.
        return torch.where((p - whole).abs() < 1e-3, whole, p)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), linear between entries."""
        p, values = self.position(t), self._values(t)
        below = p.floor().long().clamp(max=len(self) - 2)
        return torch.lerp(values[below], values[below + 1], p - below)

    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which the schedule has this log-SNR; beyond the table's ends, the nearest level."""
        rising = -self._values(log_snr)
        wanted = (-log_snr).clamp(rising[0], rising[-1])
        above = torch.searchsorted(rising, wanted.contiguous()).clamp(1, len(self) - 1)
        fraction = (wanted - rising[above - 1]) / (rising[above] - rising[above - 1])
        return (above - 1 + fraction) / len(self)


def stable_diffusion() -> Table:
    """The table of Stable Diffusion 1.x and 2.x: 1000 levels, sqrt(beta) linear, beta 0.00085 to 0.012."""
    return Table.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
