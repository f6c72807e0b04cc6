"""The trainable student of a latent prior, at toy size."""

import builtins
import dataclasses

import pytest
import torch

from distill3d.objectives import esd, timesteps, vsd
from distill3d.priors import load_prior
from distill3d.priors.student import Student
from distill3d.types import Conditioning

pytest.importorskip("peft")


@pytest.fixture
def prior(toy):
    return load_prior(toy[1])


@pytest.fixture
def conditioning(prior):
    plain = Conditioning(prior.embed(["a cube", "a cat"]), prior.embed(["", ""]))
    return plain.with_camera(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(7)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(seed=0):
    return torch.randn(2, 4, 8, 8, generator=generator(seed))


def trained(student):
    return {name: p for name, p in student.unet.named_parameters() if p.requires_grad}


TIMES, EVERY = torch.tensor([0.3, 0.8]), torch.tensor([True, True])


def test_a_new_student_is_the_prior(prior, conditioning):
    student = Student(prior, generator())
    expected = prior.predict(noise(), TIMES, conditioning.positive)
    for with_camera in (EVERY, ~EVERY):
        torch.testing.assert_close(
            student.predict(noise(), TIMES, conditioning, with_camera), expected, rtol=1e-5, atol=1e-5
        )
    objective = dataclasses.replace(vsd(student, 1.0), timesteps=timesteps.listed([[0.3, 0.8]]))
    out = objective.guidance(noise(), prior, conditioning, step=0, total=1, generator=generator())
    assert out.gradient.abs().max() < 1e-4 < out.prediction.abs().max()
    assert out.nfe == 3 * 2  # prior, student, the lesson


def test_the_prior_is_shared_and_untouched(prior, conditioning):
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in prior.network.named_parameters()}
    student = Student(prior, generator())
    for seed in range(3):
        student.learn(noise(seed), conditioning, generator(seed))
    now = dict(prior.network.named_parameters())
    assert now.keys() == before.keys() and prior.network.class_embedding is None
    assert all(now[n].data_ptr() == where and torch.equal(now[n], value) for n, (where, value) in before.items())
    assert not any(p.requires_grad for p in now.values())
    places = {p.data_ptr() for p in student.unet.parameters() if not p.requires_grad}
    assert places == {where for where, _ in before.values()}


def test_learning_lowers_the_loss_on_what_was_shown(prior, conditioning):
    student, batch = Student(prior, generator(), learning_rate=1e-3), (noise(1), TIMES, noise(2), conditioning, EVERY)
    with torch.no_grad():
        before = student.loss(*batch)
    student.optimizer.zero_grad()
    student.loss(*batch).backward()
    student.optimizer.step()
    with torch.no_grad():
        assert student.loss(*batch) < before


def test_learning_reaches_every_new_weight(prior, conditioning):
    student = Student(prior, generator(), camera_dropout=0.0)
    before = {name: p.detach().clone() for name, p in trained(student).items()}
    for seed in range(2):  # behind a zero weight the gradient arrives at the second step
        assert student.learn(noise(seed), conditioning, generator(seed)) == 2
    assert all(not torch.equal(p, before[name]) for name, p in trained(student).items())
    with_it, free = (student.predict(noise(), TIMES, conditioning, with_camera) for with_camera in (EVERY, ~EVERY))
    assert (with_it - free).abs().max() > 1e-7  # the camera has an effect
    plain = Conditioning(*(dataclasses.replace(c, camera=None) for c in (conditioning.positive, conditioning.negative)))
    torch.testing.assert_close(student.predict(noise(), TIMES, plain, EVERY), free)


def test_the_loss_is_in_what_the_network_predicts(prior, conditioning):
    """Of eps, or of v: |v' - v|^2 = |eps' - eps|^2 (alpha + sigma^2 / alpha)^2 at one x_t."""
    student, x, fresh = Student(prior, generator()), noise(1), noise(2)
    alpha, sigma = (f(TIMES)[:, None, None, None] for f in (prior.schedule.alpha, prior.schedule.sigma))
    error = prior.predict(alpha * x + sigma * fresh, TIMES, conditioning.positive) - fresh
    factor = 1 / alpha if prior.kind == "v" else 1.0
    with torch.no_grad():
        found = student.loss(x, TIMES, fresh, conditioning, EVERY)
    torch.testing.assert_close(found, (factor * error).square().mean(), rtol=1e-4, atol=1e-5)


def test_esd_asks_with_and_without_the_camera_in_one_call(prior, conditioning):
    student = Student(prior, generator())
    for seed in range(3):
        student.learn(noise(seed), conditioning, generator(seed))
    with_it, free = (student.predict(noise(), TIMES, conditioning, with_camera) for with_camera in (EVERY, ~EVERY))
    rows, with_camera = torch.arange(2).repeat(2), torch.tensor([True, True, False, False])
    both = student.predict(noise()[rows], TIMES[rows], conditioning[rows], with_camera)
    torch.testing.assert_close(both, torch.cat([with_it, free]), rtol=1e-5, atol=1e-6)
    out = esd(student).guidance(noise(), prior, conditioning, step=0, total=1, generator=generator())
    assert out.nfe == 4 + 4 + 2 and out.gradient.isfinite().all()


def test_checkpoint_round_trip(prior, conditioning):
    student, other = Student(prior, generator(1)), Student(prior, generator(2))
    student.learn(noise(), conditioning, generator())
    other.load_state_dict(student.state_dict())
    for each in (student, other):  # moments included: both continue alike
        each.learn(noise(5), conditioning, generator(5))
    for name, p in trained(student).items():
        torch.testing.assert_close(p, trained(other)[name], rtol=0, atol=0)
    fresh = Student(prior, generator(1))
    other.load_state_dict(fresh.state_dict())  # before any step: no moments yet
    assert all(torch.equal(p, trained(fresh)[name]) for name, p in trained(other).items())


def test_vsd_and_esd_train_their_student_on_x_itself(prior, conditioning):
    """Not on the noised sample: the student learns the distribution of the rendered images."""
    learned = []

    class Watched(Student):
        def learn(self, x, conditioning, generator):
            learned.append(x)
            return super().learn(x, conditioning, generator)

    for method in (vsd, esd):
        objective = method(Watched(prior, generator()))
        objective.guidance(noise(3), prior, conditioning, step=0, total=1, generator=generator())
        assert torch.equal(learned.pop(), noise(3)) and not learned


def test_its_chance_is_its_own(prior):
    state = torch.get_rng_state()
    a, b, c = (trained(Student(prior, generator(seed))) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, b[name]) for name, p in a.items())
    assert any(not torch.equal(p, c[name]) for name, p in a.items())


def test_a_low_precision_prior_has_a_student_in_float32(toy):
    prior = load_prior(toy[1], dtype=torch.bfloat16)
    plain = Conditioning(prior.embed(["a cube", "a cat"]), prior.embed(["", ""]))
    student = Student(prior, generator())
    before = student.predict(noise(), TIMES, plain, EVERY)
    torch.testing.assert_close(before, prior.predict(noise(), TIMES, plain.positive), rtol=0.05, atol=0.05)
    student.learn(noise(), plain, generator())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained(student).values())


def test_conditions_keep_their_cameras(conditioning):
    rows = torch.tensor([1, 0, 1])
    chosen = conditioning[rows]
    assert torch.equal(chosen.positive.camera, conditioning.positive.camera[rows])
    assert len(chosen) == 3 and torch.equal(chosen.positive.hidden, conditioning.positive.hidden[rows])


def test_mistakes_are_named(prior, monkeypatch):
    for options in ({"rank": 0}, {"learning_rate": 0.0}, {"camera_dropout": 2.0}):
        with pytest.raises(ValueError, match="rank must be at least 1, learning_rate above 0"):
            Student(prior, generator(), **options)
    student = Student(prior, generator())
    with pytest.raises(ValueError, match="another rank than 4"):
        student.load_state_dict(Student(prior, generator(), rank=2).state_dict())
    with pytest.raises(ValueError, match="the state does not fit this student"):
        student.load_state_dict({})
    true_import = builtins.__import__

    def without_peft(name, *rest, **options):
        if name == "peft":
            raise ImportError("No module named 'peft'", name="peft")
        return true_import(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ImportError, match="pip install"):
        Student(prior, generator())
