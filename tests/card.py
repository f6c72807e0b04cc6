"""A pretend accelerator: the device "card" holds the values of its tensors in host memory.

Tests run whole recipes on it, and it sees what only a machine with a GPU would show otherwise: an operation on tensors
of both devices, a float64 where the device has none, and every point where the host waits for the device or copies to
or from it, by file and line.

    with card.watch() as seen:
        distill(scene.to(card.DEVICE), prior, SDI(), "a cube", steps=2)
    print(seen.waits)

A back end in Python on PyTorch's PrivateUse1 hook: a tensor of the device wraps one of the host, with real values, so
that autograd, optimizers, activation checkpointing and decisions by value work as they are. Speed, memory and the
rounding of a real card are not simulated, and Triton kernels are not chosen. An error inside a backward pass would end
the process, so what is found there is raised at the end of `watch`.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("privateuseone", 0)  # called "card:0" from here on

# Operations whose result has a size, or is a number, that the host has to wait for.
WAITING = {
    "aten::_local_scalar_dense",  # item(), float(), bool()
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::equal",
    "aten::allclose",
}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
# They take a host number, a tensor without dimensions, beside those of the device.
NUMBERS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::index_put", "aten::index_put_"}
NUMBERS |= {"aten::_index_put_impl_", "aten::index_fill", "aten::index_fill_"}
# Made by PyTorch as an empty tensor that is resized, which a wrapper cannot be.
MADE_WHOLE = ("arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye", "eye.m", "randperm")
WIDE = (torch.float64, torch.complex128)


@dataclass
class Seen:
    """What was seen since the beginning, or since `take`."""

    float64: bool = True  # whether the device has double precision
    waits: Counter[str] = field(default_factory=Counter)  # "file:line what": times
    errors: list[str] = field(default_factory=list)

    def take(self) -> Counter[str]:
        """The waits since the last call."""
        taken, self.waits = self.waits, Counter()
        return taken

    def wait(self, what: str) -> None:
        self.waits[f"{_place()} {what}"] += 1

    def error(self, what: str) -> None:
        self.errors.append(f"{what} at {_place()}")
        if torch._C._current_graph_task_id() < 0:  # not in a backward pass
            raise RuntimeError(self.errors[-1])


_seen = Seen()


@contextmanager
def watch(float64: bool = True) -> Iterator[Seen]:
    """Collects what happens on the device; float64=False: it has no double precision, like MPS.

    Raises RuntimeError for an operation on tensors of both devices, and for float64 where the device has none.
    """
    global _seen
    before, _seen = _seen, Seen(float64)
    try:
        yield _seen
        if _seen.errors:
            raise RuntimeError("; ".join(_seen.errors))
    finally:
        _seen = before


class CardTensor(torch.Tensor):
    """A tensor of the device; `host` has its values."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> CardTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )

    def __init__(self, host: torch.Tensor):
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"card({self.host!r})"

    def tolist(self):
        _seen.wait("tolist")
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the device card to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()


def _place() -> str:
    """File and line in the library that the present operation comes from."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/distill3d/" in name:
            return f"{name.rpartition('/distill3d/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward" if torch._C._current_graph_task_id() >= 0 else "elsewhere"


def _run(operation, args: tuple, kwargs: dict):
    """An operation on the wrapped tensors, after what it means for a device has been noted."""
    name, leaves = operation._schema.name, tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, CardTensor)]
    others = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, CardTensor)]
    device = kwargs.get("device")
    here = bool(ours) if device is None else torch.device(device).type == DEVICE.type
    if name in COPIES:
        _note_copy(name, args, here)
    elif ours:
        _note(operation, name, args, kwargs, others)
    host_args, host_kwargs = tree_map_only(CardTensor, lambda x: x.host, (args, kwargs))
    if device is not None:
        host_kwargs["device"] = torch.device("cpu")
    out = operation(*host_args, **host_kwargs)
    if name.endswith("_") and args and isinstance(args[0], CardTensor):
        return args[0]
    if not here:
        return out
    if not _seen.float64 and any(x.dtype in WIDE for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
        _seen.error(f"{name}: float64 on a device without it")
    known = {id(x.host): x for x in ours}
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else CardTensor(x), out)


def _note_copy(name: str, args: tuple, here: bool) -> None:
    source, target = {
        "aten::_to_copy": lambda: (args[0], here),
        "aten::copy_": lambda: (args[1], isinstance(args[0], CardTensor)),
        "aten::_copy_from": lambda: (args[0], isinstance(args[1], CardTensor)),
    }[name]()
    if isinstance(source, CardTensor) != target:
        _seen.wait("copy to the device" if target else "copy to the host")


def _note(operation, name: str, args: tuple, kwargs: dict, others: list) -> None:
    if name in WAITING:
        _seen.wait(name.removeprefix("aten::"))
    if operation is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        _seen.wait("repeat_interleave")
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                _seen.wait("nonzero of a mask")
            elif isinstance(index, torch.Tensor) and not isinstance(index, CardTensor):
                _seen.wait("copy of an index to the device")
        others = [x for x in others if not any(x is index for index in args[1])]
    numbers = torch.Tag.pointwise in operation.tags or name in NUMBERS or "_foreach_" in name
    if any(x.dim() > 0 or not numbers for x in others):
        _seen.error(f"{name}: tensors of the device and of the host")


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> torch.Tensor:
    return _run(torch.ops.aten.empty.memory_format, (size,), dict(dtype=dtype, device=device))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None) -> torch.Tensor:
    return _run(torch.ops.aten.empty_strided.default, (size, stride), dict(dtype=dtype, device=device))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _note_copy("aten::_copy_from", (source, target), True)
    plain = [x.host if isinstance(x, CardTensor) else x for x in (source, target)]
    plain[1].copy_(plain[0])
    return target


def _register() -> list[torch.library.Library]:
    """Makes the device known to PyTorch, once in a process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = types.ModuleType("torch.card")
    module.is_initialized = module.is_available = lambda: True  # type: ignore[attr-defined]
    module.current_device, module.device_count = lambda: 0, lambda: 1  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    _setup_privateuseone_for_python_backend("card", backend_module=module)
    fallback, kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in MADE_WHOLE:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        kernels.impl(name, lambda *args, _of=operation, **kwargs: _run(_of, args, kwargs), "PrivateUse1")
    return [fallback, kernels]


_libraries = _register()  # they live as long as the device
