"""View-dependent prompts and Perp-Neg weights."""

import math

import pytest
import torch

from distill3d.prompts import ViewPrompts, direction_of, perp_neg_mix, read_prompts, weighted_parts
from distill3d.types import Condition


def spell(texts):
    """An embedding that can be read back: the codes of the first letters of the last two words."""
    rows = [[float(ord(word[0])) for word in (["#", "#", *text.split()])[-2:]] for text in texts]
    return Condition(torch.tensor(rows)[:, :, None])


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [(0, 0, "front"), (44, 0, "front"), (-44, 10, "front"), (46, 0, "side"), (-90, 30, "side"), (134, 0, "side"),
     (136, 0, "back"), (180, 0, "back"), (-180, 0, "back"), (540, 0, "back"), (361, 0, "front"), (0, 61, "overhead")],
)  # fmt: skip
def test_directions(azimuth, elevation, word):
    assert direction_of(azimuth, elevation) == word


def test_each_view_gets_its_own_text():
    prompts = ViewPrompts("a red mushroom", negative="gray mud")
    conditioning = prompts.conditioning(torch.tensor([0.0, 90.0, 180.0]), torch.tensor([0.0, 0.0, 80.0]), spell)
    assert [chr(int(v)) for v in conditioning.positive.hidden[:, 0, 0]] == ["f", "s", "o"]
    assert [chr(int(v)) for v in conditioning.negative.hidden[:, 1, 0]] == ["m"] * 3
    assert conditioning.perp is None


def test_perp_neg_mixture_is_continuous_at_the_side():
    before, after = perp_neg_mix(90 - 1e-9, 0), perp_neg_mix(90, 0)
    assert before.second == after.first == "side"
    assert before.fraction == pytest.approx(0, abs=1e-6) and after.fraction == pytest.approx(1)
    assert perp_neg_mix(-50, 0) == perp_neg_mix(50, 0) == perp_neg_mix(310, 0)


@pytest.mark.parametrize("azimuth", range(0, 181, 15))
def test_perp_neg_weights_push_away_and_follow_their_formula(azimuth):
    mix = perp_neg_mix(azimuth, 0)
    assert max(mix.weights) < 0
    r = 1 - azimuth / 90 if azimuth < 90 else 2 - azimuth / 90
    a, c = (4, -2.426) if azimuth < 90 else (1, -0.606)
    assert mix.weights[0] == pytest.approx(-abs(a * math.exp(-0.5 * r) + c), rel=1e-6)


def test_perp_neg_conditioning_has_two_directions_a_view():
    conditioning = ViewPrompts("a dog", perp_neg=True).conditioning(torch.tensor([45.0, 180.0]), torch.zeros(2), spell)
    assert len(conditioning) == 2 and conditioning.perp is not None and len(conditioning.perp) == 4
    mixed = 0.5 * (ord("f") + ord("s"))
    assert conditioning.positive.hidden[0, 0, 0] == pytest.approx(mixed)
    assert conditioning[torch.tensor([1])].perp_weights.shape == (1, 2)


def test_perp_neg_mixes_the_pooled_texts_as_it_mixes_the_words():
    def embed(texts):
        words = spell(texts)
        return Condition(words.hidden, 10 * words.hidden[:, 0])

    azimuth = torch.tensor([22.5, 45.0, 135.0])
    mixed = ViewPrompts("a dog", perp_neg=True).conditioning(azimuth, torch.zeros(3), embed).positive
    torch.testing.assert_close(mixed.pooled, 10 * mixed.hidden[:, 0])
    assert mixed.pooled[0] == pytest.approx(10 * (0.75 * ord("f") + 0.25 * ord("s")))


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_prompts_are_refused(text):
    with pytest.raises(ValueError, match="prompt is empty"):
        ViewPrompts(text)


def test_weights_are_read_from_brackets():
    assert weighted_parts("a (red:1.3) hat") == [("a", 1.0), ("red", 1.3), ("hat", 1.0)]
    assert weighted_parts("(two words:0.5)") == [("two words", 0.5)]
    assert weighted_parts("(no:-1), (yes:.5)") == [("no", -1.0), (",", 1.0), ("yes", 0.5)]
    assert weighted_parts("a ((red:1.2) hat:0.5) (b)") == [("a", 1.0), ("red", 0.6), ("hat", 0.5), ("(b)", 1.0)]
    assert weighted_parts("((red:2):0.25)") == [("red", 0.5)] and weighted_parts("(a (b):2)") == [("a (b)", 2.0)]
    with pytest.raises(ValueError, match=r"the weight in \(red:3\) must lie between -10 and 10"):
        weighted_parts("((red:4):3)")
    for plain in ("a hat (red)", "a hat: red", "(a:b)", "", "ratio 1:2", "(16:9)", "(scale 1:10)", "a (b", "b:2)",
                  "a clock (showing 12:30)", "(:2)", ")("):  # fmt: skip
        assert weighted_parts(plain) == [(plain, 1.0)]


def test_a_direction_may_have_a_text_of_its_own():
    prompts = ViewPrompts("a car", negative="blurry", views={"back": "tail lights"})
    assert prompts.text("back") == "tail lights" and prompts.text("side") == "a car, side view"
    assert set(prompts.texts) == {"blurry", "tail lights", *(f"a car, {d} view" for d in ("front", "side", "overhead"))}
    with pytest.raises(ValueError, match="no view is called below: use front, side, back, overhead"):
        ViewPrompts("a car", views={"below": "wheels"})


def test_every_text_of_a_run_is_told_in_advance():
    asked = set()

    def embed(texts):
        asked.update(texts)
        return Condition(torch.zeros(len(texts), 2, 3))

    for perp_neg in (False, True):
        prompts = ViewPrompts("a car", "blurry", perp_neg, {"front": "a face"})
        azimuth = torch.linspace(-180, 180, 24)
        prompts.conditioning(azimuth, torch.full((24,), 10.0), embed)
        prompts.conditioning(azimuth, torch.full((24,), 80.0), embed)
        assert asked == set(prompts.texts)


def test_more_words_follow_the_prompt_and_texts_of_single_views():
    prompts = ViewPrompts("a car", "blurry", True, {"front": "a face"}).extended(", normal map")
    assert prompts.text("side") == "a car, normal map, side view" and prompts.text("front") == "a face, normal map"
    assert prompts.negative == "blurry" and prompts.perp_neg


def test_without_words_of_direction_a_view_has_the_prompt_or_its_own_text():
    prompts = ViewPrompts("a car", views={"back": "an exhaust"}).undirected()
    assert [prompts.text(d) for d in ("front", "side", "back", "overhead")] == ["a car", "a car", "an exhaust", "a car"]
    assert set(prompts.texts) == {"", "a car", "an exhaust"}


def test_prompt_files(tmp_path):
    assert read_prompts("a car") == ["a car"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa car\r\n\n# a remark\n  ein grüner Würfel  \n红色的立方体".encode())
    assert read_prompts(f"@{file}") == ["a car", "ein grüner Würfel", "红色的立方体"]
    for content in (b"", b"\n# only a remark\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="contains no prompt: write one per line"):
            read_prompts(f"@{file}")
    file.write_bytes(b"\xff\xfe\x00")
    for name in (file, tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_prompts(f"@{name}")


def test_times_and_ratios_are_words_and_weights_have_limits():
    for text in ("a clock (showing 12:30)", "a frame (ratio 16:9)", "a hat (of wool)"):
        assert weighted_parts(text) == [(text, 1.0)]
    assert weighted_parts("a (red:1.3) hat (old:-0.5)") == [("a", 1.0), ("red", 1.3), ("hat", 1.0), ("old", -0.5)]
    with pytest.raises(ValueError, match=r"weight in \(red:30\) must lie between -10 and 10"):
        weighted_parts("a (red:30) hat")
