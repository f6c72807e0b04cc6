"""The hash encoding: the reference against single look-ups by hand, the fast paths against the reference."""

import math

import pytest
import torch

from distill3d.scenes.hashgrid.encoding import encode, reference
from distill3d.scenes.hashgrid.layout import PRIMES, HashLayout

# Dense and hashed levels both, float64 throughout.
SMALL = HashLayout(levels=5, features=2, log2_table=9, coarsest=4, finest=40)


def a_table(layout, seed=0):
    return torch.randn(layout.rows, layout.features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_points(count, seed=1):
    points = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points[:4] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5], [0.25, 0.5, 0.75]])
    return points


def test_the_published_layout():
    layout = HashLayout()
    assert layout.channels == 32 and layout.cells[0] == 16 and layout.cells[-1] == 4096
    growth = math.exp((math.log(4096) - math.log(16)) / 15)  # Instant-NGP, equation 3
    assert layout.cells[1:-1] == tuple(math.floor(16 * growth**level) for level in range(1, 15))
    assert [layout.dense(level) for level in range(16)] == [(n + 1) ** 3 <= 2**19 for n in layout.cells]
    assert layout.sizes[0] == 17**3 and layout.sizes[-1] == 2**19 and layout.rows == sum(layout.sizes)


def test_the_reference_is_the_sum_over_corners_by_hand():
    table, points = a_table(SMALL), some_points(12)
    found = reference(table, points, SMALL, SMALL.levels, False)[0]
    assert {SMALL.dense(level) for level in range(SMALL.levels)} == {True, False}
    for row, point in zip(found, points.tolist(), strict=True):
        expected = []
        for level, n in enumerate(SMALL.cells):
            sums = [0.0, 0.0]
            for i in range(8):
                weight, corner = 1.0, []
                for axis in range(3):
                    at = point[axis] * n
                    cell = min(int(at), n - 1)
                    up = i >> axis & 1
                    weight *= at - cell if up else 1 - (at - cell)
                    corner.append(cell + up)
                x, y, z = corner
                place = x + (n + 1) * y + (n + 1) ** 2 * z
                if (n + 1) ** 3 > 512:
                    place = (x ^ (y * 2654435761) ^ (z * 805459861)) % 512
                for f in range(2):
                    sums[f] += weight * table[SMALL.starts[level] + place, f].item()
            expected += sums
        torch.testing.assert_close(row, row.new_tensor(expected))


def test_a_linear_function_on_a_dense_level_is_met_exactly_with_its_slopes():
    layout = HashLayout(levels=1, features=2, log2_table=12, coarsest=7, finest=7)
    axis = torch.linspace(0, 1, 8, dtype=torch.float64)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    table = torch.stack((x + 2 * y - z, x * y), -1).view(-1, 2)
    points = some_points(40)
    out = encode(table, points, layout, slopes=True)
    torch.testing.assert_close(out[0, :, 0], points @ points.new_tensor([1.0, 2, -1]))
    torch.testing.assert_close(out[1:, :, 0], points.new_tensor([[1.0], [2], [-1]]).expand(3, 40))


def test_slopes_are_derivatives():
    table, points = a_table(SMALL), some_points(200)[4:]
    out = reference(table, points, SMALL, SMALL.levels, True)
    step = 1e-6
    for axis in range(3):
        move = step * torch.eye(3, dtype=torch.float64)[axis]
        ahead, behind = (reference(table, points + s * move, SMALL, SMALL.levels, False)[0] for s in (1, -1))
        torch.testing.assert_close(out[1 + axis], (ahead - behind) / (2 * step), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("levels", [0, 3, 5])
def test_the_fast_path_agrees_with_the_reference(slopes, levels):
    table, points = a_table(SMALL).requires_grad_(), 1.2 * some_points(300) - 0.1
    fast, slow = encode(table, points, SMALL, levels, slopes), reference(table, points, SMALL, levels, slopes)
    torch.testing.assert_close(fast, slow)
    assert not fast[:, :, levels * SMALL.features :].any()
    gradient = torch.randn(fast.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.grad(slow, table, gradient, allow_unused=True)[0] if levels else torch.zeros_like(table)
    torch.testing.assert_close(torch.autograd.grad(fast, table, gradient)[0], expected)


def test_gradients_agree_with_finite_differences():
    layout = HashLayout(levels=2, features=2, log2_table=5, coarsest=2, finest=5)
    table, points = a_table(layout).requires_grad_(), some_points(9)
    assert torch.autograd.gradcheck(lambda t: encode(t, points, layout, slopes=True), table)
    assert torch.autograd.gradcheck(lambda t: encode(t, points, layout), table)


def test_the_published_size_works_in_single_precision():
    """Products of the hash exceed 32 bits there; the fast path keeps the low ones only."""
    layout = HashLayout()
    table, points = a_table(layout).float(), some_points(500).float()
    fast, slow = encode(table, points, layout), reference(table, points, layout, 16, False)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


def test_hashed_rows_are_spread():
    """65,536 lattice points among as many rows: a fair hash fills 1 - 1/e of them."""
    layout = HashLayout(levels=1, log2_table=16, coarsest=1000, finest=1000)
    corner = torch.randint(0, 1001, (2**16, 3), generator=torch.Generator().manual_seed(0))
    rows = layout.lattice_rows(0, corner)
    assert rows.min() >= 0 and rows.max() < 2**16
    assert len(rows.unique()) / 2**16 == pytest.approx(1 - math.exp(-1), abs=0.02)
    assert PRIMES[0] == 1


def test_no_points_are_legal():
    table = a_table(SMALL).requires_grad_()
    encode(table, torch.empty(0, 3, dtype=torch.float64), SMALL, slopes=True).sum().backward()
    assert table.grad is not None and not table.grad.any()


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: HashLayout(levels=0), "got 0"),
        (lambda: HashLayout(coarsest=9, finest=8), "got 9 and 8"),
        (lambda: HashLayout(log2_table=40), "got 40"),
        (lambda: encode(torch.zeros(3, 2), torch.zeros(1, 3), SMALL), r"got \[3, 2\]"),
        (lambda: encode(torch.zeros(SMALL.rows, 2), torch.zeros(1, 3), SMALL, 6), "got 6"),
    ],
)
def test_mistakes_are_value_errors(make, got):
    with pytest.raises(ValueError, match=got):
        make()
