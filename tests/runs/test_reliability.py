"""A run folder loses nothing: signals, kills, a second process, a damaged log."""

import json
import os
import platform
import pty
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

from distill3d import interrupts
from distill3d.distill.loop import Progress
from distill3d.distill.recipes import DISTILL
from distill3d.runs.checkpoint import load_module, read_state
from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import Config, resume
from distill3d.scenes.voxels import VoxelField, VoxelOptions


class Walk:
    """A run of a voxel field under a loss that needs no prior; `within` is called in the middle of each step."""

    def __init__(self, within=lambda step: None):
        self.module, self.within = VoxelField(VoxelOptions(resolution=6)), within
        self.generator, self.state = torch.Generator().manual_seed(5), None
        self.restart_optimizer()

    def restart_optimizer(self):
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)

    def optimizer_at(self, step):
        return self.optimizer

    def loss(self, step):
        density, color, _ = self.module.query(torch.rand(50, 3, generator=self.generator) * 2 - 1)
        self.within(step)
        loss = density.mean() + color.square().mean()
        return loss, Progress(step, 0.5, float(loss.detach()), 0.0, 0.5, 2)


@pytest.fixture(scope="module")
def whole():
    """The parameters after five steps without an interruption."""
    run = Walk()
    for step in range(5):
        loss, _ = run.loss(step)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
    return run.module.raw.detach().clone()


@pytest.fixture
def handlers():
    """The signals as a process of the command line has them, given back afterwards."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    for number, handler in zip(interrupts.SIGNALS, (signal.default_int_handler, *[signal.SIG_DFL] * 2), strict=True):
        signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted(folder, steps=2):
    """A folder whose run was interrupted after so many steps."""

    def stop(progress):
        if progress.step == steps - 1:
            raise KeyboardInterrupt

    assert folder.train(Walk(), 5, stop).interrupted == signal.SIGINT


def continued(folder):
    run = Walk()
    training = folder.train(run, 5)
    assert (training.steps, training.nfe) == (5, 10)
    return run.module.raw.detach()


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_within_a_step_is_heard_at_its_end_and_the_run_goes_on_to_the_same_end(
    number, handlers, whole, tmp_path
):
    interrupts.raise_on_signals()
    folder, before = RunFolder(tmp_path), signal.getsignal(number)
    assert callable(before), "it would end the process"

    def send(step):
        for _ in range(1 if number == signal.SIGINT else 3):  # closed terminals and supervisors send more than one
            if step == 2:
                os.kill(os.getpid(), number)

    training = folder.train(Walk(send), 5)
    assert (training.steps, training.interrupted) == (3, number) and signal.getsignal(number) is before
    assert read_state(folder.checkpoint).step == 3
    assert torch.equal(continued(folder), whole)


def test_what_is_ignored_stays_ignored_and_a_callers_own_handler_stays(handlers):
    own = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGTERM, own)
    interrupts.raise_on_signals()
    with interrupts.interrupts_between_steps():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is own


TERMINAL = """
import os, signal, sys, time
from pathlib import Path
from distill3d import interrupts
from distill3d.cli import main as cli
from distill3d.runs.folder import RunFolder

sys.path.insert(0, sys.argv[1])
from test_reliability import Walk

class Command:
    def run(self):
        def slowly(progress):
            os.write(1, b"a bar")
            time.sleep(0.05)  # in which the terminal goes
            os.write(1, b"another")

        return 128 + RunFolder(Path(sys.argv[2])).train(Walk(), 500, slowly).interrupted

for number in interrupts.SIGNALS:
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
cli.parse = lambda argv: Command()
cli.main(["generate"])
"""


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path):
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, "-c", TERMINAL, str(Path(__file__).parent), str(tmp_path)])
    seen = b""
    while b"a bar" not in seen:
        try:
            seen += os.read(terminal, 1024)
        except OSError:  # it ended early
            pytest.fail(seen.decode())
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    done = read_state(RunFolder(tmp_path).checkpoint).step
    assert 0 < done < 500 and len(RunFolder(tmp_path).history()) == done


def test_the_first_checkpoint_is_there_before_the_first_step(tmp_path):
    steps = []

    def look(step):
        steps.append(read_state(RunFolder(tmp_path).checkpoint).step)

    RunFolder(tmp_path).train(Walk(look), 2)
    assert steps == [0, 0]


def test_an_error_of_a_callback_does_not_lose_the_step(tmp_path, whole):
    folder = RunFolder(tmp_path)

    def fail(progress):
        if progress.step == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        folder.train(Walk(), 5, fail)
    assert read_state(folder.checkpoint).step == 3 and torch.equal(continued(folder), whole)


def test_the_log_is_on_the_disk_before_the_checkpoint_and_the_checkpoint_before_its_name(tmp_path, monkeypatch):
    order, fsync = [], os.fsync

    def watched(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])  # noqa: PTH115
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    RunFolder(tmp_path).train(Walk(), 1)
    files = ["scene.safetensors", "optimizer.safetensors", "state.json", "checkpoint.new"]
    assert order[-6:] == ["metrics.jsonl", *files, tmp_path.name]


def test_a_second_process_is_kept_off_and_what_a_killed_one_left_is_removed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config("object", Config("a cat", DISTILL, prior="toybox"))
    for name in ("checkpoint.new", "checkpoint.old", f".partial-{platform.node()}-999999999-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scene.safetensors").write_text("part")
    with folder.locked():
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", ".lock"}
        with pytest.raises(ValueError, match="another process is at work in"):
            resume(tmp_path)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda lines: lines[:1], 1),  # too few
        (lambda lines: [lines[0][:20], lines[1]], 1),  # garbled
        (lambda lines: [lines[0].replace('"nfe": 2', '"nfe": 3'), lines[1]], 2),  # another number
        (lambda lines: ["[" * 10_000, lines[1]], 1),
        (lambda lines: [], 0),
    ],
)
def test_a_log_that_is_not_the_checkpoints_is_told_and_the_run_goes_on_to_the_same_end(damage, kept, tmp_path, whole):
    folder = RunFolder(tmp_path)
    interrupted(folder)
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("".join(f"{line}\n" for line in damage(lines)))
    with pytest.warns(UserWarning, match=rf"metrics.jsonl is damaged: {kept} of its 2 lines"):
        assert torch.equal(continued(folder), whole)
    assert [line["step"] for line in folder.history()][-3:] == [2, 3, 4] and len(folder.history()) == kept + 3


def test_lines_after_the_checkpoint_are_taken_again_without_a_word(tmp_path, whole):
    folder = RunFolder(tmp_path)
    interrupted(folder)
    with folder.metrics.open("a") as file:
        file.write(json.dumps({**folder.history()[-1], "step": 2}) + '\n{"step": 3, "lo')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(continued(folder), whole)
    assert [line["step"] for line in folder.history()] == [0, 1, 2, 3, 4]


def test_another_configuration_than_the_checkpoints_is_told(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config("object", Config("a cat", DISTILL, prior="toybox"))
    interrupted(folder)
    folder.write_config("object", Config("a cat", DISTILL, prior="toybox", seed=1))
    with pytest.warns(UserWarning, match=r"config.json was changed since the checkpoint"):
        continued(folder)


def test_a_damaged_checkpoint_is_refused_for_rendering_too(tmp_path):
    folder = RunFolder(tmp_path)
    interrupted(folder)
    path = folder.checkpoint / "scene.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scene.safetensors is damaged"):
        load_module(folder.checkpoint, Walk().module)
