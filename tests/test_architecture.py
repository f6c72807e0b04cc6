"""Laws about the source as a whole: who imports whom, what an import costs, where chance comes from.

Each check is a function of source text, and each is first shown a text that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "distill3d"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
MODULES = {".".join((PACKAGE, *Path(name).with_suffix("").parts)).removesuffix(".__init__"): name for name in SOURCES}

# A unit, which is a file or folder of the package, imports only what stands on a line above its own.
LAYERS = """
devices
types files interrupts untrusted texels
workers
cameras prompts diffusion
priors render
objectives meshes
export
scenes
distill evaluation
runs
planning
bench viewer
cli
"""
RANKS = {unit: rank for rank, line in enumerate(LAYERS.strip().splitlines()) for unit in line.split()}

# Beyond the order: the mathematics of 2D and of 3D do not know each other, they meet in `distill`.
FLAT = {"diffusion", "priors", "objectives"}
SOLID = {"cameras", "render", "meshes", "export", "scenes"}
FORBIDDEN = {(a, b) for a in FLAT for b in SOLID} | {(b, a) for a in FLAT for b in SOLID}

# The world behind the bundled prior stands beside the layers.
TOYBOX_IMPORTS = {"types", "files", "cameras", "prompts", "render", "meshes", "priors"}
TOYBOX_USERS = {"evaluation", "runs", "bench", "cli"}
# The package itself re-exports what is below; only those on top may take from it (its version, say).
PACKAGE_USERS = {"runs", "bench", "cli"}


def unit_of(module: str) -> str:
    """The unit a module of the package belongs to; the package itself is its own unit."""
    unit = module.split(".")[1] if "." in module else PACKAGE
    return "cli" if unit == "__main__" else unit


# Protocols name what they are given: there an import that only type checkers see may go up.
MAY_NAME = {"types.py"}


def imported(source: str, named: bool = True) -> Iterator[tuple[str, bool]]:
    """(module, whether at the top level) for each import, wherever it stands; `from a import b` may give a.b.

    Without `named`, imports under `if TYPE_CHECKING` are left out.
    """
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    checking = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = set() if named else {id(inner) for node in checking for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base, id(node) in top)


def import_errors(name: str, source: str) -> list[str]:
    """What the file `name` (relative to the package) imports against the order."""
    unit = unit_of(PACKAGE if name == "__init__.py" else f"{PACKAGE}.{Path(name).parts[0].removesuffix('.py')}")
    errors = []
    for module, _ in imported(source, named=name not in MAY_NAME):
        if module.startswith("."):
            errors.append(f"{name}: relative import of {module}")
        elif module.split(".")[0] == PACKAGE and not _allowed(unit, unit_of(module)):
            errors.append(f"{name}: {unit} may not import {module}")
    return errors


def _allowed(unit: str, other: str) -> bool:
    if unit == other:
        return True
    if other == PACKAGE:
        return unit in PACKAGE_USERS
    if unit == PACKAGE:
        return other not in ("cli", "__main__", "toybox")
    if unit == "toybox":
        return other in TOYBOX_IMPORTS
    if other == "toybox":
        return unit in TOYBOX_USERS
    return RANKS[other] < RANKS[unit] and (unit, other) not in FORBIDDEN


# Drawing from, or seeding, a generator that nobody passed.
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS |= {"rand_like", "randn_like", "randint_like"}
IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
IN_PLACE |= {"trunc_normal_", "xavier_normal_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_"}
SEEDS = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.random.seed"}
OWNED = {"numpy.random.default_rng", "numpy.random.Generator", "numpy.random.SeedSequence", "numpy.random.PCG64"}
OWNED |= {"random.Random"}
# Networks are initialized by diffusers and transformers, which know the global generator only.
MAY_SEED = {"toybox/train.py"}


def chance_errors(name: str, source: str) -> list[str]:
    """Calls that draw from or seed a global generator."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update(
                (a.asname or a.name.split(".")[0], a.name if a.asname else a.name.split(".")[0]) for a in node.names
            )
        elif isinstance(node, ast.ImportFrom):
            aliases.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [f"{name}:{c.lineno}: {ast.unparse(c.func)}" for c in calls if _global_chance(name, c, aliases)]


def _global_chance(name: str, call: ast.Call, aliases: dict[str, str]) -> bool:
    head, _, rest = ast.unparse(call.func).partition(".")
    path = ".".join(filter(None, (aliases.get(head, head), rest)))
    method = path.rsplit(".", 1)[-1]
    generator = next((k.value for k in call.keywords if k.arg == "generator"), None)
    drawn = generator is not None and not (isinstance(generator, ast.Constant) and generator.value is None)
    if path.startswith(("torch.manual", "torch.seed", "torch.random", "torch.cuda.manual", "torch.cuda.seed")):
        return not (path in SEEDS and name in MAY_SEED)
    if path.startswith(("numpy.random.", "random.")):
        return path not in OWNED or not (call.args or call.keywords)
    return not drawn and (method in IN_PLACE or (path.startswith("torch.") and method in DRAWS))


def test_imports_go_one_way():
    assert {"cli", "distill", "types"} < RANKS.keys()
    units = {unit_of(module) for module in MODULES} - {PACKAGE, "toybox"}
    assert units <= RANKS.keys(), f"give these a place in LAYERS: {units - RANKS.keys()}"
    assert not [e for name, source in SOURCES.items() for e in import_errors(name, source)]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("types.py", "from distill3d.cameras import orbit"),
        ("types.py", "if not TYPE_CHECKING:\n    from distill3d.cameras import orbit"),
        ("prompts.py", "if TYPE_CHECKING:\n    from distill3d.cameras import orbit"),
        ("scenes/voxels.py", "import distill3d.diffusion.ddim"),
        ("scenes/voxels.py", "from distill3d import priors"),
        ("objectives/noise.py", "from distill3d.cameras import orbit"),
        ("priors/stable_diffusion.py", "if True:\n    def f():\n        from distill3d.render import volume"),
        ("distill/recipes.py", "from distill3d import runs"),
        ("distill/loop.py", "from distill3d import sdi"),
        ("priors/loading.py", "from distill3d.toybox.world import build"),
        ("toybox/world.py", "from distill3d.scenes.voxels import VoxelField"),
        ("__init__.py", "from distill3d.cli.main import main"),
        ("priors/flow.py", "from .loading import load_prior"),
    ],
)
def test_a_wrong_import_is_seen(name, line):
    assert len(import_errors(name, line)) == 1


def test_no_module_imports_itself_in_a_circle():
    """Not even by imports inside functions."""
    graph: dict[str, set[str]] = {}
    for module, name in MODULES.items():
        found = {other for other, _ in imported(SOURCES[name], named=False) if other in MODULES}
        graph[module] = found - {module, PACKAGE}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) >= MODULES.keys() - {PACKAGE}


def test_randomness_has_an_owner():
    assert not [e for name, source in SOURCES.items() for e in chance_errors(name, source)]


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.manual_seed(0)",
        "import torch; torch.cuda.manual_seed_all(0)",
        "import torch; torch.randn(3)",
        "import torch as t; t.rand(3, generator=None)",
        "from torch import randperm; randperm(3)",
        "import torch; torch.randn_like(x)",
        "x.new_empty(3).normal_()",
        "from torch import nn; nn.init.uniform_(w)",
        "import numpy as np; np.random.seed(0)",
        "import numpy as np; np.random.default_rng()",
        "from numpy.random import rand; rand(3)",
        "import random; random.choice([1, 2])",
    ],
)
def test_global_chance_is_seen(line):
    assert len(chance_errors("priors/latent.py", line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.randn(3, generator=g)",
        "import torch; torch.Generator().manual_seed(0)",
        "import numpy as np; np.random.default_rng(0)",
        "rng.normal(0, 1)",
    ],
)
def test_owned_chance_is_allowed(line):
    assert not chance_errors("priors/latent.py", line)


def json_errors(name: str, source: str) -> list[str]:
    """Calls that would write NaN and Infinity, which no strict reader of JSON takes."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) in ("json.dump", "json.dumps", "dumps", "dump")]
    return [f"{name}:{c.lineno}" for c in calls if "allow_nan=False" not in [ast.unparse(k) for k in c.keywords]]


def test_json_is_strict():
    scripts = {path.name: path.read_text() for path in ROOT.parents[1].glob("benchmarks/*.py")}
    assert not [e for name, source in {**SOURCES, **scripts}.items() for e in json_errors(name, source)]


@pytest.mark.parametrize("line", ["json.dumps(x)", "dump(x, file)", "json.dumps(x, allow_nan=True)"])
def test_loose_json_is_seen(line):
    assert len(json_errors("files.py", line)) == 1 and not json_errors("files.py", "json.dumps(x, allow_nan=False)")


def test_files_can_be_read_in_one_go():
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    assert not {name: n for name, n in lengths.items() if n > 400}


def test_importing_the_package_is_cheap():
    """torch is the only heavy import; what torch itself brings along is not held against us."""
    heavy = [
        "diffusers",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "trimesh",
        "skimage",
        "scipy",
        "PIL",
        "av",
        "tyro",
        "rich",
        "viser",
        "ray",
        "fsspec",
    ]

    def loaded(*modules: str) -> set[str]:
        code = f"import sys, {', '.join(modules)}; print(*(m for m in {heavy} if m in sys.modules))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(run.stdout.split())

    assert loaded("scipy", PACKAGE) >= {"scipy"}  # the probe sees what is there
    assert loaded("torch", PACKAGE) == loaded("torch")
