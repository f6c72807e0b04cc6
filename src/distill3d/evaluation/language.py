"""How well images [N, 3, H, W] in [0, 1] match texts, and quality scores from pairs of opposite texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill3d.evaluation.evaluator import Evaluator

if TYPE_CHECKING:
    from PIL.Image import Image

# The (good, bad) texts behind the paper's Table 1, in torchmetrics' wording.
IQA_PAIRS: dict[str, tuple[str, str]] = {
    "quality": ("Good photo.", "Bad photo."),
    "sharpness": ("Sharp photo.", "Blurry photo."),
    "real": ("Real photo.", "Abstract photo."),
}
TEMPERATURE = 100.0  # of CLIP-IQA: the logit scale at which OpenAI's CLIP models end their training


def clip_score(images: Float[Tensor, "n 3 h w"], text: str, evaluator: Evaluator) -> float:
    """Mean of 100 max(0, cosine) over the images of one text (Hessel et al. 2021), in [0, 100]; higher is better.

    torchmetrics clamps the mean at 0, this clamps each image. Scores of different CLIP models are not comparable.
    """
    return float(evaluator.score(images, [text] * len(images)).mean())


def ranks(images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], correct: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many other texts match each image at least as well as its own text.

    Ties count against it, so an evaluator that embeds all texts alike gets nothing right.

    Args:
        images: unit embeddings of the images.
        texts: unit embeddings of the texts.
        correct: index of each image's own text.
    """
    similarity = images @ texts.T
    own = similarity.gather(1, correct[:, None])
    return (similarity >= own).sum(1) - 1


def r_precision(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], correct: Int[Tensor, " n"], k: int = 1
) -> float:
    """Fraction of images whose own text is among the k best matches (Park et al. 2021; DreamFusion, section 5.1).

    Chance level is k / m, so compare only over the same list of texts. For the arguments see `ranks`.

    Raises:
        ValueError: for fewer than two texts, as it would be 1 for any image.
    """
    if len(texts) < 2:
        raise ValueError(f"R-precision needs at least two texts to choose from, got {len(texts)}")
    return float((ranks(images, texts, correct) < k).float().mean())


def clip_r_precision(
    images: Float[Tensor, "n 3 h w"], text: str, prompts: Sequence[str], evaluator: Evaluator
) -> float:
    """`r_precision` of the images of one text among several prompts; repeated prompts count once.

    Raises:
        ValueError: if the text is not among the prompts, or is the only one.
    """
    pool = list(dict.fromkeys(prompts))
    if text not in pool:
        raise ValueError(f"the prompts of an R-precision must contain the image's own text, {text[:80]!r}")
    correct = torch.full((len(images),), pool.index(text))
    return r_precision(evaluator.embed_images(images), evaluator.embed_texts(pool), correct)


def clip_iqa(images: Float[Tensor, "n 3 h w"], pair: tuple[str, str], evaluator: Evaluator) -> Float[Tensor, " n"]:
    """Probability that the first of two texts matches better: softmax over 100 cosines (Wang et al. 2023).

    Equals torchmetrics' CLIPImageQualityAssessment with an OpenAI model, except that torchmetrics (1.9) darkens
    images in [0, 1] by dividing them by 255 again. Its default model "clip_iqa" also drops the positional embedding,
    which is not done here. Only for evaluators that know these words, see `knows_iqa`.
    """
    return (TEMPERATURE * evaluator.embed_images(images) @ evaluator.embed_texts(pair).T).softmax(-1)[:, 0]


def mean_clip_iqa(images: Float[Tensor, "n 3 h w"], evaluator: Evaluator, name: str) -> float:
    """Mean of `clip_iqa` over images for a pair of `IQA_PAIRS`."""
    return float(clip_iqa(images, IQA_PAIRS[name], evaluator).mean())


def knows_iqa(evaluator: Evaluator) -> bool:
    """Whether an evaluator knows the words of `IQA_PAIRS`; the bundled judge does not."""
    return evaluator.knows_words([text for pair in IQA_PAIRS.values() for text in pair])


def image_reward(images: Float[Tensor, "n 3 h w"], text: str) -> float:
    """Mean ImageReward of the images of one text (Xu et al. 2023); higher is better.

    Scores are roughly standard normal over the images that the model was trained on. The package loads its own
    weights (1.8 GB) from its cache or the hub.

    Raises:
        ImportError: if the package image-reward is missing.
    """
    from PIL.Image import fromarray

    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    model = _reward_model()
    with torch.no_grad():
        return sum(float(model.score(text, fromarray(image))) for image in pixels) / len(pixels)


class _RewardModel(Protocol):
    """ImageReward's model, as far as it is used here."""

    def score(self, prompt: str, image: Image) -> float: ...


@cache
def _reward_model() -> _RewardModel:
    try:
        package = import_module("ImageReward")
    except ImportError as error:
        raise ImportError('ImageReward is not installed; type  pip install "distill3d[reward]"') from error
    return package.load("ImageReward-v1.0")
