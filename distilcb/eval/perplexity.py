"""Perplexity of a long text under a causal model: sliding windows, so that every token but the first is predicted once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilcb.data.tokenizer import TextTokenizer
from distilcb.distributed import device
from distilcb.errors import ConfigError
from distilcb.losses.head import rows_per_chunk
from distilcb.models.families import Family, family_of
from distilcb.models.loading import load_language_model

_TOKENS_A_PASS = 8192


@dataclass(frozen=True)
class Perplexity:
    """Of one text. nll: nats over all `tokens` that are predicted; words, characters: of the text."""

    nll: float
    tokens: int
    words: int
    characters: int

    @property
    def a_token(self) -> float:
        """What papers call perplexity; it depends on the tokenizer."""
        return math.exp(self.nll / self.tokens)

    @property
    def a_word(self) -> float:
        """The same for each word that white space divides; tokenizers can be compared by it."""
        return math.exp(min(self.nll / self.words, 700.0))

    @property
    def bits_a_character(self) -> float:
        return self.nll / self.characters / math.log(2)


@dataclass(frozen=True)
class Window:
    """Tokens start .. stop of the text are read, those from `first` on are predicted."""

    start: int
    first: int
    stop: int


def windows(tokens: int, *, size: int, stride: int) -> Iterator[Window]:
    """Windows of `size` tokens, each `stride` further; every token but the first is predicted in one of them.

    Each has size - stride tokens or more before it, but for those of the first window.

    Raises:
        ConfigError: a stride that would leave tokens out.
    """
    if not 1 <= stride < size:
        raise ConfigError(f"stride={stride}: needed 1 to {size - 1}, less than the window of {size} tokens.")
    first = 1
    while first < tokens:
        stop = min(tokens, size if first == 1 else first + stride)
        yield Window(max(0, stop - size), first, stop)
        first = stop


def perplexity_of(name: str, text: str, *, size: int | None, stride: int | None) -> Perplexity:
    """Of a text under a model, on this rank's device.

    Args:
        name: a causal model's folder or hub name.
        size: tokens of a window; None: as many as the model has positions for.
        stride: None: half a window.

    Raises:
        ConfigError: an encoder, a window that is longer than the model's positions, or a text of no two tokens.
        ModelError: a model that cannot be read.
    """
    model = load_language_model(name, dtype=torch.float16 if device().type == "cuda" else torch.float32).to(device())
    family = family_of(model.config, where=name)
    if not family.causal:
        raise ConfigError(
            f"{name} is an encoder ({model.config.model_type}), which predicts masked words: use launch/evaluate.py."
        )
    longest = family.max_seq_len(model.config)
    if size is not None and size > longest:
        raise ConfigError(f"window={size}: {name} has positions for {longest} tokens.")
    size = size or longest
    ids = TextTokenizer(name).hugging_face(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} token(s) for {name}: needed 2 or more.")
    on_device = torch.tensor(ids, device=device())
    nll, tokens = summed_nll(model.eval(), family, on_device, size=size, stride=stride or size // 2)
    return Perplexity(nll, tokens, max(1, len(text.split())), len(text))


@torch.no_grad()
def summed_nll(model: Any, family: Family, ids: Tensor, *, size: int, stride: int) -> tuple[float, int]:
    """Nats over all predicted tokens of `ids`, (tokens,) int64 on the model's device; and how many those are."""
    total, count = torch.zeros((), dtype=torch.float64, device=ids.device), 0
    for batch in _batches(list(windows(len(ids), size=size, stride=stride)), size):
        rows = torch.stack([ids[each.start : each.stop] for each in batch])
        states = family.encode(model, rows[:, :-1])
        for hidden, each in zip(states, batch, strict=True):
            predicted = hidden[each.first - 1 - each.start :]
            total += _nll(model, family, predicted, ids[each.first : each.stop])
            count += each.stop - each.first
    return total.item(), count


def _batches(found: list[Window], size: int) -> Iterator[list[Window]]:
    """Windows of one length together; the first and the last may be shorter."""
    most = max(1, _TOKENS_A_PASS // size)
    batch: list[Window] = []
    for each in found:
        if batch and (len(batch) == most or each.stop - each.start != batch[0].stop - batch[0].start):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _nll(model: Any, family: Family, hidden: Tensor, labels: Tensor) -> Tensor:
    weight, bias = family.decoder(model)
    features = family.head_features(model, hidden)
    step = rows_per_chunk(weight.shape[0], weight.device.type)
    total = torch.zeros((), dtype=torch.float64, device=labels.device)
    for start in range(0, len(labels), step):
        logits = torch.nn.functional.linear(features[start : start + step], weight, bias).float()
        total += torch.nn.functional.cross_entropy(logits, labels[start : start + step], reduction="sum").double()
    return total
