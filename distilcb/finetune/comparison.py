"""With and without soft targets, seed by seed, in a folder that goes on where it was stopped.

<output>/settings.json              what the results depend on
<output>/teacher/                   its figures; with --teacher_base the model that was fine-tuned here
<output>/{without,with}/seed_N/     result.json (written last), predictions.jsonl, curve.jsonl, model/
<output>/results.json, results.md   the table of all that is finished
"""

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from distilcb.config import flatten
from distilcb.engine.checkpoint import write_durably
from distilcb.errors import ConfigError, TrainingError, first_line, writing
from distilcb.finetune.objective import Weights
from distilcb.finetune.report import as_table, summary
from distilcb.finetune.subjects import Subject
from distilcb.finetune.training import Outcome, Recipe, TaskTrainer, arguments, train

log = logging.getLogger(__name__)

ARMS = ("without", "with")
_TEACHER_SEED = 0
_ON_FULL_DISK = "Free some space and run the same command again."


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
        lock = FileLock(output / ".lock", blocking=False)
        try:
            with writing(output, ConfigError, "Name another --output."):
                output.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except Timeout as error:
            raise ConfigError(f"{output}: another process works there. Wait for it, or name another folder.") from error
        try:
            return self._run(output)
        finally:
            lock.release()

    def _run(self, output: Path) -> dict[str, Any]:
        check_settings(output / "settings.json", self.settings)
        teacher, results = self._teacher(output / "teacher"), finished(output)
        if teacher is not None:
            results["teacher"] = {_TEACHER_SEED: _read(output / "teacher" / "result.json")}
        for seed in self.seeds:  # seeds outside, so that what is stopped early compares like with like
            for arm in self.arms:
                folder = output / arm / f"seed_{seed}"
                taught_by = teacher if arm == "with" else None
                results.setdefault(arm, {})[seed] = self._one(folder, self.student, self.recipe, seed, taught_by, arm)
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
        _write(output / "results.json", made)
        with writing(output, ConfigError, _ON_FULL_DISK):
            write_durably(output / "results.md", as_table(found, self.subject.columns) + "\n")
        return made

    def _teacher(self, folder: Path) -> str | None:
        """The teacher's folder, once it is fine-tuned and its figures are known; None where none is wanted."""
        if self.teacher_base is not None:
            found = self._one(folder, self.teacher_base, self.teacher_recipe, _TEACHER_SEED, None, "teacher")
            if "diverged_at_step" in found:
                raise TrainingError(f"{folder}: the teacher's loss was no number. Take a smaller --teacher_lr.")
            return str(folder / "model")
        if self.teacher is not None and not (folder / "result.json").is_file():
            model = self.subject.load(self.teacher, fine_tuned=True)
            with writing(folder, ConfigError, _ON_FULL_DISK):
                folder.mkdir(parents=True, exist_ok=True)
                trainer = measuring_trainer(self.subject, model, folder)
                figures = self.subject.measure(trainer, folder / "predictions.jsonl")
            _write(folder / "result.json", {"figures": figures})
        return self.teacher

    def _one(
        self, folder: Path, model: str, recipe: Recipe, seed: int, teacher: str | None, arm: str
    ) -> dict[str, Any]:
        """The result of one training; of one that is finished what was kept."""
        if (folder / "result.json").is_file():
            return _read(folder / "result.json")
        with writing(folder, ConfigError, _ON_FULL_DISK):
            folder.mkdir(parents=True, exist_ok=True)
        taught_by = self.subject.load(teacher, fine_tuned=True) if teacher else None
        trainer, outcome = train(
            self.subject.kind,
            lambda: self.subject.load(model, fine_tuned=False),
            self.subject.data,
            self.subject.collate,
            recipe=recipe,
            seed=seed,
            teacher=taught_by,
            weights=self.weights,
            folder=folder,
            name=arm if arm == "teacher" else f"{arm} soft targets, seed {seed}",
        )
        with writing(folder, ConfigError, _ON_FULL_DISK):
            result = self._finish(folder, trainer, outcome)
        _write(folder / "result.json", result)
        return result

    def _finish(self, folder: Path, trainer: TaskTrainer, outcome: Outcome) -> dict[str, Any]:
        facts: dict[str, Any] = {"steps": outcome.steps, "seconds": round(outcome.seconds, 1)}
        lines = (
            json.dumps({"step": step, "loss": loss if math.isfinite(loss) else None}) for step, loss in outcome.curve
        )
        (folder / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if outcome.diverged_at is not None:
            log.warning("%s: the loss was no number at step %d", folder, outcome.diverged_at)
            return facts | {"diverged_at_step": outcome.diverged_at}
        figures = self.subject.measure(trainer, folder / "predictions.jsonl")
        save_model(folder / "model", trainer.trained, self.subject.tokenizer)
        log.info("%s: %s", folder, ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
        return facts | {"figures": figures}


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


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model in fp32 and its tokenizer, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
    except SafetensorError as error:  # how it tells of a full disk
        raise OSError(first_line(error)) from error
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def finished(output: Path) -> dict[str, dict[int, Any]]:
    """The results that are there by arm and seed, of earlier starts too."""
    found: dict[str, dict[int, Any]] = {}
    for arm in ARMS:
        there = {int(path.parent.name.removeprefix("seed_")): path for path in output.glob(f"{arm}/seed_*/result.json")}
        if there:
            found[arm] = {seed: _read(there[seed]) for seed in sorted(there)}
    return found


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a new folder; refuse one of others.

    Raises:
        ConfigError: names each setting that differs.
    """
    plain = json.loads(json.dumps(settings))
    if not path.is_file():
        _write(path, plain)
        return
    there, now = flatten(_read(path)), flatten(plain)
    names = [name for name in now | there if now.get(name) != there.get(name)]
    if names:
        faults = ", ".join(f"{name} {there.get(name)!r} there, {now.get(name)!r} now" for name in names)
        raise ConfigError(f"{path.parent} holds results of other settings ({faults}). Name another --output.")


def _write(path: Path, facts: dict[str, Any]) -> None:
    with writing(path.parent, ConfigError, _ON_FULL_DISK):
        write_durably(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). Delete it to have it made again.") from error
