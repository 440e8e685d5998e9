"""One fine-tuning in a folder of its own: result.json (written last), predictions.jsonl, curve.jsonl, model/.

What comparisons with a teacher's soft targets and evaluations of several models have in common: a folder has settings,
one process at a time, and results that stay when it is stopped.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from distilcb.config import flatten
from distilcb.durability import write_durably
from distilcb.errors import ConfigError, first_line, writing
from distilcb.finetune.objective import Weights
from distilcb.finetune.subjects import Subject
from distilcb.finetune.training import Outcome, Recipe, TaskTrainer, train
from distilcb.surroundings import surroundings

log = logging.getLogger(__name__)

# What a folder from before these were kept was made with; None: nobody knows, so it goes on as asked for.
_LATER_SETTINGS = {
    "precision": None,
    "train_rows": None,
    "recipe.by_length": False,
    "teacher_recipe.by_length": False,
}
PREDICTIONS = "predictions.jsonl"
_LIBRARIES = ("accelerate", "scikit-learn", "scipy", "seqeval", "tokenizers")
ON_FULL_DISK = "Free some space and run the same command again."


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """A folder, made where it is not there, in which no other process works meanwhile.

    Raises:
        ConfigError: another one does, or it cannot be written to.
    """
    lock = FileLock(output / ".lock", blocking=False)
    try:
        with writing(output, ConfigError, "Name another --output."):
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise ConfigError(f"{output}: another process works there. Wait for it, or name another folder.") from error
    try:
        yield
    finally:
        lock.release()


def fine_tune(
    folder: Path,
    subject: Subject,
    model: str,
    recipe: Recipe,
    *,
    seed: int,
    name: str,
    teacher: str | None = None,
    weights: Weights | None = None,
    keep_model: bool = True,
    others: Mapping[str, Subject] | None = None,
) -> dict[str, Any]:
    """{"steps", "seconds", "made_with", "figures"} of one training, or "diverged_at_step" in place of figures.

    Once it is finished, what was kept of it.

    Args:
        model: folder or hub name; its head for the task is new.
        name: for log lines.
        teacher: folder or hub name of a fine-tuned model whose soft targets are taken too.
        keep_model: whether to write <folder>/model.
        others: what is measured too without having been trained on; its figures are kept as "others".

    Raises:
        ConfigError: a full disk, or a result that cannot be read.
    """
    if (folder / "result.json").is_file():
        return read_json(folder / "result.json")
    with writing(folder, ConfigError, ON_FULL_DISK):
        folder.mkdir(parents=True, exist_ok=True)
    made_with = surroundings()  # as it begins: that is the code that runs
    made_with["versions"] |= {library: version(library) for library in _LIBRARIES}
    taught_by = subject.load(teacher, fine_tuned=True) if teacher else None
    trainer, outcome = train(
        subject.kind,
        lambda: subject.load(model, fine_tuned=False),
        subject.data,
        subject.collate,
        recipe=recipe,
        seed=seed,
        teacher=taught_by,
        weights=weights or Weights(),
        folder=folder,
        name=name,
    )
    with writing(folder, ConfigError, ON_FULL_DISK):
        result = _finish(folder, subject, trainer, outcome, keep_model=keep_model, others=others or {})
    result["made_with"] = made_with
    write_json(folder / "result.json", result)
    return result


def _finish(
    folder: Path,
    subject: Subject,
    trainer: TaskTrainer,
    outcome: Outcome,
    *,
    keep_model: bool,
    others: Mapping[str, Subject],
) -> dict[str, Any]:
    facts: dict[str, Any] = {"steps": outcome.steps, "seconds": round(outcome.seconds, 1)}
    lines = (json.dumps({"step": step, "loss": loss if math.isfinite(loss) else None}) for step, loss in outcome.curve)
    (folder / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if outcome.diverged_at is not None:
        log.warning("%s: the loss was no number at step %d", folder, outcome.diverged_at)
        return facts | {"diverged_at_step": outcome.diverged_at}
    figures = subject.measure(trainer, folder / PREDICTIONS)
    if keep_model:
        save_model(folder / "model", trainer.trained, subject.tokenizer)
    log.info("%s: %s", folder, ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    facts["figures"] = figures
    if others:
        measured = {each: other.measure(trainer, folder / predictions_of(each)) for each, other in others.items()}
        facts["others"] = measured
    return facts


def predictions_of(other: str) -> str:
    """The file of what was said of the rows of another task than the one that was learnt."""
    return f"predictions_{other}.jsonl"


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


def results_by_seed(folder: Path) -> dict[int, dict[str, Any]]:
    """{seed: result} of what is finished in <folder>/seed_N, of earlier starts too."""
    there = {int(path.parent.name.removeprefix("seed_")): path for path in folder.glob("seed_*/result.json")}
    return {seed: read_json(there[seed]) for seed in sorted(there)}


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a new folder; refuse one of others.

    Raises:
        ConfigError: names each setting that differs.
    """
    plain = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, plain)
        return
    now = flatten(plain)
    later = {name: now[name] if was is None else was for name, was in _LATER_SETTINGS.items() if name in now}
    there = later | flatten(read_json(path))
    names = [name for name in now | there if now.get(name) != there.get(name)]
    if names:
        hashes = [name for name in names if name.split(".")[-1] == "content" or name.startswith("models.")]
        told = [f"{name} {there.get(name)!r} there, {now.get(name)!r} now" for name in names if name not in hashes]
        told = told or [_other_content(name) for name in hashes]
        raise ConfigError(f"{path.parent} holds results of other settings ({', '.join(told)}). Name another --output.")


def _other_content(name: str) -> str:
    """What a hash that differs says in words."""
    if name == "content":
        return "the rows or files of that name differ"
    return f"the files of {name.removeprefix('models.').removesuffix('.content')} differ"


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Durably, or a ConfigError on a full disk."""
    with writing(path.parent, ConfigError, ON_FULL_DISK):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; raises ConfigError where it is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). Delete it to have it made again.") from error
