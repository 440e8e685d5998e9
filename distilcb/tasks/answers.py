"""Questions as windows of tokens, and answers from what a model says of each token.

A context that is longer than the model reads is cut into windows that begin `stride` tokens apart, each after the whole
question: <s> question </s></s> part of the context </s>.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilcb.tasks.declarations import Task

# The original script's: tokens of a question, tokens of an answer, starts and ends that are tried together.
QUESTION_TOKENS, ANSWER_TOKENS, N_BEST = 64, 30, 20


@dataclass(frozen=True)
class Window:
    """Part of a row.

    input_ids, token_type_ids: (tokens,) int32.
    spans: (tokens, 2) int32 characters of the context, first and after the last; -1 where a token is none of it.
    """

    row: int
    input_ids: NDArray[np.int32]
    token_type_ids: NDArray[np.int32]
    spans: NDArray[np.int32]


@dataclass(frozen=True)
class Windows:
    """All windows of some rows. cut_rows: how many rows have several; cut_questions: how many lost their end."""

    windows: list[Window]
    cut_rows: int
    cut_questions: int


def windows_of(rows: Sequence[dict[str, Any]], task: Task, tokenizer: Any, *, max_length: int, stride: int) -> Windows:
    """The windows of these rows, in their order.

    Args:
        tokenizer: a fast one, which knows the characters of each token.
        max_length: tokens of a window with question and separators, 16 or more.
        stride: tokens from one window's beginning to the next one's; no more than fit are left out.
    """
    found: list[Window] = []
    cut_rows = cut_questions = 0
    for number, row in enumerate(rows):
        question, is_cut = _first_tokens(row[task.texts[0]], tokenizer, min(QUESTION_TOKENS, max_length // 2 - 2))
        own = _windows_of_row(number, question, row[task.texts[1]], tokenizer, max_length, stride)
        found += own
        cut_rows += len(own) > 1
        cut_questions += is_cut
    return Windows(found, cut_rows, cut_questions)


def _first_tokens(text: str, tokenizer: Any, most: int) -> tuple[str, bool]:
    """The text of so many tokens at most, and whether anything is left out."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return (text[: spans[most - 1][1]], True) if len(spans) > most else (text, False)


def _windows_of_row(
    number: int, question: str, context: str, tokenizer: Any, max_length: int, stride: int
) -> list[Window]:
    taken = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    room = max_length - taken - tokenizer.num_special_tokens_to_add(pair=True)
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=max(0, room - stride),  # to transformers it is what two windows share
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        verbose=False,
    )
    found = []
    for place, ids in enumerate(encoded["input_ids"]):
        spans = np.array(encoded["offset_mapping"][place], dtype=np.int32)
        spans[[part != 1 for part in encoded.sequence_ids(place)]] = -1
        types = np.array(encoded["token_type_ids"][place], dtype=np.int32)
        found.append(Window(number, np.array(ids, dtype=np.int32), types, spans))
    return found


def answer_places(window: Window, answers: dict[str, list[Any]]) -> tuple[int, int] | None:
    """First and last token of the first answer that lies in the window as a whole; None where none does."""
    inside = np.flatnonzero(window.spans[:, 0] >= 0)
    if not inside.size:
        return None
    spans = window.spans[inside]
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        end = start + len(text)
        if spans[0, 0] <= start and end <= spans[-1, 1]:
            first, last = np.flatnonzero(spans[:, 1] > start)[0], np.flatnonzero(spans[:, 0] < end)[-1]
            return int(inside[first]), int(inside[last])
    return None


def best_span(
    start_logits: NDArray[np.float32], end_logits: NDArray[np.float32], window: Window
) -> tuple[float, int, int] | None:
    """(score, first character, character after the last) of a window's likeliest answer; None where it has no context.

    Of the N_BEST likeliest first tokens and last tokens in the context the pair with the highest sum of logits, in
    order and ANSWER_TOKENS long at most.

    Args:
        start_logits, end_logits: (tokens,) of the window, or more, of which the rest is padding.
    """
    inside = np.flatnonzero(window.spans[:, 0] >= 0)
    starts, ends = (inside[np.argsort(-each[inside], kind="stable")][:N_BEST] for each in (start_logits, end_logits))
    lengths = ends[None, :] - starts[:, None] + 1
    sums = start_logits[starts][:, None] + end_logits[ends][None, :]
    sums = np.where((lengths >= 1) & (lengths <= ANSWER_TOKENS), sums, -np.inf)
    if not np.isfinite(sums).any():
        return None
    first, last = np.unravel_index(np.argmax(sums), sums.shape)
    span = window.spans[starts[first], 0], window.spans[ends[last], 1]
    return float(sums[first, last]), int(span[0]), int(span[1])


def answers_of(
    rows: Sequence[dict[str, Any]],
    task: Task,
    windows: Sequence[Window],
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
) -> list[str]:
    """The answer to each row, from its likeliest window; "" where no window gives any.

    Args:
        start_logits, end_logits: (windows, tokens).
    """
    best: dict[int, tuple[float, int, int]] = {}
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        found = best_span(starts, ends, window)
        if found and (window.row not in best or found[0] > best[window.row][0]):
            best[window.row] = found
    context = task.texts[1]
    spans = [best.get(number, (0.0, 0, 0)) for number in range(len(rows))]
    return [row[context][start:end].strip() for row, (_, start, end) in zip(rows, spans, strict=True)]
