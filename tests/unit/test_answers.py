"""Windows over long contexts, and the answers that come out of them."""

import itertools

import numpy as np
import pytest
from transformers import AutoTokenizer

from distilcb.tasks.answers import ANSWER_TOKENS, Window, answer_places, answers_of, best_span, windows_of
from distilcb.tasks.declarations import TASKS
from distilcb.tasks.encoding import encode

TASK = TASKS["piaf_qa"]
CONTEXT = (
    "Les dépenses des ménages représentent plus de 50 % de ces montants (14,2 milliards d'euros en 2003), contre 7,9 "
    "milliards d'euros pour les collectivités locales, 3,2 pour l'État, et 2,2 pour les entreprises."
)
QUESTION = "Combien dépensent les collectivités ?"


@pytest.fixture(scope="module")
def tokenizer(mini_teacher):
    return AutoTokenizer.from_pretrained(mini_teacher)


def row(answer="14,2 milliards", *, context=CONTEXT, question=QUESTION):
    return {
        "question": question,
        "context": context,
        "answers": {"text": [answer], "answer_start": [context.index(answer)]},
    }


def cut(tokenizer, *rows, max_length=40, stride=8):
    return windows_of(rows, TASK, tokenizer, max_length=max_length, stride=stride)


def inside(window):
    return np.flatnonzero(window.spans[:, 0] >= 0)


def context_tokens(tokenizer):
    return tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]


def test_windows_begin_a_stride_apart_and_leave_nothing_out(tokenizer):
    windows = cut(tokenizer, row()).windows
    everything = context_tokens(tokenizer)
    assert len(windows) > 3
    for number, window in enumerate(windows):
        part = window.input_ids[inside(window)].tolist()
        assert part == everything[8 * number : 8 * number + len(part)]
        assert window.input_ids.size <= 40
    assert windows[-1].input_ids[inside(windows[-1])].tolist()[-1] == everything[-1]
    assert all(window.input_ids.size == 40 for window in windows[:-1])


def test_every_window_begins_with_the_question(tokenizer):
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    for window in cut(tokenizer, row()).windows:
        assert window.input_ids[1 : 1 + len(question)].tolist() == question
        assert inside(window)[0] > len(question)


def test_a_stride_longer_than_the_room_leaves_nothing_out_either(tokenizer):
    windows = cut(tokenizer, row(), stride=1000).windows
    parts = [window.input_ids[inside(window)].tolist() for window in windows]
    assert list(itertools.chain(*parts)) == context_tokens(tokenizer)


def test_a_short_context_is_one_window_and_a_long_one_is_counted(tokenizer):
    short = row("Lyon", context="Il vit à Lyon.")
    found = cut(tokenizer, short, row(), short)
    assert [window.row for window in found.windows].count(0) == 1
    assert (found.cut_rows, found.cut_questions) == (1, 0)


def test_a_question_that_is_too_long_loses_its_end(tokenizer):
    found = cut(tokenizer, row(question="Pourquoi " * 100))
    assert found.cut_questions == 1
    assert all(window.input_ids.size <= 40 and inside(window).size > 10 for window in found.windows)


def text_between(window, first, last):
    return CONTEXT[window.spans[first, 0] : window.spans[last, 1]].strip()


def test_every_run_of_words_is_found_again_in_the_windows_that_hold_it(tokenizer):
    words = CONTEXT.split(" ")
    starts = [sum(len(word) + 1 for word in words[:number]) for number in range(len(words))]
    windows = cut(tokenizer, row()).windows
    for first, count in itertools.product(range(len(words)), (1, 2, 5)):
        answer = " ".join(words[first : first + count])
        answers = {"text": [answer], "answer_start": [starts[first]]}
        places = [answer_places(window, answers) for window in windows]
        texts = [text_between(window, *place) for window, place in zip(windows, places, strict=True) if place]
        assert texts, f"no window holds {answer!r}"
        assert set(texts) == {answer}


def test_an_answer_counts_at_the_very_edges_of_a_window_and_not_beyond(tokenizer):
    window = cut(tokenizer, row()).windows[1]
    places = inside(window)
    spans = window.spans[places]
    begin = spans[0, 0] + (CONTEXT[spans[0, 0]] == " ")
    whole = {"text": [CONTEXT[begin : spans[-1, 1]]], "answer_start": [int(begin)]}
    assert answer_places(window, whole) == (places[0], places[-1])
    longer = {"text": [CONTEXT[begin : spans[-1, 1] + 1]], "answer_start": [int(begin)]}
    assert answer_places(window, longer) is None
    earlier = {"text": [CONTEXT[spans[0, 0] - 1 : spans[-1, 1]]], "answer_start": [int(spans[0, 0] - 1)]}
    assert answer_places(window, earlier) is None


def test_a_window_without_the_answer_is_taught_the_separator(tokenizer):
    encoded = encode([row("2,2")], TASK, tokenizer, max_length=40, stride=8)
    features = encoded.features
    held = [answer_places(window, row("2,2")["answers"]) for window in encoded.windows]
    assert any(held)
    assert not all(held)
    for feature, place in zip(features, held, strict=True):
        assert (feature["start_positions"], feature["end_positions"]) == (place or (0, 0))
    assert encoded.windows[0].input_ids[0] == tokenizer.cls_token_id
    assert encoded.figures["answers_in_no_window"] == 0


def test_an_answer_longer_than_any_window_is_counted(tokenizer):
    encoded = encode([row(CONTEXT[4:150])], TASK, tokenizer, max_length=40, stride=8)
    assert encoded.figures["answers_in_no_window"] == 1


def window_of(*, tokens, before):
    """A window whose context token i has character i."""
    spans = np.full((tokens, 2), -1, dtype=np.int32)
    spans[before:, 0] = range(tokens - before)
    spans[before:, 1] = range(1, tokens - before + 1)
    ids = np.zeros(tokens, dtype=np.int32)
    return Window(0, ids, ids, spans)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_span_is_that_of_trying_all_pairs(seed):
    generator = np.random.default_rng(seed)
    start, end = generator.normal(size=(2, 20)).astype(np.float32)
    window = window_of(tokens=20, before=6)
    tried = {
        (first, last): float(start[first] + end[last])
        for first in range(6, 20)
        for last in range(first, min(20, first + ANSWER_TOKENS))
    }
    first, last = max(tried, key=tried.get)
    assert best_span(start, end, window) == (pytest.approx(tried[first, last]), first - 6, last - 6 + 1)


def test_an_answer_lies_in_the_context_and_is_not_too_long():
    window = window_of(tokens=60, before=6)
    start, end = np.zeros((2, 60), dtype=np.float32)
    start[0] = end[1] = 50.0  # in the question
    start[10] = end[50] = 9.0  # 41 tokens
    start[12] = end[30] = 5.0
    assert best_span(start, end, window) == (9.0 + 5.0, 10 - 6, 30 - 6 + 1)


def test_an_end_before_the_start_is_none():
    window = window_of(tokens=10, before=2)
    start, end = np.full((2, 10), -5.0, dtype=np.float32)
    start[8], end[3] = 9.0, 9.0
    _, first, last = best_span(start, end, window)
    assert last > first


def test_padding_behind_a_window_is_never_an_answer():
    window = window_of(tokens=10, before=2)
    start, end = np.zeros((2, 16), dtype=np.float32)
    start[12:], end[12:] = 50.0, 50.0
    assert best_span(start, end, window)[0] == 0.0


def test_a_window_without_context_gives_no_answer():
    assert best_span(np.zeros(4), np.zeros(4), window_of(tokens=4, before=4)) is None


def test_the_answer_comes_from_the_window_that_is_surest(tokenizer):
    rows = [row("2,2"), row("Lyon", context="Il vit à Lyon.")]
    windows = cut(tokenizer, *rows).windows
    tokens = max(window.input_ids.size for window in windows)
    start, end = np.zeros((2, len(windows), tokens), dtype=np.float32)
    for number, window in enumerate(windows):
        place = answer_places(window, rows[window.row]["answers"])
        if place:
            start[number, place[0]] = end[number, place[1]] = 5.0
        elif window.row == 0:
            start[number, inside(window)[0]] = end[number, inside(window)[0]] = 2.0
    assert answers_of(rows, TASK, windows, start, end) == ["2,2", "Lyon"]
