"""Texts and tagged words as models read them, and predictions as scores take them."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from distilcb.tasks.declarations import TASKS
from distilcb.tasks.encoding import IGNORED, encode, gold, predictions

NAMES = TASKS["ner_fr"]
SENTENCE = {"tokens": ["Marie", "Skłodowska-Curie", "vit", "à", "Paris"], "tags": [1, 2, 0, 0, 5]}


@pytest.fixture(scope="module")
def tokenizer(mini_teacher):
    return AutoTokenizer.from_pretrained(mini_teacher)


def test_a_tag_stands_at_the_first_token_of_its_word_alone(tokenizer):
    encoded = encode([SENTENCE], NAMES, tokenizer, max_length=64, stride=1)
    labels = np.array(encoded.features[0]["labels"])
    assert labels[labels != IGNORED].tolist() == SENTENCE["tags"]
    ids = encoded.features[0]["input_ids"]
    starts = [ids[place] for place in np.flatnonzero(labels != IGNORED)]
    firsts = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in SENTENCE["tokens"]]
    assert starts == firsts


def test_words_that_are_cut_off_are_counted_and_tagged_as_nothing(tokenizer):
    encoded = encode([SENTENCE], NAMES, tokenizer, max_length=5, stride=1)
    left = int((encoded.word_places[0] >= 0).sum())
    assert 0 < left < 5
    assert encoded.figures == {
        "rows": 1,
        "sequences": 1,
        "cut_rows": 1,
        "words": 5,
        "words_without_token": 5 - left,
    }
    logits = np.zeros((1, 5, len(NAMES.labels)))
    logits[..., 3] = 1.0
    assert predictions(NAMES, encoded, logits) == [["B-ORG"] * left + ["O"] * (5 - left)]


def test_a_word_that_the_tokenizer_makes_nothing_of_is_no_cut(tokenizer):
    row = {"tokens": ["\u200b", "chat"], "tags": [0, 0]}
    figures = encode([row], NAMES, tokenizer, max_length=64, stride=1).figures
    assert (figures["cut_rows"], figures["words_without_token"]) == (0, 1)


def test_tags_come_back_in_the_order_of_words(tokenizer):
    rows = [SENTENCE, {"tokens": ["Paris"], "tags": [5]}]
    encoded = encode(rows, NAMES, tokenizer, max_length=64, stride=1)
    longest = max(map(len, encoded.features["input_ids"]))
    logits = np.full((2, longest, len(NAMES.labels)), -100.0)  # as Trainer pads them
    for number, labels in enumerate(encoded.features["labels"]):
        for place, label in enumerate(labels):
            logits[number, place, max(label, 0)] = 1.0
    assert predictions(NAMES, encoded, logits) == gold(NAMES, rows)


def test_long_texts_are_cut_and_counted(tokenizer):
    task = TASKS["xnli_fr"]
    short = {"premise": "Il pleut.", "hypothesis": "Il neige.", "label": 2}
    long = short | {"premise": "Il pleut. " * 40}
    encoded = encode([short, long], task, tokenizer, max_length=24, stride=1)
    assert [len(ids) <= 24 for ids in encoded.features["input_ids"]] == [True, True]
    assert encoded.figures["cut_rows"] == 1
    end = tokenizer("Il neige.", add_special_tokens=False)["input_ids"]
    assert encoded.features[1]["input_ids"][-len(end) - 1 : -1] == end
    assert encoded.features["labels"] == [2, 2]


def test_the_likeliest_label_and_the_score_itself_are_predicted(tokenizer):
    inference, similar = TASKS["xnli_fr"], TASKS["stsb_fr"]
    rows = [{"premise": "a", "hypothesis": "b", "label": number} for number in (0, 2)]
    encoded = encode(rows, inference, tokenizer, max_length=16, stride=1)
    assert predictions(inference, encoded, np.array([[1, 0, 0], [0, 1, 3]])) == ["entailment", "contradiction"]
    assert gold(inference, rows) == ["entailment", "contradiction"]
    pairs = [{"sentence1": "a", "sentence2": "b", "score": 2.5}]
    encoded = encode(pairs, similar, tokenizer, max_length=16, stride=1)
    assert predictions(similar, encoded, np.array([[3.25]])) == [3.25]
    assert gold(similar, pairs) == [2.5]
