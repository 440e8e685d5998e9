"""Scores of predictions, as hundredths: 100 is best."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from distilcb.tasks.declarations import Task

# A word that was cut off with the end of a sentence: no entity, and as a part of speech wrong.
NOT_TAGGED = "O"

_ENGLISH_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# With their elided and contracted forms; du, des, au and aux hold one.
_FRENCH_ARTICLES = re.compile(r"\bl'|\b(?:le|la|les|un|une|du|des|au|aux)\b")


def scores(task: Task, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
    """{metric: value} of the task's metrics, each as hundredths.

    Args:
        gold, predicted: one a row: label names; numbers; lists of tags; for questions lists of right answers, and the
            answer that was given.
    """
    if task.kind == "question_answering":
        measure = {"f1": answer_f1, "exact_match": exact_match}
        return {name: _best_of(measure[name], gold, predicted, task.language) for name in task.metrics}
    if task.kind == "tagging":
        return {name: 100 * _TAGS[name](gold, predicted) for name in task.metrics}
    if task.kind == "regression":
        return {name: 100 * _correlation(name, gold, predicted) for name in task.metrics}
    names = list(task.labels)
    return {name: 100 * _LABELS[name](gold, predicted, names) for name in task.metrics}


def subword_f1(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], tokens: Sequence[Iterable[int]]
) -> float:
    """F1 over sub-words, O among the types of entities, as hundredths; not to be compared with an entity's F1.

    A word's tag counts once for each of its tokens, B and I are one type, and types are averaged by how many tokens
    they have: as the "global" F1 of the card of cmarkea/distilcamembert-base-ner, which says no more of how, where nine
    tokens of ten are O.

    Args:
        gold, predicted: tags, one a word.
        tokens: how many a word has.
    """
    from sklearn.metrics import f1_score

    right, said = ([tag.partition("-")[2] or tag for tag in _flat(rows)] for rows in (gold, predicted))
    weights = [int(count) for row in tokens for count in row]
    if not any(weights):
        return 0.0
    return 100 * float(f1_score(right, said, average="weighted", sample_weight=weights, zero_division=0))


def exact_match(given: str, right: str, *, language: str) -> float:
    """1 where both are the same once normalised, else 0."""
    return float(normalised(given, language=language) == normalised(right, language=language))


def answer_f1(given: str, right: str, *, language: str) -> float:
    """Harmonic mean of the shares of words that two answers have in common, once normalised: 0 to 1.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1.
    """
    words = [normalised(text, language=language).split() for text in (given, right)]
    if not all(words):
        return float(words[0] == words[1])
    common = (Counter(words[0]) & Counter(words[1])).total()
    return 2 * common / (len(words[0]) + len(words[1]))


def normalised(answer: str, *, language: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    English as SQuAD's script has it: a, an and the; ASCII's punctuation. French: le, la, l', les, un, une, du, des, au
    and aux; every punctuation mark, typographic ones too, in place of which nothing stands (d'eau is one word).
    """
    text = answer.lower()
    if language == "fr":
        text = _FRENCH_ARTICLES.sub(" ", text.replace("\u2019", "'"))
        return " ".join("".join(sign for sign in text if not _is_punctuation(sign)).split())
    text = "".join(sign for sign in text if sign not in string.punctuation)
    return " ".join(_ENGLISH_ARTICLES.sub(" ", text).split())


def _is_punctuation(sign: str) -> bool:
    return sign in string.punctuation or unicodedata.category(sign).startswith("P")


def _best_of(
    measure: Callable[..., float], gold: Sequence[Sequence[str]], predicted: Sequence[str], language: str
) -> float:
    """Mean over questions of the best value over a question's right answers."""
    best = [
        max(measure(given, right, language=language) for right in rights)
        for rights, given in zip(gold, predicted, strict=True)
    ]
    return 100 * float(np.mean(best))


def _accuracy(gold: Sequence[str], predicted: Sequence[str], _names: list[str]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(gold, predicted))


def _macro_f1(gold: Sequence[str], predicted: Sequence[str], _names: list[str]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=sorted(set(gold)), average="macro", zero_division=0))


def _binary_f1(gold: Sequence[str], predicted: Sequence[str], names: list[str]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=[names[1]], average="macro", zero_division=0))


def _mcc(gold: Sequence[str], predicted: Sequence[str], _names: list[str]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(gold, predicted))


def _correlation(name: str, gold: Sequence[float], predicted: Sequence[float]) -> float:
    from scipy import stats

    if len(set(predicted)) < 2 or len(set(gold)) < 2:
        return 0.0  # of a constant there is none
    return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(gold, predicted).statistic)


def _flat(rows: Sequence[Sequence[str]]) -> list[str]:
    return [tag for row in rows for tag in row]


def _entities(name: str) -> Callable[[Any, Any], float]:
    def measure(gold: Sequence[list[str]], predicted: Sequence[list[str]]) -> float:
        from seqeval import metrics

        return float(getattr(metrics, f"{name}_score")(list(gold), list(predicted), zero_division=0))

    return measure


_LABELS = {"accuracy": _accuracy, "macro_f1": _macro_f1, "binary_f1": _binary_f1, "mcc": _mcc}
_TAGS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": lambda gold, predicted: _accuracy(_flat(gold), _flat(predicted), []),
    "macro_f1": lambda gold, predicted: _macro_f1(_flat(gold), _flat(predicted), []),
    **{f"entity_{name}": _entities(name) for name in ("f1", "precision", "recall")},
}
