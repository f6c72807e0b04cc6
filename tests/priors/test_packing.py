"""Convolutions with reordered weights: the same values, whatever was computed before."""

import copy

import pytest
import torch
from torch import nn

from distill3d.priors.components import packing
from distill3d.priors.components.mapped import MAPS
from distill3d.priors.components.packing import PackedConv2d, _works, pack_convolutions
from distill3d.priors.loading import load_prior
from distill3d.priors.options import PriorOptions

pytestmark = pytest.mark.skipif(not _works(), reason="this torch has no oneDNN")


def pair(dtype=torch.float32, **settings):
    """A plain convolution of 8 channels and a packed one with the same frozen weights."""
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, settings.pop("kernel_size", 3), **settings).to(dtype).requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack_convolutions(packed)
    assert type(packed) is PackedConv2d and type(plain) is nn.Conv2d
    return plain, packed


def images(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "settings",
    [{"padding": 1}, {"kernel_size": 1}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2, "groups": 4},
     {"padding": 1, "bias": False}, {"padding": "same"}],
)  # fmt: skip
def test_the_values_are_those_of_the_plain_convolution(settings, dtype, tolerance):
    plain, packed = pair(dtype, **settings)
    for shape in ((2, 8, 8, 8), (1, 8, 5, 7)):
        x = images(*shape, dtype=dtype)
        torch.testing.assert_close(packed(x), plain(x), rtol=tolerance, atol=tolerance)
    assert packed(images(0, 8, 8, 8, dtype=dtype)).shape[0] == 0


def test_no_value_depends_on_what_was_computed_before():
    x = images(4, 8, 16, 16)
    first, second = pair(padding=1)[1], pair(padding=1)[1]
    second(images(1, 8, 4, 4))
    assert torch.equal(first(x), second(x))


def test_trying_it_draws_nothing_from_torchs_own_generator():
    before = torch.get_rng_state()
    assert _works.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)


def test_changed_weights_are_seen():
    plain, packed = pair(padding=1)
    x = images(2, 8, 8, 8)
    packed(x)
    for module in (plain, packed):
        with torch.no_grad():
            module.weight.mul_(2)
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    packed.load_state_dict({"weight": -packed.weight, "bias": -packed.bias})
    torch.testing.assert_close(packed(x), -plain(x), rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(packed)
    with torch.no_grad():
        twin.weight.zero_()
    assert not torch.equal(twin(x), packed(x))


def test_gradients_are_those_of_the_plain_convolution():
    plain, packed = pair(padding=1)
    x, gradient = images(2, 8, 8, 8), images(2, 16, 8, 8, seed=1)
    of_input, of_weights = [], []
    for module in (plain, packed):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(gradient)
        of_input.append(leaf.grad)
        module.requires_grad_(True)
        module(x).backward(gradient)
        of_weights.append(module.weight.grad)
    assert torch.equal(*of_input) and torch.equal(*of_weights)


def is_packed(prior):
    return any(isinstance(module, PackedConv2d) for module in prior.network.modules())


@pytest.mark.skipif(not MAPS.is_file(), reason="this system does not list what is mapped")
@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
def test_by_default_large_convolutions_are_packed_whose_weights_stay_in_their_file(kl_folder, monkeypatch):
    assert not is_packed(load_prior(kl_folder)), "they are small"
    monkeypatch.setattr(packing, "LARGE", 1000)
    assert is_packed(load_prior(kl_folder))
    assert not is_packed(load_prior(kl_folder, dtype="bfloat16")), "a converted copy is no longer the file's"
    assert not is_packed(load_prior(kl_folder, options=PriorOptions(compile=True)))
    plain, packed = (load_prior(kl_folder, options=PriorOptions(packed=choice)) for choice in (False, None))
    x, t = images(2, *plain.sample_shape), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        found = [prior.predict(x, t, prior.embed(["a dog", ""])) for prior in (plain, packed)]
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_network_is_packed_where_the_options_say_so():
    x, t = images(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    found = []
    for options in (PriorOptions(packed=False), PriorOptions(packed=True)):
        prior = load_prior("toybox", options=options)
        assert is_packed(prior) == options.packed
        with torch.no_grad():
            found.append(prior.predict(x, t, prior.embed(["a red car", ""])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="leave it out"):
        load_prior("toybox", device="meta", options=PriorOptions(packed=True))
