"""Rows of a task: <folder>/{train,dev,test}.jsonl, also .gz, or a data set of the hub."""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distilcb.errors import DataError, first_line
from distilcb.hub import HUB_PREFIX, HubDataset
from distilcb.tasks.declarations import Task

Row = dict[str, Any]

SPLITS = ("train", "dev", "test")
_SUFFIXES = (".jsonl", ".jsonl.gz")
# JSON can spell these ("\\ud83d"), and no tokenizer takes one.
_NO_CHARACTER = re.compile("[\ud800-\udfff]")
# On the hub; MNLI has two of the second kind, and the first is of the genres that it is trained on. Some say dev.
_HUB_SPLITS = {"train": ("train",), "dev": ("validation", "validation_matched", "dev"), "test": ("test",)}
# What published data sets call a field that they do not have by the task's name.
_HUB_FIELDS = {"score": ("label", "similarity_score"), "tags": ("ner_tags",), "text": ("review",)}
_HUB_LABELS = {"neg": "negative", "pos": "positive"}


@dataclass(frozen=True)
class TaskRows:
    """Where the rows of a task are: a folder, or hub:NAME or hub:NAME:CONFIG."""

    source: str

    def read(self, task: Task, split: str, *, limit: int | None = None) -> list[Row]:
        """The checked rows of a split, labels as numbers.

        Args:
            limit: the first so many only.

        Raises:
            DataError: no such split, no rows, or a row that lacks something; names file and line.
        """
        found = []
        for where, row in self._rows(task, split):
            found.append(checked(task, row, where=where))
            if len(found) == limit:
                break
        if not found:
            raise DataError(f"{self._file(split) or self.source}, {split}: no rows. Needed: a line of JSON for each.")
        if task.kind == "regression" and len(found) > 1 and len({row[task.target] for row in found}) == 1:
            raise DataError(
                f"{self.source}, {split}: '{task.target}' is {found[0][task.target]:g} in every row, as where answers "
                "are left out. Choose a --split that has them."
            )
        return found

    def heldout_split(self) -> str:
        """ "test" where there is one, else "dev"."""
        if self.source.startswith(HUB_PREFIX):
            return "dev"  # the hub's test splits mostly lack their answers
        return "test" if self._file("test") else "dev"

    def _rows(self, task: Task, split: str) -> Iterator[tuple[str, Row]]:
        if self.source.startswith(HUB_PREFIX):
            if self.source.removeprefix(HUB_PREFIX).count(":") > 1:
                raise DataError(f"{self.source}: needed hub:NAME or hub:NAME:CONFIG. Which rows, --split says.")
            return _hub_rows(task, HubDataset.parse(self.source), split)
        path = self._file(split)
        if path is None:
            names = ", ".join(f"{split}{suffix}" for suffix in _SUFFIXES)
            within = Path(self.source) / task.name
            hint = f" There is {within}: is it meant?" if within.is_dir() else ""
            raise DataError(f"{self.source}: no rows of '{split}'. Needed: a folder with {names}, or hub:NAME.{hint}")
        return _file_rows(path)

    def _file(self, split: str) -> Path | None:
        files = (Path(self.source).expanduser() / f"{split}{suffix}" for suffix in _SUFFIXES)
        return next((file for file in files if file.is_file()), None)


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after line {number}: cannot be read ({first_line(error)}).") from error


def _hub_rows(task: Task, name: HubDataset, split: str) -> Iterator[tuple[str, Row]]:
    rows, split = _loaded(name, _HUB_SPLITS[split])
    for field in task.needed_fields:
        there = [other for other in _HUB_FIELDS.get(field, ()) if other in rows.column_names]
        if field not in rows.column_names and there:
            rows = rows.rename_column(there[0], field)
    names = _class_names(rows.features.get(task.target), task.labels)
    if names == [str(number) for number in range(len(names))]:
        names = []  # they say no more than the numbers
    for number, row in enumerate(rows, 1):
        where, target = f"{name.name}, {split}, row {number}", row.get(task.target)
        if names:
            row = row | {task.target: _as_names(target, names)}
        elif task.kind == "tagging" and isinstance(target, list) and any(isinstance(tag, int) for tag in target):
            raise DataError(  # data sets of names count them in different orders
                f"{where}: '{task.target}' holds numbers, and the data set does not say what they stand for. Write the "
                "rows as train.jsonl and dev.jsonl with the tags' names, and give that folder."
            )
        yield where, row


def _loaded(name: HubDataset, splits: Sequence[str]) -> tuple[Any, str]:
    """The first of these splits that there is, and its name."""
    try:
        return replace(name, split=splits[0]).load(), splits[0]
    except DataError as error:
        for other in splits[1:]:
            with suppress(DataError):
                return replace(name, split=other).load(), other
        raise DataError(f"{error} Where it is a split that is missing, choose another --split.") from error


def _class_names(feature: Any, labels: Sequence[str]) -> list[str]:
    """The names behind a data set's numbers, where it has some, as the task calls them."""
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None) or []
    return [name if name in labels else _HUB_LABELS.get(name, name) for name in names]


def _as_names(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_as_names(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def checked(task: Task, row: Any, *, where: str) -> Row:
    """The fields of a row that the task needs, labels as numbers.

    Raises:
        DataError: what is missing or does not fit, with what was needed.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: came {type(row).__name__}, needed an object with {', '.join(task.needed_fields)}.")
    missing = [name for name in task.needed_fields if row.get(name) is None]
    if missing:
        unlabelled = " Rows without answers cannot be used: to measure, choose a --split that has them." * (
            missing == [task.target]
        )
        there = ", ".join(f"{name}: null" if value is None else str(name) for name, value in row.items())
        raise DataError(
            f"{where}: no {', '.join(missing)}; came {there}, task {task.name} needs "
            f"{', '.join(task.needed_fields)}.{unlabelled}"
        )
    texts = {name: row[name] for name in task.texts}
    wanted = list if task.kind == "tagging" else str
    for name, value in texts.items():
        if not isinstance(value, wanted) or (wanted is list and not all(isinstance(word, str) for word in value)):
            needed = "a list of words" if wanted is list else "text"
            raise DataError(f"{where}: '{name}' holds {type(value).__name__}, needed {needed}.")
        if value == []:
            raise DataError(f"{where}: '{name}' holds no word. Leave the row out.")
        if _NO_CHARACTER.search("".join(value)):
            raise DataError(f"{where}: '{name}' holds half a character (a lone surrogate). Mend or leave out the row.")
    return texts | {task.target: _target(task, row[task.target], texts, where)}


def _target(task: Task, value: Any, texts: Row, where: str) -> Any:
    if task.kind == "regression":
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise DataError(f"{where}: '{task.target}' is {value!r}, needed a number.")
        return float(value)
    if task.kind == "classification":
        return _label_number(task, value, where)
    if task.kind == "tagging":
        words = texts[task.texts[0]]
        if not isinstance(value, list) or len(value) != len(words):
            came = f"{len(value)} tags" if isinstance(value, list) else type(value).__name__
            raise DataError(f"{where}: '{task.target}' holds {came}, needed a list of {len(words)}, one a word.")
        return [_label_number(task, each, where) for each in value]
    return _answers(task, value, texts[task.texts[1]], where)


def _label_number(task: Task, value: Any, where: str) -> int:
    if isinstance(value, str) and value in task.labels:
        return task.labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return value
    if value == -1:
        raise DataError(f"{where}: '{task.target}' is -1, which stands for no label: choose a --split that has them.")
    raise DataError(
        f"{where}: '{task.target}' is {value!r}; task {task.name} has {', '.join(task.labels)}, or their numbers "
        "from 0."
    )


def _answers(task: Task, value: Any, context: str, where: str) -> Row:
    texts = value.get("text") if isinstance(value, dict) else None
    starts = value.get("answer_start") if isinstance(value, dict) else None
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(f"{where}: '{task.target}' is {value!r}, needed {{'text': [...], 'answer_start': [...]}}.")
    if not texts:
        raise DataError(f"{where}: no answer. Questions without one, as in SQuAD 2, cannot be used: leave them out.")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            raise DataError(
                f"{where}: answer {text!r} at {start!r}, needed text and the number of its first character."
            )
        if context[start : start + len(text)] != text:
            there = context[start : start + len(text)]
            raise DataError(f"{where}: the answer {text!r} is not at character {start} of the context, but {there!r}.")
    return {"text": list(texts), "answer_start": list(starts)}
