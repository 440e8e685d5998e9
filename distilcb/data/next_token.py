"""What a causal model predicts: of every token the next one, within a document."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distilcb.data.tokenizer import Vocabulary


@dataclass(frozen=True)
class NextToken:
    """Labels of whole blocks, the same in every epoch.

    A token has no label where it ends a document, as what follows is another one, or where it ends the block.
    """

    vocabulary: Vocabulary
    seq_len: int

    @property
    def k(self) -> int:
        """The most labels that a block can have; each separator costs one."""
        return self.seq_len - 1

    def has_label(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(samples, tokens) bool of blocks (samples, tokens)."""
        labelled = blocks != self.vocabulary.eos_id
        labelled[:, -1] = False
        return labelled

    def lay_out(
        self, blocks: NDArray[np.int64], _sample_ids: NDArray[np.int64], _epochs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """As `Masking.lay_out`: the blocks as they are, rows with a label, and the tokens that follow there."""
        rows = np.flatnonzero(self.has_label(blocks))
        return blocks, rows, blocks.ravel()[rows + 1]
