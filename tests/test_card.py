"""The pretend accelerator finds what it is there to find, and computes what the host computes."""

import card
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from distill3d.cameras import turntable
from distill3d.devices import as_floats, at_once, marked, on_host
from distill3d.diffusion.schedule import stable_diffusion


@pytest.fixture
def seen():
    with card.watch() as seen:
        yield seen


def on_card(*values):
    return torch.tensor(values).to(card.DEVICE)


def test_a_tensor_left_on_the_host_is_found_with_its_place():
    with pytest.raises(RuntimeError, match=r"tensors of the device and of the host at cameras\.py:"), card.watch():
        cameras = turntable(2).to(card.DEVICE)
        broken = type(cameras)(cameras.camera_to_world.cpu(), cameras.fov_y, *[cameras.azimuth] * 3)
        from distill3d.cameras import rays

        rays(broken, 4, 4)


def test_a_tensor_left_on_the_host_is_found_in_a_backward_pass():
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.tensor([2.0, 2.0])  # of the host

    with pytest.raises(RuntimeError, match="aten::mul: tensors of the device and of the host"), card.watch():
        x = on_card(1.0, 2.0).requires_grad_()
        Forgetful.apply(x).sum().backward()


def test_float64_is_found_where_the_device_has_none():
    t, schedule = torch.tensor([0.5], dtype=torch.float64), stable_diffusion()
    with card.watch(float64=False):
        schedule.alpha(t.float().to(card.DEVICE))  # in the precision of t, though the table is float64
    found = pytest.raises(RuntimeError, match=r"float64 on a device without it at devices\.py:")
    with found, card.watch(float64=False):
        at_once(card.DEVICE, t)
    with card.watch():
        assert at_once(card.DEVICE, t)[0].dtype == torch.float64


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 1).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.allclose(x, x),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.new_tensor([1.0]),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.ones(3).to(x),
    ],
)  # fmt: skip
def test_every_wait_is_counted_once(wait, seen):
    x = on_card(1.0, 2.0, 3.0)
    seen.take()
    wait(x)
    assert sum(seen.take().values()) == 1


def test_what_needs_no_wait_is_not_counted(seen):
    x = on_card(1.0, 2.0, 3.0)
    index = x.argsort()
    seen.take()
    y = torch.where(x > 1, x[index], 0.0) + x.new_zeros(3) + torch.arange(3, device=x.device) + torch.tensor(1.0)
    y = y.clamp(0, 2).cumsum(0).view(3, 1).expand(3, 2).double().sum(1)
    y[1], y[index] = 5.0, y + 1
    assert not seen.take()


def test_values_gradients_checkpoints_and_adam_are_those_of_the_host(seen):
    def trained(device):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 3, generator=generator).to(device).requires_grad_()
        x = torch.randn(4, 3, generator=generator).to(device)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for _ in range(3):
            y = checkpoint(lambda x: torch.relu(x @ weight).sin(), x, use_reentrant=False)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        return weight.detach().cpu()

    assert torch.equal(trained(card.DEVICE), trained("cpu"))


def test_numpy_refuses_a_tensor_of_the_device(seen):
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        on_card(1.0).numpy()


def test_tensors_travel_together_and_remember_their_values(seen):
    parts = [torch.arange(3), torch.rand(2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([True, False])]
    parts += [torch.tensor(2.5, dtype=torch.float64), torch.empty(0, 3), torch.tensor([1.0, 2.0]).bfloat16()]
    moved = at_once(card.DEVICE, *parts, already := on_card(7.0))
    assert sum(seen.take().values()) == 2  # one is that of `on_card`
    assert moved[-1] is already
    for part, there in zip(parts, moved, strict=False):
        assert there.device == card.DEVICE and there.dtype == part.dtype and on_host(there) is part
    assert not seen.take()
    assert all(torch.equal(there.cpu(), part) for part, there in zip(parts, moved, strict=False))
    seen.take()
    assert torch.equal(on_host(moved[0] + 1), parts[0] + 1) and sum(seen.take().values()) == 1
    assert at_once("cpu", *parts)[0] is parts[0]


@pytest.mark.parametrize("mask", [[True, False, True, True], [False, False], [True], []])
def test_marked_needs_no_wait_where_the_number_is_known(mask, seen):
    host = torch.tensor(mask, dtype=torch.bool)
    there = host.to(card.DEVICE)
    seen.take()
    index = marked(there, int(host.sum()))
    assert not seen.take()
    assert torch.equal(index.cpu(), host.nonzero()[:, 0]) and torch.equal(marked(host, int(host.sum())), index.cpu())


def test_scalars_are_read_in_one_copy_as_they_are(seen):
    values = on_card(0.1)[0], on_card(0.25)[0].bfloat16(), on_card(1 / 3)[0].double()
    seen.take()
    read = as_floats(*values)
    assert sum(seen.take().values()) == 1
    assert read == [float(value.cpu()) for value in values]
