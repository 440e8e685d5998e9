"""Seeds of several models on several tasks as tables: mean ± standard deviation, share of the teacher retained."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distilcb.eval.report import as_markdown as table

CONFIDENCE = 0.95
ARROW = (
    "One → other: learnt from the rows of the first, measured on those of the second (zero-shot), and so is what is "
    "had without pre-training."
)

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def summary_of_task(
    results: Results,
    columns: Sequence[str],
    floor: Mapping[str, float],
    *,
    teacher: str,
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """{"metric", "columns", "floor", "others", "models": {name: facts}}.

    Facts are "seeds", "diverged", "mean", "deviation", "retained", "others". A seed that diverged is named and counts
    nowhere. "retained" is there beside a teacher, for the task's own metric, as `retained` gives it.

    Args:
        results: {model: {seed: what `fine_tune` gave}}.
        columns: metrics, the task's own first.
        floor: {metric: value} without a pre-trained model.
        teacher: its name in `results`, if it is there.
        others: what models are measured on without having been trained on it: {task: {"floor", "read"}}.
    """
    own, elsewhere = columns[0], others or {}
    models = {name: _over_seeds(seeds, columns, elsewhere) for name, seeds in results.items()}
    for name, found in models.items():
        if name == teacher or teacher not in models:
            continue
        _add_retained(found, models[teacher], own, floor)
        for other, there in found["others"].items():
            _add_retained(there, models[teacher]["others"][other], own, elsewhere[other]["floor"])
    return {
        "metric": own,
        "columns": list(columns),
        "floor": dict(floor),
        "others": {name: dict(each) for name, each in elsewhere.items()},
        "models": models,
    }


def measured_on(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Each task of a results.json, and behind it what its models are measured on without having been trained on it.

    The latter as "learnt → measured on", with what a task has but "others" and "floor_is".
    """
    found = {}
    for task, facts in tasks.items():
        found[task] = facts
        for other, there in facts["others"].items():
            models = {name: model["others"][other] for name, model in facts["models"].items()}
            found[f"{task} → {other}"] = {
                "metric": facts["metric"],
                "columns": facts["columns"],
                "models": models,
                **there,
            }
    return found


def _over_seeds(
    seeds: Mapping[int, Mapping[str, Any]], columns: Sequence[str], others: Iterable[str]
) -> dict[str, Any]:
    there = {seed: each for seed, each in seeds.items() if "figures" in each}
    diverged = [seed for seed in seeds if seed not in there]
    found = _spread({seed: each["figures"] for seed, each in there.items()}, columns) | {"diverged": diverged}
    found["others"] = {
        name: _spread({seed: each["others"][name] for seed, each in there.items()}, columns) | {"diverged": diverged}
        for name in others
    }
    return found


def _spread(seeds: Mapping[int, Mapping[str, float]], columns: Sequence[str]) -> dict[str, Any]:
    figures = list(seeds.values())
    return {
        "seeds": dict(seeds),
        "mean": _each(statistics.fmean, figures, columns),
        "deviation": _each(statistics.stdev, figures, columns, least=2),
    }


def _add_retained(student: dict[str, Any], teacher: Mapping[str, Any], own: str, floor: Mapping[str, float]) -> None:
    ours, theirs = ([each[own] for each in model["seeds"].values()] for model in (student, teacher))
    if ours and theirs:
        student["retained"] = retained(ours, theirs, floor.get(own))


def _each(
    measure: Any, figures: Sequence[Mapping[str, float]], columns: Sequence[str], *, least: int = 1
) -> dict[str, float]:
    """{column: what `measure` makes of its values}, where there are enough of them."""
    return {name: measure([each[name] for each in figures]) for name in columns} if len(figures) >= least else {}


def retained(student: Sequence[float], teacher: Sequence[float], floor: float | None) -> dict[str, float | None]:
    """{"share": mean over mean, "low" and "high" of its confidence interval, "above_floor"}.

    The interval is Fieller's of a ratio of two means, with Student's t at Welch and Satterthwaite's degrees of freedom:
    seeds of either are independent. It holds of scores about 0 too, such as MCC. None where there is none: of one
    seed, beside a teacher whose own mean is not told from 0, or of a student that is at 0 in every seed.
    above_floor: the same share once the floor is taken from both; None where the teacher is not above it.
    """
    from scipy import stats

    ours, theirs = statistics.fmean(student), statistics.fmean(teacher)
    found: dict[str, float | None] = {"share": ours / theirs if theirs > 0 else None, "low": None, "high": None}
    found["above_floor"] = (ours - floor) / (theirs - floor) if floor is not None and theirs > floor else None
    if theirs <= 0 or min(len(student), len(teacher)) < 2 or not any(student):
        return found
    share = ours / theirs
    # Of ours - share * theirs, which is 0 at the true share.
    parts = [statistics.variance(student) / len(student), share**2 * statistics.variance(teacher) / len(teacher)]
    if not sum(parts):
        return found | {"low": share, "high": share}
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (student, teacher), strict=True)
    )
    squared = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) ** 2
    # The shares at which that difference's square is at most t squared times its variance: between two roots.
    above = ours**2 - squared * statistics.variance(student) / len(student)
    below = theirs**2 - squared * statistics.variance(teacher) / len(teacher)
    if below <= 0:
        return found
    width = math.sqrt(max(0.0, (ours * theirs) ** 2 - above * below))
    return found | {"low": (ours * theirs - width) / below, "high": (ours * theirs + width) / below}


def as_markdown(made: Mapping[str, Any]) -> str:
    """The tables of a results.json: each task's own metric, shares retained, then every metric."""
    tasks = made["tasks"]
    every = measured_on(tasks)
    rows = [["", *(f"{name}: {_words(found['metric'])}" for name, found in every.items())]]
    rows.append(["without pre-training", *(_number(found["floor"].get(found["metric"])) for found in every.values())])
    rows += [
        [name, *(mean_of(found["models"][name], found["metric"]) for found in every.values())]
        for name in made["models"]
    ]
    parts = [
        table(rows),
        "Mean ± standard deviation over seeds, as hundredths. " + _floors(tasks),
        *([ARROW] if len(every) > len(tasks) else []),
        *_retained(list(made["models"]), every),
        *(_details(name, found) for name, found in every.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def _floors(tasks: Mapping[str, Any]) -> str:
    kinds: dict[str, list[str]] = {}
    for name, found in tasks.items():
        kinds.setdefault(found["floor_is"], []).append(name)
    said = "; ".join(f"{', '.join(names)}: {what}" for what, names in kinds.items())
    return f"Without pre-training is what the same rows teach by themselves ({said})."


def _retained(models: Sequence[str], tasks: Mapping[str, Any]) -> list[str]:
    names = [name for name in models if any("retained" in found["models"][name] for found in tasks.values())]
    if not names:
        return []
    rows = [["of the teacher", *tasks]]
    for name in names:
        shares = [found["models"][name].get("retained") for found in tasks.values()]
        rows.append([name, *(share_of(each) for each in shares)])
        rows.append([f"{name}, above the floor", *(_percent(each and each["above_floor"]) for each in shares)])
    note = (
        f"The model's mean over the teacher's, with its {CONFIDENCE:.0%} interval over seeds, if any; then the same "
        "with what is had without pre-training taken from both (–: the teacher has no more than that, and then the "
        "share before says nothing)."
    )
    return [table(rows), note]


def _details(task: str, found: Mapping[str, Any]) -> str:
    rows = [[task, *map(_words, found["columns"]), "seeds"]]
    rows.append(["without pre-training", *(_number(found["floor"].get(column)) for column in found["columns"]), ""])
    for name, each in found["models"].items():
        rows.append([name, *(mean_of(each, column) for column in found["columns"]), str(len(each["seeds"]))])
    odd = [f"{name}: {told}" for name, each in found["models"].items() if (told := odd_seeds(each))]
    return "\n\n".join([table(rows), *_told_of_rows(found["read"]), *odd])


def odd_seeds(model: Mapping[str, Any]) -> str:
    """Which seeds of a model are in no figure, and which have learnt nothing but are; empty where there is none."""
    kinds = {
        "ended with a loss that was no number and counts nowhere": model["diverged"],
        "gave every row the same label, and counts": model.get("one_label", []),
    }
    told = [f"seed {', '.join(map(str, seeds))} {what}" for what, seeds in kinds.items() if seeds]
    return f"{'; '.join(told)}." if told else ""


def _told_of_rows(read: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was read and cut: in one sentence, or one for each model whose tokenizer made something else of it."""
    models: dict[str, list[str]] = {}
    for name, facts in read.items():
        told = (
            f"measured on {facts['split']}: {', '.join(_counts(facts['heldout']))}; "
            f"{facts['max_length']} tokens at most."
        )
        if "train" in facts:
            learnt = ", ".join([rows_learnt(facts), *_counts(facts["train"])[1:]])
            told = f"trained on {learnt}; {told}"
        models.setdefault(told, []).append(name)
    if len(models) == 1:
        return [f"{told[0].upper()}{told[1:]}" for told in models]
    return [f"{', '.join(names)}: {told}" for told, names in models.items()]


def _counts(figures: Mapping[str, int]) -> list[str]:
    """Rows come first."""
    return [f"{value:,} {_words(key)}" for key, value in figures.items()]


def rows_learnt(read: Mapping[str, Any]) -> str:
    """How many rows a model was trained on, and whether there were more."""
    return f"{read['train']['rows']:,} rows" + (" (the first ones only)" if read.get("first_rows_only") else "")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def share_of(found: Mapping[str, float | None] | None) -> str:
    """What `retained` gave, for a table."""
    if found is None or found["share"] is None:
        return "–"
    if found["low"] is None:
        return _percent(found["share"])
    return f"{_percent(found['share'])} ({_percent(found['low'])} to {_percent(found['high'])})"


def mean_of(found: Mapping[str, Any], column: str) -> str:
    """A model's mean ± standard deviation, for a table."""
    if column not in found["mean"]:
        return "–"
    deviation = found["deviation"].get(column)
    return _number(found["mean"][column]) + ("" if deviation is None else f" ± {deviation:.2f}")
