"""What a task's rows alone teach, without a pre-trained model: what fine-tuning must beat."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from distilcb.tasks.declarations import Task
from distilcb.tasks.encoding import gold
from distilcb.tasks.rows import Row
from distilcb.tasks.scores import scores

FLOORS = {
    "classification": "logistic regression on words and pairs of words",
    "regression": "shares of words that both texts have",
    "tagging": "each word's most frequent tag",
    "question_answering": "the first words of the context",
}
"""kind of task -> how its floor is made"""


def floor(task: Task, training: Sequence[Row], heldout: Sequence[Row]) -> dict[str, float]:
    """{metric: hundredths} of FLOORS[task.kind], learnt from `training` and measured on `heldout`."""
    return scores(task, gold(task, heldout), _PREDICTORS[task.kind](task, training, heldout))


def floor_of_other(task: Task, training: Sequence[Row], other: Task, heldout: Sequence[Row]) -> dict[str, float]:
    """What rows of `task` teach of those of another one, scored as that is; of the same kind, with as many texts."""
    names = dict(zip(task.texts, other.texts, strict=True)) | {task.target: other.target}
    return floor(other, [{theirs: row[mine] for mine, theirs in names.items()} for row in training], heldout)


def _by_words(task: Task, training: Sequence[Row], heldout: Sequence[Row]) -> list[str]:
    """Labels by words; of a pair of texts each one's, and those that both have."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labels = Counter(row[task.target] for row in training)
    if len(labels) < 2 or not any(_names_of(task, row) for row in training):
        return [task.labels[labels.most_common(1)[0][0]]] * len(heldout)
    names = TfidfVectorizer(lowercase=False, analyzer=lambda row: _names_of(task, row), min_df=1, sublinear_tf=True)
    model = make_pipeline(names, LogisticRegression(max_iter=1000))
    model.fit(training, [row[task.target] for row in training])
    return [task.labels[number] for number in model.predict(heldout)]


def _names_of(task: Task, row: Row) -> list[str]:
    texts = [_words(row[name]) for name in task.texts]
    found = [
        f"{number}:{' '.join(several)}"
        for number, words in enumerate(texts)
        for size in (1, 2)
        for several in zip(*(words[place:] for place in range(size)), strict=False)
    ]
    return found + ([f"both:{word}" for word in set(texts[0]) & set(texts[1])] if len(texts) == 2 else [])


def _words(text: str) -> list[str]:
    kept = "".join(sign.lower() if sign.isalnum() else " " for sign in text)
    return kept.split()


def _by_overlap(task: Task, _training: Sequence[Row], heldout: Sequence[Row]) -> list[float]:
    found = []
    for row in heldout:
        sets = [set(_words(row[name])) for name in task.texts]
        every = set.union(*sets)
        found.append(len(set.intersection(*sets)) / len(every) if len(sets) == 2 and every else 0.0)
    return found


def _by_lexicon(task: Task, training: Sequence[Row], heldout: Sequence[Row]) -> list[list[str]]:
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for row in training:
        for word, tag in zip(row[task.texts[0]], row[task.target], strict=True):
            counts[word][tag] += 1
    # A word that was not there before is most like those that were there once.
    unknown: Counter[int] = sum((tags for tags in counts.values() if tags.total() == 1), Counter())
    other = unknown.most_common(1)[0][0] if unknown else 0
    best = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    return [[task.labels[best.get(word, other)] for word in row[task.texts[0]]] for row in heldout]


def _by_place(task: Task, training: Sequence[Row], heldout: Sequence[Row]) -> list[str]:
    length = round(float(np.median([len(row[task.target]["text"][0].split()) for row in training])))
    return [" ".join(row[task.texts[1]].split()[:length]) for row in heldout]


_PREDICTORS: dict[str, Any] = {
    "classification": _by_words,
    "regression": _by_overlap,
    "tagging": _by_lexicon,
    "question_answering": _by_place,
}
