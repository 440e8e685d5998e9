"""The French text that is shipped: enough, of many kinds, without repetition, honestly split."""

import lzma
import re
import unicodedata
from collections import Counter

import pytest

from distilcb.config import REPOSITORY

TEXT = REPOSITORY / "recipes" / "mini" / "text"
TRAIN, HELDOUT = (sorted((TEXT / part).glob("*.txt")) for part in ("train", "heldout"))
FILES = TRAIN + HELDOUT
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")

# characters; below, a document teaches no context, above, one drowns its genre
SHORTEST, LONGEST = 300, 4000
REPEATED_WORDS = 8
# Real French of this size compresses to 33 %, text made from templates to far less.
LEAST_COMPRESSED_SHARE = 0.30


def size(paths):
    return sum(path.stat().st_size for path in paths)


def documents(paths):
    return [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def words(text):
    return re.findall(r"\w+", text.lower())


def test_there_are_100_kilobytes_of_at_least_eight_genres():
    assert size(FILES) >= 100_000
    assert len(TRAIN) >= 8


def test_the_same_genres_are_trained_on_and_held_out():
    assert [path.name for path in TRAIN] == [path.name for path in HELDOUT]


def test_no_genre_is_over_a_quarter():
    by_genre = Counter()
    for path in FILES:
        by_genre[path.name] += size([path])
    assert max(by_genre.values()) <= size(FILES) / 4


def test_a_tenth_is_held_out():
    assert 0.08 <= size(HELDOUT) / size(FILES) <= 0.13


@every_file
def test_a_line_is_a_document_of_some_length(path):
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert "\r" not in text
    assert all(SHORTEST <= len(line) <= LONGEST for line in text.splitlines())


@every_file
def test_text_is_in_composed_form_and_printable(path):
    text = path.read_text(encoding="utf-8")
    assert unicodedata.is_normalized("NFC", text)
    assert "\ufeff" not in text
    assert "\ufffd" not in text


def test_no_eight_words_in_a_row_come_twice():
    runs = Counter()
    for document in documents(FILES):
        its = words(document)
        runs.update(tuple(its[start : start + REPEATED_WORDS]) for start in range(len(its) - REPEATED_WORDS + 1))
    assert len(runs) > 10_000
    assert [" ".join(run) for run, times in runs.items() if times > 1] == []


def test_held_out_documents_are_not_trained_on():
    trained, held_out = ({tuple(words(document)) for document in documents(paths)} for paths in (TRAIN, HELDOUT))
    assert held_out
    assert trained.isdisjoint(held_out)


def test_it_is_as_rich_as_real_french():
    raw = "\n".join(documents(FILES)).encode()
    assert len(lzma.compress(raw)) >= LEAST_COMPRESSED_SHARE * len(raw)


def test_it_looks_french():
    text = "\n".join(documents(FILES))
    most_frequent = {word for word, _ in Counter(words(text)).most_common(15)}
    assert {"de", "la", "le", "et"} <= most_frequent
    accented = sum(character in "éèêàâçùûîïôœ" for character in text.lower())
    assert 0.02 < accented / len(text) < 0.06
