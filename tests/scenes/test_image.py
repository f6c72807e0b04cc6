"""An image as a scene: what it shows, where it may go, where its gradient goes."""

import pytest
import torch

from distill3d.scenes.image import ImageScene, encodable, unit_range


def test_it_shows_its_parameters_and_passes_the_gradient_on():
    scene = ImageScene(torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)))
    rendering = scene.render()
    assert torch.equal(rendering.rgb, scene.values)
    assert rendering.opacity.shape == (2, 1, 4, 5) and bool((rendering.opacity == 1).all())
    assert not rendering.opacity.requires_grad
    (rendering.rgb * 3).sum().backward()
    assert scene.values.grad is not None
    torch.testing.assert_close(scene.values.grad, torch.full((2, 3, 4, 5), 3.0))


def test_it_owns_a_copy():
    values = torch.zeros(1, 3, 2, 2)
    scene = ImageScene(values)
    values += 1
    assert bool((scene.values == 0).all())


def test_projection_puts_pixels_back_into_range_and_leaves_the_others():
    scene = ImageScene(torch.tensor([-0.5, 0.25, 2.0]).reshape(1, 3, 1, 1), unit_range)
    scene.project()
    assert scene.values.flatten().tolist() == [0.0, 0.25, 1.0]
    assert scene.values.requires_grad and scene.values.grad is None
    free = ImageScene(torch.full((1, 4, 1, 1), 7.0))
    free.project()
    assert bool((free.values == 7).all())


def test_latents_are_held_among_those_of_images():
    def encode(images):
        return 2 * images - 1

    def decode(x):
        return (x + 1) / 2

    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scene = ImageScene(encode(images), encodable(encode, decode))
    before = scene.values.detach().clone()
    scene.project()
    torch.testing.assert_close(scene.values.detach(), before)  # an encoded image stays
    projection = encodable(encode, decode)
    far = projection(torch.full((1, 3, 4, 4), 9.0))
    torch.testing.assert_close(far, torch.ones(1, 3, 4, 4))
    torch.testing.assert_close(projection(far), far)  # a projection: twice is once


def _noise(seed):
    return ImageScene.noise((1, 3, 32, 32), torch.Generator().manual_seed(seed)).values.detach()


def test_starts_are_pixels_in_range_and_noise_repeats_with_its_seed():
    assert bool((ImageScene.gray((1, 3, 4, 4), 0.3).values == 0.3).all())
    one, again, other = (_noise(s) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.min() >= 0 and one.max() <= 1
    assert float(one.mean()) == pytest.approx(0.5, abs=0.02)  # 3072 draws of spread 0.2: 5.5 standard errors


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageScene(torch.zeros(3, 4, 4)),
        lambda: ImageScene(torch.zeros(1, 3, 4, 4, dtype=torch.long)),
        lambda: ImageScene(torch.full((1, 3, 4, 4), float("nan"))),
        lambda: ImageScene.gray((1, 3, 4, 4), 1.5),
    ],
)
def test_mistakes_are_value_errors(make):
    with pytest.raises(ValueError, match="got"):
        make()
