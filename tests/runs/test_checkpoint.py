"""Save, load, continue: the same as not having stopped."""

import pytest
import torch

from distill3d.runs.checkpoint import load_checkpoint, restore_optimizer, save_checkpoint
from distill3d.scenes.voxels import VoxelField, VoxelOptions


def make():
    scene = VoxelField(VoxelOptions(resolution=6))
    return scene, torch.optim.Adam(scene.parameters(), lr=0.1), torch.Generator().manual_seed(5)


def walk(scene, optimizer, generator, steps):
    for _ in range(steps):
        points = torch.rand(50, 3, generator=generator) * 2 - 1
        density, color, _ = scene.query(points)
        optimizer.zero_grad()
        (density.mean() + color.square().mean()).backward()
        optimizer.step()


def test_a_continued_run_equals_an_uninterrupted_one(tmp_path):
    scene, optimizer, generator = make()
    walk(scene, optimizer, generator, 5)
    save_checkpoint(tmp_path, scene, optimizer, 5, generator)
    walk(scene, optimizer, generator, 4)

    other, _, rng = make()
    step, moments = load_checkpoint(tmp_path, other, rng)
    again = torch.optim.Adam(other.parameters(), lr=0.1)
    restore_optimizer(again, moments)
    walk(other, again, rng, 4)
    assert step == 5
    assert torch.equal(scene.raw, other.raw)


def test_a_refined_field_is_restored_into_a_coarse_one(tmp_path):
    scene, _, generator = make()
    scene.upsample(9)
    save_checkpoint(tmp_path, scene, torch.optim.Adam(scene.parameters()), 1, generator)
    other, _, _ = make()
    load_checkpoint(tmp_path, other, generator)
    assert other.resolution == 9 and torch.equal(other.raw, scene.raw)


@pytest.mark.parametrize("name", ["scene.safetensors", "optimizer.safetensors", "state.json"])
def test_missing_or_truncated_files_are_one_clear_error(tmp_path, name):
    scene, optimizer, generator = make()
    save_checkpoint(tmp_path, scene, optimizer, 1, generator)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path, scene, generator)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_checkpoint(tmp_path, scene, generator)
