"""Labelled tasks, each declared once: what its rows hold, what is asked, what it is scored by.

A new one is a line in TASKS, or a YAML file with the same names (`read_task`).
"""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from distilcb.errors import ConfigError, first_line
from distilcb.recipe import UniqueKeyLoader

Kind = Literal["question_answering", "classification", "regression", "tagging"]

METRICS: dict[str, tuple[str, ...]] = {
    "question_answering": ("f1", "exact_match"),
    "classification": ("accuracy", "macro_f1", "binary_f1", "mcc"),
    "regression": ("pearson", "spearman"),
    "tagging": ("accuracy", "macro_f1", "entity_f1", "entity_precision", "entity_recall"),
}
_TEXTS = {"question_answering": (2,), "classification": (1, 2), "regression": (1, 2), "tagging": (1,)}


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        texts: the fields that are read: one text or a pair; question and context; the list of words to tag.
        target: the field with the answer: a label or its number among `labels`; a number; a list of tags, one a word;
            {"text": [...], "answer_start": [...]} in characters of the context.
        labels: in the order of their numbers; those of a model's head.
        metrics: some of METRICS[kind]; the first one is the task's own.
        language: whose articles an answer is compared without: en or fr.
    """

    name: str
    kind: Kind
    texts: tuple[str, ...]
    target: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    language: str = "fr"

    def __post_init__(self) -> None:
        faults = []
        if self.kind not in get_args(Kind):
            faults.append(f"kind={self.kind}, needed one of {', '.join(get_args(Kind))}")
        elif len(self.texts) not in _TEXTS[self.kind]:
            faults.append(f"texts={list(self.texts)}: {self.kind} reads {' or '.join(map(str, _TEXTS[self.kind]))}")
        if (self.kind in ("classification", "tagging")) != bool(self.labels):
            faults.append(f"labels={list(self.labels)}: classification and tagging have some, the others none")
        if len(set(self.labels)) < len(self.labels):
            faults.append(f"labels={list(self.labels)}: one stands there twice")
        known = METRICS.get(self.kind, self.metrics)
        if not self.metrics or set(self.metrics) - set(known):
            faults.append(f"metrics={list(self.metrics)}, needed some of {', '.join(known)}")
        elif "binary_f1" in self.metrics and len(self.labels) != 2:
            faults.append(f"metrics={list(self.metrics)}: binary_f1 is of two labels, there are {len(self.labels)}")
        if self.language not in ("en", "fr"):
            faults.append(f"language={self.language}, needed en or fr")
        if faults:
            raise ConfigError(f"task {self.name}: {'; '.join(faults)}.")

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """What a labelled row must hold."""
        return (*self.texts, self.target)


def _entities(*names: str) -> tuple[str, ...]:
    return ("O", *(f"{place}-{name}" for name in names for place in ("B", "I")))


# The seventeen of Universal Dependencies.
_PARTS_OF_SPEECH = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
    *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
_SHARES = ("accuracy", "macro_f1")
_CORRELATIONS = ("pearson", "spearman")
_ANSWERS = ("f1", "exact_match")


def _classification(name: str, texts: tuple[str, ...], labels: tuple[str, ...], metrics: tuple[str, ...]) -> Task:
    return Task(name, "classification", texts, "label", metrics, labels)


def _similarity(name: str) -> Task:
    return Task(name, "regression", ("sentence1", "sentence2"), "score", _CORRELATIONS)


def _names(name: str, *entities: str) -> Task:
    metrics = ("entity_f1", "entity_precision", "entity_recall")
    return Task(name, "tagging", ("tokens",), "tags", metrics, _entities(*entities))


def _parts_of_speech(name: str) -> Task:
    return Task(name, "tagging", ("tokens",), "upos", _SHARES, _PARTS_OF_SPEECH)


def _questions(name: str, language: str) -> Task:
    return Task(name, "question_answering", ("question", "context"), "answers", _ANSWERS, language=language)


_INFERENCE = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_TASKS = (
    _questions("piaf_qa", "fr"),
    _questions("fquad", "fr"),
    _questions("squad", "en"),
    _classification("xnli_fr", ("premise", "hypothesis"), _INFERENCE, _SHARES),
    _classification("xnli_en", ("premise", "hypothesis"), _INFERENCE, _SHARES),
    _classification("xnli_de", ("premise", "hypothesis"), _INFERENCE, _SHARES),
    _classification("cls_fr", ("text",), ("negative", "positive"), _SHARES),
    _classification("pawsx_fr", _PAIR, ("different", "paraphrase"), _SHARES),
    _classification("allocine_fr", ("text",), ("negative", "positive"), _SHARES),
    _classification("qfrcola", ("sentence",), ("unacceptable", "acceptable"), ("mcc", *_SHARES)),
    _similarity("stsb_fr"),
    _names("ner_fr", "PER", "ORG", "LOC", "MISC"),
    _names("wikiner_fr", "PER", "ORG", "LOC", "MISC"),
    _names("wikiann_fr", "PER", "ORG", "LOC"),
    _parts_of_speech("pos_fr_gsd"),
    _parts_of_speech("pos_fr_sequoia"),
    _parts_of_speech("pos_fr_rhapsodie"),
    _classification("sst2", ("sentence",), ("negative", "positive"), _SHARES),
    _classification("cola", ("sentence",), ("unacceptable", "acceptable"), ("mcc", *_SHARES)),
    _classification("mrpc", _PAIR, ("not_equivalent", "equivalent"), (*_SHARES, "binary_f1")),
    _classification("mnli", ("premise", "hypothesis"), _INFERENCE, _SHARES),
    _classification("qnli", ("question", "sentence"), ("entailment", "not_entailment"), _SHARES),
    _classification("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), (*_SHARES, "binary_f1")),
    _classification("rte", _PAIR, ("entailment", "not_entailment"), _SHARES),
    _classification("wnli", _PAIR, ("not_entailment", "entailment"), _SHARES),
    _similarity("stsb"),
    _names("ner_en", "PER", "ORG", "LOC", "MISC"),
    _names("ner_de", "PER", "ORG", "LOC", "MISC"),
    _parts_of_speech("pos_en_ewt"),
    _parts_of_speech("pos_de_gsd"),
)
TASKS = {task.name: task for task in _TASKS}


def task_named(name: str, *, option: str = "--task") -> Task:
    """The task of this name, or the one that a YAML file declares.

    Raises:
        ConfigError: no such name, or a file that declares none.
    """
    if name.endswith((".yaml", ".yml")):
        return read_task(Path(name))
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{option} {name}: needed one of {', '.join(TASKS)}, or a YAML file that declares one.{meant}"
        )
    return TASKS[name]


def read_task(path: Path) -> Task:
    """The task of a YAML file with the names of `Task`; its own name is the file's.

    Raises:
        ConfigError: unreadable, names that are none or missing, or values that do not go together.
    """
    try:
        facts: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where} cannot be read ({first_line(error)}).") from error
    names = [field.name for field in fields(Task) if field.name != "name"]
    needed = ["kind", "texts", "target", "metrics"]
    if not isinstance(facts, dict) or set(facts) - set(names) or set(needed) - set(facts):
        came = facts if isinstance(facts, dict) else {}
        odd = [f"{name} is not known" for name in came if name not in names]
        odd += [f"{name} is missing" for name in needed if name not in came]
        raise ConfigError(
            f"{path}: {', '.join(odd) if isinstance(facts, dict) else 'names and values were to stand there'}. "
            f"Needed: {', '.join(needed)}; for classification and tagging labels too; language for questions. "
            "The task is called as its file."
        )
    faults = [_fault_of_value(name, value) for name, value in facts.items()]
    if any(faults):
        raise ConfigError(f"{path}: {'; '.join(filter(None, faults))}.")
    lists = {name: tuple(facts[name]) for name in _LISTS if name in facts}
    values: dict[str, Any] = {"name": path.stem} | facts | lists
    return Task(**values)


_LISTS = ("texts", "metrics", "labels")


def _fault_of_value(name: str, value: Any) -> str | None:
    """What is wrong with a value of a YAML file; YAML takes an unquoted yes, no, on and off for true and false."""
    is_list = name in _LISTS
    if isinstance(value, list) == is_list and all(isinstance(each, str) for each in (value if is_list else [value])):
        return None
    needed = "a list of texts, such as [one, two]" if is_list else "a text"
    return f"{name}={value!r}, needed {needed}; put quotes around numbers, yes, no, on and off"
