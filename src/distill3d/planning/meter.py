"""Live memory and arithmetic of tensor operations, with or without values, as a dispatch mode of torch."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
Kind = str  # "half", "float32" or "convolution" in float32, for which cards have different rates


def _attention(query: Any, key: Any, value: Any, *args: object, out_val: object, **options: object) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *args: object, out_val: object, **options: object
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# torch counts the attention of GPUs only. For FlopCounterMode(custom_mapping=...), too.
for _function in (_attention, _attention_backward):
    vars(_function)["_get_raw"] = True
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# They touch as much of their first operand as they take from it or put there.
READS = {"index_select", "gather", "index", "embedding"}
WRITES = {"index_put_", "_index_put_impl_", "index_copy_", "index_add_", "scatter_", "scatter_add_"}


@dataclass(frozen=True)
class Operation:
    """What one kernel has to do."""

    flops: int
    bytes: int  # read and written
    kind: Kind


@dataclass(eq=False)
class Meter(TorchDispatchMode):
    """Counts the storages that are made inside the block and live, by the part that made them, and all operations.

    A storage that an operation was given from outside is not counted: it is for `hold`.
    """

    part: str = "other"
    live: Counter[str] = field(default_factory=Counter)  # bytes by part
    peak: Counter[str] = field(default_factory=Counter)  # `live` when its sum was largest
    work: Counter[Operation] = field(default_factory=Counter)
    paused: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._total = self._highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True  # a question to values that are not there, such as whether all are finite
        if self.paused:
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            self._note(x, outside=True)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in made:
            self._note(x)
        inside = {id(x.untyped_storage()) for x in given}
        if func._schema.is_mutable or any(id(x.untyped_storage()) not in inside for x in made):  # not a view
            self.work[operation(func, args, kwargs, out, given, made)] += 1
        return out

    @property
    def total(self) -> int:
        """Bytes that live now."""
        return self._total

    @property
    def highest(self) -> int:
        """The largest number of bytes that lived at once, since the last `restart`."""
        return self._highest

    def restart(self) -> None:
        """Looks for the peak from here on."""
        self._highest, self.peak = self._total, self.live.copy()

    def hold(self, part: str, count: int) -> None:
        """Adds so many bytes to a part (or takes them from it, if negative)."""
        self.live[part] += count
        self._total += count
        if self._total > self._highest:
            self._highest, self.peak = self._total, self.live.copy()

    def pulse(self, part: str, count: int) -> None:
        """So many bytes live for a moment."""
        self.hold(part, count)
        self.hold(part, -count)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What is made inside the block belongs to a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is made inside the block is not counted."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _note(self, x: Tensor, outside: bool = False) -> None:
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        count, part = 0 if outside else storage.nbytes(), self.part
        self._storages[key] = weakref.ref(storage, partial(self._freed, key, part, count))
        if count:
            self.hold(part, count)

    def _freed(self, key: int, part: str, count: int, _: object) -> None:
        self._storages.pop(key, None)
        if count:
            self.hold(part, -count)


def operation(func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]) -> Operation:
    """The arithmetic and the memory traffic of one operation."""
    count = ATTENTION.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
    flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
    name = func._schema.name.removeprefix("aten::")
    if name in READS:
        given = [*given[1:], *made]
    elif name in WRITES:
        given, made = [*given[1:], *given[1:]], []
    moved = sum(x.numel() * x.element_size() for x in (*given, *made))
    dtype = given[0].dtype if given else torch.float32
    return Operation(flops, moved, "half" if dtype in HALF else "convolution" if "convolution" in name else "float32")
