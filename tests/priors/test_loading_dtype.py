"""Devices and precisions by name, and what low precision costs."""

import pytest
import torch

from distill3d.priors.base import resolve_device, resolve_dtype
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions


def test_auto_is_a_precision_and_every_other_name_is_itself():
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    assert resolve_dtype("auto", "mps") == torch.float32
    for name in ("float32", "bfloat16", "float16", "float64"):
        dtype = getattr(torch, name)
        assert resolve_dtype(name) == resolve_dtype(dtype) == dtype
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_auto_reaches_the_network(kl_folder):
    prior = load_prior(kl_folder, dtype="auto")
    assert prior.dtype == prior.network.dtype == resolve_dtype("auto", "cpu")


@pytest.mark.parametrize("dtype", ["float23", "nn", "", "int8", torch.int64, "float32 "])
def test_an_unknown_dtype_is_named_with_what_is_allowed(kl_folder, dtype):
    with pytest.raises(ValueError, match=r"unknown dtype '.*': use auto, float32, bfloat16, float16, float64$"):
        load_prior(kl_folder, dtype=dtype)


@pytest.mark.parametrize("device", ["xpu:7", "gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named_with_what_is_allowed(kl_folder, device):
    with pytest.raises(ValueError, match=f"cannot compute on '{device}': .*; use cpu, cuda, cuda:N or mps"):
        load_prior(kl_folder, device)


def test_offloading_needs_another_device(kl_folder):
    with pytest.raises(ValueError, match="--offload sends layers from main memory to a GPU: choose one with --device"):
        load_prior(kl_folder, options=PriorOptions(offload=True))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_bfloat16_agrees_with_float32(t):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    outputs = []
    for dtype in ("float32", "bfloat16"):
        prior = load_prior("toybox", dtype=dtype)
        outputs.append(prior.predict(x, torch.full((2,), t), prior.embed(["a red mushroom", "a blue car"])))
    # Eight bits of mantissa, through some forty layers that add up: half a percent a number, and less on the whole.
    assert (outputs[0] - outputs[1]).norm() < 0.03 * outputs[0].norm()
