"""Text encoders of the families: one text in, its tokens' vectors out.

CLIP reads windows of 77 tokens: a longer text is read window by window, and the network attends to all of them.
T5 reads its family's number of tokens. What would be left out is told in a warning.
"""

from __future__ import annotations

import textwrap
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from distill3d.priors.components.folder import freeze
from distill3d.prompts import weighted_parts


class Clip:
    """A CLIP text encoder with its tokenizer, frozen."""

    def __init__(self, tokenizer: Any, encoder: Any, device: str | torch.device, dtype: torch.dtype):
        self.tokenizer, self.encoder = tokenizer, freeze(encoder, device, dtype)
        self.device = torch.device(device)
        _check_words(tokenizer, encoder)
        # Some tokenizer folders do not state their limit and report a number beyond any model.
        self.window = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        self._expansions: dict[str, str] = {}

    def states(self, text: str, windows: int | None = None, warn: bool = True) -> list[Tensor]:
        """All layers' vectors of a text, the last one normalized, each [1, L, C]; L is a multiple of the window.

        windows limits how much is read, with a warning for what is not unless `warn` is off; None reads everything.
        A word's weight w moves its vectors to e + w (h - e), e being those of the empty text at the same places.
        """
        tokens, weights = self._tokens(text)
        out = self._read(self._windows(text, tokens, windows, warn))
        layers = [*out.hidden_states[:-1], out.last_hidden_state]
        flat = [layer.flatten(0, 1)[None] for layer in layers]
        if all(w == 1.0 for w in weights):
            return flat
        empty = self._read(self._windows("", [], None))
        bare = [*empty.hidden_states[:-1], empty.last_hidden_state]
        w = self._in_windows(weights, 1.0, 1.0, len(layers[0])).to(flat[0]).flatten()[None, :, None]
        return [e + w * (h - e) for h, e in zip(flat, (b.repeat(1, len(layers[0]), 1) for b in bare), strict=True)]

    def pooled(self, text: str) -> Tensor:
        """The vector of a whole text, [1, P]: projected where the encoder has a projection. Reads one window."""
        out = self._read(self._windows("", self._tokens(text)[0], 1, warn=False))
        return out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output

    def add_token(self, name: str, vectors: Tensor) -> None:
        """Teaches a word (textual inversion): `name` in a text stands for vectors [V, C].

        Raises ValueError where the vectors do not fit, or the word is known already.
        """
        table = self.encoder.get_input_embeddings()
        if vectors.ndim != 2 or vectors.shape[1] != table.embedding_dim:
            raise ValueError(f"the token {name!r} has vectors {list(vectors.shape)}, the text encoder wants "
                             f"[V, {table.embedding_dim}]: it was made for another model")  # fmt: skip
        words = [name, *(f"{name}_{i}" for i in range(1, len(vectors)))]
        first = len(self.tokenizer)
        if self.tokenizer.add_tokens(words) != len(words):
            raise ValueError(f"the text encoder knows the token {name!r} already: give it another name, FILE:NAME")
        grown = table.weight.new_zeros(max(first, len(table.weight)) + len(words), table.embedding_dim)
        grown[: len(table.weight)] = table.weight
        grown[self.tokenizer.convert_tokens_to_ids(words)] = vectors.to(table.weight)
        self.encoder.set_input_embeddings(nn.Embedding.from_pretrained(grown, freeze=True))
        self._expansions[name] = " ".join(words)

    def _tokens(self, text: str) -> tuple[list[int], list[float]]:
        for name, words in self._expansions.items():
            text = text.replace(name, words)
        ids: list[int] = []
        weights: list[float] = []
        for part, weight in weighted_parts(text):
            new = _ids(self.tokenizer, part)
            ids, weights = ids + new, weights + [weight] * len(new)
        return ids, weights

    def _windows(self, text: str, tokens: list[int], limit: int | None, warn: bool = True) -> Tensor:
        space = self.window - 2
        count = max(1, -(-len(tokens) // space))
        if limit is not None and count > limit:
            if warn:
                _tell_rest(self.encoder, space * limit, len(tokens), text)
            count = limit
        begin, end, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        return self._in_windows(tokens, begin, end, count, pad).to(self.device)

    def _in_windows(self, values: list, begin: Any, end: Any, count: int, pad: Any = 1.0) -> Tensor:
        """One value for each token as [count, window], with what stands at the begin, the end and the padding."""
        space, rows = self.window - 2, []
        for i in range(count):
            row = [begin, *values[i * space : (i + 1) * space], end]
            rows.append(row + [pad] * (self.window - len(row)))
        return torch.tensor(rows)

    def _read(self, ids: Tensor) -> Any:
        return self.encoder(ids, output_hidden_states=True)


class T5:
    """A T5 encoder with its tokenizer, frozen; reads `length` tokens and pads shorter texts."""

    def __init__(
        self, tokenizer: Any, encoder: Any, length: int, device: str | torch.device, dtype: torch.dtype,
        masked: bool = False,
    ):  # fmt: skip
        """masked hides the padding from the encoder, as IF was trained; SD 3 and FLUX let it see all."""
        self.tokenizer, self.encoder = tokenizer, freeze(encoder, device, dtype)
        self.length, self.masked, self.device = length, masked, torch.device(device)
        _check_words(tokenizer, encoder)

    def states(self, text: str) -> Tensor:
        """The last layer's vectors of a text, [1, length, C]; weights as in `Clip.states`."""
        parts = weighted_parts(text)
        if len(parts) == 1 and parts[0][1] == 1.0:
            return self._read(_ids(self.tokenizer, parts[0][0], specials=True), text)
        ids: list[int] = []
        weights: list[float] = []
        for part, weight in parts:
            new = _ids(self.tokenizer, part)
            ids, weights = ids + new, weights + [weight] * len(new)
        weights = [*weights[: self.length - 1], 1.0]  # the last is the end's
        w = torch.ones(self.length)
        w[: len(weights)] = torch.tensor(weights)
        h = self._read([*ids, self.tokenizer.eos_token_id], text)
        e = self._read(_ids(self.tokenizer, "", specials=True), "")
        return e + w.to(h)[None, :, None] * (h - e)

    def _read(self, ids: list[int], text: str) -> Tensor:
        if len(ids) > self.length:
            _tell_rest(self.encoder, self.length, len(ids), text)
            ids = [*ids[: self.length - 1], ids[-1]]
        row = torch.full((1, self.length), self.tokenizer.pad_token_id)
        row[0, : len(ids)] = torch.tensor(ids)
        mask = None
        if self.masked:
            mask = (torch.arange(self.length) < len(ids))[None].long().to(self.device)
        return self.encoder(row.to(self.device), attention_mask=mask)[0]


def _check_words(tokenizer: Any, encoder: Any) -> None:
    words, known = tokenizer.vocab_size, encoder.get_input_embeddings().num_embeddings
    if words > known:
        raise ValueError(f"the tokenizer has {words} words, {type(encoder).__name__} knows {known}: "
                         "the parts belong to different models")  # fmt: skip


def _ids(tokenizer: Any, text: str, specials: bool = False) -> list[int]:
    # verbose would warn of texts beyond the window, which are read in windows, or told of in our words.
    return tokenizer(text, add_special_tokens=specials, verbose=False).input_ids


def _tell_rest(encoder: Any, read: int, count: int, text: str) -> None:
    short = textwrap.shorten(text, 60, placeholder=" ...")
    warnings.warn(f"{type(encoder).__name__} reads {read} of {count} tokens of {short!r}", stacklevel=5)
