"""A contrastive model as a judge: which words fit a picture best, and how well a text fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VIT_B_32 = "openai/clip-vit-base-patch32"  # what the literature's CLIP scores are made with
BATCH = 64  # pictures at once: bounds the memory of a long turntable


class Evaluator:
    """A transformers CLIP folder; pictures go in as [N, 3, H, W] in [0, 1], of any size.

    They are resized and normalized as the folder's preprocessor_config.json says; without one, bilinearly and to
    [-1, 1], which is what the bundled evaluators were trained on.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        """Raises ValueError where the folder holds no CLIP model."""
        from transformers import CLIPModel, CLIPTokenizer

        self.folder, self.device = Path(folder), torch.device(device)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{folder} is no CLIP folder: it has no config.json (of transformers' CLIPModel)")
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except OSError as error:
            raise ValueError(f"{folder} is no CLIP folder: {str(error).splitlines()[0]}") from error
        self.model.requires_grad_(False).to(self.device)
        self.size = self.model.config.vision_config.image_size
        self._mean, self._std, self._mode = _preprocessing(self.folder / "preprocessor_config.json")
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Unit embeddings [N, D] of square pictures, on the CPU."""
        return torch.cat([self._embed(part) for part in images.split(BATCH)])

    def _embed(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode=self._mode, antialias=True, align_corners=False)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self._mean, self._std))
        out = self.model.vision_model(pixel_values=(images.clamp(0, 1) - mean) / std).pooler_output
        return F.normalize(self.model.visual_projection(out), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [N, D] of texts; each is computed once."""
        new = [t for t in dict.fromkeys(texts) if t not in self._texts]
        if new:
            tokens = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            out = self.model.text_model(input_ids=tokens.to(self.device)).pooler_output
            out = F.normalize(self.model.text_projection(out), dim=-1).cpu()
            self._texts.update(zip(new, out, strict=True))
        return torch.stack([self._texts[t] for t in texts])

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIP score [N]: 100 max(0, cosine) of picture i and text i (Hessel et al. 2021)."""
        return 100 * (self.pictures(images) * self.texts(texts)).sum(-1).clamp_min(0)

    def choose(self, images: Tensor, options: Sequence[str]) -> Tensor:
        """Index [N] of the option that fits each picture best."""
        return (self.pictures(images) @ self.texts(options).T).argmax(-1)

    def reads(self, texts: Sequence[str]) -> bool:
        """Whether every word is in the vocabulary as a whole: a word in pieces was never trained on as such."""
        words = {word.strip(".,!?") for text in texts for word in text.split()}
        return all(len(self.tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words if word)


def _preprocessing(path: Path) -> tuple[list[float], list[float], str]:
    """Mean, standard deviation and way of resizing that a CLIP folder asks for."""
    if not path.is_file():
        return [0.5] * 3, [0.5] * 3, "bilinear"
    told = json.loads(path.read_text())
    mode = {2: "bilinear", 3: "bicubic"}.get(told.get("resample", 3), "bicubic")
    return told["image_mean"], told["image_std"], mode


@dataclass(frozen=True)
class Verdict:
    """What the toy world's judge says of pictures [N]: which are right."""

    kind: Tensor  # bool [N]
    color: Tensor
    view: Tensor

    @property
    def both(self) -> Tensor:
        """Kind and color right."""
        return self.kind & self.color


class ToyboxJudge(Evaluator):
    """The evaluator that was trained apart from the bundled prior, on pictures of its own."""

    def __init__(self, folder: str | Path | None = None, device: torch.device | str = "cpu"):
        bundled = Path(str(resources.files("distill3d"))) / "assets" / "toybox" / "evaluator_judge"
        super().__init__(bundled if folder is None else folder, device)

    def verdict(self, images: Tensor, kind: str, color: str, view: str | Sequence[str] = "front") -> Verdict:
        """Asks which of all kinds and colors a picture shows ("a red mushroom" against all others), and which view.

        `view` is one word or one for each picture; it is judged knowing kind and color.
        """
        from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, Claim, sentence

        pairs = [(k, c) for k in range(len(KIND_NAMES)) for c in range(len(COLOR_NAMES))]
        chosen = self.choose(images, [sentence(Claim(k, c)) for k, c in pairs]).tolist()
        k, c = KIND_NAMES.index(kind), COLOR_NAMES.index(color)
        seen = self.choose(images, [sentence(Claim(k, c, view=v)) for v in range(len(VIEW_WORDS))])
        wanted = [view] * len(images) if isinstance(view, str) else list(view)
        return Verdict(
            kind=torch.tensor([pairs[i][0] == k for i in chosen]),
            color=torch.tensor([pairs[i][1] == c for i in chosen]),
            view=seen == torch.tensor([VIEW_WORDS.index(v) for v in wanted]),
        )


def load_evaluator(name: str | Path = VIT_B_32, device: torch.device | str = "cpu") -> Evaluator:
    """The evaluator that a name means: "toybox" the bundled judge, a CLIP folder, or a hub id in the local cache.

    Asks no network. Raises ValueError where there is no such folder, or the cache does not hold the model.
    """
    from distill3d.priors.components.hub import cached, is_path

    if str(name) == "toybox":
        return ToyboxJudge(device=device)
    if is_path(str(name)):
        return Evaluator(Path(name).expanduser(), device)
    folder = cached(str(name))
    if folder is None:
        raise ValueError(
            f"no evaluator {str(name)[:80]!r} here: give a CLIP folder, or fetch the model once with "
            f'`hf download {VIT_B_32}`; for the toy world it is "toybox"'
        )
    return Evaluator(folder, device)
