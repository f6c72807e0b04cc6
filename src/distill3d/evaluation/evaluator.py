"""CLIP models as evaluators: embeddings of images and texts, the CLIP score, and which text fits an image best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill3d.priors.components.folder import check_finite, check_settings, first_line, is_out_of_memory, quiet

VIT_B_32 = "openai/clip-vit-base-patch32"  # the model behind most published CLIP scores
BATCH = 64  # images per forward pass: bounds the memory of a long turntable
BUNDLED_JUDGE = Path(__file__).parents[1] / "assets" / "toybox" / "evaluator_judge"


class Evaluator:
    """A CLIP model in transformers' format that embeds images [N, 3, H, W] in [0, 1] of any size, and texts.

    Images are resized and normalized as the folder's preprocessor_config.json says. Without that file they are
    resized bilinearly and scaled to [-1, 1], which is how the bundled evaluators were trained.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        """Loads the model.

        Raises:
            ValueError: if the folder holds no CLIP model.
        """
        from transformers import CLIPModel, CLIPTokenizer

        self.folder, self.device = Path(folder), torch.device(device)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a CLIP folder: it has no config.json (of transformers' CLIPModel)")
        check_settings(self.folder)
        try:
            with quiet():
                model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
                self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises all kinds for damaged files
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{folder} is not a CLIP folder: {first_line(error)}") from error
        self.model = model.eval().requires_grad_(False)
        check_finite(model.named_parameters(), self.folder)
        torch.nn.Module.to(self.model, self.device)  # transformers' own `to` hides its arguments from type checkers
        self.size: int = model.config.to_dict()["vision_config"]["image_size"]
        self._mean, self._std, self._mode = _preprocessing(self.folder / "preprocessor_config.json")
        self._text_cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed_images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Unit embeddings of square images, on the CPU."""
        return torch.cat([self._embed(batch) for batch in images.split(BATCH)])

    def _embed(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode=self._mode, antialias=True, align_corners=False)
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self._mean, self._std))
        out = self.model.vision_model(pixel_values=(images.clamp(0, 1) - mean) / std).pooler_output
        return F.normalize(self.model.visual_projection(out), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit embeddings of texts, on the CPU; each text is computed once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._text_cache]
        if new:
            tokens = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            out = self.model.text_model(input_ids=tokens.to(self.device)).pooler_output
            out = F.normalize(self.model.text_projection(out), dim=-1).cpu()
            self._text_cache.update(zip(new, out, strict=True))
        return torch.stack([self._text_cache[text] for text in texts])

    def score(self, images: Float[Tensor, "n 3 h w"], texts: Sequence[str]) -> Float[Tensor, " n"]:
        """CLIP score of each image and its text: 100 max(0, cosine) (Hessel et al. 2021)."""
        return 100 * (self.embed_images(images) * self.embed_texts(texts)).sum(-1).clamp_min(0)

    def classify(self, images: Float[Tensor, "n 3 h w"], options: Sequence[str]) -> Int[Tensor, " n"]:
        """Index of the text that fits each image best."""
        return (self.embed_images(images) @ self.embed_texts(options).T).argmax(-1)

    def knows_words(self, texts: Sequence[str]) -> bool:
        """Whether every word of the texts is a single token; the bundled models saw no other words in training."""
        words = {word.strip(".,!?") for text in texts for word in text.split()}
        return all(len(self.tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words if word)


def _preprocessing(path: Path) -> tuple[list[float], list[float], str]:
    """Mean, standard deviation and interpolation mode that a CLIP folder asks for."""
    if not path.is_file():
        return [0.5] * 3, [0.5] * 3, "bilinear"
    config = json.loads(path.read_text())
    mode = {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 3), "bicubic")
    return config["image_mean"], config["image_std"], mode


@dataclass(frozen=True)
class Verdict:
    """Which images are classified correctly, by kind of toy, color and view."""

    kind: Bool[Tensor, " n"]
    color: Bool[Tensor, " n"]
    view: Bool[Tensor, " n"]

    @property
    def both(self) -> Bool[Tensor, " n"]:
        """Kind and color are correct."""
        return self.kind & self.color


class ToyboxJudge(Evaluator):
    """The bundled evaluator of toybox images, trained independently of the bundled prior and on its own images."""

    def __init__(self, folder: str | Path | None = None, device: torch.device | str = "cpu"):
        """Loads the bundled weights, or those of a folder."""
        super().__init__(BUNDLED_JUDGE if folder is None else folder, device)

    def verdict(
        self, images: Float[Tensor, "n 3 h w"], kind: str, color: str, view: str | Sequence[str] = "front"
    ) -> Verdict:
        """Classifies images among all kinds and colors ("a red mushroom" against all others), and among the views.

        Args:
            view: one word for all images or one per image; it is judged given the correct kind and color.
        """
        from distill3d.toybox.captions import COLOR_NAMES, KIND_NAMES, VIEW_WORDS, Claim, sentence

        pairs = [(k, c) for k in range(len(KIND_NAMES)) for c in range(len(COLOR_NAMES))]
        chosen = self.classify(images, [sentence(Claim(k, c)) for k, c in pairs]).tolist()
        k, c = KIND_NAMES.index(kind), COLOR_NAMES.index(color)
        views = self.classify(images, [sentence(Claim(k, c, view=v)) for v in range(len(VIEW_WORDS))])
        wanted = [view] * len(images) if isinstance(view, str) else list(view)
        return Verdict(
            kind=torch.tensor([pairs[i][0] == k for i in chosen]),
            color=torch.tensor([pairs[i][1] == c for i in chosen]),
            view=views == torch.tensor([VIEW_WORDS.index(v) for v in wanted]),
        )


def load_evaluator(name: str | Path = VIT_B_32, device: torch.device | str = "cpu") -> Evaluator:
    """Loads an evaluator: "toybox" (the bundled judge), a CLIP folder, or a hub id in the local cache.

    Never downloads anything.

    Raises:
        ValueError: if there is no such folder, or the cache does not hold the model.
    """
    from distill3d.priors.components.hub import cached, is_path

    if str(name) == "toybox":
        return ToyboxJudge(device=device)
    if is_path(str(name)):
        return Evaluator(Path(name).expanduser(), device)
    folder = cached(str(name))
    if folder is None:
        raise ValueError(
            f"evaluator {str(name)[:80]!r} not found: give a CLIP folder, download a model once with "
            f'`hf download {VIT_B_32}`, or use "toybox" for the toy world'
        )
    return Evaluator(folder, device)
