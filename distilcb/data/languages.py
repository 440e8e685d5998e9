"""Text in several languages: how much of each is shown, and when; pure functions of the seed and the position.

A language of n blocks gets a share of the samples in proportion to n^exponent: with 1 as much as there is of it, with 0
as much as any other. Shares are kept exactly and not on average: the positions are dealt in stretches, each with a
quota of places for every language, which a keyed permutation puts in order. A language's places show its own order, in
which all of it comes once before anything comes again.

Source: the weighting of multilingual BERT (Devlin 2018, multilingual.md of google-research/bert: exponent 0.7) and of
XLM (Lample and Conneau 2019, arXiv:1901.07291, section 3.1), both by lot.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distilcb.data.blocks import Blocks, BlockSource
from distilcb.data.corpus import find_sources
from distilcb.data.order import Order, SampleOrder, key, permute
from distilcb.data.prepare import prepared_folder
from distilcb.data.tables import Source
from distilcb.errors import DataError

# Places that are dealt at a time, at most: a table of 8 MB, and shares that are kept to a millionth.
LONGEST_DEAL = 1 << 20


def shares_of(blocks: Sequence[int], exponent: float) -> list[float]:
    """Of each language its share of the samples: blocks^exponent over the sum of all. blocks: 1 or more each."""
    weights = [count**exponent for count in blocks]
    return [weight / sum(weights) for weight in weights]


def quotas_of(shares: Sequence[float], places: int) -> tuple[int, ...]:
    """Whole numbers as near to shares x places as their sum allows, which is `places`; none is 0.

    Largest remainders. places: as many as languages, or more.
    """
    exact = np.array(shares) * places
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    # Rounded, so that the last bit of a power, in which machines may differ, does not decide between equal ones.
    by_remainder = np.argsort(-np.round(exact - quotas, 6), kind="stable")
    quotas[by_remainder[: max(0, places - quotas.sum())]] += 1
    quotas[quotas.argmax()] -= quotas.sum() - places  # what languages of less than a place were given
    assert quotas.min() >= 1
    return tuple(quotas.tolist())


class LanguageOrder:
    """The order in which a run sees the samples of several languages; with `Order`'s promises for each of them.

    Rows are counted through: those of the second language follow those of the first. A language's blocks all come once
    before one of them comes again, so that a small one is gone through several times while a large one is once.

    Attributes:
        size: blocks in use, over all languages; what `train/epoch` is counted in.
        quotas: places of each language in one deal.
    """

    def __init__(self, rows: Sequence[int], *, exponent: float, seed: int, fraction: float = 1.0) -> None:
        """rows: blocks of each language; fraction: the share of each that is used, drawn once from the seed."""
        self.seed = seed
        self.orders = [
            Order(count, seed=int(key(seed, number, _LANGUAGE)), fraction=fraction) for number, count in enumerate(rows)
        ]
        used = [order.size for order in self.orders]
        self.size = sum(used)
        self.quotas = quotas_of(shares_of(used, exponent), min(self.size, LONGEST_DEAL))
        self._used, self._first_rows = np.array(used), np.cumsum([0, *rows[:-1]])

    def language(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the language that each position of the run shows, from 0."""
        return self._dealt(positions)[0]

    def epoch(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often the language of each position had been gone through before, from 0."""
        language, counted = self._dealt(positions)
        return counted // self._used[language]

    def row(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of the store, which has the languages one after another, that each position of the run shows."""
        language, counted = self._dealt(positions)
        rows = np.empty_like(positions)
        for number in np.unique(language):
            here = language == number
            rows[here] = self._first_rows[number] + self.orders[number].row(counted[here])
        return rows

    def _dealt(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The language of each position, and how many positions before it were of that language."""
        deals, places = np.divmod(positions, sum(self.quotas))
        language, counted = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(deals):
            here = deals == number
            languages, before = _deal(self.quotas, int(key(self.seed, int(number), _DEAL)))
            language[here], counted[here] = languages[places[here]], before[places[here]]
        return language, counted + deals * np.array(self.quotas)[language]


@lru_cache(maxsize=2)  # positions rise, and a batch may lie across the end of a deal
def _deal(quotas: tuple[int, ...], deal_key: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The language of each place of a deal, and how many places before it are of that language."""
    places = sum(quotas)
    in_order = np.repeat(np.arange(len(quotas), dtype=np.int32), quotas)
    languages = in_order[permute(np.arange(places), places, np.uint64(deal_key))]
    before = np.empty(places, dtype=np.int32)
    first = np.repeat(np.cumsum([0, *quotas[:-1]]), quotas)
    before[np.argsort(languages, kind="stable")] = np.arange(places) - first
    languages.flags.writeable = before.flags.writeable = False  # they are kept
    return languages, before


class LanguageBlocks:
    """The blocks of several languages as one store: those of the second follow those of the first.

    Attributes:
        shares: of each language, of the samples.
        token_counts: (vocab,) how often each token comes in as many samples as there are blocks, so that
            masking.smoothing goes by what is shown and not by what is there.
    """

    def __init__(self, parts: Sequence[Blocks], *, exponent: float) -> None:
        """parts: a language each, made with one tokenizer and of one length."""
        self.parts, self.exponent, self.seq_len = parts, exponent, parts[0].seq_len
        sizes = [len(part) for part in parts]
        self.shares = shares_of(sizes, exponent)
        self._ends = np.cumsum(sizes)
        shown = [
            sum(sizes) * share / len(part) * part.token_counts for part, share in zip(parts, self.shares, strict=True)
        ]
        self.token_counts: NDArray[np.int64] = np.rint(np.sum(shown, axis=0)).astype(np.int64)

    @property
    def content(self) -> list[str]:
        """What tells these texts from others, one a language."""
        return [part.content for part in self.parts]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows, tokens) int64 token ids."""
        language = np.searchsorted(self._ends, rows, side="right")
        blocks = np.empty((len(rows), self.seq_len), dtype=np.int64)
        for number in np.unique(language):
            here = language == number
            part = self.parts[number]
            blocks[here] = part.read(rows[here] - (self._ends[number] - len(part)))
        return blocks


def order_of(blocks: BlockSource, *, seed: int, fraction: float) -> SampleOrder:
    """The order in which these blocks are shown; fraction: as `Order`'s, of each language where there are several."""
    if isinstance(blocks, LanguageBlocks):
        rows = [len(part) for part in blocks.parts]
        return LanguageOrder(rows, exponent=blocks.exponent, seed=seed, fraction=fraction)
    return Order(len(blocks), seed=seed, fraction=fraction)


def check_languages(names: Sequence[str]) -> None:
    """See that each name stands for readable text that no other stands for.

    Raises:
        DataError: a name that stands for nothing, or two that share a file.
    """
    named: dict[Source, int] = {}
    for number, name in enumerate(names):
        prepared = prepared_folder([name])
        for source in [prepared] if prepared else find_sources([name]):
            where = source.resolve() if isinstance(source, Path) else source
            first = named.setdefault(where, number)
            if first != number:
                raise DataError(
                    f"data.train: {names[first]} and {name} both hold {source}. With data.language_exponent each name "
                    "is a language of its own: name its text once, or set data.language_exponent to null."
                )


# Purposes of a key, apart from those of order.py and masking.py.
_DEAL, _LANGUAGE = 5, 6
