"""A text cut into blocks as it runs: line ends kept, no end-of-text tokens, as published perplexities are taken."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from distilcb.data.corpus import read_as_it_runs
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import DataError

# Pieces of a megabyte that the tokenizer's threads share.
_PIECES_AT_ONCE = 64


class RunningText:
    """Blocks of one running text, in memory; what does not fill the last block is left out."""

    def __init__(self, names: Sequence[str], tokenizer: TextTokenizer, *, seq_len: int) -> None:
        """Tokenizes at once, a piece by itself: what a token across two of them would be is lost, one in a megabyte.

        Raises:
            DataError: names that cannot be read, or text that fills no block.
        """
        self.seq_len, found = seq_len, [np.empty(0, dtype=np.int32)]
        pieces = read_as_it_runs(names)
        while some := list(islice(pieces, _PIECES_AT_ONCE)):
            ids = tokenizer.hugging_face(some, add_special_tokens=False, verbose=False)["input_ids"]
            found += [np.array(each, dtype=np.int32) for each in ids]
        tokens = np.concatenate(found)
        blocks = len(tokens) // seq_len
        if not blocks:
            raise DataError(f"{', '.join(names)}: {len(tokens)} tokens, and a block needs {seq_len}. Give more text.")
        self._blocks = tokens[: blocks * seq_len].reshape(blocks, seq_len)
        self.token_counts: NDArray[np.int64] = np.bincount(
            self._blocks.ravel(), minlength=tokenizer.vocabulary.size
        ).astype(np.int64)

    def __len__(self) -> int:
        return len(self._blocks)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows, tokens) int64 token ids."""
        return self._blocks[rows].astype(np.int64)
