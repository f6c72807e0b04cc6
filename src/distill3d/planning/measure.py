"""What a large part of a step needs, measured once by itself, and the stand-ins that need the same in the loop."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from distill3d.planning.meter import Meter, Operation


@dataclass(frozen=True)
class Profile:
    """Bytes and operations of one call and, if there is one, of its backward pass. Results are not counted."""

    forward: int  # most at once
    kept: int  # for the backward pass
    backward: int  # most at once, what was kept included
    work: Counter[Operation] = field(default_factory=Counter)
    work_backward: Counter[Operation] = field(default_factory=Counter)
    shapes: Any = None  # of the results: a tree of tensors on the meta device

    def scaled(self, smaller: Profile, ratio: float) -> Profile:
        """Extrapolated linearly from two sizes: `ratio` is how often the step between them is to be added."""

        def more(a: float, b: float) -> int:
            return max(0, round(b + (b - a) * ratio))

        def work(a: Counter[Operation], b: Counter[Operation]) -> Counter[Operation]:
            flops, moved = (
                more(*(sum(getattr(one, name) * n for one, n in of.items()) for of in (a, b)))
                for name in ("flops", "bytes")
            )
            return Counter({Operation(flops, moved, "float32"): 1, Operation(0, 0, "float32"): b.total()})

        names = ("forward", "kept", "backward")
        return Profile(
            **{name: more(getattr(smaller, name), getattr(self, name)) for name in names},
            work=work(smaller.work, self.work),
            work_backward=work(smaller.work_backward, self.work_backward),
        )


@dataclass(frozen=True)
class Known:
    """What plans have in common: it is found once, and kept."""

    profiles: dict[tuple[Any, ...], Profile] = field(default_factory=dict)
    scenes: dict[str, Any] = field(default_factory=dict)  # by their settings


@dataclass
class Stage:
    """Where stand-ins play: the meter of the loop, what is known, and what was done."""

    known: Known = field(default_factory=Known)
    meter: Meter = field(default_factory=Meter)
    fake: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    played: dict[tuple[str, int, bool], list[Any]] = field(default_factory=dict)  # since the last `take`

    def call(
        self, part: str, key: object, function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
    ) -> Any:
        """Zeros of the shape that `function(*args, **options)` has, at its cost. `key` identifies the function."""
        with self.meter.pause():
            leaves, tree = tree_flatten((tuple(args), dict(options)))
            tensors = [x for x in leaves if isinstance(x, Tensor)]
            gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            signature = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
            key = (part, key, signature, gradient)
            profiles = self.known.profiles
            if key not in profiles:
                profiles[key] = self._profile(function, leaves, tree, gradient)
        return self.play(part, profiles[key], [x for x in tensors if x.requires_grad] if gradient else [])

    def play(self, part: str, profile: Profile, inputs: list[Tensor]) -> Any:
        """Zeros at the cost of a profile; with `inputs`, their gradients have the cost of its backward pass."""
        self.note(part, profile)
        self.meter.pulse(part, profile.forward)
        with self.meter.within(part):
            out = tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), profile.shapes)  # with values
            if inputs:
                self.meter.hold(part, profile.kept)
                (only,) = tree_leaves(out)
                out = _Crossing.apply(self, part, profile, only, *inputs)
        return out

    def note(self, part: str, profile: Profile, backward: bool = False) -> None:
        """Remembers that a profile was played."""
        self.played.setdefault((part, id(profile.work), backward), [profile, 0])[1] += 1

    def take(self) -> tuple[dict[str, Counter[Operation]], Counter[str]]:
        """The operations and calls since the last time, by part."""
        work, calls = defaultdict[str, Counter[Operation]](Counter), Counter[str]()
        for (part, _, backward), (found, times) in self.played.items():
            for one, count in (found.work_backward if backward else found.work).items():
                work[part][one] += count * times
            calls[part] += 0 if backward else times
        self.played = {}
        return dict(work), calls

    def _profile(self, function: Callable[..., Any], leaves: list[Any], tree: Any, gradient: bool) -> Profile:
        def hollow(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            with self.fake:
                return torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.requires_grad and gradient)

        args, options = tree_unflatten([hollow(x) for x in leaves], tree)
        with torch.set_grad_enabled(gradient), self.fake:
            return profile(lambda: function(*args, **options), gradient)


def profile(call: Callable[[], Any], gradient: bool) -> Profile:
    """Measures a call by itself, and its backward pass if its one result has a gradient."""
    with Meter() as meter:
        out = call()
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        results = sum({id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors}.values())
        forward, kept, work = meter.highest - results, meter.total - results, meter.work
        shapes = tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), out)
        backward, work_backward = 0, Counter()
        if gradient:
            meter.work = work_backward
            ones = [torch.ones_like(x) for x in tensors if x.requires_grad]
            results += sum(x.numel() * x.element_size() for x in ones)
            meter.restart()
            torch.autograd.backward([x for x in tensors if x.requires_grad], ones)
            backward = meter.highest - results
    return Profile(max(0, forward), max(0, kept), max(0, backward), work, work_backward, shapes)


class _Crossing(torch.autograd.Function):
    """The result of a stand-in: the backward pass has the cost of the part, and gradients of zero."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, part: str, profile: Profile, out: Tensor, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.stage, ctx.part, ctx.profile = stage, part, profile
        ctx.shapes = [(x.shape, x.dtype) for x in inputs]
        return out.clone() if any(out is x for x in inputs) else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        stage, part, found = ctx.stage, ctx.part, ctx.profile
        stage.note(part, found, backward=True)
        stage.meter.pulse(part, found.backward - found.kept)
        stage.meter.hold(part, -found.kept)
        return None, None, None, None, *(torch.zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)
