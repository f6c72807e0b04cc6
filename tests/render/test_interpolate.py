"""Weighted rows: the fast path against indexing, forward and backward."""

import pytest
import torch

from distill3d.render.interpolate import reference, weighted_rows


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
    for function in (weighted_rows, reference):
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
