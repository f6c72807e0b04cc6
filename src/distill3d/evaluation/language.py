"""How well pictures [N, 3, H, W] in [0, 1] fit texts, and what words describe their quality."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distill3d.evaluation.evaluator import Evaluator

# What the paper's Table 1 asks, in torchmetrics' words: the good one, the bad one.
IQA_PAIRS: dict[str, tuple[str, str]] = {
    "quality": ("Good photo.", "Bad photo."),
    "sharpness": ("Sharp photo.", "Blurry photo."),
    "real": ("Real photo.", "Abstract photo."),
}
TEMPERATURE = 100.0  # of CLIP-IQA: the scale that OpenAI's CLIP models were trained up to


def clip_score(images: Tensor, text: str, evaluator: Evaluator) -> float:
    """Mean of 100 max(0, cosine) over the pictures of one text (Hessel et al. 2021), in [0, 100]; higher is better.

    torchmetrics clips the mean at 0, here each picture is. Scores of different CLIP models do not compare.
    """
    return float(evaluator.score(images, [text] * len(images)).mean())


def ranks(pictures: Tensor, texts: Tensor, right: Tensor) -> Tensor:
    """How many texts fit each picture at least as well as its own does, its own not counted, [N] int64.

    A tie counts against it, so an evaluator that gives all texts one embedding is right in nothing.

    Args:
        pictures: unit embeddings [N, D]; texts: unit embeddings [M, D]; right: [N], the text of each picture.
    """
    similar = pictures @ texts.T
    own = similar.gather(1, right[:, None])
    return (similar >= own).sum(1) - 1


def r_precision(pictures: Tensor, texts: Tensor, right: Tensor, k: int = 1) -> float:
    """Share of the pictures whose own text is among the k that fit best (Park et al. 2021; DreamFusion, 5.1).

    Chance is k / M for M texts, so it only compares over one list of prompts. See `ranks` for the arguments.

    Raises:
        ValueError: for fewer than two texts, where it would be 1 whatever is seen.
    """
    if len(texts) < 2:
        raise ValueError(f"R-precision needs at least two texts to choose from, got {len(texts)}")
    return float((ranks(pictures, texts, right) < k).float().mean())


def clip_r_precision(images: Tensor, text: str, prompts: Sequence[str], evaluator: Evaluator) -> float:
    """`r_precision` of the pictures of one text, which is one of several prompts; repeated prompts count once.

    Raises:
        ValueError: where the text is not among the prompts, or is the only one.
    """
    pool = list(dict.fromkeys(prompts))
    if text not in pool:
        raise ValueError(f"R-precision needs the prompts that {text[:80]!r} is chosen from, itself among them")
    right = torch.full((len(images),), pool.index(text))
    return r_precision(evaluator.pictures(images), evaluator.texts(pool), right)


def clip_iqa(images: Tensor, pair: tuple[str, str], evaluator: Evaluator) -> Tensor:
    """Probability [N] that the first of two texts fits better: softmax of 100 cosines (Wang et al. 2023).

    As torchmetrics' CLIPImageQualityAssessment with an OpenAI model, except that it (1.9) darkens pictures in [0, 1]
    by dividing them by 255 once more; its default model "clip_iqa" leaves out the positional embedding as well, which
    is not done here. Only for evaluators that read English (`Evaluator.reads`).
    """
    return (TEMPERATURE * evaluator.pictures(images) @ evaluator.texts(pair).T).softmax(-1)[:, 0]


def image_reward(images: Tensor, text: str) -> float:
    """Mean ImageReward of the pictures of one text (Xu et al. 2023), about normal for the pictures it was trained on.

    The package loads its own weights (1.8 GB) from its cache or the hub.

    Raises:
        ImportError: where the package image-reward is missing.
    """
    from PIL import Image

    bytes_ = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    model = _reward_model()
    with torch.no_grad():
        return sum(float(model.score(text, Image.fromarray(picture))) for picture in bytes_) / len(bytes_)


def has_image_reward() -> bool:
    """Whether the package image-reward is installed; imports nothing."""
    from importlib.util import find_spec

    return find_spec("ImageReward") is not None


@cache
def _reward_model() -> Any:
    try:
        import ImageReward  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("ImageReward is not installed: pip install image-reward") from error
    return ImageReward.load("ImageReward-v1.0")
