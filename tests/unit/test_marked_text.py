"""A masked block as people read it."""

import numpy as np
import pytest

from distilcb.config import MaskingConfig
from distilcb.data.marked_text import MaskedWord, mark
from distilcb.data.masking import Masking
from distilcb.data.tokenizer import TextTokenizer

SENTENCE = "Mes papillons se rappellent une odeur apprise, d'hier."


@pytest.fixture(scope="module")
def tokenizer(mini_teacher):
    return TextTokenizer(mini_teacher)


@pytest.fixture(scope="module")
def block(tokenizer):
    """<s>, the sentence, </s>"""
    vocabulary = tokenizer.vocabulary
    return np.array([vocabulary.bos_id, *tokenizer.encode([SENTENCE])[0], vocabulary.eos_id])


def columns_of(tokenizer, block, pieces):
    """Where the tokens of these pieces stand."""
    return np.array([block.tolist().index(tokenizer.hugging_face.convert_tokens_to_ids(piece)) for piece in pieces])


def test_a_block_without_masks_reads_as_its_text(tokenizer, block):
    assert mark(block, block, np.array([], dtype=np.int64), tokenizer=tokenizer) == (SENTENCE, [])


def test_hidden_replaced_and_kept_words_are_told_apart(tokenizer, block):
    hidden, replaced, kept = positions = columns_of(tokenizer, block, ["▁papillon", "▁se", "▁appris"])
    input_ids = block.copy()
    input_ids[hidden] = tokenizer.vocabulary.mask_id
    input_ids[replaced] = block[1]
    text, words = mark(block, input_ids, positions, tokenizer=tokenizer)
    assert text == "Mes [papillon]s [se→Mes] rappellent une odeur [appris=]e, d'hier."
    assert words == [
        MaskedWord((int(hidden),), "papillon", "<mask>", "hidden"),
        MaskedWord((int(replaced),), "se", "Mes", "replaced"),
        MaskedWord((int(kept),), "appris", "appris", "kept"),
    ]


def test_masked_tokens_of_one_word_are_one_and_those_of_two_words_are_two(tokenizer, block):
    positions = columns_of(tokenizer, block, ["▁papillon", "s", "▁se", "▁rappelle", "nt"])
    input_ids = block.copy()
    input_ids[positions] = tokenizer.vocabulary.mask_id
    text, words = mark(block, input_ids, positions, tokenizer=tokenizer)
    assert text == "Mes [papillons] [se] [rappellent] une odeur apprise, d'hier."
    assert [len(word.columns) for word in words] == [2, 1, 2]


def test_every_masked_column_is_in_one_word_and_without_brackets_the_text_stays(tokenizer, block):
    vocabulary = tokenizer.vocabulary
    counts = np.ones(vocabulary.size, dtype=np.int64)
    masking = Masking(MaskingConfig(rate=0.5), vocabulary, counts, seq_len=block.size, seed=3)
    for epoch in range(20):
        masked = masking.apply(block[None], np.array([7]), np.array([epoch]))
        input_ids, positions = masked.input_ids[0], masked.positions[0]
        text, words = mark(block, input_ids, positions, tokenizer=tokenizer)
        assert [column for word in words for column in word.columns] == positions.tolist()
        for word in words:
            assert str(word) in text
            text = text.replace(str(word), word.word, 1)
            hidden = {int(input_ids[column]) == vocabulary.mask_id for column in word.columns}
            assert hidden == {word.treatment == "hidden"}
        assert text == SENTENCE


def test_a_separator_between_two_documents_is_shown_and_those_around_the_block_are_not(tokenizer, block):
    eos = tokenizer.vocabulary.eos_id
    two = np.array([*block[:-1], eos, *block[1:]])
    text, _ = mark(two, two, np.array([], dtype=np.int64), tokenizer=tokenizer)
    assert text.startswith(f"{SENTENCE}</s>")
    assert text.count("</s>") == 1
    assert text.endswith(SENTENCE)
