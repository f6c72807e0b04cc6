"""What pyproject.toml promises: extras install what the code uses, and nothing heavy is in the wheel without need."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from distill3d.bench import LIBRARIES
from distill3d.runs.logs import LOGS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_the_extra_of_benchmarks_is_what_they_check_for():
    assert {line.split(">=")[0] for line in EXTRAS["bench"]} == set(LIBRARIES)


def test_the_extra_of_logs_is_what_they_write_with():
    assert {line.split(">=")[0] for line in EXTRAS["log"]} == set(LOGS)


def test_the_wheel_leaves_out_what_only_training_reads():
    excluded = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
    large = (ROOT / "src").rglob("*.safetensors")
    kept = [path.relative_to(ROOT).as_posix() for path in large]
    kept = {path for path in kept if not any(fnmatch(path, f"{pattern}/*") for pattern in excluded)}
    both = (
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    )
    judges = ("evaluator_critic/model.safetensors", "evaluator_judge/model.safetensors")
    parts = {"toybox": (*both, *judges), "toybox-mv": (*both, "matting/model.safetensors")}
    assert kept == {f"src/distill3d/assets/{name}/{part}" for name, files in parts.items() for part in files}


SAFE = {  # the first versions without known holes that a model, a mesh or an image can reach
    "diffusers": "0.38",
    "transformers": "5.5",
    "pillow": "12.1.1",
    "safetensors": "0.5",
    "filelock": "3.20.3",
    "jinja2": "3.1.6",
    "protobuf": "6.33.5",
    "sentencepiece": "0.2.1",
    "torch": "2.6",
}
FLOORS = {
    requirement.name: next(iter(requirement.specifier)).version
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    if (requirement := Requirement(line)).name != "distill3d"
}


def test_no_lower_bound_has_a_known_hole():
    assert not {name for name, safe in SAFE.items() if Version(FLOORS[name]) < Version(safe)}
    assert Version(FLOORS["tyro"]) > Version("0.9.0")  # which was withdrawn


def test_what_is_installed_lies_within_the_bounds():
    """constraints.txt pins everything that CI installs; what it leaves out are extras that CI does not install."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    low = {name: pinned[key] for name in FLOORS if (key := canonicalize_name(name)) in pinned}
    assert not {name for name, pin in low.items() if Version(pin) < Version(FLOORS[name])}
    assert FLOORS.keys() - low.keys() == {"gsplat", "image-reward", "sentencepiece", "ray", "s3fs"}
