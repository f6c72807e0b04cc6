"""A canary: a wrong shape raises in the test run, so annotations of shapes are true."""

import jaxtyping
import pytest
import torch

from distill3d.evaluation.images import sharpness


def test_a_wrong_shape_raises():
    images = torch.rand(2, 3, 8, 8)
    assert sharpness(images, images) == pytest.approx(1.0)
    with pytest.raises(jaxtyping.TypeCheckError):
        sharpness(images[0], images[0])
    with pytest.raises(jaxtyping.TypeCheckError):
        sharpness(images.long(), images)
