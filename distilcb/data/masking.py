"""Which tokens are hidden: a pure function of (seed, epoch, sample), so no rank and no batch changes a mask."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distilcb.config import MaskingConfig
from distilcb.data.order import key, mix
from distilcb.data.tokenizer import Vocabulary
from distilcb.errors import ModelError

# Purposes of a random number; each sample position has one of each.
_CHOICE, _TREATMENT, _WORD = 11, 12, 13


@dataclass(frozen=True)
class Masked:
    """Masked blocks: what the models read, and what is to be predicted.

    input_ids: (samples, tokens) int64 with the chosen tokens treated.
    positions: (samples, k) int64 chosen columns, ascending.
    labels: (samples, k) int64 the tokens that stood there.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]


def masked_per_block(rate: float, seq_len: int) -> int:
    """k: how many tokens of every block are chosen."""
    return max(1, round(rate * (seq_len - 2)))


class Masking:
    """Chooses exactly k tokens of each block and hides them, as the masking section says."""

    def __init__(
        self,
        masking: MaskingConfig,
        vocabulary: Vocabulary,
        token_counts: NDArray[np.int64],
        *,
        seq_len: int,
        seed: int,
    ) -> None:
        """token_counts: (vocab,) how often each token occurs in the training blocks."""
        if vocabulary.mask_id is None:
            raise ModelError("the tokenizer has no mask token: masked words need one")
        self.masking, self.vocabulary, self.seed = masking, vocabulary, seed
        self.k = masked_per_block(masking.rate, seq_len)
        self._mask_id: int = vocabulary.mask_id
        self._weights = np.maximum(token_counts, 1).astype(np.float64) ** -masking.smoothing
        self._weights[vocabulary.special_ids] = 0.0
        self._ordinary = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special_ids)

    def apply(self, blocks: NDArray[np.int64], sample_ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> Masked:
        """Mask each block. blocks: (samples, tokens); sample_ids and epochs: (samples,)."""
        keys = _sample_keys(self.seed, sample_ids, epochs)
        positions = np.sort(self._choose(blocks, keys), axis=1)
        labels = np.take_along_axis(blocks, positions, axis=1)
        treated = self._treat(labels, positions, keys)
        input_ids = blocks.copy()
        np.put_along_axis(input_ids, positions, treated, axis=1)
        return Masked(input_ids, positions, labels)

    def lay_out(
        self, blocks: NDArray[np.int64], sample_ids: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """What the models read; the rows of the flattened blocks that have a label, and those labels."""
        masked = self.apply(blocks, sample_ids, epochs)
        rows = masked.positions + (np.arange(len(blocks)) * blocks.shape[1])[:, None]
        return masked.input_ids, rows.ravel(), masked.labels.ravel()

    def _choose(self, blocks: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        columns = np.broadcast_to(np.arange(blocks.shape[1]), blocks.shape)
        weights = self._weights[blocks]
        if self.masking.whole_word:
            special = weights == 0
            starts = self.vocabulary.word_start[blocks] | special
            starts[:, 1:] |= special[:, :-1]  # a block may begin within a word, which is then no part of <s>
            word = np.cumsum(starts, axis=1)
            ranks = self._rank(_word_means(weights, word), _uniform(keys, word, _CHOICE))
            # Words in the order of their draw, the tokens of one word side by side; the last may be cut to reach k.
            return np.argsort(-ranks, axis=1, kind="stable")[:, : self.k]
        ranks = self._rank(weights, _uniform(keys, columns, _CHOICE))
        return np.argpartition(-ranks, self.k - 1, axis=1)[:, : self.k]

    @staticmethod
    def _rank(weights: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """The k largest of log(u)/w are a draw without replacement by weight (Efraimidis and Spirakis 2006)."""
        with np.errstate(divide="ignore"):
            return np.where(weights > 0, np.log(uniform) / weights, -np.inf)

    def _treat(
        self, labels: NDArray[np.int64], positions: NDArray[np.int64], keys: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        treatment = _uniform(keys, positions, _TREATMENT)
        words = self._ordinary[(_uniform(keys, positions, _WORD) * self._ordinary.size).astype(np.int64)]
        mask_below = self.masking.mask_share
        random_below = mask_below + self.masking.random_share
        return np.where(
            treatment < mask_below,
            self._mask_id,
            np.where(treatment < random_below, words, labels),
        )


def _sample_keys(seed: int, sample_ids: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    keys = mix(sample_ids.astype(np.uint64) + key(seed, 3))
    return mix(keys ^ mix(epochs.astype(np.uint64) + key(seed, 4)))[:, None]


def _uniform(keys: NDArray[np.uint64], columns: NDArray[np.int64], purpose: int) -> NDArray[np.float64]:
    """A number in (0, 1) for each (sample key, column, purpose)."""
    bits = mix(keys + mix(columns.astype(np.uint64) + key(purpose)))
    # 52 bits: with 53 the half would be rounded, and the largest number would be 1.
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _word_means(weights: NDArray[np.float64], word: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean weight of the word that each token belongs to. word: (samples, tokens) numbers that only rise."""
    samples, width = word.shape
    flat = (word + (np.arange(samples) * (width + 1))[:, None]).ravel()
    sums = np.bincount(flat, weights.ravel(), minlength=samples * (width + 1))
    sizes = np.bincount(flat, minlength=samples * (width + 1))
    return (sums[flat] / sizes[flat]).reshape(word.shape)
