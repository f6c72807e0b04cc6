"""Weights in a mapped file: read from it with the same values, and without making the mapping resident."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill3d.priors.components.folder import freeze
from distill3d.priors.components.mapped import MAPS, Mappings

pytestmark = pytest.mark.skipif(not MAPS.is_file(), reason="this system does not list what is mapped")


@pytest.fixture
def file(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=g),
        "b": torch.randn(4, 7, 3, generator=g).bfloat16(),
        "c": torch.randn(0, 3, generator=g),
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_values_are_those_of_the_file_in_memory_of_their_own(file):
    mapped = load_file(file)
    mappings = Mappings.of_this_process()
    for name in ("a", "b"):
        values = mappings.read(mapped[name])
        assert torch.equal(values, mapped[name]) and values.dtype == mapped[name].dtype
        assert values.data_ptr() != mapped[name].data_ptr()
        torch.testing.assert_close(mappings.read(mapped[name][1:]), mapped[name][1:], rtol=0, atol=0)


def test_what_is_not_mapped_is_not_read(file, tmp_path):
    mapped = load_file(file)
    mappings = Mappings.of_this_process()
    for other in (mapped["a"].clone(), mapped["a"].mT, mapped["c"], torch.randn(5), mapped["a"].to("meta")):
        assert mappings.read(other) is None
    assert Mappings(()).read(mapped["a"]) is None


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_file_that_is_no_longer_the_one_is_not_read(file, change):
    mapped = load_file(file)
    file.unlink()
    if change == "replaced":
        save_file({"a": torch.zeros(3, 5)}, file)
    assert Mappings.of_this_process().read(mapped["a"]) is None


def test_a_value_that_is_not_finite_is_found_in_a_mapped_file(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    network.weight.data[1, 2] = torch.inf
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    network.load_state_dict(load_file(tmp_path / "weights.safetensors"), assign=True)
    assert Mappings.of_this_process().read(network.weight.data) is not None
    with pytest.raises(ValueError, match=r"weights that are not finite in torch.float32: weight"):
        freeze(network, "cpu", torch.float32)


MEASURE = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from distill3d.priors.components.folder import freeze


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


freeze(torch.nn.Linear(2, 2), "cpu", torch.float32)  # loads what it needs
with torch.device("meta"):
    network = torch.nn.Linear(4096, 4096, bias=False)
network.load_state_dict(load_file(sys.argv[1]), assign=True)
before = resident()
freeze(network, "cpu", torch.float32)
print(resident() - before)
"""


def test_a_check_of_mapped_weights_does_not_make_them_resident(tmp_path):
    weights = torch.zeros(4096, 4096)
    save_file({"weight": weights}, tmp_path / "weights.safetensors")
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "weights.safetensors")]
    grown = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert grown < 0.5 * weights.numel() * 4, "the weights themselves have 67 MB"
