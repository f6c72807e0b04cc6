"""Runs that take turns evaluate the network together: one call has the rows of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill3d.priors.wrapped import WrappedPrior
from distill3d.types import Condition, Prior
from distill3d.workers.turns import Turns


@dataclass(frozen=True)
class Call:
    """The arguments of `Prior.predict`, and what decides which calls can be one."""

    prior: Prior
    views: int
    x_t: Tensor
    t: Tensor
    condition: Condition

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for calls that can be evaluated as one."""
        c = self.condition
        shapes = [None if x is None else (x.shape[1:], x.dtype) for x in (c.hidden, c.pooled, c.control, c.camera)]
        return id(self.prior), self.views, self.x_t.shape[1:], self.x_t.dtype, *shapes


class SharedCalls(WrappedPrior):
    """The prior of one of several runs that take turns: its network calls wait for those of the others.

    The values are those of a call alone up to rounding, since the network sees more rows at once.
    """

    def __init__(self, turns: Turns[Call, Tensor], prior: Prior):
        """`turns` serves with `evaluate`; all runs have the same."""
        super().__init__(prior)
        self._turns = turns

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As the prior; a call with gradients is evaluated alone."""
        call = Call(self.prior, self.views, x_t, t, condition)
        return evaluate([call])[0] if torch.is_grad_enabled() else self._turns.meet(call)


def evaluate(calls: Sequence[Call]) -> list[Tensor]:
    """The predictions of some calls, in as few network calls as possible."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, call in enumerate(calls):
        kinds.setdefault(call.kind, []).append(index)
    found: dict[int, Tensor] = {}
    for rows in kinds.values():
        found |= zip(rows, _evaluate_alike([calls[index] for index in rows]), strict=True)
    return [found[index] for index in range(len(calls))]


def _evaluate_alike(calls: Sequence[Call]) -> list[Tensor]:
    """One call of the network. The first halves of all calls come before the second ones.

    Guidance repeats its samples: the second half of a call has the x_t of the first. So has the second half of the
    joint call then, which a prior may use (`priors.components.sharing`).
    """
    first = calls[0]
    prior, views = first.prior, first.views
    if prior.views != views:
        prior.join(views)
    if len(calls) == 1:
        return [prior.predict(first.x_t, first.t, first.condition)]
    halved = all(len(call.x_t) % (2 * views) == 0 for call in calls)
    pieces = [(call, slice(0, len(call.x_t) // 2 if halved else None)) for call in calls]
    pieces += [(call, slice(len(call.x_t) // 2, None)) for call in calls if halved]
    x_t, t = (torch.cat([getattr(call, name)[rows] for call, rows in pieces]) for name in ("x_t", "t"))
    with torch.no_grad():
        eps = prior.predict(x_t, t, Condition.cat([call.condition[rows] for call, rows in pieces]))
    parts = eps.split([len(call.t[rows]) for call, rows in pieces])
    if not halved:
        return list(parts)
    return [torch.cat(pair) for pair in zip(parts[: len(calls)], parts[len(calls) :], strict=True)]
