"""Weighted rows and trilinear interpolation: the fast paths against the readable ones, forward and backward."""

import pytest
import torch

from distill3d.render.interpolate import (
    trilinear,
    trilinear_reference,
    weighted_rows,
    weighted_rows_reference,
)


def drawn(rows=50, points=200, entries=4):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, 3, generator=generator)
    indices = torch.randint(rows, (points, entries), generator=generator)
    return table, indices, torch.randn(points, entries, generator=generator)


def test_it_is_the_sum_that_it_says():
    table, indices, weights = drawn(points=2, entries=2)
    expected = weights[1, 0] * table[indices[1, 0]] + weights[1, 1] * table[indices[1, 1]]
    torch.testing.assert_close(weighted_rows(table, indices, weights)[1], expected)


def test_its_gradients_are_those_of_the_reference():
    table, indices, weights = drawn()
    gradients = []
    for function in (weighted_rows, weighted_rows_reference):
        leaves = [table.clone().requires_grad_(), weights.clone().requires_grad_()]
        (function(leaves[0], indices, leaves[1]).sin()).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("leaf", [0, 2])
def test_only_what_asks_for_a_gradient_gets_one(leaf):
    arguments = list(drawn())
    arguments[leaf].requires_grad_()
    weighted_rows(*arguments).sum().backward()
    assert arguments[leaf].grad.shape == arguments[leaf].shape


def test_no_points_are_no_rows():
    table, indices, weights = drawn()
    table.requires_grad_()
    out = weighted_rows(table, indices[:0], weights[:0])
    out.sum().backward()
    assert out.shape == (0, 3) and not table.grad.any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_trilinear_agrees_with_the_reference(channels):
    generator = torch.Generator().manual_seed(0)
    lattice = torch.randn(5, 6, 7, channels, generator=generator, dtype=torch.float64, requires_grad=True)
    points = 2.4 * torch.rand(500, 3, generator=generator, dtype=torch.float64) - 1.2
    points[:3] = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, 0]])
    fast, slow = trilinear(lattice, points), trilinear_reference(lattice, points)
    torch.testing.assert_close(fast, slow)
    gradient = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(slow, lattice, gradient)[0]
    torch.testing.assert_close(torch.autograd.grad(fast, lattice, gradient)[0], expected)
    torch.testing.assert_close(trilinear(lattice.detach(), points), fast.detach())


def test_a_linear_function_is_met_exactly_and_no_points_are_legal():
    axis = torch.linspace(-1, 1, 4)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    lattice = (x + 2 * y - z)[..., None].requires_grad_()
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = points @ torch.tensor([1.0, 2.0, -1.0])
    torch.testing.assert_close(trilinear(lattice, points)[:, 0], expected, atol=1e-5, rtol=0)
    trilinear(lattice, points[:0]).sum().backward()
    assert torch.equal(lattice.grad, torch.zeros_like(lattice))
