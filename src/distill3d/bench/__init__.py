"""Comparing methods under one protocol: the same prompts, seeds, scene, cameras and budget for all, with a report."""

from importlib.util import find_spec

LIBRARIES = ("jinja2", "matplotlib", "tabulate")  # what the extra "bench" installs


def check_libraries() -> None:
    """Raises ImportError, saying what to type, if a library of the extra "bench" is missing; imports nothing."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise ImportError(f'benchmarks need {", ".join(missing)}: type  pip install "distill3d[bench]"')
