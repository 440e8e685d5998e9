"""Blocks as transformers' Trainer takes them for a causal model."""

import numpy as np
import torch

from distilcb.data.next_token import NextToken
from distilcb.data.tokenizer import Vocabulary
from distilcb.finetune.subjects import NextWordRows
from distilcb.tasks.encoding import IGNORED

END, LENGTH = 0, 12
VOCABULARY = Vocabulary(50, END, END, None, np.array([END]), np.ones(50, dtype=bool), "causal")


class Documents:
    """Blocks in memory, in which documents end here and there."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.tokens = random.integers(1, 50, (20, LENGTH))
        self.tokens[random.random((20, LENGTH)) < 0.2] = END

    def __len__(self):
        return len(self.tokens)

    def read(self, rows):
        return self.tokens[rows].copy()


def test_a_token_is_asked_of_the_one_before_where_distillation_asks_it():
    documents, asked = Documents(), NextToken(VOCABULARY, LENGTH)
    rows = NextWordRows(documents, asked)
    assert len(rows) == 20
    for number in range(20):
        row = rows[number]
        _, places, words = asked.lay_out(documents.read(np.array([number])), np.array([0]), np.array([0]))
        asked_at = np.flatnonzero(row["labels"] != IGNORED)
        assert (asked_at - 1).tolist() == places.tolist()
        assert row["labels"][asked_at].tolist() == words.tolist()
        assert row["input_ids"].tolist() == documents.tokens[number].tolist()
        assert torch.from_numpy(row["labels"]).dtype == torch.int64
