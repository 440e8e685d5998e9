"""What an evaluation found, in a student's model card: README.md of its folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from distilcb.durability import write_durably
from distilcb.errors import ConfigError, ModelError, first_line, writing
from distilcb.eval.report import as_markdown
from distilcb.eval.speed import Timed
from distilcb.export.model_card import with_results, with_sections
from distilcb.finetune.evaluation import TEACHER
from distilcb.finetune.evaluation_report import ARROW, mean_of, measured_on, odd_seeds, rows_learnt, share_of
from distilcb.hub import public_name
from distilcb.models.loading import load_config
from distilcb.tasks.declarations import Task

# Of the model card of cmarkea/distilcamembert-base, F1 in hundredths on the official splits.
PUBLISHED_DISTILCAMEMBERT = {"cls_fr": 83, "pawsx_fr": 77, "xnli_fr": 68, "wikiner_fr": 92, "ner_fr": 92}

_LIKE_PUBLISHED = ("subword_f1", "macro_f1")

_HUB_TASKS = {
    "classification": "text-classification",
    "regression": "sentence-similarity",
    "tagging": "token-classification",
    "question_answering": "question-answering",
}
_HUB_METRICS = {
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "accuracy": "accuracy",
    "exact_match": "exact_match",
}


def card_of(model: str) -> Path:
    """The card of a model's folder; raises ConfigError where there is none to fill."""
    card = Path(model).expanduser() / "README.md"
    if not card.is_file():
        raise ConfigError(
            f"--card: {card} is not there. Needed: folders that launch/train.py or launch/export.py wrote; leave "
            "--card out for other models."
        )
    return card


def fill_card(
    model: str, name: str, *, made: Mapping[str, Any] | None, tasks: Mapping[str, Task], speed: Timed | None
) -> Path:
    """Put an evaluation into a model's card, in place of an earlier one; returns the card.

    Tasks of which no seed has a figure are left out; where there is no other, what an earlier evaluation found stays.

    Args:
        model: its folder.
        name: what it is called in `made` and `speed`.
        made: what is in tasks/results.json.
        tasks: by name, those of `made`.
        speed: what was measured of it and of other models.

    Raises:
        ConfigError, ModelError: no card, or one that cannot be read or written.
    """
    card = card_of(model)
    if made:
        finished = {task: found for task, found in made["tasks"].items() if found["models"][name]["seeds"]}
        made = {**made, "tasks": finished} if finished else None
    sections = {}
    if made:
        sections["Fine-tuned on tasks"] = _tasks_section(model, name, made)
    if speed:
        sections["Size and speed"] = _speed_section(name, speed)
    try:
        text = with_sections(card.read_text(encoding="utf-8"), sections)
        if made:
            title = re.search(r"^# (.+)$", text, re.MULTILINE)
            called = title[1] if title else Path(model).resolve().name
            text = with_results(text, _results(name, made, tasks), name=called)
    except ValueError as error:
        raise ModelError(f"{card} cannot be filled ({first_line(error)}). Export the model again.") from error
    with writing(card.parent, ConfigError, "Free some space and run the same command again."):
        write_durably(card, text)
    return card


def _speed_section(name: str, speed: Timed) -> str:
    """This model beside the first one; where they lie here says nothing where a card is read."""
    other = "its teacher" if speed.beside == TEACHER else public_name(speed.beside)
    return speed.of({speed.beside: other, name: "this model"}).as_markdown()


def _tasks_section(model: str, name: str, made: Mapping[str, Any]) -> str:
    has_teacher = TEACHER in made["models"]
    published = PUBLISHED_DISTILCAMEMBERT if _is_like_distilcamembert(model) else {}
    head = ["", "metric", "this model", *(["its teacher", "retained"] if has_teacher else []), "without pre-training"]
    rows = [head + (["F1, published", "F1 of its kind, here"] if published else [])]
    every = measured_on(made["tasks"])
    for task, found in every.items():
        own, metric = found["models"][name], found["metric"]
        row = [task, metric.replace("_", " "), mean_of(own, metric)]
        if has_teacher:
            row += [mean_of(found["models"][TEACHER], metric), share_of(own.get("retained"))]
        floor = found["floor"].get(metric)
        row.append("–" if floor is None else f"{floor:.2f}")
        if published:
            row += _beside_published(own, published.get(task))
        rows.append(row)
    recipe = made["recipe"]
    seeds = sorted({len(found["models"][name]["seeds"]) for found in made["tasks"].values()})
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    over = "Of one seed" if seeds == [1] else f"Mean ± standard deviation over {number} seeds"
    rows_read = " ".join(_rows_of(task, found["read"][name]) for task, found in every.items())
    odd = [
        f" {who}Of {task} {told}"
        for task, found in every.items()
        for each, who in {name: "", TEACHER: "Its teacher: "}.items()
        if each in found["models"] and (told := odd_seeds(found["models"][each]))
    ]
    note = (
        f"{over}, in hundredths; passes over the rows: {recipe['epochs']:g}, batches of {recipe['batch']}, "
        f"learning rate {recipe['lr']:g}. {rows_read}{''.join(odd)}"
    )
    if len(every) > len(made["tasks"]):
        note += f" {ARROW}"
    if published:
        note += (
            " Published: the F1 of cmarkea/distilcamembert-base's card, on the official splits; where these rows are "
            "others, only the order of size can be compared. Its kind: over sub-words with O as a type where words "
            "are tagged, else the mean over labels."
        )
    return f"{as_markdown(rows)}\n\n{note}"


def _beside_published(own: Mapping[str, Any], published: int | None) -> list[str]:
    """Two cells: the published F1, and this model's of the same kind."""
    like = [metric for metric in _LIKE_PUBLISHED if metric in own["mean"]]
    if published is None or not like:
        return ["–", "–"]
    return [str(published), f"{mean_of(own, like[0])} ({like[0].replace('_', ' ')})"]


def _rows_of(task: str, read: Mapping[str, Any]) -> str:
    learnt = f"trained on {rows_learnt(read)}, " if "train" in read else ""
    return f"{task}: {learnt}measured on {read['heldout']['rows']:,} of {read['split']}."


def _is_like_distilcamembert(model: str) -> bool:
    config = load_config(model)
    return (config.model_type, config.num_hidden_layers, config.hidden_size) == ("camembert", 6, 768)


def _results(name: str, made: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[EvalResult]:
    """For the hub, which ranks by them: without tries on a task's first rows."""
    return [
        EvalResult(
            task_type=_HUB_TASKS[tasks[task].kind],
            dataset_type=task,
            dataset_name=task,
            dataset_split=found["read"][name]["split"],
            metric_type=_HUB_METRICS.get(found["metric"], "f1"),
            metric_name=f"{found['metric'].replace('_', ' ')}, mean over seeds",
            metric_value=round(found["models"][name]["mean"][found["metric"]], 2),
        )
        for task, found in made["tasks"].items()
        if found["metric"] in found["models"][name]["mean"] and not found["read"][name].get("first_rows_only")
    ]
