"""Pictures against texts: the evaluators, R-precision and what is said of quality."""

import json
import shutil

import numpy as np
import pytest
import torch

from distill3d.evaluation.evaluator import Evaluator, ToyboxJudge, load_evaluator
from distill3d.evaluation.language import (
    IQA_PAIRS,
    clip_iqa,
    clip_r_precision,
    clip_score,
    image_reward,
    r_precision,
    ranks,
)
from distill3d.evaluation.metrics import METRICS
from distill3d.toybox.world import View, build, draw


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.fixture(scope="module")
def judge() -> ToyboxJudge:
    return ToyboxJudge()


@pytest.fixture(scope="module")
def cars() -> torch.Tensor:
    pictures = [draw(build("car", "blue", seed=7), View(a, 15)) for a in (0, 90, 200)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


def test_r_precision_is_one_for_perfect_embeddings_and_k_over_m_for_random_ones():
    texts = unit(20, 16)
    right = torch.arange(20)
    assert r_precision(texts, texts, right) == 1
    assert r_precision(-texts, texts, right) == 0
    many = torch.arange(20).repeat(200)
    for k in (1, 5):
        expected, count = k / 20, len(many)
        share = r_precision(unit(count, 16, seed=1), texts, many, k)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    assert r_precision(unit(count, 16, seed=1), texts, many, 20) == 1


def test_ranks_are_those_of_a_sort_and_ties_count_against():
    pictures, texts, right = unit(30, 8), unit(12, 8, seed=1), torch.arange(30) % 12
    order = (pictures @ texts.T).argsort(1, descending=True)
    expected = [order[i].tolist().index(int(right[i])) for i in range(30)]
    assert ranks(pictures, texts, right).tolist() == expected
    assert ranks(pictures, texts[:1].expand(12, -1), right).tolist() == [11] * 30
    with pytest.raises(ValueError, match="at least two texts"):
        r_precision(pictures, texts[:1], right * 0)


def test_true_renders_are_found_among_other_prompts(judge, cars):
    prompts = ["a red mushroom", "a blue car", "a red car", "a blue boat", "a blue car"]
    assert clip_r_precision(cars, "a blue car", prompts, judge) == 1
    assert clip_r_precision(cars, "a red mushroom", prompts, judge) == 0
    assert clip_score(cars, "a blue car", judge) > clip_score(cars, "a red mushroom", judge) + 20
    with pytest.raises(ValueError, match="own text"):
        clip_r_precision(cars, "a green car", prompts, judge)


def test_clip_score_is_100_times_the_cosine(judge, cars):
    cosine = judge.embed_images(cars) @ judge.embed_texts(["a blue car"])[0]
    assert clip_score(cars, "a blue car", judge) == pytest.approx(100 * float(cosine.clamp_min(0).mean()), rel=1e-5)


def test_quality_is_the_odds_of_two_texts(judge, cars):
    pair = ("a blue car", "a red car")
    good, bad = (judge.embed_images(cars) @ judge.embed_texts(pair).T).unbind(1)
    torch.testing.assert_close(clip_iqa(cars, pair, judge), torch.sigmoid(100 * (good - bad)))
    torch.testing.assert_close(clip_iqa(cars, pair, judge) + clip_iqa(cars, pair[::-1], judge), torch.ones(3))
    assert (clip_iqa(cars, pair, judge) > 0.5).all()


def test_the_bundled_judge_does_not_read_the_words_of_quality(judge):
    assert judge.knows_words(["a red mushroom, front view"])
    assert not judge.knows_words([text for pair in IQA_PAIRS.values() for text in pair])


def test_an_evaluator_prepares_pictures_as_its_folder_says(judge, cars, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(judge.folder, folder)
    settings = {"image_mean": [0.25, 0.5, 0.75], "image_std": [0.5, 0.25, 0.5], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    mean, std = (torch.tensor(settings[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    raw = 0.4 + 0.1 * cars  # which the plain preprocessing maps to 2 x - 1
    torch.testing.assert_close(Evaluator(folder).embed_images(raw), judge.embed_images((1 + (raw - mean) / std) / 2))


def test_a_long_turntable_is_its_parts(judge, cars):
    many = cars.repeat(30, 1, 1, 1)
    torch.testing.assert_close(judge.embed_images(many), judge.embed_images(cars).repeat(30, 1), atol=1e-5, rtol=1e-5)


def test_evaluators_by_name(judge, tmp_path):
    assert isinstance(load_evaluator("toybox"), ToyboxJudge)
    assert load_evaluator(judge.folder).folder == judge.folder
    with pytest.raises(ValueError, match=r"not a CLIP folder: it has no config\.json"):
        load_evaluator(tmp_path)
    with pytest.raises(ValueError, match="hf download openai/clip-vit-base-patch32"):
        load_evaluator("nobody/nothing-of-the-kind")


@pytest.mark.skipif(METRICS["image_reward"].installed, reason="ImageReward is installed; its weights are 1.8 GB")
def test_image_reward_says_what_is_missing(cars):
    with pytest.raises(ImportError, match=r"distill3d\[reward\]"):
        image_reward(cars, "a blue car")
