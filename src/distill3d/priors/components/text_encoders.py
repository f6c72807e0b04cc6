"""The text encoders of the model families: from one text to the features of its tokens.

CLIP reads windows of 77 tokens: a longer text is read window by window, and the network attends to all of them. T5
reads a fixed number of tokens. A warning says how many tokens of a text are left out.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill3d.priors.components.folder import freeze
from distill3d.prompts import weighted_parts
from distill3d.types import Condition

V = TypeVar("V", int, float)


@dataclass(frozen=True)
class TextEncoders:
    """The loaded text encoders of a model: from one text to a Condition of one row, and their networks by name."""

    encode: Callable[[str], Condition]
    modules: Mapping[str, nn.Module]


class Clip:
    """A CLIP text encoder with its tokenizer, frozen."""

    def __init__(self, tokenizer: Any, encoder: Any, device: str | torch.device, dtype: torch.dtype):
        """Raises ValueError if the tokenizer knows more tokens than the encoder."""
        self.tokenizer, self.encoder = tokenizer, freeze(encoder, device, dtype)
        self.device = torch.device(device)
        _check_vocabulary(tokenizer, encoder)
        # Some tokenizers do not state their limit and report a number beyond any model.
        self.window = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        self._expansions: dict[str, str] = {}

    def states(self, text: str, windows: int | None = None, warn: bool = True) -> list[Float[Tensor, "1 l c"]]:
        """The hidden states of all layers, the last one normalized; l is a multiple of the window.

        `windows` limits how much is read, with a warning about the rest unless `warn` is off; None reads everything.
        A word's weight w moves its features to e + w (h - e), where e are those of the empty text at the same places.
        """
        tokens, weights = self._tokens(text)
        layers = self._layers(self._windows(text, tokens, windows, warn))
        flat = [layer.flatten(0, 1)[None] for layer in layers]
        if all(w == 1.0 for w in weights):
            return flat
        empty = self._layers(self._windows("", [], None))
        count = len(layers[0])
        w = self._in_windows(weights, 1.0, 1.0, count, 1.0).to(flat[0]).flatten()[None, :, None]
        return [e + w * (h - e) for h, e in zip(flat, (layer.repeat(1, count, 1) for layer in empty), strict=True)]

    def pooled(self, text: str) -> Float[Tensor, "1 p"]:
        """The feature of the whole text, projected if the encoder has a projection. Reads one window."""
        out = self._read(self._windows("", self._tokens(text)[0], 1, warn=False))
        return out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output

    def add_token(self, name: str, vectors: Tensor) -> None:
        """Adds a textual-inversion token: the word `name` in a text stands for vectors [V, C].

        Raises ValueError if the vectors do not fit, or the tokenizer has this token already.
        """
        from transformers import AddedToken

        table = self.encoder.get_input_embeddings()
        if vectors.ndim != 2 or vectors.shape[1] != table.embedding_dim:
            raise ValueError(
                f"the token {name!r} has vectors {list(vectors.shape)}, the text encoder needs "
                f"[V, {table.embedding_dim}]: it was made for another model"
            )
        words = [name, *(f"{name}_{i}" for i in range(1, len(vectors)))]
        first = len(self.tokenizer)
        added = [AddedToken(word, single_word=_is_word(name), normalized=True) for word in words]
        if self.tokenizer.add_tokens(added) != len(words):
            raise ValueError(f"the tokenizer has the token {name!r} already: choose another name, FILE:NAME")
        grown = table.weight.new_zeros(max(first, len(table.weight)) + len(words), table.embedding_dim)
        grown[: len(table.weight)] = table.weight
        grown[self.tokenizer.convert_tokens_to_ids(words)] = vectors.to(table.weight)
        self.encoder.set_input_embeddings(nn.Embedding.from_pretrained(grown, freeze=True))
        self._expansions[name] = " ".join(words)

    def _tokens(self, text: str) -> tuple[list[int], list[float]]:
        return _weighted_tokens(self.tokenizer, expand_words(text, self._expansions))

    def _windows(self, text: str, tokens: list[int], limit: int | None, warn: bool = True) -> Tensor:
        space = self.window - 2
        count = max(1, -(-len(tokens) // space))
        if limit is not None and count > limit:
            if warn:
                _warn_truncated(self.encoder, space * limit, len(tokens), text)
            count = limit
        begin, end, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        return self._in_windows(tokens, begin, end, count, pad).to(self.device)

    def _in_windows(self, values: Sequence[V], begin: V, end: V, count: int, pad: V) -> Tensor:
        """Values per token as [count, window], with those of the begin, end and padding tokens added."""
        space, rows = self.window - 2, []
        for i in range(count):
            row = [begin, *values[i * space : (i + 1) * space], end]
            rows.append(row + [pad] * (self.window - len(row)))
        return torch.tensor(rows)

    def _layers(self, ids: Tensor) -> list[Tensor]:
        out = self._read(ids)
        return [*out.hidden_states[:-1], out.last_hidden_state]

    def _read(self, ids: Tensor) -> Any:
        return self.encoder(ids, output_hidden_states=True)


class T5:
    """A T5 encoder with its tokenizer, frozen; reads `length` tokens and pads shorter texts."""

    def __init__(
        self,
        tokenizer: Any,
        encoder: Any,
        length: int,
        device: str | torch.device,
        dtype: torch.dtype,
        masked: bool = False,
    ):
        """masked hides the padding from the encoder, as in the training of IF; SD 3 and FLUX do not."""
        self.tokenizer, self.encoder = tokenizer, freeze(encoder, device, dtype)
        self.length, self.masked, self.device = length, masked, torch.device(device)
        _check_vocabulary(tokenizer, encoder)

    def states(self, text: str) -> Float[Tensor, "1 l c"]:
        """The last hidden state of a text, l = length; weights as in `Clip.states`."""
        tokens, weights = _weighted_tokens(self.tokenizer, text)
        h = self._read(tokens, text)
        if all(w == 1.0 for w in weights):
            return h
        weights = weights[: self.length - 1]
        w = torch.ones(self.length)  # of the end token and the padding, too
        w[: len(weights)] = torch.tensor(weights)
        e = self._read([], "")
        return e + w.to(h)[None, :, None] * (h - e)

    def _read(self, tokens: list[int], text: str) -> Tensor:
        if len(tokens) >= self.length:
            _warn_truncated(self.encoder, self.length, len(tokens) + 1, text)
        ids = [*tokens[: self.length - 1], self.tokenizer.eos_token_id]
        row = torch.full((1, self.length), self.tokenizer.pad_token_id)
        row[0, : len(ids)] = torch.tensor(ids)
        mask = None
        if self.masked:
            mask = (torch.arange(self.length) < len(ids))[None].long().to(self.device)
        return self.encoder(row.to(self.device), attention_mask=mask)[0]


def expand_words(text: str, expansions: Mapping[str, str]) -> str:
    """Replaces names in a text: with {"cat": "cat cat_1"}, "a cat in a category" is "a cat cat_1 in a category".

    A name in brackets or the like, "<cat>", is also replaced next to letters.
    """
    if not expansions:
        return text
    names = sorted(expansions, key=len, reverse=True)
    patterns = (rf"(?<!\w){re.escape(name)}(?!\w)" if _is_word(name) else re.escape(name) for name in names)
    return re.sub("|".join(patterns), lambda match: expansions[match[0]], text)


def _is_word(name: str) -> bool:
    """Whether a name could be found inside a word: "cat" in "category"."""
    return re.match(r"\w", name) is not None or re.search(r"\w$", name) is not None


def _check_vocabulary(tokenizer: Any, encoder: Any) -> None:
    tokens, known = tokenizer.vocab_size, encoder.get_input_embeddings().num_embeddings
    if tokens > known:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, {type(encoder).__name__} only {known}: the components belong to "
            "different models"
        )


def _weighted_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[float]]:
    """The tokens of a text without begin and end, and their weights."""
    tokens: list[int] = []
    weights: list[float] = []
    for part, weight in weighted_parts(text):
        # verbose would warn of texts beyond the window, which are read window by window or warned about here.
        new = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        tokens, weights = tokens + new, weights + [weight] * len(new)
    return tokens, weights


def _warn_truncated(encoder: nn.Module, read: int, count: int, text: str) -> None:
    short = textwrap.shorten(text, 60, placeholder=" ...")
    warnings.warn(f"{type(encoder).__name__} reads {read} of {count} tokens of {short!r}", stacklevel=1)
