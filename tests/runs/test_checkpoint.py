"""Save, load, continue: the same as without an interruption."""

import pytest
import torch

from distill3d.runs.checkpoint import checkpointed_steps, has_checkpoint, load_checkpoint, load_module, save_checkpoint
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
    assert load_checkpoint(folder, other) == checkpointed_steps(folder) == 5
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


@pytest.mark.parametrize("files", range(4), ids=["nothing", "scene", "optimizer", "all"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(folder, files, monkeypatch):
    """Killed after any of the writes, or between the two renames: there is always a whole checkpoint."""
    import pathlib

    import safetensors.torch

    run, other = Small(), Small()
    save_checkpoint(folder, run, 1)
    before = run.module.raw.detach().clone()
    run.walk(1)
    written = []

    class Killed(BaseException):
        pass

    def save_file(tensors, path, original=safetensors.torch.save_file):
        if len(written) == files:
            raise Killed
        written.append(path)
        original(tensors, path)

    def rename(path, target, original=pathlib.Path.rename):
        if files == 3 and path.name == "checkpoint.new":
            raise Killed
        return original(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(safetensors.torch, "save_file", save_file)
        patch.setattr(pathlib.Path, "rename", rename)
        if files == 2:
            patch.setattr(pathlib.Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        save_checkpoint(folder, run, 2)
    assert has_checkpoint(folder) and load_checkpoint(folder, other) == 1
    assert torch.equal(other.module.raw, before)
    save_checkpoint(folder, run, 2)  # and the next one succeeds
    assert load_checkpoint(folder, other) == 2 and [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


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
