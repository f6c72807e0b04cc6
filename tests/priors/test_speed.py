import pytest
import torch

from distill3d.cli.shared import precision
from distill3d.priors.loading import load_prior
from distill3d.priors.speed import fast_dtype


def test_auto_is_a_precision_and_every_other_is_itself():
    assert precision("auto", "cpu") in ("float32", "bfloat16")
    assert getattr(torch, precision("auto", "cpu")) == fast_dtype("cpu")
    assert precision("float16", "cpu") == "float16"
    assert fast_dtype("mps") == torch.float32


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_bfloat16_says_what_float32_says(t):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        prior = load_prior("toybox", dtype=dtype)
        said.append(prior.predict(x, torch.full((2,), t), prior.embed(["a red mushroom", "a blue car"])))
    # Eight bits of mantissa, through some forty layers that add up: half a percent a number, and less on the whole.
    assert (said[0] - said[1]).norm() < 0.03 * said[0].norm()
