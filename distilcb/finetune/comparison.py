"""With and without soft targets, seed by seed, in a folder that goes on where it was stopped.

<output>/settings.json              what the results depend on
<output>/teacher/                   its figures; with --teacher_base the model that was fine-tuned here
<output>/{without,with}/seed_N/     result.json (written last), predictions.jsonl, curve.jsonl, model/
<output>/results.json, results.md   the table of all that is finished
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcb.durability import write_durably
from distilcb.errors import ConfigError, TrainingError, writing
from distilcb.finetune.objective import Weights
from distilcb.finetune.report import as_table, summary
from distilcb.finetune.runs import (
    ON_FULL_DISK,
    alone_in,
    check_settings,
    fine_tune,
    read_json,
    results_by_seed,
    write_json,
)
from distilcb.finetune.subjects import Subject
from distilcb.finetune.training import Recipe, TaskTrainer, arguments

ARMS = ("without", "with")
_TEACHER_SEED = 0


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        teacher: a model that has learnt the task; None with `teacher_base`, or where no soft targets are wanted.
        teacher_base: a model that is fine-tuned first, into <output>/teacher/model.
        arms: of ARMS.
        settings: all else that decides the results, for settings.json.
    """

    subject: Subject
    student: str
    teacher: str | None
    teacher_base: str | None
    recipe: Recipe
    teacher_recipe: Recipe
    weights: Weights
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]

    def run(self, output: Path) -> dict[str, Any]:
        """Train what is not finished yet, and write the table; returns what is in results.json.

        Raises:
            ConfigError: a folder of other settings, or one in which another process works.
            TrainingError: every seed of an arm ended without a finite loss.
        """
        with alone_in(output):
            return self._run(output)

    def _run(self, output: Path) -> dict[str, Any]:
        check_settings(output / "settings.json", self.settings)
        teacher, results = self._teacher(output / "teacher"), finished(output)
        if teacher is not None:
            results["teacher"] = {_TEACHER_SEED: read_json(output / "teacher" / "result.json")}
        for seed in self.seeds:  # seeds outside, so that what is stopped early compares like with like
            for arm in self.arms:
                results.setdefault(arm, {})[seed] = fine_tune(
                    output / arm / f"seed_{seed}",
                    self.subject,
                    self.student,
                    self.recipe,
                    seed=seed,
                    name=f"{arm} soft targets, seed {seed}",
                    teacher=teacher if arm == "with" else None,
                    weights=self.weights,
                )
            made = self._write_results(output, results)
        lost = [arm for arm in self.arms if not made["summary"][arm]["seeds"]]
        if lost:
            raise TrainingError(f"{output}: no seed of '{lost[0]}' kept a finite loss. Take a smaller --lr.")
        return made

    def _write_results(self, output: Path, results: dict[str, dict[int, Any]]) -> dict[str, Any]:
        """The results so far, also as files."""
        found = summary(results, self.subject.columns)
        made: dict[str, Any] = {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "settings": self.settings}
        made |= {"read": self.subject.facts, "results": results, "summary": found}
        write_json(output / "results.json", made)
        with writing(output, ConfigError, ON_FULL_DISK):
            write_durably(output / "results.md", as_table(found, self.subject.columns) + "\n")
        return made

    def _teacher(self, folder: Path) -> str | None:
        """The teacher's folder, once it is fine-tuned and its figures are known; None where none is wanted."""
        if self.teacher_base is not None:
            found = fine_tune(
                folder, self.subject, self.teacher_base, self.teacher_recipe, seed=_TEACHER_SEED, name="teacher"
            )
            if "diverged_at_step" in found:
                raise TrainingError(f"{folder}: the teacher's loss was no number. Take a smaller --teacher_lr.")
            return str(folder / "model")
        if self.teacher is not None and not (folder / "result.json").is_file():
            model = self.subject.load(self.teacher, fine_tuned=True)
            with writing(folder, ConfigError, ON_FULL_DISK):
                folder.mkdir(parents=True, exist_ok=True)
                trainer = measuring_trainer(self.subject, model, folder)
                figures = self.subject.measure(trainer, folder / "predictions.jsonl")
            write_json(folder / "result.json", {"figures": figures})
        return self.teacher


def measuring_trainer(subject: Subject, model: Any, folder: Path) -> TaskTrainer:
    """A trainer that only measures."""
    return TaskTrainer(
        subject.kind,
        None,
        Weights(),
        model=model,
        args=arguments(Recipe(), seed=0, folder=folder, sequences=1),
        data_collator=subject.collate,
    )


def finished(output: Path) -> dict[str, dict[int, Any]]:
    """The results that are there by arm and seed, of earlier starts too."""
    found: dict[str, dict[int, Any]] = {}
    for arm in ARMS:
        if there := results_by_seed(output / arm):
            found[arm] = there
    return found
