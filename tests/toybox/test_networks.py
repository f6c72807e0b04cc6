"""The prior's parts before training: the tokenizer, the whitening, the resumable loop."""

import subprocess
import sys

import torch
from torch import nn

from distill3d.toybox.captions import vocabulary
from distill3d.toybox.fitting import Fit, train
from distill3d.toybox.networks import TOKENS, byte_pairs, make_autoencoder, make_tokenizer, normalize_latents


def test_each_word_of_the_world_is_one_token_and_others_are_letters(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    words = [w for w in vocabulary() if not any(c.isdigit() for c in w)]
    ids = [tokenizer(w, add_special_tokens=False).input_ids for w in words]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(words)
    assert len(tokenizer("xylophone", add_special_tokens=False).input_ids) > 2
    padded = tokenizer("a red mushroom", padding="max_length").input_ids
    assert len(padded) == TOKENS and padded[0] == tokenizer.bos_token_id and padded[4:] == [tokenizer.eos_token_id] * 16


def test_the_merges_are_the_same_in_every_process():
    script = "from distill3d.toybox.networks import *; print(byte_pairs(vocabulary()))"
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 1000


def test_merges_spell_their_words():
    merges = byte_pairs(["aab", "ab"])
    assert merges == [("a", "b</w>"), ("a", "ab</w>")]


@torch.no_grad()
def test_whitened_latents_have_unit_covariance():
    autoencoder = make_autoencoder()
    images = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = autoencoder.encode(images).latents
    whiten, mean = normalize_latents(autoencoder, before)
    after = autoencoder.encode(images).latents.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(after.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.T @ after / len(after), torch.eye(4), atol=1e-3, rtol=0)
    expected = (before.movedim(1, -1).reshape(-1, 4).double() - mean) @ whiten.T
    torch.testing.assert_close(after.double(), expected, atol=1e-3, rtol=1e-3)


def test_an_interrupted_training_equals_an_uninterrupted_one(tmp_path):
    def loss_of(network):
        def loss(step, generator):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=generator)
            return (network(x) - x.sum(1, keepdim=True)).square().mean()

        return loss

    def fresh():
        network = nn.Linear(3, 1)
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)
        return network

    fit, stop = Fit(20, 0.1, warmup=2, save_every=5), -1
    (tmp_path / "a").mkdir()
    whole = train("net", whole := fresh(), fit, loss_of(whole), tmp_path / "a")
    (tmp_path / "b").mkdir()
    network, stop = fresh(), 12
    try:
        train("net", network, fit, loss_of(network), tmp_path / "b")
    except KeyboardInterrupt:
        stop = -1
    network = fresh()
    train("net", network, fit, loss_of(network), tmp_path / "b")
    torch.testing.assert_close(network.weight, whole.weight, rtol=0, atol=0)
