"""Weights on a CPU: mapped from their file, and in either memory format the same function."""

import sys
from pathlib import Path

import pytest
import torch

from distill3d.priors.components.layout import network_format
from distill3d.priors.loading import load_prior


def mapped_files():
    """(first address, last address, file) of everything that this process has mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, file = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in addresses.split("-"))
        yield first, last, file


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_on_a_cpu_the_weights_of_the_network_are_those_of_the_file(kl_folder):
    """Nothing is copied when a prior is loaded in the precision of its file: the peak is the size of the file."""
    prior = load_prior(kl_folder)
    parts = [(first, last) for first, last, file in mapped_files() if file.startswith(str(kl_folder / "unet"))]
    for name, weight in prior.network.named_parameters():
        assert any(first <= weight.data_ptr() < last for first, last in parts), name


def test_the_memory_format_changes_nothing_but_rounding(kl_folder):
    plain, other = load_prior(kl_folder), load_prior(kl_folder)
    assert (
        plain.memory_format == torch.contiguous_format and network_format(torch.device("cuda")) == torch.channels_last
    )
    other.memory_format = torch.channels_last
    other.network.to(memory_format=torch.channels_last)
    x = torch.randn(2, *plain.sample_shape, generator=torch.Generator().manual_seed(0))
    found, expected = (p.predict(x, torch.tensor([0.3, 0.9]), p.embed(["a dog", ""])) for p in (other, plain))
    assert found.is_contiguous() and expected.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
