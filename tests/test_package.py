"""What pyproject.toml promises: extras install what the code uses, and nothing heavy is in the wheel without need."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from distill3d.bench import LIBRARIES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_the_extra_of_benchmarks_is_what_they_check_for():
    assert {line.split(">=")[0] for line in EXTRAS["bench"]} == set(LIBRARIES)


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
