"""Commands whose address space is limited end with status 5, a line that names their flags, and what they have."""

import json
import os
import struct
import subprocess
import sys

import pytest

from distill3d.runs.objects import load_scene

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")

# Runs a command with so many megabytes more than what the libraries take.
LIMITED = """
import resource, sys
import av, diffusers, peft, safetensors.torch, skimage.measure, torch, transformers
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from distill3d.cli import main
torch.set_num_threads(1)
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + (int(sys.argv[1]) << 20),) * 2)
main.main(sys.argv[2:])
"""
SMALL = ["--recipe", "distill", "--steps", "3", "--views-per-step", "1", "--frames", "8", "--set", "export.fit=0"]
SMALL += ["--set", "scene.resolution=24", "--set", "objective.inversion_steps=1", "--set", "export.resolution=32"]


def starved(megabytes, *words):
    """The line that a command ends with."""
    command = [sys.executable, "-c", LIMITED, str(megabytes), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("distill3d: ") == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("distill3d: out of memory: try ")
    return line


def test_a_run_and_its_export_without_memory(tmp_path):
    huge = ["--set", "scene.refine=[[0.5, 20.0]]"]  # 480^3 points from the third step on
    line = starved(600, "generate", "a red mushroom", "--out", tmp_path, *SMALL, *huge)
    assert "--render-size" in line and "--dtype" in line and "--views-per-step" not in line  # which is 1 already
    (folder,) = tmp_path.iterdir()
    assert line.endswith(f"the run is kept in {folder}: type  distill3d resume {folder}")
    assert load_scene(folder).raw.isfinite().all()

    line = starved(600, "export", folder, "--texture-size", 2**13)
    assert "--texture-size" in line and "--resolution" in line and "--views-per-step" not in line
    assert not (folder / "mesh.glb").exists()


def test_an_image_without_memory(tmp_path):
    line = starved(600, "image", "a red mushroom", "--image-size", 4096, "--steps", 1, "--out", tmp_path)
    assert "--dtype bfloat16" in line and "--image-size" in line and "--views-per-step" not in line


def test_a_file_that_cannot_be_mapped_is_not_called_damaged(tmp_path):
    """A hole of 4 GB in a file: it takes no disk, but as much address space as any other file of its size."""
    file, size = tmp_path / "big.safetensors", 2**32
    header = json.dumps({"unet.x.lora_A.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header.encode())
        out.truncate(8 + len(header) + size)
    line = starved(1000, "image", "a red mushroom", "--steps", 1, "--lora", file, "--out", tmp_path / "runs")
    assert "--dtype" in line and "damaged" not in line
