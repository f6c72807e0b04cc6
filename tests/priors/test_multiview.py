"""A network that sees groups of views together: laws of its attention, its camera, and of every objective on it."""

import dataclasses
import json
import shutil

import pytest
import torch

from distill3d.cameras import orbit
from distill3d.objectives import csd, esd, hifa, ism, mvdream, nfsd, noise, sdi, sds, sds_bridge, sjc
from distill3d.priors import load_prior
from distill3d.priors.options import PriorOptions
from distill3d.priors.stable_diffusion import MultiViewPrior, camera_embedding_input, join_views
from distill3d.priors.student import Student
from distill3d.types import Condition, Conditioning

VIEWS = 4


def mark(folder, **settings):
    """Changes unet/config.json; None takes a setting away."""
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture(scope="module")
def prior(views_folder):
    return load_prior(views_folder)


@pytest.fixture(scope="module")
def exact(views_folder):
    """In float64: guidance scales of 40 and more multiply the rounding of a batch's size."""
    return load_prior(views_folder, dtype="float64")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cameras(groups, elevation=20.0):
    """Poses of quadruples, each turned a little further."""
    azimuth = torch.arange(4).repeat(groups) * 90.0 + torch.arange(groups).repeat_interleave(4) * 31.0
    return orbit(azimuth, elevation, 2.5, 40.0).camera_to_world


def conditioning_of(prior, groups, text="a cat"):
    b = VIEWS * groups
    return Conditioning(prior.embed([text] * b), prior.embed([""] * b)).with_camera(cameras(groups))


def predict(prior, x, t, conditioning):
    return prior.predict(x, t, conditioning.positive)


def test_the_marker_makes_it_a_multi_view_prior(prior, views_folder, tmp_path):
    assert isinstance(prior, MultiViewPrior) and prior.views == VIEWS
    shutil.copytree(views_folder, tmp_path / "two")
    mark(tmp_path / "two", views=2)
    assert load_prior(tmp_path / "two").views == 2


def test_attention_over_a_group_is_attention_over_all_its_tokens(prior):
    """One attention layer against softmax written out, over the tokens of four views."""
    layer = prior.network.mid_block.attentions[0].transformer_blocks[0].attn1
    x = randn(8, 5, layer.to_q.in_features)
    got = layer(x)
    joint = x.view(2, 20, -1)
    q, k, v = (f(joint).view(2, 20, layer.heads, -1).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1)
    wanted = layer.to_out[0]((weights @ v).transpose(1, 2).reshape(2, 20, -1)).view(8, 5, -1)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_groups_of_one_view_are_the_plain_model(kl_folder):
    plain, joined = load_prior(kl_folder), load_prior(kl_folder)
    join_views(joined.network, 1)
    x, t, text = randn(3, 4, 8, 8), torch.tensor([0.9, 0.5, 0.2]), plain.embed(["a cat", "", "a dog"])
    assert torch.equal(joined.predict(x, t, text), plain.predict(x, t, text))


def test_views_that_are_alike_see_nothing_new(prior, views_folder, tmp_path):
    """Attention over four copies of a view is attention over the view: the plain network's answer for that camera."""
    shutil.copytree(views_folder, tmp_path / "one")
    mark(tmp_path / "one", views=1)
    one = load_prior(tmp_path / "one")
    alone = Conditioning(one.embed(["a cat"]), one.embed([""])).with_camera(cameras(1)[:1])
    x, t = randn(1, 4, 8, 8), torch.tensor([0.6])
    four = torch.zeros(4, dtype=torch.long)
    got = predict(prior, x[four], t[four], alone[four])
    torch.testing.assert_close(got, predict(one, x, t, alone)[four], rtol=1e-4, atol=1e-5)


def test_permuted_views_give_permuted_answers(prior):
    x, t, conditioning = randn(4, 4, 8, 8), torch.full((4,), 0.6), conditioning_of(prior, 1)
    order = torch.tensor([2, 0, 3, 1])
    got = predict(prior, x[order], t, conditioning[order])
    torch.testing.assert_close(got, predict(prior, x, t, conditioning)[order], rtol=1e-4, atol=1e-5)


def test_views_see_their_own_group_and_no_other(prior):
    x, t, conditioning = randn(8, 4, 8, 8), torch.tensor([0.7] * 4 + [0.3] * 4), conditioning_of(prior, 2)
    before = predict(prior, x, t, conditioning)
    changed = x.clone()
    changed[5] += 1
    after = predict(prior, changed, t, conditioning)
    moved = (after - before).abs().amax((1, 2, 3))
    assert (moved[:4] == 0).all() and (moved[4:] > 1e-4).all()


def test_the_camera_changes_the_answer(prior):
    x, t, conditioning = randn(4, 4, 8, 8), torch.full((4,), 0.6), conditioning_of(prior, 1)
    other = conditioning.with_camera(cameras(1, elevation=60.0))
    assert (predict(prior, x, t, other) - predict(prior, x, t, conditioning)).abs().max() > 1e-3


def test_the_distance_of_a_camera_does_not_matter():
    near, far = (orbit([30.0, 120.0], 20.0, d, 40.0).camera_to_world for d in (1.5, 4.0))
    torch.testing.assert_close(camera_embedding_input(near), camera_embedding_input(far))
    position = camera_embedding_input(near).view(-1, 4, 4)[:, :3, 3]
    torch.testing.assert_close(position.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(camera_embedding_input(near).view(-1, 4, 4)[:, :3, :3], near[:, :3, :3])


def test_cameras_follow_the_rows_of_a_condition(prior):
    conditioning, poses = conditioning_of(prior, 2), cameras(2)
    assert torch.equal(conditioning.positive.camera, poses)
    rows = torch.tensor([4, 5, 6, 7])
    assert torch.equal(conditioning[rows].negative.camera, poses[rows])
    both = Condition.cat([conditioning.negative, conditioning.positive])
    assert torch.equal(both.camera, poses.repeat(2, 1, 1))


OBJECTIVES = {
    "mvdream": mvdream(),
    "mvdream-shared": mvdream(shared_noise=True),
    "sds": sds(7.5),
    "sjc": sjc(7.5),
    "sdi": sdi(inversion_steps=3),
    "sdi-heun": sdi(inversion_steps=2, eta=0.0, solver="heun"),
    "hifa": hifa(7.5),
    "nfsd": nfsd(),
    "csd": csd(),
    "csd-words": csd(1.0, "ugly", 0.5),
    "bridge": sds_bridge(),
    "ism": ism(steps=2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_groups_equals_its_groups(exact, name):
    objective = dataclasses.replace(OBJECTIVES[name], views=VIEWS)
    x, conditioning = 0.5 * randn(8, 4, 8, 8).double(), conditioning_of(exact, 2)

    def seeds(rows):
        return [torch.Generator().manual_seed(i) for i in rows]

    whole = objective.guidance(x, exact, conditioning, step=3, total=9, generator=seeds(range(8)))
    rows = 0
    for first in (0, 4):
        here = torch.arange(first, first + 4)
        part = objective.guidance(x[here], exact, conditioning[here], step=3, total=9, generator=seeds(here.tolist()))
        rows += part.nfe
        assert part.t.unique().numel() == 1
        for field in ("t", "noise", "x0", "gradient"):
            torch.testing.assert_close(getattr(whole, field)[here], getattr(part, field), rtol=1e-6, atol=1e-8)
    assert whole.nfe == rows and whole.gradient.abs().max() > 0


def test_inversion_of_groups_keeps_each_at_one_time(prior):
    """Overshoot is drawn once a group: every call that the inversion makes has whole groups of one time."""
    seen = []

    class Watch:
        def __getattr__(self, name):
            return getattr(prior, name)

        def predict(self, x_t, t, text):
            seen.append(t)
            return prior.predict(x_t, t, text)

    objective = dataclasses.replace(sdi(inversion_steps=4), views=VIEWS)
    objective.guidance(
        randn(8, 4, 8, 8),
        Watch(),
        conditioning_of(prior, 2),
        step=3,
        total=9,
        generator=torch.Generator().manual_seed(0),
    )
    assert all((t.view(-1, 4) == t.view(-1, 4)[:, :1]).all() for t in seen)
    assert len(seen) >= 4


def test_views_that_are_alike_invert_alike(prior):
    """Only if the end of the inversion, which is drawn and not asked about, is one for the group."""
    objective = dataclasses.replace(sdi(inversion_steps=4, eta=0.0), views=VIEWS)
    same = conditioning_of(prior, 2).with_camera(cameras(1)[:1].repeat(8, 1, 1))
    x = randn(1, 4, 8, 8).repeat(8, 1, 1, 1)
    kappa = objective.guidance(
        x, prior, same, step=3, total=9, generator=torch.Generator().manual_seed(0)
    ).noise.unflatten(0, (2, 4))
    torch.testing.assert_close(kappa, kappa[:, :1].expand_as(kappa), rtol=1e-4, atol=1e-4)
    assert (kappa[0] - kappa[1]).abs().max() > 1e-2


def test_shared_noise_is_that_of_the_first_view(prior):
    def kappa(shared):
        objective = dataclasses.replace(sds(), noise=noise.gaussian(shared), views=VIEWS)
        return objective.guidance(
            randn(8, 4, 8, 8),
            prior,
            conditioning_of(prior, 2),
            step=0,
            total=1,
            generator=[torch.Generator().manual_seed(i) for i in range(8)],
        ).noise

    groups = kappa(True).unflatten(0, (2, 4))
    assert (groups == groups[:, :1]).all() and not torch.equal(groups[0], groups[1])
    own = kappa(False).unflatten(0, (2, 4))
    assert (own[:, 0] != own[:, 1]).any()


def test_mistakes_are_named(prior, views_folder, kl_folder, tmp_path):
    x, t, conditioning = randn(8, 4, 8, 8), torch.full((8,), 0.5), conditioning_of(prior, 2)
    with pytest.raises(ValueError, match=r"is conditioned on cameras, and there are none: .*with_camera"):
        prior.predict(x, t, prior.embed(["a cat"] * 8))
    with pytest.raises(ValueError, match="groups of 4 views at one time t each, got 6 rows"):
        prior.predict(x[:6], t[:6], conditioning.positive[:6])
    with pytest.raises(ValueError, match="groups of 4 views at one time t each"):
        prior.predict(x, torch.linspace(0.1, 0.9, 8), conditioning.positive)
    with pytest.raises(ValueError, match="groups of 4 views, got 6 samples"):
        mvdream().guidance(x[:6], prior, conditioning[torch.arange(6)], step=0, total=1, generator=torch.Generator())
    pushed = dataclasses.replace(conditioning, perp=prior.embed(["a dog"] * 8), perp_weights=torch.full((8, 1), -1.0))
    with pytest.raises(ValueError, match=r"does not support Perp-Neg; pass --set recipe.perp_neg=false$"):
        mvdream().guidance(x, prior, pushed, step=0, total=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="cannot be trained: the prior is conditioned on cameras"):
        esd(Student(prior, torch.Generator()))
    with pytest.raises(ValueError, match="does not support --controlnet"):
        load_prior(views_folder, options=PriorOptions(controlnet="x"))
    for change, match in (
        ({"views": 0}, "must be an integer of at least 1, got 0"),
        ({"views": None}, "needs more conditions than a text .*mark a multi-view model as described in docs/priors.md"),
        (
            {"projection_class_embeddings_input_dim": 12},
            "projection_class_embeddings_input_dim 16, got .projection. and 12",
        ),
    ):
        copy = tmp_path / str(change).replace("'", "")
        shutil.copytree(views_folder, copy)
        mark(copy, **change)
        with pytest.raises(ValueError, match=match) as caught:
            load_prior(copy)
        assert "\n" not in str(caught.value)
    shutil.copytree(kl_folder, tmp_path / "plain")
    mark(tmp_path / "plain", views=4)
    with pytest.raises(
        ValueError, match=r"so class_embed_type must be .projection. and projection_class_embeddings_input_dim 16"
    ):
        load_prior(tmp_path / "plain")
