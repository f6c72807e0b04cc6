"""The same numbers as torchmetrics, on features and on a random CLIP model prepared as OpenAI's are."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from distill3d.evaluation.distances import frechet_distance, kernel_distance
from distill3d.evaluation.evaluator import Evaluator, ToyboxJudge
from distill3d.evaluation.language import IQA_PAIRS, clip_iqa, clip_score

fid = pytest.importorskip("torchmetrics.image.fid")
kid = pytest.importorskip("torchmetrics.image.kid")
score = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
iqa = pytest.importorskip("torchmetrics.functional.multimodal.clip_iqa")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance():
    a, b = normal(60, 4), normal(50, 4, seed=2) * 1.5 + 0.3
    expected = fid._compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"gamma": 1.0, "degree": 2, "coef": 0.5}])
def test_kernel_distance(arguments):
    a, b = normal(20, 5), normal(20, 5, seed=1) + 0.4
    expected = float(kid.poly_mmd(a, b, **arguments))
    assert kernel_distance(a, b, **arguments) == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def openai(tmp_path_factory) -> Path:
    """The judge's weights in a folder that asks for OpenAI's preprocessing at its own 64 pixels."""
    folder = tmp_path_factory.mktemp("openai") / "clip"
    shutil.copytree(ToyboxJudge().folder, folder)
    settings = {
        "crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}, "resample": 3,
        "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def parts(openai):
    """(model, processor) as transformers 4 had them, which torchmetrics 1.9 expects: features are bare tensors.

    The processor is put together of the classes that do not ask for torchvision.
    """
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    class Older(CLIPModel):
        def get_image_features(self, *inputs):
            return self.visual_projection(self.vision_model(*inputs).pooler_output)

        def get_text_features(self, *inputs):
            return self.text_projection(self.text_model(*inputs).pooler_output)

    model = Older.from_pretrained(openai, dtype=torch.float32)
    return model, CLIPProcessor(CLIPImageProcessorPil.from_pretrained(openai), CLIPTokenizer.from_pretrained(openai))


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """uint8 [4, 3, 64, 64]: smooth pictures, which any way of rounding leaves alike."""
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1) * 255).round().byte()


def test_clip_score(openai, parts, photos):
    texts = ["a red car", "a blue duck", "a green hat", "a white boat"]
    ours = [clip_score(p[None] / 255, text, Evaluator(openai)) for p, text in zip(photos, texts, strict=True)]
    theirs, _ = score._clip_score_update(list(photos), texts, *parts)
    assert ours == pytest.approx(theirs.clamp_min(0).tolist(), abs=2e-3)


@pytest.mark.parametrize("name", IQA_PAIRS)
def test_clip_iqa(openai, parts, photos, name):
    assert iqa._PROMPTS[name] == IQA_PAIRS[name]
    model, processor = parts
    prompts, _ = iqa._clip_iqa_format_prompts((name,))
    tokens = processor(text=prompts, return_tensors="pt", padding=True)
    anchors = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
    # The processor divides by 255, so nothing else must: with data_range=255 torchmetrics would do it twice.
    features = iqa._clip_iqa_update("openai", photos.float(), model, processor, 1.0, "cpu")
    expected = iqa._clip_iqa_compute(features, anchors / anchors.norm(dim=-1, keepdim=True), [name])
    torch.testing.assert_close(clip_iqa(photos / 255, IQA_PAIRS[name], Evaluator(openai)), expected, atol=1e-4, rtol=0)
