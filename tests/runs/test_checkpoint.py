"""Save, load, continue: the same as without an interruption, and nothing less after a kill or a flipped bit."""

import json
import os
import shutil
import sys

import pytest
import torch

from distill3d.runs.checkpoint import load_checkpoint, load_module, read_state, save_checkpoint, tidy
from distill3d.scenes.voxels import VoxelField, VoxelOptions


class Small:
    """A run of a voxel field under a loss that needs no prior."""

    def __init__(self):
        self.module = VoxelField(VoxelOptions(resolution=6))
        self.generator, self.state = torch.Generator().manual_seed(5), None
        self.restart_optimizer()

    def restart_optimizer(self):
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)

    def walk(self, steps):
        for _ in range(steps):
            density, color, _ = self.module.query(torch.rand(50, 3, generator=self.generator) * 2 - 1)
            self.optimizer.zero_grad()
            (density.mean() + color.square().mean()).backward()
            self.optimizer.step()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoint"


def test_a_continued_run_equals_an_uninterrupted_one(folder):
    run, other = Small(), Small()
    run.walk(5)
    save_checkpoint(folder, run, 5)
    run.walk(4)
    assert load_checkpoint(folder, other) == read_state(folder) and read_state(folder).step == 5
    other.walk(4)
    assert torch.equal(run.module.raw, other.module.raw)


def test_a_refined_field_is_restored_into_a_coarse_one(folder):
    run, other = Small(), Small()
    run.module.upsample(9)
    save_checkpoint(folder, run, 1)
    load_module(folder, other.module)
    assert other.module.resolution == 9 and torch.equal(other.module.raw, run.module.raw)


class Memory:
    """What an objective has learned."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_what_the_objective_learned_is_restored(folder):
    run, other = Small(), Small()
    run.state, other.state = (Memory(torch.full((2,), v)) for v in (3.0, 0.0))
    save_checkpoint(folder, run, 1)
    load_checkpoint(folder, other)
    assert torch.equal(other.state.value, torch.full((2,), 3.0))


@pytest.mark.parametrize(("place", "tensor"), [("scene", "raw"), ("optimizer", "0.exp_avg_sq"), ("objective", "value")])
def test_numbers_that_are_not_finite_are_refused_with_file_and_tensor(place, tensor, folder):
    run, other = Small(), Small()
    run.state, other.state = Memory(torch.ones(2)), Memory(torch.ones(2))
    run.walk(1)
    moments = run.optimizer.state[run.module.raw]["exp_avg_sq"]
    {"scene": run.module.raw.data, "optimizer": moments, "objective": run.state.value}[place].view(-1)[1] = torch.inf
    save_checkpoint(folder, run, 1)
    with pytest.raises(ValueError, match=rf"{place}.safetensors: the tensor {tensor} has values that are not finite"):
        load_checkpoint(folder, other)


def killed(action, operation):
    """Does something in another process, killed just before its n-th file operation; whether it came so far."""
    process = os.fork()
    if not process:
        seen = 0

        def count(event, arguments):
            nonlocal seen
            seen += event == "open" or event.startswith("os.")
            if seen > operation:
                os._exit(9)

        sys.addaudithook(count)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(folder):
    first, second, other = Small(), Small(), Small()
    first.walk(1)
    second.walk(2)
    save_checkpoint(folder, first, 1)
    kept, operation = [], 0
    while True:
        before = shutil.copytree(folder, folder.with_name("before"))
        died = killed(lambda: save_checkpoint(folder, second, 2), operation)
        step = load_checkpoint(folder, other).step
        assert torch.equal(other.module.raw, {1: first, 2: second}[step].module.raw)
        kept.append(step)
        tidy(folder)
        assert sorted(path.name for path in folder.parent.iterdir()) == ["before", "checkpoint"]
        assert load_checkpoint(folder, other).step == step
        shutil.rmtree(folder)
        before.rename(folder)
        if not died:
            break
        operation += 1
    assert kept == sorted(kept) and kept.count(1) > 8 and kept.count(2) > 4  # before the switch and after it


def test_one_that_cannot_be_written_leaves_no_part(folder, monkeypatch):
    run = Small()
    save_checkpoint(folder, run, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, run, 2)
    assert read_state(folder).step == 1 and [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", ["scene.safetensors", "optimizer.safetensors", "state.json"])
def test_one_flipped_bit_is_noticed(name, folder):
    run = Small()
    run.walk(1)
    save_checkpoint(folder, run, 1)
    content = (folder / name).read_bytes()
    for place in range(0, len(content), len(content) // 50):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (folder / name).write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged|has format") as error:
            load_checkpoint(folder, run)
        assert "\n" not in str(error.value)
    (folder / name).write_bytes(content)
    assert load_checkpoint(folder, run).step == 1


def test_other_formats_and_unknown_fields_are_named(folder):
    from distill3d.runs import checkpoint

    save_checkpoint(folder, Small(), 1)
    content = json.loads((folder / "state.json").read_text())
    del content["sha256"]
    for change, message in (({"format": 3}, "has format 3"), ({"color": 1}, "color")):
        changed = content | change
        (folder / "state.json").write_text(json.dumps(changed | {"sha256": checkpoint.json_checksum(changed)}))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(folder, Small())


@pytest.mark.parametrize("name", ["scene.safetensors", "optimizer.safetensors", "state.json"])
def test_missing_or_truncated_files_are_one_clear_error(folder, name):
    run = Small()
    run.walk(1)
    save_checkpoint(folder, run, 1)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder, run)
    (folder / name).unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_checkpoint(folder, run)
