"""What reaches the network of a text: long ones, weights, words of its own, and embeddings kept on disk."""

import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

from distill3d.priors import load_prior
from distill3d.priors.components.folder import ModelFolder
from distill3d.priors.components.text_cache import cache_folder
from distill3d.priors.components.text_encoders import expand_words
from distill3d.priors.options import PriorOptions
from distill3d.types import Condition, Conditioning

LONG = "a very long text that nobody would type, with a red cube at its end"


@pytest.fixture
def prior(kl_folder):
    return load_prior(kl_folder)


def noise(n, size=8):
    return torch.randn(n, 4, size, size, generator=torch.Generator().manual_seed(0))


def test_long_texts_are_read_to_their_end(prior):
    """The toy encoder reads 24 tokens; a text of more is as many windows, and every word counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = prior.embed([LONG])
    assert text.hidden.shape == (1, 3 * 24, 16)
    other = prior.embed([LONG.replace("cube", "ball")])
    torch.testing.assert_close(text.hidden[:, :24], other.hidden[:, :24])
    assert (text.hidden[:, 48:] - other.hidden[:, 48:]).abs().max() > 0.1
    x, t = noise(1), torch.tensor([0.5])
    assert (prior.predict(x, t, text) - prior.predict(x, t, other)).abs().max() > 1e-4


def test_texts_of_unlike_length_share_a_batch_and_change_nothing(prior):
    """A short text beside a long one is repeated: attention over copies is attention over one."""
    x, t = noise(2), torch.tensor([0.5, 0.5])
    mixed = prior.embed([LONG, ""])
    assert mixed.hidden.shape[1] == 72
    alone = torch.cat([prior.predict(x[i : i + 1], t[:1], prior.embed([text])) for i, text in enumerate([LONG, ""])])
    torch.testing.assert_close(prior.predict(x, t, mixed), alone, rtol=1e-4, atol=1e-5)
    both = Condition.cat([prior.embed([LONG]), prior.embed([""])])
    torch.testing.assert_close(both.hidden, mixed.hidden)


@pytest.mark.parametrize("name", ["sdxl", "if", "sd3", "flux-dev"])
def test_other_families_read_long_texts_or_warn_what_they_leave_out(toys, name):
    toy = toys(name)
    prior = load_prior(toy.folder, options=PriorOptions(image_size=toy.size))
    text, end = "a cat, " * 20, "a red cube"
    if name == "if":
        text *= 5
    if name in ("if", "sd3"):
        with pytest.warns(UserWarning, match=r"reads \d+ of \d+ tokens of"):
            first, second = prior.embed([text]), prior.embed([text + end])
    else:
        first, second = prior.embed([text]), prior.embed([text + end])
    length = min(first.hidden.shape[1], second.hidden.shape[1])
    differs = (first.hidden[:, :length] - second.hidden[:, :length]).abs().max() > 1e-3
    assert differs == (name != "if")  # of 500 tokens IF reads 77


def test_weights_are_linear_between_the_empty_text_and_the_text(prior):
    """(words:w) moves the vectors of these words, and theirs alone, to e + w (h - e)."""
    plain, empty = prior.embed(["a red cube"]).hidden, prior.embed([""]).hidden
    for w in (0.0, 0.5, 1.7, -1.0):
        got = prior.embed([f"a (red:{w}) cube"]).hidden
        red = slice(2, 5)  # begin, a, r, e, d, c, u, b, e, end
        torch.testing.assert_close(got[:, red], empty[:, red] + w * (plain[:, red] - empty[:, red]))
        torch.testing.assert_close(got[:, :2], plain[:, :2])
        torch.testing.assert_close(got[:, 5:], plain[:, 5:])
    torch.testing.assert_close(prior.embed(["a (red:1) cube"]).hidden, plain)
    assert not torch.equal(prior.embed(["a (red) cube"]).hidden, plain)  # brackets alone are words


def test_weights_reach_t5(toys):
    prior = load_prior(toys("if").folder)
    plain, half, none = (prior.embed([text]).hidden for text in ("a red cube", "a (red:0.5) cube", "a (red:0) cube"))
    torch.testing.assert_close(half, (plain + none) / 2, rtol=1e-4, atol=1e-4)
    moved = (plain - none).abs().amax((0, 2)) > 1e-4
    assert moved.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("text", ["ein grüner Würfel", "红色的立方体", "🚗 a car", "a\ncar\t", "café" * 20])
def test_unicode_is_text_like_any_other(prior, text):
    hidden = prior.embed([text]).hidden
    assert hidden.isfinite().all() and hidden.shape[1] % 24 == 0


def token_file(path, *vectors, key="emb_params"):
    save_file({key: torch.stack(vectors)}, path)
    return path


def test_a_word_of_textual_inversion_stands_for_its_vectors(kl_folder, tmp_path):
    """A token with the vectors of c, a, t gives the same features as these letters."""
    plain = load_prior(kl_folder)
    encoder, tokenizer = (
        plain.text_cache.encoders().modules["text_encoder"],
        ModelFolder(kl_folder).tokenizer("tokenizer"),
    )
    rows = encoder.get_input_embeddings().weight[tokenizer("cat").input_ids[1:-1]]
    file = token_file(tmp_path / "pet.safetensors", *rows)
    wanted = plain.embed(["a cat"]).hidden
    for option, word in ((str(file), "<pet>"), (f"{file}:<mine>", "<mine>")):
        prior = load_prior(kl_folder, options=PriorOptions(token=(option,)))
        torch.testing.assert_close(prior.embed([f"a {word}"]).hidden, wanted)
        torch.testing.assert_close(prior.embed(["a cube"]).hidden, plain.embed(["a cube"]).hidden)


def test_a_token_is_a_whole_word(kl_folder, tmp_path):
    """The name "cat" must not be found in "category", neither by us nor by the tokenizer; "<cat>" is found anywhere."""
    assert expand_words("a cat, a category, Cat", {"cat": "cat cat_1"}) == "a cat cat_1, a category, Cat"
    assert expand_words("<cat>s and cat_1", {"<cat>": "X", "cat": "Y", "cat_1": "Z"}) == "Xs and Z"
    assert expand_words("a dog", {"dog": "cat cat_1", "cat": "Y"}) == "a cat cat_1"  # nothing is replaced twice
    plain = load_prior(kl_folder)
    for vectors in ([torch.ones(16)], [torch.ones(16), torch.zeros(16)]):
        file = token_file(tmp_path / f"{len(vectors)}.safetensors", *vectors)
        prior = load_prior(kl_folder, options=PriorOptions(token=(f"{file}:cat",)))
        for text in ("a category", "a scat", "concat", "cats"):
            torch.testing.assert_close(prior.embed([text]).hidden, plain.embed([text]).hidden)
        for text in ("a cat", "cat, red", "cat"):
            assert not torch.equal(prior.embed([text]).hidden, plain.embed([text]).hidden)


def test_textual_inversion_for_two_encoders(toys, tmp_path):
    file, folder = tmp_path / "pet.safetensors", toys("sdxl").folder
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 16)}, file)
    prior = load_prior(folder, options=PriorOptions(token=(str(file),)))
    assert not torch.equal(prior.embed(["<pet>"]).hidden, load_prior(folder).embed(["<pet>"]).hidden)


def test_mistaken_tokens_are_named(kl_folder, toys, tmp_path):
    def fails(folder, option, match):
        with pytest.raises(ValueError, match=match) as caught:
            load_prior(folder, options=PriorOptions(token=(str(option),))).embed(["a <pet>"])
        assert "\n" not in str(caught.value)

    fails(kl_folder, tmp_path / "none.safetensors", "there is no file")
    (tmp_path / "pet.pt").touch()
    fails(kl_folder, tmp_path / "pet.pt", r"is not a \.safetensors file; other formats can run code")
    wide = token_file(tmp_path / "pet.safetensors", torch.zeros(7))
    fails(kl_folder, wide, r"vectors \[1, 7\], the text encoder needs \[V, 16\]")
    fails(toys("sdxl").folder, wide, "contains emb_params: this model needs clip_l and clip_g")
    fails(toys("if").folder, wide, "does not support --vae, --controlnet and --token")
    (tmp_path / "pet.safetensors").write_bytes(b"")
    fails(kl_folder, wide, "is damaged")


def test_embeddings_on_disk_spare_the_encoders(kl_folder):
    first = load_prior(kl_folder)
    wanted = first.embed(["a kept text", "another"])
    first.text_cache.free_encoders()
    assert not {"text_encoder"} & first.modules().keys()
    again = load_prior(kl_folder)
    torch.testing.assert_close(again.embed(["another", "a kept text"]).hidden, wanted.hidden.flip(0), rtol=0, atol=0)
    assert "text_encoder" not in again.modules()  # nothing had to be loaded
    again.embed(["a new text"])
    assert "text_encoder" in again.modules()


def test_another_model_precision_or_word_finds_nothing_of_this_ones(kl_folder, toys, tmp_path):
    token = token_file(tmp_path / "pet.safetensors", torch.ones(16))
    variants = [
        {"name": kl_folder},
        {"name": kl_folder, "dtype": torch.bfloat16},
        {"name": kl_folder, "options": PriorOptions(token=(str(token),))},
        {"name": toys("zero-snr").folder},
    ]
    priors = [load_prior(**variant) for variant in variants]
    assert len({prior.text_cache.disk.path("a text") for prior in priors}) == len(priors)
    assert priors[0].text_cache.disk.path("a text") == load_prior(kl_folder).text_cache.disk.path("a text")
    assert priors[0].text_cache.disk.path("a text") != priors[0].text_cache.disk.path("a text ")
    assert load_prior("toybox").text_cache.disk is None  # smaller than what it would spare


def test_a_damaged_or_unwritable_cache_is_only_slower(kl_folder, monkeypatch, tmp_path):
    wanted = load_prior(kl_folder).embed(["some text"]).hidden
    disk = load_prior(kl_folder).text_cache.disk
    disk.path("some text").write_bytes(b"torn")
    torch.testing.assert_close(load_prior(kl_folder).embed(["some text"]).hidden, wanted)
    assert disk.read("some text") is not None  # written again
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTILL3D_CACHE", str(tmp_path / "file"))
    torch.testing.assert_close(load_prior(kl_folder).embed(["some text"]).hidden, wanted)


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.delenv("DISTILL3D_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join("somewhere", "else"))  # noqa: PTH118 (as a user sets it)
    assert cache_folder().parts == ("somewhere", "else", "distill3d", "embeddings")


def test_prepare_knows_every_text_and_frees_the_encoders(kl_folder):
    prior = load_prior(kl_folder)
    prior.prepare(["a brand new text", "and another"])
    assert "text_encoder" not in prior.modules()
    conditioning = Conditioning(prior.embed(["a brand new text"]), prior.embed(["and another"]))
    assert len(conditioning) == 1 and "text_encoder" not in prior.modules()
