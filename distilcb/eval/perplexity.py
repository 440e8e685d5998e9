"""Perplexity of a long text under a causal model: sliding windows, so that every token but the first counts once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from distilcb.data.tokenizer import TextTokenizer
from distilcb.distributed import all_reduce_sum, device
from distilcb.errors import ConfigError
from distilcb.launcher import World
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
        return math.exp(min(self.nll / self.tokens, 700.0))

    @property
    def a_word(self) -> float:
        """The same for each word that white space divides; tokenizers can be compared by it."""
        return math.exp(min(self.nll / self.words, 700.0))

    @property
    def bits_a_character(self) -> float:
        """Comparable between tokenizers too."""
        return self.nll / self.characters / math.log(2)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        figures = {"perplexity_a_token": self.a_token, "perplexity_a_word": self.a_word}
        return asdict(self) | figures | {"bits_a_character": self.bits_a_character}


@dataclass(frozen=True)
class Window:
    """Tokens start .. stop of the text are read, those from `first` on are predicted."""

    start: int
    first: int
    stop: int


def perplexity_rows(found: Mapping[str, Perplexity]) -> list[list[str]]:
    """Header and one row a model."""
    rows = [["", "perplexity a token", "a word", "bits a character", "tokens"]]
    for name, each in found.items():
        rows.append(
            [name, f"{each.a_token:.2f}", f"{each.a_word:.2f}", f"{each.bits_a_character:.4f}", f"{each.tokens:,}"]
        )
    return rows


def windows(tokens: int, *, size: int, stride: int) -> Iterator[Window]:
    """Windows of `size` tokens, each `stride` further; every token but the first is predicted in one of them.

    Each has size - stride tokens or more before it, but for those of the first window.

    Raises:
        ConfigError: a stride that would leave tokens out.
    """
    if not 1 <= stride < size:
        raise ConfigError(f"--stride {stride}: needed 1 to {size - 1}, less than the window of {size} tokens.")
    first = 1
    while first < tokens:
        stop = min(tokens, size if first == 1 else first + stride)
        yield Window(max(0, stop - size), first, stop)
        first = stop


def perplexity_of(name: str, text: str, *, size: int | None, stride: int | None, world: World) -> Perplexity:
    """Of a text under a model, the windows shared out among the ranks; on every rank together.

    Args:
        name: a causal model's folder or hub name.
        size: tokens of a window; None: as many as the model has positions for.
        stride: tokens from one window to the next; None: half a window.

    Raises:
        ConfigError: an encoder, a window that is longer than the model's positions, a stride that leaves tokens out, or
            a text of less than two tokens.
        ModelError: a model that cannot be read.
    """
    model = load_language_model(name, dtype=torch.float16 if device().type == "cuda" else torch.float32).to(device())
    family = family_of(model.config, where=name)
    if not family.causal:
        raise ConfigError(
            f"{name} is an encoder ({model.config.model_type}), which predicts masked words: launch/evaluate.py scores "
            "those."
        )
    longest = family.max_seq_len(model.config)
    if size is not None and size > longest:
        raise ConfigError(f"--window {size}: {name} has positions for {longest} tokens. Use {longest} or less.")
    size = size or longest
    ids = TextTokenizer(name).hugging_face(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} token(s) for {name}: needed 2 or more.")
    found = list(windows(len(ids), size=size, stride=stride or size // 2))
    on_device = torch.tensor(ids, device=device())
    nll = all_reduce_sum(summed_nll(model.eval(), family, on_device, found[world.rank :: world.size], name=name)).item()
    return Perplexity(nll, len(ids) - 1, max(1, len(text.split())), len(text))


@torch.inference_mode()
def summed_nll(model: Any, family: Family, ids: Tensor, shares: Sequence[Window], *, name: str = "") -> Tensor:
    """Nats over the tokens that `shares` predict of `ids`, (tokens,) int64 on the model's device; scalar, float64."""
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    size = max((each.stop - each.start for each in shares), default=1)
    for batch in tqdm(list(_batches(shares, size)), desc=name, unit="pass", disable=None, leave=False):
        rows = torch.stack([ids[each.start : each.stop] for each in batch])
        states = family.encode(model, rows[:, :-1])  # the last token's successor belongs to the next window
        for hidden, each in zip(states, batch, strict=True):
            total += _nll(model, family, hidden[each.first - 1 - each.start :], ids[each.first : each.stop])
    return total


def _batches(shares: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Windows of one length together, about _TOKENS_A_PASS; the first and the last of a text may be shorter."""
    most = max(1, _TOKENS_A_PASS // size)
    for _, run in groupby(shares, key=lambda each: each.stop - each.start):
        alike = list(run)
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


def _nll(model: Any, family: Family, hidden: Tensor, labels: Tensor) -> Tensor:
    weight, bias = family.decoder(model)
    features = family.head_features(model, hidden)
    step = rows_per_chunk(weight.shape[0], weight.device.type, len(labels))
    total = torch.zeros((), dtype=torch.float64, device=labels.device)
    for start in range(0, len(labels), step):
        logits = torch.nn.functional.linear(features[start : start + step], weight, bias).float()
        total += torch.nn.functional.cross_entropy(logits, labels[start : start + step], reduction="sum").double()
    return total
