"""Noise that stays in 3D: what an atlas shows, and what is written back into it, for any texels."""

import dataclasses
import itertools

import pytest
import torch

from distill3d.diffusion import ddim
from distill3d.diffusion.guidance import Guided
from distill3d.diffusion.schedule import coefficients
from distill3d.objectives import CFD, SDICached, cfd, sdi_cached, weighting
from distill3d.objectives.atlas import Atlas
from distill3d.objectives.objective import Query
from distill3d.texels import Texels

F64 = torch.float64
COUNT, SHOWN = 60, 24  # texels of the atlas, and of a view: views share some


def seed(number=0):
    return torch.Generator().manual_seed(number)


def views_of(number, each=SHOWN, generator=None):
    """Random texels of so many views of 2 x 2 pixels; the last pixel of each shows none."""
    generator = generator or seed(number)
    texel = torch.stack([torch.randperm(COUNT, generator=generator)[:each] for _ in range(number)])
    pixel = torch.randint(3, (number, each), generator=generator) + 4 * torch.arange(number)[:, None]
    return Texels(COUNT, texel.flatten(), pixel.flatten())


def query(mixture, conditions, texels, views, generator, x=None, step=0):
    x = torch.zeros(views, 2, 2, 2, dtype=F64) if x is None else x
    conditioning = conditions(mixture, ["left"] * views)
    return Query(x, torch.full((views,), 0.5, dtype=F64), mixture, conditioning, generator, step, 9, texels=texels)


@pytest.fixture
def ask(mixture, conditions):
    """ask(texels, views, seed=0): a query with x = 0."""
    return lambda texels, views, number=0: query(mixture, conditions, texels, views, seed(number))


def saying(eps):
    """A prediction that is known."""
    return lambda query, x_t: (eps, 0)


def test_a_pixel_shows_the_sum_of_its_texels_over_the_root_of_their_number(ask):
    texels, atlas = views_of(3), Atlas()
    kappa, nfe = atlas.noise(ask(texels, 3))
    values, background = atlas.state_dict()["atlas"], atlas.state_dict()["background"]
    for view, row, column in itertools.product(range(3), range(2), range(2)):
        own = values[texels.texel[texels.pixel == 4 * view + 2 * row + column]]
        expected = own.sum(0) / len(own) ** 0.5 if len(own) else background[:, row, column]
        torch.testing.assert_close(kappa[view, :, row, column], expected, rtol=1e-12, atol=1e-12)
    assert nfe == 0 and len(own) == 0


def test_a_written_view_shows_the_prediction_exactly(ask, randn):
    """Texel by texel it is the least change: all texels of a pixel move alike, and the others stay."""
    texels, eps, atlas = views_of(1), randn(1, 2, 2, 2), Atlas()
    asked = ask(texels, 1)
    atlas.noise(asked)
    before = atlas.state_dict()
    atlas.remember(saying(eps))(asked, eps)
    after, (kappa, _) = atlas.state_dict(), atlas.noise(asked)
    torch.testing.assert_close(kappa[..., 0, :], eps[..., 0, :], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kappa[..., 1, 0], eps[..., 1, 0], rtol=1e-12, atol=1e-12)
    assert torch.equal(kappa[0, :, 1, 1], before["background"][:, 1, 1])  # nothing to write on
    moved = after["atlas"] - before["atlas"]
    hidden = torch.ones(COUNT, dtype=torch.bool).index_fill(0, texels.texel, False)
    assert torch.equal(after["atlas"][hidden], before["atlas"][hidden])
    for pixel in range(3):
        own = moved[texels.texel[texels.pixel == pixel]]
        assert len(own) > 3 and own[0].abs().min() > 0
        torch.testing.assert_close(own, own[:1].expand_as(own), rtol=1e-9, atol=1e-12)


def test_another_view_shows_what_it_shares(ask, randn):
    """Its pixel moves by |common texels| / sqrt(n n') of the change, which is the correlation of the two noises."""
    first, eps, atlas = views_of(1), randn(1, 2, 2, 2), Atlas()
    second = dataclasses.replace(views_of(1, generator=seed(9)), count=COUNT)
    old, other = atlas.noise(ask(first, 1))[0], atlas.noise(ask(second, 1))[0]
    atlas.remember(saying(eps))(ask(first, 1), eps)
    change, moved = (eps - old).flatten(2)[0], (atlas.noise(ask(second, 1))[0] - other).flatten(2)[0]
    for q in range(3):
        own = second.texel[second.pixel == q]
        shared = [int(torch.isin(first.texel[first.pixel == p], own).sum()) for p in range(3)]
        sizes = [int((first.pixel == p).sum()) for p in range(3)]
        expected = sum(
            n / (m * len(own)) ** 0.5 * change[:, p] for p, (n, m) in enumerate(zip(shared, sizes, strict=True))
        )
        torch.testing.assert_close(moved[:, q], expected, rtol=1e-9, atol=1e-12)
    assert int(torch.isin(first.texel, second.texel).sum()) > 3


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_a_batch_equals_its_views_one_by_one(ask, randn, eta):
    """Reading is of one state; writing is one view after the other."""
    texels, eps, together, alone = views_of(3), randn(3, 2, 2, 2), Atlas(eta=eta), Atlas(eta=eta)
    asked = dataclasses.replace(ask(texels, 3), generator=[seed(i) for i in range(3)])
    kappa, _ = together.noise(asked)
    ones = [dataclasses.replace(ask(texels.of_view(i, 4), 1), generator=asked.generator[i : i + 1]) for i in range(3)]
    alone.load_state_dict(together.state_dict())
    for view, one in enumerate(ones):
        torch.testing.assert_close(alone.noise(one)[0], kappa[view : view + 1], rtol=1e-12, atol=1e-12)
    states = [g.get_state() for g in asked.generator]
    together.remember(saying(eps))(asked, eps)
    for view, one in enumerate(ones):
        one.generator[0].set_state(states[view])
        alone.remember(saying(eps[view : view + 1]))(one, eps)
    torch.testing.assert_close(together.state_dict(), alone.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("eta", "lasts"), [(0.3, True), (1.0, True), (0.0, False)])
def test_fresh_noise_keeps_unit_variance_over_many_views(ask, eta, lasts):
    """Against predictions that are too large, biased and too smooth; written as they are, those take over."""
    generator, atlas, spreads = seed(4), Atlas(eta=eta), []
    for step in range(400):
        texels = views_of(2, generator=generator)
        asked = ask(texels, 2, step)
        kappa, _ = atlas.noise(asked)
        eps = 1.05 * (0.8 * kappa + 0.2 * kappa.mean((2, 3), keepdim=True)) + 0.1
        atlas.remember(saying(eps))(asked, eps)
        spreads.append(float(atlas.noise(ask(views_of(1, generator=generator), 1))[0][..., 0, :].square().mean()))
    assert (sum(spreads[200:]) / 200 == pytest.approx(1, abs=0.15)) == lasts


def test_refreshing_changes_the_noise_slowly_and_keeps_its_variance(ask):
    texels = Texels(20_000, torch.arange(12), torch.arange(12) % 4)
    atlas, asked = Atlas(refresh=0.1), ask(texels, 1)
    atlas.noise(asked)
    first = atlas.state_dict()["atlas"]
    for _ in range(3):
        atlas.noise(asked)
    last = atlas.state_dict()["atlas"]
    assert float((first * last).mean()) == pytest.approx(0.9**1.5, abs=0.02)
    assert float(last.square().mean()) == pytest.approx(1, abs=0.02)


METHODS = {
    "cfd": lambda: cfd(5.0, noise="surface", refresh=0.2),
    "sdi_cached": lambda: sdi_cached(5.0, noise="surface", eta=0.3),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_continues_from_its_state(mixture, conditions, method):
    def steps(objective, x, some, generator):
        for step in some:
            conditioning = conditions(mixture, ["left", "right"])
            texels = views_of(2, generator=seed(step))
            out = objective.guidance(x, mixture, conditioning, step=step, total=6, generator=generator, texels=texels)
            x = x - out.gradient
        return x

    zero, whole, first, second = torch.zeros(2, 2, 2, 2, dtype=F64), *(METHODS[method]() for _ in range(3))
    expected = steps(whole, zero, range(6), seed())
    generator = seed()
    x = steps(first, zero, range(3), generator)
    second.state.load_state_dict({k: v.clone() for k, v in first.state.state_dict().items()})
    assert torch.equal(steps(second, x, range(3, 6), generator), expected)
    assert not torch.equal(steps(METHODS[method](), x, range(3, 6), generator), expected)


@pytest.mark.parametrize("method", ["cfd", "sdi_cached"])
def test_theorem_one_view_of_a_surface_is_the_ddim_sampler(mixture, conditions, method):
    """Seen from one camera, a surface is an image: with DDIM's steps both forms of its noise end where DDIM does."""
    shown = Texels(COUNT, torch.arange(COUNT), torch.arange(COUNT) % 4)  # all four pixels
    conditioning, x = conditions(mixture, ["odd"]), torch.zeros(1, 2, 2, 2, dtype=F64)
    build = cfd if method == "cfd" else sdi_cached
    objective = build(5.0, noise="surface")
    if method == "cfd":
        objective = dataclasses.replace(objective, step_size=weighting.ddim_step_size)
    outs = []
    for step in range(20):
        outs.append(objective.guidance(x, mixture, conditioning, step=step, total=20, generator=seed(1), texels=shown))
        x = x - outs[-1].gradient
    times = torch.linspace(0.98, 0.02, 20, dtype=F64)
    start = coefficients(mixture.schedule, times[:1], x)[1] * outs[0].noise
    end = ddim.sample(Guided(mixture, conditioning, 5.0), start, mixture.schedule, times)
    torch.testing.assert_close(outs[-1].x_t, end, rtol=1e-10, atol=1e-10)
    assert outs[0].noise.std() > 0.3


def test_wrong_settings_are_explained(mixture, conditions, randn):
    x, conditioning = randn(1, 2, 2, 2), conditions(mixture, ["left"])
    with pytest.raises(ValueError, match="needs the texels of the views; for images set noise='image'"):
        cfd(noise="surface").guidance(x, mixture, conditioning, step=0, total=2, generator=seed())
    for wrong, message in (
        (lambda: CFD(noise="nowhere"), "unknown noise 'nowhere': choose image, constant, camera, surface"),
        (lambda: CFD(refresh=0.1), "are for noise in 3D: set noise='surface' too"),
        (lambda: SDICached(eta=0.1), "are for noise in 3D"),
        (lambda: SDICached(eta=1.1, noise="camera"), r"eta must lie in \[0, 1\]"),
        (lambda: CFD(refresh=-1.0, noise="camera"), r"refresh must lie in \[0, 1\]"),
        (lambda: cfd(first=x, noise="surface"), "first is for images"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
