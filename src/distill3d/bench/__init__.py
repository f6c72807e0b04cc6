"""Comparing methods under one protocol: the same prompts, seeds, scene, cameras and budget for all, with a report."""

from collections.abc import Sequence
from importlib.util import find_spec

LIBRARIES = ("jinja2", "matplotlib", "tabulate")  # what the extra "bench" installs


def check_libraries(who: str = "benchmarks need", names: Sequence[str] | None = None) -> None:
    """Raises ImportError, saying what to type, if a library of the extra "bench" is missing; imports nothing."""
    missing = [name for name in names or LIBRARIES if find_spec(name) is None]
    if missing:
        raise ImportError(f'{who} {", ".join(missing)}: type  pip install "distill3d[bench]"')
