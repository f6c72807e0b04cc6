"""What travels between the stages: rows are selected, joined and extended together."""

import torch

from distill3d.types import Condition, Conditioning


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_low_precision_does_not_round_the_camera():
    condition = Condition(randn(2, 3, 4), randn(2, 5), randn(2, 3, 8, 8), randn(2, 4, 4))
    low = condition.to(torch.bfloat16)
    assert {low.hidden.dtype, low.pooled.dtype, low.control.dtype} == {torch.bfloat16}
    assert torch.equal(low.camera, condition.camera)


def test_every_row_carries_its_camera_and_its_control():
    b, k = 3, 2
    plain = Conditioning(*(Condition(randn(n, 3, 4)) for n in (b, b, b * k)), randn(b, k))
    camera, images = randn(b, 4, 4), randn(b, 3, 8, 8)
    full = plain.with_camera(camera).with_control(images)
    assert plain.positive.camera is None and plain.positive.control is None
    for condition in (full.positive, full.negative):
        assert torch.equal(condition.camera, camera) and torch.equal(condition.control, images)
    view = torch.arange(b).repeat_interleave(k)  # of each Perp-Neg row
    assert torch.equal(full.perp.camera, camera[view]) and torch.equal(full.perp.control, images[view])
    assert torch.equal(full.perp_weights, plain.perp_weights) and torch.equal(full.perp.hidden, plain.perp.hidden)
    rows = torch.tensor([2, 0])
    chosen = full[rows]
    assert len(chosen) == 2 and torch.equal(chosen.perp.camera.unflatten(0, (2, k))[:, 0], camera[rows])
    joined = Condition.cat([full.positive, full.perp])
    assert torch.equal(joined.camera, torch.cat([camera, camera[view]]))
    assert torch.equal(joined.control, torch.cat([images, images[view]])) and joined.pooled is None


def test_a_shorter_text_is_repeated_when_rows_are_joined():
    short, long = Condition(randn(1, 2, 4), randn(1, 5)), Condition(randn(2, 6, 4), randn(2, 5, seed=1))
    joined = Condition.cat([short, long])
    assert torch.equal(joined.hidden[0], short.hidden[0].repeat(3, 1)) and torch.equal(joined.hidden[1:], long.hidden)
    assert torch.equal(joined.pooled, torch.cat([short.pooled, long.pooled]))
