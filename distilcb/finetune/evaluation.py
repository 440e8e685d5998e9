"""Models on labelled tasks, seed by seed, in a folder that goes on where it was stopped.

<output>/<task>/settings.json     what its results depend on
<output>/<task>/floor.json        what is reached without a pre-trained model
<output>/<task>/<model>/seed_N/   result.json (written last), curve.jsonl, predictions.jsonl and, of
                                  --zero_shot, predictions_<task>.jsonl
<output>/results.json, results.md   of the models and tasks that are asked for, all that is finished
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distilcb.durability import write_durably
from distilcb.errors import ConfigError, TrainingError, writing
from distilcb.finetune.evaluation_report import as_markdown, summary_of_task
from distilcb.finetune.models import content_of, longest_sequence
from distilcb.finetune.runs import (
    ON_FULL_DISK,
    PREDICTIONS,
    alone_in,
    check_settings,
    fine_tune,
    predictions_of,
    read_json,
    results_by_seed,
    write_json,
)
from distilcb.finetune.subjects import LabelledTask
from distilcb.finetune.training import Recipe, precision
from distilcb.tasks.declarations import Task
from distilcb.tasks.floors import FLOORS, floor, floor_of_other

log = logging.getLogger(__name__)

TEACHER = "teacher"
_FEW_ROWS, _SEEDS, _SEEDS_OF_FEW_ROWS = 3000, 3, 5


def gave_one_label(file: Path) -> bool:
    """Whether every row of these predictions has the same, as of a model that collapsed; not where nobody can tell."""
    try:
        with file.open(encoding="utf-8") as lines:
            given = (json.loads(line)["predicted"] for line in lines)
            first = next(given, None)
            return first is not None and all(each == first for each in given)
    except (OSError, ValueError):  # predictions may be deleted; figures are kept without them
        return False


def check_none_is_lost(made: Mapping[str, Any], output: Path) -> None:
    """Of results; it is asked last, as what else there is to do holds of the other models.

    Raises:
        TrainingError: every seed of a model ended without a finite loss.
    """
    lost = [
        f"{name} on {title}"
        for title, found in made["tasks"].items()
        for name, each in found["models"].items()
        if not each["seeds"] and each["diverged"]
    ]
    if lost:
        raise TrainingError(f"{output}: no seed of {', '.join(lost)} kept a finite loss. Take a smaller --lr.")


@dataclass(frozen=True)
class AskedTask:
    """A task, where its rows are, and which others a model that has learnt it is measured on too (zero-shot).

    Attributes:
        zero_shot: of the same kind, metrics and labels, with as many texts.
    """

    task: Task
    source: str
    zero_shot: tuple["AskedTask", ...] = ()

    def __post_init__(self) -> None:
        names = [other.task.name for other in self.zero_shot]
        if len(set(names)) < len(names):
            raise ConfigError(f"--zero_shot: {self.task.name} is followed by one task twice: {', '.join(names)}.")
        for other in self.zero_shot:
            if other.task.metrics != self.task.metrics:
                raise ConfigError(
                    f"--zero_shot {self.task.name}:{other.task.name}: one is scored by {', '.join(self.task.metrics)}, "
                    f"the other by {', '.join(other.task.metrics)}. They must be the same."
                )
            if len(other.task.texts) != len(self.task.texts):
                raise ConfigError(
                    f"--zero_shot {self.task.name}:{other.task.name}: one reads {', '.join(self.task.texts)}, the "
                    f"other {', '.join(other.task.texts)}. They must be as many."
                )
            if (other.task.kind, other.task.labels) != (self.task.kind, self.task.labels):
                raise ConfigError(
                    f"--zero_shot {self.task.name}:{other.task.name}: one has the labels "
                    f"{', '.join(self.task.labels) or 'of no list'} ({self.task.kind}), the other "
                    f"{', '.join(other.task.labels) or 'of no list'} ({other.task.kind}). They must be the same."
                )


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        models: what each is called in the results -> folder or hub name; the teacher as "teacher".
        max_lengths: kind of task -> tokens of a sequence.
        seeds: None: 3, of tasks with under 3,000 rows 5.
        split: rows to measure on; None: test where there is one.
    """

    models: Mapping[str, str]
    tasks: tuple[AskedTask, ...]
    recipe: Recipe
    max_lengths: Mapping[str, int]
    stride: int
    seeds: tuple[int, ...] | None = None
    split: str | None = None
    train_rows: int | None = None
    folders: dict[str, str] = field(init=False)
    _measured: dict[tuple[str, str, str], LabelledTask] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        folders = {
            name: re.sub(r"[^\w.-]+", "_", name).strip("_.") or Path(model).resolve().name
            for name, model in self.models.items()
        }
        for folder in folders.values():
            same = [other for other in folders if folders[other] == folder]
            if len(same) > 1:
                raise ConfigError(f"{' and '.join(same)} would share the folder {folder}. Evaluate them one by one.")
        object.__setattr__(self, "folders", folders)

    def run(self, output: Path) -> dict[str, Any]:
        """Train what is not finished yet, and write the tables; returns what is in results.json.

        Raises:
            ConfigError: a folder of other settings, or one in which another process works.
            DataError, ModelError: rows or models that cannot be used; told before anything is trained.
        """
        with alone_in(output):
            subjects = {asked.task.name: self._subjects(asked) for asked in self.tasks}
            for asked in self.tasks:
                self._check(output / asked.task.name, asked, subjects[asked.task.name])
            return self._run(output, subjects)

    def _run(self, output: Path, subjects: dict[str, dict[str, LabelledTask]]) -> dict[str, Any]:
        planned = [
            (asked, seed, name)
            for asked in self.tasks
            for seed in self._seeds(next(iter(subjects[asked.task.name].values())))
            for name in self.models  # models inside, so that what is stopped early compares like with like
        ]
        made: dict[str, Any] = {}
        bar = tqdm(planned, desc="fine-tuning", unit="training", disable=not sys.stderr.isatty())
        for number, (asked, seed, name) in enumerate(bar, 1):
            title = asked.task.name
            folder = output / title / self.folders[name] / f"seed_{seed}"
            if not (folder / "result.json").is_file():
                log.info("%d of %d: %s, %s, seed %d", number, len(planned), title, name, seed)
            fine_tune(
                folder,
                subjects[title][name],
                self.models[name],
                self.recipe,
                seed=seed,
                name=f"{title}, {name}, seed {seed}",
                keep_model=False,
                others=self._others(asked, name),
            )
            made = self._write(output, subjects)
        return made

    def _write(self, output: Path, subjects: dict[str, dict[str, LabelledTask]]) -> dict[str, Any]:
        """The results so far, also as files."""
        tasks = {asked.task.name: self._summary(output, asked, subjects[asked.task.name]) for asked in self.tasks}
        made: dict[str, Any] = {
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "models": dict(self.models),
            "recipe": asdict(self.recipe),
            "tasks": tasks,
        }
        write_json(output / "results.json", made)
        with writing(output, ConfigError, ON_FULL_DISK):
            write_durably(output / "results.md", as_markdown(made) + "\n")
        return made

    def _summary(self, output: Path, asked: AskedTask, subjects: Mapping[str, LabelledTask]) -> dict[str, Any]:
        folder, first = output / asked.task.name, next(iter(subjects.values()))
        results = {name: results_by_seed(folder / self.folders[name]) for name in self.models}
        kept = read_json(folder / "floor.json")
        names = [other.task.name for other in asked.zero_shot]
        others = {
            title: {
                "floor": kept["others"][title],
                "read": {name: self._others(asked, name)[title].facts for name in self.models},
            }
            for title in names
        }
        found = summary_of_task(results, first.columns, kept["figures"], teacher=TEACHER, others=others)
        if asked.task.kind == "classification":
            for name, model in found["models"].items():
                of = folder / self.folders[name]
                for each, file in ((model, PREDICTIONS), *((model["others"][t], predictions_of(t)) for t in names)):
                    each["one_label"] = [seed for seed in each["seeds"] if gave_one_label(of / f"seed_{seed}" / file)]
        return found | {"floor_is": FLOORS[asked.task.kind], "read": {name: s.facts for name, s in subjects.items()}}

    def _subjects(self, asked: AskedTask) -> dict[str, LabelledTask]:
        return {name: self._subject(asked, model) for name, model in self.models.items()}

    def _subject(self, asked: AskedTask, model: str, *, heldout_only: bool = False) -> LabelledTask:
        longest = longest_sequence(list(self.models.values()), self.max_lengths[asked.task.kind])
        return LabelledTask(
            asked.task,
            asked.source,
            model,
            max_length=longest,
            stride=self.stride,
            split=self.split,
            train_rows=self.train_rows,
            heldout_only=heldout_only,
        )

    def _others(self, asked: AskedTask, name: str) -> dict[str, LabelledTask]:
        """What else a model is measured on, read once."""
        found = {}
        for other in asked.zero_shot:
            key = (other.task.name, other.source, name)
            if key not in self._measured:
                self._measured[key] = self._subject(other, self.models[name], heldout_only=True)
            found[other.task.name] = self._measured[key]
        return found

    def _check(self, folder: Path, asked: AskedTask, subjects: Mapping[str, LabelledTask]) -> None:
        """Refuse what would mix with other results, and models that the task cannot have; make the floor."""
        first = next(iter(subjects.values()))
        settings = {
            "declared": asdict(asked.task),
            "content": first.content,
            "train_rows": self.train_rows if first.facts["first_rows_only"] else None,
            "split": first.facts["split"],
            "max_length": first.facts["max_length"],
            "stride": self.stride,
            "recipe": asdict(self.recipe),
            "precision": precision(),
            "zero_shot": {
                title: {"declared": asdict(other.task), "content": other.content}
                for title, other in self._others(asked, next(iter(self.models))).items()
            },
        }
        check_settings(folder / "settings.json", settings)
        for name, model in self.models.items():
            subjects[name].load(model, fine_tuned=False)
            self._others(asked, name)
            check_settings(folder / self.folders[name] / "settings.json", {"content": content_of(model)})
        kept = folder / "floor.json"
        # Earlier versions made none of other tasks.
        if not kept.is_file() or (asked.zero_shot and "others" not in read_json(kept)):
            figures = floor(asked.task, first.training_rows, first.heldout.rows)
            others = {
                title: floor_of_other(asked.task, first.training_rows, other.task, other.heldout.rows)
                for title, other in self._others(asked, next(iter(self.models))).items()
            }
            made = {"made_of": FLOORS[asked.task.kind], "figures": figures} | ({"others": others} if others else {})
            write_json(kept, made)

    def _seeds(self, subject: LabelledTask) -> tuple[int, ...]:
        if self.seeds is not None:
            return self.seeds
        return tuple(range(_SEEDS_OF_FEW_ROWS if len(subject.training_rows) < _FEW_ROWS else _SEEDS))
