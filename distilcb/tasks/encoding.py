"""Rows -> what a model reads, and what it says -> predictions, for every kind of task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilcb.tasks.answers import Window, answer_places, answers_of, windows_of
from distilcb.tasks.declarations import Task
from distilcb.tasks.rows import Row
from distilcb.tasks.scores import NOT_TAGGED

IGNORED = -100
"""the label of a token that is not asked for, as in transformers"""


@dataclass(frozen=True)
class Encoded:
    """Rows as a model reads them.

    Attributes:
        features: a datasets.Dataset of input_ids, token_type_ids and the labels, unpadded.
        figures: how many rows and sequences there are, and how many were cut.
        windows: of questions, one a sequence.
        word_places: of tagging, by row: the token of each word, -1 where it was cut off.
        word_tokens: likewise: how many tokens of each word there are.
    """

    rows: Sequence[Row]
    features: Any
    figures: dict[str, int]
    windows: Sequence[Window] = field(default=(), repr=False)
    word_places: Sequence[NDArray[np.int64]] = field(default=(), repr=False)
    word_tokens: Sequence[NDArray[np.int64]] = field(default=(), repr=False)


def encode(rows: Sequence[Row], task: Task, tokenizer: Any, *, max_length: int, stride: int) -> Encoded:
    """The rows of a task for a model.

    Args:
        tokenizer: a fast one of Hugging Face's.
        max_length: tokens of a sequence; questions are windowed, everything else is cut and counted.
        stride: tokens from window to window.
    """
    if task.kind == "question_answering":
        return _questions(rows, task, tokenizer, max_length, stride)
    if task.kind == "tagging":
        return _tagged(rows, task, tokenizer, max_length)
    return _texts(rows, task, tokenizer, max_length)


def predictions(task: Task, encoded: Encoded, logits: Any) -> list[Any]:
    """What the model says of each row, as `scores` takes it: label names, numbers, lists of tags, answers.

    Args:
        logits: as transformers' Trainer gives them: of questions a pair (windows, tokens), of tagging
            (rows, tokens, labels), else (rows, labels or 1).
    """
    if task.kind == "question_answering":
        return list(answers_of(encoded.rows, task, encoded.windows, *logits))
    if task.kind == "regression":
        return [float(value) for value in np.asarray(logits).reshape(len(encoded.rows))]
    chosen = np.asarray(logits).argmax(-1)
    if task.kind == "classification":
        return [task.labels[number] for number in chosen]
    return [
        [task.labels[row[place]] if place >= 0 else NOT_TAGGED for place in places]
        for row, places in zip(chosen, encoded.word_places, strict=True)
    ]


def gold(task: Task, rows: Sequence[Row]) -> list[Any]:
    """What is right of each row, as `scores` takes it."""
    targets = [row[task.target] for row in rows]
    if task.kind == "question_answering":
        return [target["text"] for target in targets]
    if task.kind == "tagging":
        return [[task.labels[number] for number in target] for target in targets]
    return [task.labels[target] for target in targets] if task.kind == "classification" else targets


def _dataset(columns: dict[str, Any]) -> Any:
    import datasets

    return datasets.Dataset.from_dict(columns)


def _texts(rows: Sequence[Row], task: Task, tokenizer: Any, max_length: int) -> Encoded:
    texts = [[row[name] for row in rows] for name in task.texts]
    whole = tokenizer(*texts, return_token_type_ids=True, verbose=False)
    kept = tokenizer(*texts, return_token_type_ids=True, truncation=True, max_length=max_length)
    cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    targets = [row[task.target] for row in rows]
    columns = {"input_ids": kept["input_ids"], "token_type_ids": kept["token_type_ids"], "labels": targets}
    return Encoded(rows, _dataset(columns), {"rows": len(rows), "sequences": len(rows), "cut_rows": cut})


def _tagged(rows: Sequence[Row], task: Task, tokenizer: Any, max_length: int) -> Encoded:
    """A word's tag stands at its first token; the others are not asked for."""
    sentences = [row[task.texts[0]] for row in rows]
    encoded = tokenizer(
        sentences, is_split_into_words=True, truncation=True, max_length=max_length, return_token_type_ids=True
    )
    labels, places, counts = [], [], []
    for number, row in enumerate(rows):
        words = [word for word in encoded.word_ids(number) if word is not None]
        place = _first_places(encoded.word_ids(number), len(sentences[number]))
        own = np.full(len(encoded["input_ids"][number]), IGNORED, dtype=np.int64)
        own[place[place >= 0]] = np.array(row[task.target], dtype=np.int64)[place >= 0]
        labels.append(own)
        places.append(place)
        counts.append(np.bincount(words, minlength=len(place)))
    columns = {"input_ids": encoded["input_ids"], "token_type_ids": encoded["token_type_ids"], "labels": labels}
    figures = {
        "rows": len(rows),
        "sequences": len(rows),
        "cut_rows": sum(bool(encoded[number].overflowing) for number in range(len(rows))),
        "words": sum(map(len, places)),
        "words_without_token": int(sum((place < 0).sum() for place in places)),
    }
    return Encoded(rows, _dataset(columns), figures, word_places=places, word_tokens=counts)


def _first_places(word_ids: Sequence[int | None], words: int) -> NDArray[np.int64]:
    """(words,) the first token of each word; -1 where it has none."""
    places = np.full(words, -1, dtype=np.int64)
    for place, word in enumerate(word_ids):
        if word is not None and places[word] < 0:
            places[word] = place
    return places


def _questions(rows: Sequence[Row], task: Task, tokenizer: Any, max_length: int, stride: int) -> Encoded:
    """A window without the whole answer points at its first separator, as the original script has it."""
    cut = windows_of(rows, task, tokenizer, max_length=max_length, stride=stride)
    places = [answer_places(window, rows[window.row][task.target]) for window in cut.windows]
    nowhere = [_separator(window, tokenizer) for window in cut.windows]
    held = {window.row for window, place in zip(cut.windows, places, strict=True) if place}
    columns = {
        "input_ids": [window.input_ids for window in cut.windows],
        "token_type_ids": [window.token_type_ids for window in cut.windows],
        "start_positions": [place[0] if place else other for place, other in zip(places, nowhere, strict=True)],
        "end_positions": [place[1] if place else other for place, other in zip(places, nowhere, strict=True)],
    }
    figures = {
        "rows": len(rows),
        "sequences": len(cut.windows),
        "cut_rows": cut.cut_rows,
        "cut_questions": cut.cut_questions,
        "answers_in_no_window": len(rows) - len(held),
    }
    return Encoded(rows, _dataset(columns), figures, windows=cut.windows)


def _separator(window: Window, tokenizer: Any) -> int:
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    return int(np.flatnonzero(window.input_ids == first)[0])
