"""Time and memory of a block."""

import sys
import time

import numpy as np
import pytest
import torch

from distill3d.evaluation import cost
from distill3d.evaluation.cost import Meter, peak_memory


def test_the_clock_runs_inside_the_block_only():
    with Meter() as meter:
        time.sleep(0.05)
    seconds = meter.seconds
    time.sleep(0.05)
    assert 0.05 <= seconds < 0.09 and meter.seconds == seconds


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts the peak anew")
def test_the_peak_sees_what_was_freed_and_is_that_of_the_block():
    size = 200 << 20
    with Meter() as before:
        pass
    with Meter() as during:
        block = np.ones(size, np.uint8)
        del block
    with Meter() as after:
        pass
    assert during.peak_memory - before.peak_memory == pytest.approx(size, rel=0.1)
    assert during.peak_memory - after.peak_memory > 0.5 * size


def test_without_proc_the_peak_is_the_process_own(monkeypatch, tmp_path):
    here = peak_memory()
    monkeypatch.setattr(cost, "STATUS", tmp_path / "nothing")
    monkeypatch.setattr(cost, "CLEAR", tmp_path)  # a folder: not to be written
    with Meter() as meter:
        pass
    assert meter.peak_memory >= 0.9 * here and meter.peak_memory < 100 << 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_peak_is_what_torch_allocated():
    with Meter("cuda") as meter:
        block = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
        del block
    assert meter.peak_memory >= 64 << 20
