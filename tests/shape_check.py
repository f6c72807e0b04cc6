"""Checks the shapes and dtypes in annotations such as Float[Tensor, "b c h w"] at every call, in the test run only.

beartype alone would check all annotations, protocols too, which objects in tests fit without being instances; here it
sees those of arrays alone. `install` is called by conftest.py before the package is imported.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype


def install() -> None:
    """Makes imports of the package check their array annotations."""
    jaxtyping.install_import_hook("distill3d", "shape_check.arrays")


def arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with beartype's checks of the annotations that name an array; the function itself if none does."""
    hints = {}
    for name, hint in function.__annotations__.items():
        try:
            value = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except (NameError, AttributeError, TypeError):  # a name that only type checkers import
            continue
        if _names_an_array(value):
            hints[name] = value
    if not hints or not isinstance(function, types.FunctionType):
        return function
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__doc__ = (
        function.__kwdefaults__, function.__qualname__, function.__doc__,
    )  # fmt: skip
    copy.__module__, copy.__annotations__ = function.__module__, hints
    return beartype(copy)


def _names_an_array(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_an_array, typing.get_args(hint)))
